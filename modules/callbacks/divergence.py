"""A training whose numbers are no longer finite ends, and says where."""

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.tuner.lr_finder import _LRCallback
from torch import Tensor
from typing_extensions import override

from modules.training_data import settings_of


class DivergenceError(ValueError):
    """The training came to numbers that are not finite; the message says where."""


class DivergenceGuard(L.Callback):
    """Ends a training at a loss that is not finite, of a step or of an epoch; lets no checkpoint be made of weights that are
    not."""

    def __init__(self) -> None:
        self._finite = ""  # the last loss that was looked at

    def check_loss(self, module: L.LightningModule, loss: float, batch: dict[str, Any]) -> None:
        """Looks at a loss that is known anyway.

        Args:
            module: what is trained.
            loss: the same in all processes.
            batch: what it is of.

        Raises:
            DivergenceError: it is not finite.
        """
        if math.isfinite(loss):
            self._finite = f"; it was {loss:.4g} at step {module.global_step}"
        elif not any(isinstance(c, _LRCallback) for c in settings_of(module.trainer).callbacks):
            raise self._error(module, f"The loss is {loss} at step {module.global_step}", batch)

    def check_weights(self, module: L.LightningModule) -> None:
        """Looks at the weights of which a checkpoint is to be made.

        Raises:
            DivergenceError: there is one that is not finite.
        """
        if not all(value.isfinite().all() for value in module.parameters()):
            raise self._error(module, f"The weights are spoilt at step {module.global_step}", {})

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if (loss := trainer.callback_metrics.get("train/loss")) is not None:
            self.check_loss(pl_module, float(loss), {})

    def _error(self, module: L.LightningModule, what: str, batch: dict[str, Any]) -> DivergenceError:
        named = [
            *((f"the input {key!r}: look at the data", value) for key, value in batch.items()),
            *((f"the parameter {key}", value) for key, value in module.named_parameters()),
            *((f"the statistic {key}", value) for key, value in module.named_buffers()),
        ]
        values = [(name, value) for name, value in named if isinstance(value, Tensor)]
        where = next((name for name, value in values if not value.isfinite().all()), "")
        if module.trainer.world_size > 1:  # it may be another process's input; all are here
            places: list[str] = [""] * module.trainer.world_size
            torch.distributed.all_gather_object(places, where)
            where = next((place for place in places if place), "")
        return DivergenceError(
            f"{what}{self._finite}. The first thing that is not finite is {where or 'the loss itself'}. No checkpoint is made of "
            "it. What often helps: a lower --model.optimization.lr, --trainer.gradient_clip_val 1, a longer warm-up, another "
            "--trainer.precision."
        )
