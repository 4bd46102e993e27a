"""The moving average of the weights."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override


class WeightAverage(WeightAveraging):
    """Exponential moving average of weights and buffers, which is validated, tested and stored.

    The decay at step n is min(``decay``, (1 + n) / (10 + n)), so that the initial weights have little effect on a short
    training.

    Args:
        decay: asymptotic decay, in (0, 1).
    """

    def __init__(self, decay: float) -> None:
        def average(means: list[Tensor], values: list[Tensor], count: Tensor | int) -> None:
            if means[0].is_floating_point():
                torch._foreach_lerp_(means, values, 1 - self.decay_at(int(count)))
            else:  # counters
                torch._foreach_copy_(means, values)

        super().__init__(multi_avg_fn=average)
        self.decay = decay

    def decay_at(self, step: int) -> float:
        """Returns the decay at a zero-based step."""
        return min(self.decay, (1 + step) / (10 + step))

    @override
    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:  # after the training, the weights themselves are evaluated
            super().on_validation_epoch_start(trainer, pl_module)

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_validation_epoch_end(trainer, pl_module)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restores the average for training; in an evaluation, the checkpoint's weights are the average already."""
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
