"""How a network is trained: the settings, optimisers and schedules of them, penalties, the average of the weights."""

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import lightning as L
import numpy as np
import torch
from annotated_types import Ge
from lightning.pytorch.callbacks import Timer, WeightAveraging
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from typing_extensions import override

from modules.callbacks.freezing import layers
from modules.networks import BackboneError
from modules.ranges import NonNegative, Positive, PositiveInt, Share, ShareBelowOne
from modules.training_data import settings_of, training_data

if TYPE_CHECKING:
    from modules.base import VisionModule


TRIED = 100  # steps that a schedule is tried for
TICKS = 10_000  # that stand for steps where a training's time alone is known


class WarmupCosine(LambdaLR):
    """Linear warm-up, then half a cosine down to zero, stepped at every optimiser step (Loshchilov & Hutter 2017,
    arXiv:1608.03983).

    Args:
        optimizer: the optimiser.
        total_steps: optimiser steps of the whole training; the module knows and fills it in. 0 where the length is not
            known: the rate then stays the same, unless the training's time is limited, see `TimedSchedule`.
        warmup: share of the steps, or of the time, in which the rate rises, in [0, 1).
        final: the last rate as a share of the highest.
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int = 0, warmup: ShareBelowOne = 0.05, final: Share = 0.0
    ) -> None:
        self.total_steps = total_steps
        self.warmup, self.final = warmup, final
        self.elapsed: float | None = None  # share of the training's time, where that is limited
        super().__init__(optimizer, self._factor)

    def _factor(self, step: int) -> float:
        total, at = self.total_steps, float(step)
        if self.elapsed is not None:  # whichever is further: the training ends with the first of the two
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
    """How a network is trained.

    Args:
        optimizer: any optimiser of torch or timm.
        lr_scheduler: any schedule of torch. One with ``total_steps`` is told the length of the training and stepped at
            every optimiser step; all others are stepped once an epoch.
        lr: the learning rate, if it is to be another than the optimiser's own.
        lr_batch_size: the images a step for which the rate is stated: with another number, processes × batch size × accumulated
            batches, it is multiplied by their ratio (Goyal et al. 2017, arXiv:1706.02677); None leaves it as it is.
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
    lr_batch_size: PositiveInt | None = None
    backbone_lr_scale: NonNegative = 1.0
    layer_decay: Positive = 1.0
    frozen_epochs: Annotated[int, Ge(-1)] = 0
    l1_penalty: NonNegative = 0.0
    l2_penalty: NonNegative = 0.0
    ema_decay: ShareBelowOne | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Optimization":
        """Itself: what jsonargparse makes of a class on the command line holds the whole command."""
        return self

    @property
    def fixed(self) -> dict[str, Any]:
        """What cannot become another within a training, as plain data: the state of the old does not fit the new.

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
                warnings.simplefilter("ignore")  # of steps without the optimiser's
                for _ in range(TRIED - 1):
                    scheduler.step(*([1.0] if plateau else []))  # a figure that never gets better
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
        """The schedule of an optimiser, and after what it is stepped.

        Args:
            optimizer: the optimiser.
            total_steps: steps of the whole training; 0 where its length is not known.
        """
        make: Callable[..., Any] = self.lr_scheduler
        # What jsonargparse makes of a class on the command line is a partial of its own function, given the class.
        given = [one for one in make.args if isinstance(one, type)] if isinstance(make, partial) else []
        parameters = inspect.signature(given[0] if given else make).parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if "total_steps" in parameters or (takes_all and not (given and issubclass(given[0], ReduceLROnPlateau))):
            return make(optimizer, total_steps=total_steps), "step"
        return make(optimizer), "epoch"

    def penalty(self, named: Iterable[tuple[str, Tensor]]) -> Tensor | float:
        """The penalties on weight matrices and kernels, a scalar.

        Args:
            named: parameters by name.
        """
        penalty: Tensor | float = 0.0
        if self.l1_penalty or self.l2_penalty:
            weights = [p for _, p in named if p.ndim > 1 and p.requires_grad]
            if self.l1_penalty:
                penalty = penalty + self.l1_penalty * sum(w.abs().sum() for w in weights)
            if self.l2_penalty:
                penalty = penalty + self.l2_penalty * sum(w.square().sum() for w in weights)
        return penalty


def _check_rates(optimizer: Optimizer, zero: bool) -> None:
    """Makes sure that an optimiser's learning rates are numbers to learn with; one may have none, and find its own.

    Args:
        optimizer: the optimiser.
        zero: whether 0 is one of them, as at a schedule's end.

    Raises:
        ValueError: one is not.
    """
    for rate in (group["lr"] for group in optimizer.param_groups if group["lr"] is not None):
        if not (zero if rate == 0 else 0 < rate < math.inf):
            raise ValueError(f"the learning rate becomes {float(rate):g}")


def total_steps(trainer: L.Trainer) -> int:
    """Steps of the whole training; 0 where its length is not known, as with ``max_epochs -1`` and ``max_time``."""
    steps = trainer.estimated_stepping_batches
    return max(1, int(steps)) if math.isfinite(steps) else 0


def parameter_groups(module: "VisionModule", parts: Sequence[str] = ("",), head: str = "head") -> list[dict[str, Any]]:
    """Parameters of a module by learning rate and weight decay; ``lr_scale`` is the factor on the rate.

    Biases, norms and other vectors are not decayed (Bello et al. 2021, arXiv:2103.07579).

    Args:
        module: has a backbone, and a ``plan`` for it.
        parts: how the names of those begin that are meant, by default of all.
        head: what those are called that are not the backbone's.
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
    """Images that one step of a training is made of: processes × batch size × accumulated batches.

    Raises:
        BackboneError: the trainer has no data module, which knows the batch size.
    """
    trainer, data = module.trainer, training_data(module.trainer)
    accumulated = getattr(module, "accumulate_grad_batches", trainer.accumulate_grad_batches)
    return int(data.batch_size * trainer.world_size * accumulated)


