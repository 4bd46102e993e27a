"""What callbacks and schedules wait for is measured, which is seen before the training."""

import math

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from typing_extensions import override

from modules.training_data import settings_of
from pipelines.engine.command import UsageError


class MonitorCheck(L.Callback):
    """Makes sure, before a training begins, that a validation measures what callbacks and schedules monitor: on one batch in
    Lightning's sanity check, and where that leaves something open, on all of them. Figures of the training itself,
    ``train/NAME``, are known after the first epoch alone."""

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
        """What is monitored, but for figures of the training, and by what."""
        found: dict[str, str] = {}
        for config in trainer.lr_scheduler_configs:
            if config.reduce_on_plateau and config.strict and config.monitor:
                found[config.monitor] = type(config.scheduler).__name__
        for callback in settings_of(trainer).callbacks:
            strict = getattr(callback, "strict", True)
            if isinstance(callback, EarlyStopping | ModelCheckpoint) and strict and callback.monitor:
                found[callback.monitor] = type(callback).__name__
        return {name: owner for name, owner in found.items() if not name.startswith("train/")}
