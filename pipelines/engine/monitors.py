"""Checks before training that the metrics which callbacks and schedules monitor exist."""

import math

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from typing_extensions import override

from modules.training_data import settings_of
from pipelines.engine.command import UsageError


class MonitorCheck(L.Callback):
    """Checks, before a training starts, that validation logs the metrics which callbacks and schedules monitor: on one
    batch in Lightning's sanity check and, if that leaves a doubt, on all batches. Training metrics, ``train/NAME``, are
    only known after the first epoch.

    Args:
        registers: the name under which the model of the best validation is to be registered, so that there has to be one.
    """

    def __init__(self, registers: str | None = None) -> None:
        self.registers = registers

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses a training that would end before its first validation and leave nothing to register."""
        if self.registers is None or trainer.global_step or trainer.max_steps < 0:
            return
        every, accumulated = trainer.check_val_every_n_epoch, getattr(pl_module, "accumulate_grad_batches", 1)
        batches = trainer.max_steps * max(accumulated, trainer.accumulate_grad_batches)
        if trainer.val_check_batch is None:  # validated by the clock
            return
        first = trainer.val_check_batch + (0 if every is None else (every - 1) * trainer.num_training_batches)
        if batches < first < math.inf:
            raise UsageError(
                f"--register {self.registers} keeps the model of the best validation, and --trainer.max_steps "
                f"{trainer.max_steps} ends before the first one, which comes after batch {first}: raise it, lower "
                "--trainer.val_check_interval, or give --register null."
            )

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name, owner in self._monitored(trainer).items():
            if not trainer.enable_validation:
                raise UsageError(
                    f"{owner} monitors {name}, and there is no validation: leave it out, or give a validation split, and no "
                    "--trainer.limit_val_batches 0."
                )
            trainer.num_sanity_val_steps = max(1, trainer.num_sanity_val_steps)

    @override
    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        measured = trainer.callback_metrics.keys()
        missing = {name: owner for name, owner in self._monitored(trainer).items() if name not in measured}
        if not missing:
            return
        if trainer.num_sanity_val_steps < min(trainer.num_val_batches):  # a batch may lack what a figure is of
            trainer.num_sanity_val_steps = math.inf
            trainer._run_sanity_check()
            return
        name, owner = next(iter(missing.items()))
        raise UsageError(
            f"{owner} monitors {name}, which no validation measures. Measured are {', '.join(sorted(measured))}; "
            "figures of the training are train/NAME."
        )

    @staticmethod
    def _monitored(trainer: L.Trainer) -> dict[str, str]:
        """The monitored metrics, except those of training, and what monitors them."""
        found: dict[str, str] = {}
        for config in trainer.lr_scheduler_configs:
            if config.reduce_on_plateau and config.strict and config.monitor:
                found[config.monitor] = type(config.scheduler).__name__
        for callback in settings_of(trainer).callbacks:
            strict = getattr(callback, "strict", True)
            if isinstance(callback, EarlyStopping | ModelCheckpoint) and strict and callback.monitor:
                found[callback.monitor] = type(callback).__name__
        return {name: owner for name, owner in found.items() if not name.startswith("train/")}
