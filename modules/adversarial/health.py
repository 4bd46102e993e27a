"""Says which of the three ways to fail a GAN is taking, while it does."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

GRACE = 200  # generator's steps before anything is judged
PATIENCE = 3  # checks in a row that must say the same
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
    """Watches the figures of a training.

    - **mode collapse**: the samples' spread is under half of the real images', or a classifier sees under half as many
      classes, or coverage is under 0.1; three checks in a row.
    - **diminished gradient**: the discriminator is right in over 98 % of cases, the generator's gradient is under 5 % of
      its early maximum, and its images stand still (drift under 0.01).
    - **non-convergence**: drift is over 0.65 in the mean of three checks. The variance of the losses says nothing.

    The first 200 steps of the generator are not judged.

    Args:
        every: generator's steps from check to check; drift grows with it.
    """

    every: int = 100
    early: float = 0.0
    streaks: dict[str, int] = field(default_factory=dict)
    found: dict[str, int] = field(default_factory=dict)  # the step at which it was first seen
    sums: Tensor = field(default_factory=lambda: torch.zeros(3))  # of accuracy and gradient norm; number of steps
    peak: Tensor = field(default_factory=lambda: torch.zeros(()))  # highest gradient norm in the grace
    previous: Tensor | None = None  # the last check's images
    drifts: list[float] = field(default_factory=list)  # of the last checks

    def note(self, step: int, accuracy: Tensor, norm: Tensor) -> None:
        """Notes a generator's step.

        Args:
            step: its number, from 1.
            accuracy: share of images that the discriminator told right, a scalar.
            norm: the generator's gradient norm, a scalar.
        """
        self.sums = self.sums.to(norm.device) + torch.stack([accuracy.float(), norm.float(), torch.ones_like(norm)])
        if step <= GRACE:
            self.peak = torch.maximum(self.peak.to(norm.device), norm.float())

    def check(self, step: int, figures: dict[str, float], images: Tensor, spread: float) -> dict[str, float]:
        """Judges, from what was noted since the last check.

        Args:
            step: the generator's steps so far.
            figures: ``diversity`` (spread of the samples against that of real images), ``coverage``, and
                ``classes`` (effective classes against the real images'), where known.
            images: float N×C×S×S in [-1, 1], of the generator itself from the same noise at every check.
            spread: mean distance between real images, as float C×S×S in [-1, 1].

        Returns:
            All figures: those given, ``discriminator_accuracy``, ``gradient`` (norm against its early maximum) and
            ``drift`` (mean distance that an image moved since the last check, against ``spread``).
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
        """What goes wrong now."""
        needed = {"diminished gradient": 1, "non-convergence": 1}
        return [name for name, streak in self.streaks.items() if streak >= needed.get(name, PATIENCE)]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "early": self.early, "streaks": dict(self.streaks), "found": dict(self.found), "sums": self.sums.cpu(),
            "peak": self.peak.cpu(), "previous": self.previous,
            "drifts": list(self.drifts),
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken."""
        for name, value in state.items():
            setattr(self, name, value)
