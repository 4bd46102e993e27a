"""What trains: Lightning's trainer, and the checkpoint that a training that was cut off goes on from."""

import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException
from PIL import Image

from datamodules import VisionDataModule
from datamodules.base import collate
from modules import VisionModule
from pipelines.console import say
from pipelines.tracking import RunLogger


class VisionTrainer(L.Trainer):
    """Lightning's trainer, which can also show what a network is given to see."""

    def preview(self, model: VisionModule, datamodule: VisionDataModule, images: int = 8, draws: int = 7) -> Path:
        """Draw a sheet of training samples: as they are, and after each of several random augmentations.

        Args:
            model: draws the samples of its task.
            datamodule: has them.
            images: samples, a row each.
            draws: augmentations of each.

        Returns:
            The file ``preview.png`` in the output folder.
        """
        source = datamodule.sources["train"]
        chosen = np.linspace(0, len(source) - 1, min(images, len(source))).astype(int).tolist()
        plain, augmented = (datamodule.dataset("train", t) for t in (False, True))
        samples = [sample for i in chosen for sample in (plain[i, 0], *(augmented[i, epoch] for epoch in range(draws)))]
        sheet = model.draw_samples(collate(samples), columns=draws + 1)
        for logger in self.loggers:
            if isinstance(logger, RunLogger):
                logger.log_image("train/preview", [sheet])
        file = Path(self.default_root_dir, "preview.png")
        Image.fromarray(sheet).save(file)
        return file


class LastCheckpoint(Checkpoint):  # as one, it comes after all callbacks whose state it saves
    """Keeps ``last.ckpt``, from which a training goes on exactly: at each epoch's end, every so many seconds, and when
    Ctrl-C or SIGTERM ends the training, which they do after the step that is under way. Under SLURM so does SIGUSR1
    (``--signal=SIGUSR1@90``), which also puts the job back into the queue.

    Args:
        path: the file.
        seconds: longest time between two checkpoints.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.seconds, self._saved = path, seconds, time.monotonic()
        self._signal = 0
        self._handlers: dict[int, Any] = {}

    def _save(self, trainer: L.Trainer) -> None:
        new = self.path.with_suffix(".new")  # so that the last one stays whole until this one is
        trainer.save_checkpoint(new, weights_only=False)
        if trainer.is_global_zero:
            new.replace(self.path)
        self._saved = time.monotonic()

    def _note(self, number: int, frame: Any) -> None:
        if self._signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self._signal = number
        say(f"{signal.Signals(number).name}: the training ends after this step, with a checkpoint.")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listens to signals."""
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if SLURMEnvironment.detect() else [])]
            self._handlers = {number: signal.signal(number, self._note) for number in numbers}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves when it is time, and ends when a signal came; all processes do so together."""
        if pl_module.holds_gradients(batch_idx):  # type: ignore[operator]
            return
        state = 2 * self._signal + (time.monotonic() - self._saved >= self.seconds)
        if trainer.world_size > 1:
            if trainer.global_step % 20:
                return
            state = int(trainer.strategy.reduce(torch.tensor(state, device=pl_module.device), reduce_op="max"))
        if state:
            self._save(trainer)
        self._end(trainer, state // 2)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the epoch."""
        self._save(trainer)
        number = self._signal
        if trainer.world_size > 1:
            number = int(trainer.strategy.reduce(torch.tensor(number, device=pl_module.device), reduce_op="max"))
        self._end(trainer, number)

    @staticmethod
    def _end(trainer: L.Trainer, number: int) -> None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGUSR1 and trainer.is_global_zero:
            command = ["scontrol", "requeue", os.environ["SLURM_JOB_ID"]]
            try:
                subprocess.run(command, check=True)
            except (OSError, subprocess.SubprocessError) as error:
                say(f"The job is not back in the queue ({error}): start it again with the same --output.")
        if number:
            raise SIGTERMException

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leaves signals to those who had them."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
