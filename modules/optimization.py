"""Training settings: optimisers, learning-rate schedules and weight penalties."""

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import lightning as L
import numpy as np
import torch
from annotated_types import Ge
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from modules.callbacks.freezing import layers
from modules.networks import BackboneError
from modules.ranges import NonNegative, Positive, PositiveInt, Share, ShareBelowOne
from modules.training_data import training_data

if TYPE_CHECKING:
    from modules.base import VisionModule


TRIED = 100  # steps for which a schedule is tried out
TICKS = 10_000  # virtual number of steps if only the training's time limit is known


class WarmupCosine(LambdaLR):
    """Linear warm-up followed by cosine decay, stepped at every optimiser step (Loshchilov & Hutter 2017,
    arXiv:1608.03983).

    Args:
        optimizer: the optimiser.
        total_steps: optimiser steps of the whole training; filled in by the module. 0 if unknown: the learning rate is
            then constant, unless the training time is limited, see `TimedSchedule`.
        warmup: fraction of the steps, or of the time, in which the learning rate rises, in [0, 1).
        final: final learning rate relative to the highest.
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int = 0, warmup: ShareBelowOne = 0.05, final: Share = 0.0
    ) -> None:
        self.total_steps = total_steps
        self.warmup, self.final = warmup, final
        self.elapsed: float | None = None  # elapsed fraction of the training time, if that is limited
        super().__init__(optimizer, self._factor)

    def _factor(self, step: int) -> float:
        total, at = self.total_steps, float(step)
        if self.elapsed is not None:  # whichever is further, since the training ends at the first of the two limits
            total, at = (total, max(at, self.elapsed * total)) if total else (TICKS, self.elapsed * TICKS)
        if not total:
            return 1.0
        rise = max(1, round(self.warmup * total))
        if at < rise:
            return (at + 1) / rise
        progress = min(1.0, (at - rise) / max(1, total - rise))
        return self.final + (1 - self.final) * 0.5 * (1 + float(np.cos(np.pi * progress)))


@dataclass
class Optimization:
    """Training settings: optimiser, schedule, transfer and regularisation.

    Args:
        optimizer: any optimiser of torch or timm.
        lr_scheduler: any schedule of torch. One with ``total_steps`` gets the length of the training and is stepped at
            every optimiser step; all others are stepped once per epoch.
        lr: learning rate; None for the optimiser's default.
        lr_batch_size: images per step that the learning rate is meant for: it is multiplied by the ratio of the actual
            number, processes × batch size × accumulated batches, to this one (Goyal et al. 2017, arXiv:1706.02677);
            None for no scaling.
        backbone_lr_scale: factor on the backbone's learning rate, relative to the head's.
        layer_decay: factor on the learning rate for each layer further from the output.
        frozen_epochs: epochs in which only the head is trained; -1 for all.
        l1_penalty: weight of Σ|w| in the loss, over weight matrices and kernels.
        l2_penalty: weight of Σw² in the loss (the optimiser's ``weight_decay`` is the usual, decoupled form).
        ema_decay: evaluate and store the exponential moving average of the weights, with this decay in (0, 1).
    """

    optimizer: OptimizerCallable = torch.optim.AdamW
    lr_scheduler: LRSchedulerCallable = WarmupCosine
    lr: Positive | None = None
    lr_batch_size: PositiveInt | None = None
    backbone_lr_scale: NonNegative = 1.0
    layer_decay: Positive = 1.0
    frozen_epochs: Annotated[int, Ge(-1)] = 0
    l1_penalty: NonNegative = 0.0
    l2_penalty: NonNegative = 0.0
    ema_decay: ShareBelowOne | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Optimization":
        """Returns itself: a class on the command line becomes a jsonargparse object that holds the whole command."""
        return self

    @property
    def fixed(self) -> dict[str, Any]:
        """Settings that cannot change within a training, as plain data: the optimiser's stored state would not fit
        others.

        Raises:
            BackboneError: the optimiser or the schedule cannot work with its settings.
        """
        part = "optimizer"
        try:
            optimizer = self.optimizer([nn.Parameter(torch.zeros(1))])
            _check_rates(optimizer, zero=False)
            part = "lr_scheduler"
            scheduler = self.schedule(optimizer, TRIED)[0]
            plateau = isinstance(scheduler, ReduceLROnPlateau)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # "lr_scheduler.step() before optimizer.step()"
                for _ in range(TRIED - 1):
                    scheduler.step(*([1.0] if plateau else []))  # a metric that never improves
                    _check_rates(optimizer, zero=not plateau)
        except (ValueError, TypeError, ZeroDivisionError) as error:
            said = str(error).removesuffix(".")
            raise BackboneError(f"--model.optimization.{part} cannot work with its settings: {said}.") from None
        return {
            "optimizer": type(optimizer).__name__,
            "lr_scheduler": type(scheduler).__name__,
            "layer_decay": self.layer_decay,
            "ema_decay": "none" if self.ema_decay is None else "some",
        }

    def schedule(self, optimizer: Optimizer, total_steps: int) -> tuple[Any, Literal["step", "epoch"]]:
        """Creates the schedule of an optimiser, and returns with it whether it is stepped per step or per epoch.

        Args:
            optimizer: the optimiser.
            total_steps: steps of the whole training; 0 if unknown.
        """
        make: Callable[..., Any] = self.lr_scheduler
        # jsonargparse turns a class on the command line into a partial of its own function, with the class as an
        # argument.
        given = [one for one in make.args if isinstance(one, type)] if isinstance(make, partial) else []
        parameters = inspect.signature(given[0] if given else make).parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if "total_steps" in parameters or (takes_all and not (given and issubclass(given[0], ReduceLROnPlateau))):
            return make(optimizer, total_steps=total_steps), "step"
        return make(optimizer), "epoch"

    def penalty(self, named: Iterable[tuple[str, Tensor]]) -> Tensor | float:
        """Computes the penalties on weight matrices and kernels, a scalar."""
        penalty: Tensor | float = 0.0
        if self.l1_penalty or self.l2_penalty:
            weights = [p for _, p in named if p.ndim > 1 and p.requires_grad]
            if self.l1_penalty:
                penalty = penalty + self.l1_penalty * sum(w.abs().sum() for w in weights)
            if self.l2_penalty:
                penalty = penalty + self.l2_penalty * sum(w.square().sum() for w in weights)
        return penalty


def _check_rates(optimizer: Optimizer, zero: bool) -> None:
    """Checks that an optimiser's learning rates are valid; None is, for an optimiser that finds its own.

    Args:
        optimizer: the optimiser.
        zero: whether 0 is valid, as at the end of a schedule.

    Raises:
        ValueError: a learning rate is invalid.
    """
    for rate in (group["lr"] for group in optimizer.param_groups if group["lr"] is not None):
        if not (zero if rate == 0 else 0 < rate < math.inf):
            raise ValueError(f"the learning rate becomes {float(rate):g}")


def total_steps(trainer: L.Trainer) -> int:
    """Returns the number of optimiser steps of the whole training; 0 if unknown, as with ``max_epochs -1`` and
    ``max_time``."""
    steps = trainer.estimated_stepping_batches
    return max(1, int(steps)) if math.isfinite(steps) else 0


def parameter_groups(module: "VisionModule", parts: Sequence[str] = ("",), head: str = "head") -> list[dict[str, Any]]:
    """Groups a module's parameters by learning rate and weight decay; ``lr_scale`` is the factor on the learning rate.

    Biases, norms and other vectors have no weight decay (Bello et al. 2021, arXiv:2103.07579).

    Args:
        module: a module with a backbone and a ``plan``.
        parts: name prefixes of the parameters to group; by default, all.
        head: name of the group of parameters outside of the backbone.
    """
    plan = module.plan
    depth = layers(module.backbone) if plan.layer_decay != 1 else {}
    last = max(depth.values(), default=0) + 1
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not name.startswith(tuple(parts)):
            continue
        inner = name.removeprefix("backbone.")
        part, scale = head, 1.0
        if inner != name:
            layer = depth.get(inner, last)
            part = f"backbone.{layer}" if depth else "backbone"
            scale = plan.backbone_lr_scale * plan.layer_decay ** (last - layer)
        plain = parameter.ndim <= 1
        group = groups.setdefault((part, plain), {"params": [], "lr_scale": scale, "name": part})
        if plain:
            group |= {"weight_decay": 0.0, "name": f"{part}.no_decay"}
        group["params"].append(parameter)
    return list(groups.values())


def images_a_step(module: "VisionModule") -> int:
    """Returns the number of images per optimiser step: processes × batch size × accumulated batches.

    Raises:
        BackboneError: the trainer has no data module, which knows the batch size.
    """
    trainer, data = module.trainer, training_data(module.trainer)
    accumulated = getattr(module, "accumulate_grad_batches", trainer.accumulate_grad_batches)
    return int(data.batch_size * trainer.world_size * accumulated)


def rate_factor(module: "VisionModule") -> float:
    """Returns the factor on a module's learning rate, see ``lr_batch_size``; 1 for a rate of the learning-rate
    finder."""
    stated = module.optimization.lr_batch_size
    return images_a_step(module) / stated if stated and module.lr == module.optimization.lr else 1.0


def build_optimizer(
    plan: Optimization, groups: list[dict[str, Any]], steps: int, lr: float | None, monitor: str, factor: float = 1.0
) -> dict[str, Any]:
    """Creates an optimiser and its schedule, in the format of Lightning's `configure_optimizers`.

    Args:
        plan: the training settings.
        groups: the result of `parameter_groups`.
        steps: see `total_steps`.
        lr: learning rate; None for the optimiser's default.
        monitor: metric of `ReduceLROnPlateau`, unless the schedule names one.
        factor: factor on the learning rate; see `rate_factor`.

    Raises:
        BackboneError: the optimiser rejects its settings, or the schedule needs the length of the training.
    """
    try:
        optimizer = plan.optimizer(groups)
    except ValueError as error:
        raise BackboneError(f"--model.optimization.optimizer cannot be created: {error}") from None
    for group in optimizer.param_groups:
        group["lr"] = (lr or group["lr"]) * group.pop("lr_scale") * factor
    try:
        scheduler, interval = plan.schedule(optimizer, steps)
    except ValueError:
        if steps:
            raise
        raise BackboneError(
            "The schedule of the learning rate needs to know how long the training is: give --trainer.max_epochs or "
            "--trainer.max_steps, or another --model.optimization.lr_scheduler."
        ) from None
    config: dict[str, Any] = {"scheduler": scheduler, "interval": interval}
    if isinstance(scheduler, ReduceLROnPlateau):
        config["monitor"] = getattr(scheduler, "monitor", monitor)
    return {"optimizer": optimizer, "lr_scheduler": config}