def rate_factor(module: "VisionModule") -> float:
    """What a module's learning rate is multiplied by, see ``lr_batch_size``; nothing of a rate that was found as it is."""
    stated = module.optimization.lr_batch_size
    return images_a_step(module) / stated if stated and module.lr == module.optimization.lr else 1.0


def build_optimizer(
    plan: Optimization, groups: list[dict[str, Any]], steps: int, lr: float | None, monitor: str, factor: float = 1.0
) -> dict[str, Any]:
    """An optimiser and its schedule, as `configure_optimizers` of Lightning's returns them.

    Args:
        plan: the settings.
        groups: what `parameter_groups` gives.
        steps: see `total_steps`.
        lr: the learning rate, if it is to be another than the optimiser's own.
        monitor: the metric that a plateau is looked for in, unless the schedule names one.
        factor: on the rate; see `rate_factor`.

    Raises:
        BackboneError: the optimiser does not take its settings, or the schedule wants to know the training's length.
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


class ChangedSettings(L.Callback):
    """Lets a training take up other settings of its optimisers and schedules than it was begun with: those of the command
    that goes on with it, since the checkpoint brings the old ones back, and the rate that a learning-rate finder found."""

    def __init__(self) -> None:
        self.lr: float | None = None  # with which the optimisers were made
        self.settings: list[dict[str, Any]] = []  # of each optimiser and its schedule
        self.before: list[dict[str, Any]] = []  # the same of the checkpoint that is gone on from

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.lr, self.settings, self.before = cast("VisionModule", pl_module).lr, [], []

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.settings = [_settings(config.scheduler) for config in trainer.lr_scheduler_configs]

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        lr = cast("VisionModule", pl_module).lr
        if lr != self.lr and trainer.global_step == 0:  # found; that knows neither the schedule nor the groups' rates
            trainer.strategy.setup_optimizers(trainer)
            self.lr, self.before = lr, []
            self.on_fit_start(trainer, pl_module)
        before, self.before = self.before, []
        for config, old, new in zip(trainer.lr_scheduler_configs, before, self.settings, strict=False):
            if old != new:
                pl_module.print(self._take_up(config.scheduler, old, new, trainer.global_step))

    @staticmethod
    def _take_up(scheduler: Any, old: dict[str, Any], new: dict[str, Any], step: int) -> str:
        """Sets a schedule and its optimiser to the new settings; returns what is to be told of it."""
        for group, was, now in zip(scheduler.optimizer.param_groups, old["groups"], new["groups"], strict=True):
            group["lr"] *= now["lr"] / was["lr"] if was["lr"] else 1.0
            group |= {key: value for key, value in now.items() if key not in ("lr", "name") and value != was.get(key)}
            if "initial_lr" in group:
                group["initial_lr"] = now["lr"]
        if "base_lrs" in vars(scheduler):
            scheduler.base_lrs = [group["lr"] for group in new["groups"]]
        for key, value in new["schedule"].items():
            if value != old["schedule"].get(key):
                setattr(scheduler, key, value)
        if "total_steps" in vars(scheduler):  # its rate is a function of the step
            scheduler.last_epoch -= 1
            scheduler.step()
        rates = sorted({group["lr"] for group in scheduler.optimizer.param_groups})
        length = new["schedule"].get("total_steps")
        return (
            "The learning-rate schedule is computed anew"
            + (f" over {length} steps instead of {old['schedule'].get('total_steps')}" if length else "")
            + f": from step {step} on it is {' to '.join(f'{rate:.4g}' for rate in {*rates[:1], *rates[-1:]})}."
        )

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["planned"] = self.settings

    @override
    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.before = checkpoint.get("planned", [])


class TimedSchedule(L.Callback):
    """Lets a `WarmupCosine` end when a training's time is up, as ``--trainer.max_time`` or Lightning's ``Timer`` limits it.

    It is as far as the larger of two shares: that of the steps which are done, and that of the time which has passed. The time is
    the timer's: it counts validations, and goes on after a resume where the checkpoint was written.
    """

    def __init__(self) -> None:
        self.timer: Timer | None = None

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        limited = {
            one: left
            for one in settings_of(trainer).callbacks
            if isinstance(one, Timer) and (left := one.time_remaining())
        }
        self.timer = min(limited, key=lambda one: limited[one], default=None)
        schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
        if self.timer is None:
            self._tell(schedules, None)  # not what a checkpoint of limited time brought
        elif schedules:
            over = round(self.timer.time_elapsed())
            length = timedelta(seconds=over + round(limited[self.timer]))
            after = f"after {length} of training" + (f", of which {timedelta(seconds=over)} are over" if over else "")
            others = [type(one).__name__ for one in schedules if not isinstance(one, WarmupCosine)]
            steps = total_steps(trainer)
            pl_module.print(
                f"The training ends {after}. {others[0]} does not go by time: the learning rate is then wherever it is."
                if others
                else f"The learning rate goes by time: it comes to its end {after}"
                + (f", or after {steps:,} steps, whichever is first." if steps else ".")
            )

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.timer is not None:
            elapsed, remaining = self.timer.time_elapsed(), self.timer.time_remaining() or 0.0
            share = trainer.strategy.broadcast(elapsed / (elapsed + remaining))  # all processes have the same rate
            self._tell([config.scheduler for config in trainer.lr_scheduler_configs], share)

    @staticmethod
    def _tell(schedules: Iterable[Any], elapsed: float | None) -> None:
        for schedule in schedules:
            if isinstance(schedule, WarmupCosine):
                schedule.elapsed = elapsed


def _settings(scheduler: Any) -> dict[str, Any]:
    """The settings of a schedule and its optimiser, without their state."""
    return {
        "groups": [
            {**_plain(group), "lr": float(group.get("initial_lr", group["lr"]))}
            for group in scheduler.optimizer.param_groups
        ],
        "schedule": {
            key: value
            for key, value in _plain(scheduler.state_dict()).items()
            if key not in ("last_epoch", "base_lrs", "elapsed")
            and not key.startswith(("_last", "_step", "_is", "_get"))
        },
    }


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Those of an optimiser's or a schedule's settings that are plain data, not state."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in settings.items()
        if key not in ("params", "initial_lr") and isinstance(value, bool | int | float | str | list | tuple)
    }


class WeightAverage(WeightAveraging):
    """The exponential moving average of weights and statistics, which is validated, tested and kept.

    The decay at step n is min(``decay``, (1 + n) / (10 + n)), so that the initial weights do not weigh on a short
    training.

    Args:
        decay: the decay in the long run, in (0, 1).
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
        """The decay at a step, counted from 0."""
        return min(self.decay, (1 + step) / (10 + step))

    @override
    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:  # after it, the weights are those that shall be measured
            super().on_validation_epoch_start(trainer, pl_module)

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_validation_epoch_end(trainer, pl_module)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restores the average to train on; an evaluation finds it in the weights themselves."""
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
