"""Schedules that go by time, and settings of optimisers and schedules that changed since a training started."""

from collections.abc import Iterable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypedDict, cast

import lightning as L
from lightning.pytorch.callbacks import Timer
from typing_extensions import override

from modules.optimization import WarmupCosine, total_steps
from modules.training_data import settings_of

if TYPE_CHECKING:
    from modules.base import VisionModule


class Planned(TypedDict):
    """Settings of an optimiser's parameter groups and of its schedule, without their state."""

    groups: list[dict[str, Any]]
    schedule: dict[str, Any]


class ChangedSettings(L.Callback):
    """Applies settings of optimisers and schedules that changed since the training started: those of the command that
    resumes it, which loading the checkpoint overwrites, and the learning rate of a learning-rate finder."""

    def __init__(self) -> None:
        self.lr: float | None = None  # learning rate that the optimisers were created with
        self.settings: list[Planned] = []  # of each optimiser and its schedule
        self.before: list[Planned] = []  # the same, of the checkpoint that is resumed

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
        if lr != self.lr and trainer.global_step == 0:  # found, without schedule and factors
            trainer.strategy.setup_optimizers(trainer)
            self.lr, self.before = lr, []
            self.on_fit_start(trainer, pl_module)
        before, self.before = self.before, []
        for config, old, new in zip(trainer.lr_scheduler_configs, before, self.settings, strict=False):
            if old != new:
                pl_module.print(self._take_up(config.scheduler, old, new, trainer.global_step))

    @staticmethod
    def _take_up(scheduler: Any, old: Planned, new: Planned, step: int) -> str:
        """Applies new settings to a schedule and its optimiser; returns a message about it."""
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
    """Makes a `WarmupCosine` end when the training time is up, limited by ``--trainer.max_time`` or Lightning's
    ``Timer``.

    Its progress is the larger of two fractions: completed steps and elapsed time. The timer counts validations too, and
    continues after a resume from the time of the checkpoint.
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
            self._tell(schedules, None)  # discards the elapsed time of a checkpoint with a time limit
        elif schedules:
            over = round(self.timer.time_elapsed())
            length = timedelta(seconds=over + round(limited[self.timer]))
            after = f"after {length} of training" + (f", of which {timedelta(seconds=over)} are over" if over else "")
            others = [type(one).__name__ for one in schedules if not isinstance(one, WarmupCosine)]
            steps = total_steps(trainer)
            pl_module.print(
                f"The training ends {after}. {others[0]} does not depend on the time: the learning rate may not have reached its end."
                if others
                else f"The learning rate follows the time: it reaches its end {after}"
                + (f", or after {steps:,} steps, whichever comes first." if steps else ".")
            )

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.timer is not None:
            elapsed, remaining = self.timer.time_elapsed(), self.timer.time_remaining() or 0.0
            share = trainer.strategy.broadcast(elapsed / (elapsed + remaining))  # the same in all processes
            self._tell([config.scheduler for config in trainer.lr_scheduler_configs], share)

    @staticmethod
    def _tell(schedules: Iterable[Any], elapsed: float | None) -> None:
        for schedule in schedules:
            if isinstance(schedule, WarmupCosine):
                schedule.elapsed = elapsed


def _settings(scheduler: Any) -> Planned:
    """Returns the settings of a schedule and its optimiser, without their state."""
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
    """Returns the settings of an optimiser or a schedule that are plain data, without state."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in settings.items()
        if key not in ("params", "initial_lr") and isinstance(value, bool | int | float | str | list | tuple)
    }
