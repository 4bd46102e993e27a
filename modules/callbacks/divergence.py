"""Stops a training whose loss or weights are no longer finite, and reports the cause."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import lightning as L
import torch
from lightning.pytorch.tuner.lr_finder import _LRCallback
from torch import Tensor
from typing_extensions import override

from modules.training_data import Batch, settings_of

if TYPE_CHECKING:
    from modules.base import VisionModule


class DivergenceError(ValueError):
    """A loss or weight is not finite; the message names the first non-finite tensor."""


class DivergenceGuard(L.Callback):
    """Logs step losses and stops the training at a non-finite loss of a step or an epoch; prevents checkpoints with
    non-finite weights."""

    def __init__(self) -> None:
        self._finite = ""  # the last finite loss, for the error message
        self._losses: list[Tensor] = []  # of the batches accumulated in the current step

    def note(self, module: "VisionModule", loss: Tensor, batch: Batch, waits: bool) -> None:
        """Records the loss of a batch if its step is logged.

        Args:
            module: the module being trained.
            loss: a scalar.
            batch: the batch that the loss was computed on.
            waits: whether further batches are accumulated in the same step.
        """
        if module.global_step % settings_of(module.trainer).log_every_n_steps == 0:
            self._losses.append(loss.detach())
            if not waits:
                self.log_step(module, {"loss": torch.stack(self._losses).mean()}, batch, module.global_step)
                self._losses = []

    def log_step(self, module: "VisionModule", terms: Mapping[str, Tensor], batch: Batch, step: int) -> None:
        """Logs the losses of a step, averaged over all processes, and checks in all of them that they are finite."""
        values = torch.stack([value.detach().float() for value in terms.values()])
        if module.trainer.world_size > 1:
            values = cast(Tensor, module.trainer.strategy.reduce(values, reduce_op="mean"))
        figures = {f"train/{name}_step": value for name, value in zip(terms, values.tolist(), strict=True)}
        module.publisher.figures(module.trainer, figures, step)
        self.check_loss(module, float(values.sum()), batch)

    def check_loss(self, module: L.LightningModule, loss: float, batch: Batch) -> None:
        """Checks a loss that is already on the host.

        Raises:
            DivergenceError: it is not finite.
        """
        if math.isfinite(loss):
            self._finite = f"; it was {loss:.4g} at step {module.global_step}"
        elif not any(isinstance(c, _LRCallback) for c in settings_of(module.trainer).callbacks):
            raise self._error(module, f"The loss is {loss} at step {module.global_step}", batch)

    def check_weights(self, module: L.LightningModule) -> None:
        """Checks the weights before a checkpoint is written.

        Raises:
            DivergenceError: a weight is not finite.
        """
        if not all(value.isfinite().all() for value in module.parameters()):
            raise self._error(module, f"Not all weights are finite at step {module.global_step}", {})

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if (loss := trainer.callback_metrics.get("train/loss")) is not None:
            self.check_loss(pl_module, float(loss), {})

    def _error(self, module: L.LightningModule, what: str, batch: Batch) -> DivergenceError:
        named = [
            *((f"the input {key!r}: look at the data", value) for key, value in batch.items()),
            *((f"the parameter {key}", value) for key, value in module.named_parameters()),
            *((f"the statistic {key}", value) for key, value in module.named_buffers()),
        ]
        values = [(name, value) for name, value in named if isinstance(value, Tensor)]
        where = next((name for name, value in values if not value.isfinite().all()), "")
        if module.trainer.world_size > 1:  # the cause may be another process's input; all processes get here
            places: list[str] = [""] * module.trainer.world_size
            torch.distributed.all_gather_object(places, where)
            where = next((place for place in places if place), "")
        return DivergenceError(
            f"{what}{self._finite}. The first non-finite tensor is {where or 'the loss itself'}. No checkpoint "
            "is written. Try a lower --model.optimization.lr, --trainer.gradient_clip_val 1, a "
            "longer warm-up, another --trainer.precision."
        )
