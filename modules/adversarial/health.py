"""Detection of GAN failures during training."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

GRACE = 200  # steps of the generator before the first check
PATIENCE = 3  # consecutive checks needed for a failure
CAUSES = {
    "mode collapse": "the generator makes too few different images; try a lower rate, R1, spectral normalisation, or "
    "a larger batch",
    "diminished gradient": "the discriminator is so sure that the generator learns nothing; try a lower rate for the "
    "discriminator, R1, or another objective",
    "non-convergence": "the generator's images change from check to check as much as they differ; try lower rates, a "
    "lower momentum (betas), or R1",
}


@dataclass
class Health:
    """Detects failures from the metrics of a training.

    - **mode collapse**: the diversity of samples is below half of the real images', or a classifier detects less than
    half as many classes, or coverage is below 0.1; in three consecutive checks.
    - **diminished gradient**: the discriminator's accuracy is above 98 %, the generator's gradient norm is below 5 % of
    its early maximum, and its images do not change (drift below 0.01).
    - **non-convergence**: the mean drift of three checks is above 0.65. The variance of the losses is not informative.

    The first 200 steps of the generator are not checked.

    Args:
        every: steps of the generator between checks; drift grows with it.
    """

    every: int = 100
    early: float = 0.0
    streaks: dict[str, int] = field(default_factory=dict)
    found: dict[str, int] = field(default_factory=dict)  # step of the first detection
    sums: Tensor = field(default_factory=lambda: torch.zeros(3))  # sums of accuracy and gradient norm; number of steps
    peak: Tensor = field(default_factory=lambda: torch.zeros(()))  # maximum gradient norm in the grace period
    previous: Tensor | None = None  # images of the last check
    drifts: list[float] = field(default_factory=list)  # drift in the last checks

    def note(self, step: int, accuracy: Tensor, norm: Tensor) -> None:
        """Records a step of the generator.

        Args:
            step: number of the step, from 1.
            accuracy: accuracy of the discriminator, a scalar.
            norm: gradient norm of the generator, a scalar.
        """
        self.sums = self.sums.to(norm.device) + torch.stack([accuracy.float(), norm.float(), torch.ones_like(norm)])
        if step <= GRACE:
            self.peak = torch.maximum(self.peak.to(norm.device), norm.float())

    def check(self, step: int, figures: dict[str, float], images: Tensor, spread: float) -> dict[str, float]:
        """Checks the training since the last check.

        Args:
            step: number of the generator's steps so far.
            figures: ``diversity`` (spread of the samples relative to real images), ``coverage``, and ``classes``
                (effective classes relative to real images), if known.
            images: float N×C×H×W in [-1, 1], generated (without averaging of weights) from the same noise at every
                check.
            spread: mean distance between real images, as float C×H×W in [-1, 1].

        Returns:
            All metrics: the given ones, ``discriminator_accuracy``, ``gradient`` (norm relative to its early maximum)
            and ``drift`` (mean distance that an image moved since the last check, relative to ``spread``).
        """
        accuracy, norm, count = self.sums.tolist()
        self.sums = torch.zeros(3)
        self.early = float(self.peak)
        figures = dict(figures)
        figures["discriminator_accuracy"] = accuracy / max(1, count)
        figures["gradient"] = norm / max(1, count) / max(self.early, 1e-12)
        current = images.detach().float().cpu()
        if self.previous is not None:
            figures["drift"] = float((current - self.previous).flatten(1).norm(dim=1).mean()) / max(spread, 1e-12)
        self.previous = current
        drift = figures.get("drift")
        if drift is not None and step > GRACE:
            self.drifts = [*self.drifts, drift][-PATIENCE:]
        signs = {
            "mode collapse": figures["diversity"] < 0.5
            or figures["coverage"] < 0.1
            or figures.get("classes", 1.0) < 0.5,
            "diminished gradient": figures["discriminator_accuracy"] > 0.98
            and figures["gradient"] < 0.05
            and drift is not None
            and drift < 0.01,
            "non-convergence": len(self.drifts) == PATIENCE and sum(self.drifts) / PATIENCE > 0.65,
        }
        for name, seen in signs.items():
            self.streaks[name] = self.streaks.get(name, 0) + 1 if seen and step > GRACE else 0
        return figures

    def failing(self) -> list[str]:
        """Returns the names of current failures."""
        needed = {"diminished gradient": 1, "non-convergence": 1}
        return [name for name, streak in self.streaks.items() if streak >= needed.get(name, PATIENCE)]

    def state(self) -> dict[str, Any]:
        """Returns the state for a checkpoint."""
        return {
            "early": self.early, "streaks": dict(self.streaks), "found": dict(self.found), "sums": self.sums.cpu(),
            "peak": self.peak.cpu(), "previous": self.previous,
            "drifts": list(self.drifts),
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Restores a `state`."""
        for name, value in state.items():
            setattr(self, name, value)
