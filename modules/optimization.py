"""How a network is trained: the settings, the schedule of the rate, the average of the weights."""

import warnings
from dataclasses import dataclass
from typing import Annotated, Any

import lightning as L
import numpy as np
import torch
from annotated_types import Ge
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from modules.networks import BackboneError
from modules.ranges import NonNegative, Positive, Share, ShareBelowOne


class WarmupCosine(LambdaLR):
    """Linear warm-up, then half a cosine down to zero, stepped at every optimiser step (Loshchilov & Hutter 2017,
    arXiv:1608.03983).

    Args:
        optimizer: the optimiser.
        total_steps: optimiser steps of the whole training; the module knows and fills it in. 0 where the length is not
            known: the rate then stays the same.
        warmup: share of the steps in which the rate rises, in [0, 1).
        final: the last rate as a share of the highest.
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int = 0, warmup: ShareBelowOne = 0.05, final: Share = 0.0
    ) -> None:
        self.total_steps = total_steps
        self.warmup, self.final = warmup, final
        super().__init__(optimizer, self._factor)

    def _factor(self, step: int) -> float:
        if not self.total_steps:
            return 1.0
        rise = max(1, round(self.warmup * self.total_steps))
        if step < rise:
            return (step + 1) / rise
        progress = min(1.0, (step - rise) / max(1, self.total_steps - rise))
        return self.final + (1 - self.final) * 0.5 * (1 + float(np.cos(np.pi * progress)))


@dataclass
class Optimization:
    """How a network is trained.

    Args:
        optimizer: any optimiser of torch or timm.
        lr_scheduler: any schedule of torch. One with ``total_steps`` is told the length of the training and stepped at
            every optimiser step; all others are stepped once an epoch.
        lr: the learning rate, if it is to be another than the optimiser's own.
        backbone_lr_scale: factor on the rate of the backbone, against that of the head.
        layer_decay: factor on the rate for each layer further from the output.
        frozen_epochs: epochs in which only the head learns; -1 for all.
        l1_penalty: weight of Σ|w| in the loss, over weight matrices and kernels.
        l2_penalty: weight of Σw² in the loss (the optimiser's ``weight_decay`` is the usual, decoupled form).
        ema_decay: evaluate and keep the exponential moving average of the weights, with this decay in (0, 1).
    """

    optimizer: OptimizerCallable = torch.optim.AdamW
    lr_scheduler: LRSchedulerCallable = WarmupCosine
    lr: Positive | None = None
    backbone_lr_scale: NonNegative = 1.0
    layer_decay: Positive = 1.0
    frozen_epochs: Annotated[int, Ge(-1)] = 0
    l1_penalty: NonNegative = 0.0
    l2_penalty: NonNegative = 0.0
    ema_decay: ShareBelowOne | None = None

    @property
    def fixed(self) -> dict[str, Any]:
        """What cannot become another within a training, as plain data: the state of the old does not fit the new.

        Raises:
            BackboneError: the optimiser or the schedule cannot work with its settings.
        """
        part = "optimizer"
        try:
            optimizer = self.optimizer([torch.nn.Parameter(torch.zeros(1))])
            part = "lr_scheduler"
            try:
                scheduler: Any = self.lr_scheduler(optimizer, total_steps=100)  # type: ignore[call-arg]
            except TypeError:
                scheduler = self.lr_scheduler(optimizer)
            if not isinstance(scheduler, ReduceLROnPlateau):  # which needs something measured
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of steps without the optimiser's
                    scheduler.step()
        except (ValueError, ZeroDivisionError) as error:
            raise BackboneError(f"--model.optimization.{part} cannot work with its settings: {error}.") from None
        return {
            "optimizer": type(optimizer).__name__,
            "lr_scheduler": type(scheduler).__name__,
            "layer_decay": self.layer_decay,
            "ema_decay": "none" if self.ema_decay is None else "some",
        }


class WeightAverage(WeightAveraging):
    """The exponential moving average of weights and statistics, with which is validated, tested and kept.

    The decay at step n is min(``decay``, (1 + n) / (10 + n)), so that the initial weights do not weigh on a short
    training.

    Args:
        decay: the decay in the long run, in (0, 1).
    """

    def __init__(self, decay: float) -> None:
        def average(means: list[Tensor], values: list[Tensor], count: Tensor | int) -> None:
            if means[0].is_floating_point():
                torch._foreach_lerp_(means, values, 1 - min(decay, (1 + int(count)) / (10 + int(count))))
            else:  # counters
                torch._foreach_copy_(means, values)

        super().__init__(multi_avg_fn=average)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restores the average to train on; an evaluation finds it in the weights themselves."""
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
