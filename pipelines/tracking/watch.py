"""Progress, timing and errors of a training for its run."""

import time
from collections import defaultdict
from typing import Any

import lightning as L

from modules.training_data import settings_of
from pipelines.engine.launch import processes


class RunCallback(L.Callback):
    """Logs a training's speed, duration and error to its run."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.processes: list[tuple[str, int]] = []
        self.train_seconds = 0.0
        self._times: dict[str, float] = defaultdict(float)
        self._images = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Records the processes of the job, to name one that is lost."""
        self.processes = processes(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock."""
        self._times["start"] = self._times["epoch"] = time.perf_counter()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the epoch's clock."""
        self._times["epoch"], self._images = time.perf_counter(), 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Logs the learning rate, or one per parameter group if they differ."""
        if trainer.global_step % settings_of(trainer).log_every_n_steps == 0:
            rates = {
                f"lr/{group.get('name', number)}": group["lr"]
                for optimizer in trainer.optimizers
                for number, group in enumerate(optimizer.param_groups)
                if not str(group.get("name")).endswith(".no_decay")
            }
            if len(set(rates.values())) == 1:
                rates = {"lr": next(iter(rates.values()))}
            for logger in trainer.loggers:
                logger.log_metrics(rates, trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts images."""
        self._images += len(batch["image"]) * trainer.world_size

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Pauses the clock: validation does not count as training time."""
        self._times["validation"] = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Resumes the clock."""
        self._times["epoch"] += time.perf_counter() - self._times["validation"]

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the images per second of the epoch."""
        seconds = time.perf_counter() - self._times["epoch"]
        # An epoch that was begun by another process has no start.
        if self._images and 0 < seconds < time.perf_counter():
            for logger in trainer.loggers:
                logger.log_metrics({"train/images_per_second": self._images / seconds}, trainer.global_step - 1)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops the clock."""
        self.train_seconds = time.perf_counter() - self._times["start"]

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Records the error that ended the training."""
        self.error = exception
