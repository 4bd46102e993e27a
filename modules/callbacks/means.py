"""Exact means over epochs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.metric import jit_distributed_available
from typing_extensions import override

from modules.training_data import Batch

if TYPE_CHECKING:
    from modules.base import VisionModule


@dataclass(frozen=True)
class Losses:
    """Losses and further metrics of a batch.

    Args:
        terms: scalar loss terms by name, means over the batch; their sum is minimised.
        figures: other scalar means, which are only logged.
        weight: number of elements that the means are over; by default, the number of images.
    """

    terms: Mapping[str, Tensor]
    figures: Mapping[str, Tensor] = field(default_factory=dict)
    weight: float | None = None

    @property
    def total(self) -> Tensor:
        """Sum of the terms, a scalar."""
        terms = list(self.terms.values())
        return terms[0] if len(terms) == 1 else torch.stack(terms).sum()


class Mean(Metric):
    """A weighted mean over processes. (torchmetrics' own drops NaN values or their weights.)

    Args:
        total: weighted sum of this process, a scalar.
        weight: its weight.
    """

    total: Tensor
    weight: Tensor

    def __init__(self, total: Tensor, weight: float) -> None:
        super().__init__()
        self.add_state("total", total, "sum")
        self.add_state("weight", torch.tensor(float(weight), device=total.device), "sum")

    def update(self) -> None:
        """Does nothing: `EpochMeans` sums the samples itself, as a metric's update takes longer than the sum."""

    def compute(self) -> Tensor:
        """Returns the mean of all processes."""
        return self.total / self.weight


class EpochMeans(L.Callback):
    """Logs the exact weighted mean over each epoch and evaluation of the values passed to `update`, for any number of
    processes, and also if a training is resumed within an epoch."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, float]] = {}  # weighted sum and weight by key, e.g. ``train/loss``
        self._begun: dict[str, list[float]] = {}  # total and weight by key, from a checkpoint
        self.latest: dict[str, Tensor] = {}  # means of the last epoch or evaluation, by key

    def note(self, stage: str, losses: Losses, batch: Batch) -> None:
        """Adds the terms and figures of a batch, and the sum of the terms as ``loss``.

        Args:
            stage: prefix of the keys, such as ``val``, or ``val/detection`` where a stage has several tasks.
            losses: losses of the batch.
            batch: its ``image`` gives the number of samples.
        """
        weight = len(batch["image"]) if losses.weight is None else losses.weight
        total = {"loss": losses.total} if losses.terms else {}
        for name, value in {**losses.terms, **losses.figures, **total}.items():
            self.update(f"{stage}/{name}", value, weight)

    def update(self, key: str, value: Tensor, weight: float) -> None:
        """Adds the mean of a batch.

        Args:
            key: name, such as ``train/loss``; begins with the stage.
            value: a scalar.
            weight: number of samples in the batch, or of other elements that the mean is over.
        """
        value = value.detach()
        total, count = self._sums.get(key) or (torch.zeros((), device=value.device), 0.0)
        # in the precision that a checkpoint and the sum over processes have, so that a resumed sum is the same
        self._sums[key] = total + value * weight, float(np.float32(count) + np.float32(weight))

    def _whole(self, key: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Weighted sum and weight of a key over all processes."""
        total, weight = self._sums[key]
        total = total.to(device)
        if not jit_distributed_available():  # to make a metric takes a millisecond
            return total, torch.tensor(weight, device=device)
        mean = Mean(total, weight)
        with mean.sync_context():
            return mean.total, mean.weight

    def _reset(self, stage: str) -> None:
        for key, (total, _) in self._sums.items():
            if key.startswith(stage):  # keys stay, as all processes reduce the same ones
                self._sums[key] = torch.zeros((), device=total.device), 0.0

    def _log(self, pl_module: L.LightningModule, stage: str) -> dict[str, Tensor]:
        """Logs the means of a stage that have samples, and resets them."""
        module, figures = cast("VisionModule", pl_module), {}
        for key in self._sums:
            if key.startswith(stage):
                total, weight = self._whole(key, module.device)
                if weight:
                    figures[key] = total / weight
        self._reset(stage)
        for key, value in figures.items():
            logger = False if stage == "train/" else None
            module.log(key, value, prog_bar=key in ("train/loss", module.monitor), logger=logger)
        self.latest = figures
        return figures

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._sums.clear()
            self._begun.clear()

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restores the sums of the checkpoint; discards those of a learning-rate or batch-size search."""
        self._reset("train/")
        begun, self._begun = self._begun, {}
        for key, (total, weight) in begun.items():
            if "/" not in key:  # key of an earlier version
                key = key.replace("_", "/", 1)
            if not trainer.is_global_zero:  # the stored sums are over all processes, which all need the keys
                total, weight = 0.0, 0.0
            self._sums[key] = torch.tensor(total, device=pl_module.device), weight

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the means before a checkpoint marks the epoch as finished; Lightning would log them after it."""
        module, figures = cast("VisionModule", pl_module), self._log(pl_module, "train/")
        module.publisher.figures(trainer, {key: float(value) for key, value in figures.items()}, module.clock)

    @override
    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._reset("val/")

    @override
    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._reset("test/")

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log(pl_module, "val/")

    @override
    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log(pl_module, "test/")

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        epoch: Any = trainer.fit_loop.epoch_progress.current
        checkpoint["means"] = means = {}
        for key in self._sums:
            if key.startswith("train/") and epoch.processed == epoch.completed:  # otherwise the epoch is finished
                total, weight = self._whole(key, pl_module.device)
                means[key] = [float(total), float(weight)]

    @override
    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._begun = checkpoint.get("means", {})
