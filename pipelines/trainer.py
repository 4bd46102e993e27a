"""What trains: Lightning's trainer, and the checkpoint that a training that was cut off goes on from."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.loops import fit_loop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from PIL import Image

from datamodules import VisionDataModule
from datamodules.base import collate
from modules import VisionModule
from pipelines.console import say
from pipelines.files import whole, write_image
from pipelines.tracking import RunLogger


class _EpochLoop(_TrainingEpochLoop):
    """Lightning's loop over the batches of an epoch, which offers `LastCheckpoint` the moments at which nothing is half done:
    between two batches with all that follows the first, and before a validation, which a resumed training then begins with.
    """

    settled: Literal["before validation", "after batch"] | None = (
        None  # what a checkpoint is of; else one within a hook
    )

    @property
    def done(self) -> bool:
        """Whether the epoch's batches are over, and no validation is to come."""
        return self.settled != "before validation" and super().done

    def reset(self) -> None:
        """Begins or goes on; from a settled checkpoint there is nothing to make up for."""
        super().reset()
        if self.settled:
            self.restarting = self.trainer.fit_loop._restarting = False  # the latter would leave out ReduceLROnPlateau

    def advance(self, data_fetcher: Any) -> None:
        """Trains on a batch, unless only the validation is to come."""
        outstanding, self.settled = self.settled == "before validation", None
        if not outstanding:
            super().advance(data_fetcher)

    def on_advance_end(self, data_fetcher: Any) -> None:
        """Validates when it is time."""
        stops = self.trainer.should_stop  # it is not known to the loop that goes on: the end of the epoch is waited for
        if not stops and not self._skip_next_val and self._should_check_val_fx(data_fetcher):
            self._offer("before validation")
        super().on_advance_end(data_fetcher)
        if not (self.trainer.should_stop or self._is_training_done):
            self._offer("after batch")

    def _offer(self, settled: Literal["before validation", "after batch"]) -> None:
        self.settled = settled
        try:
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, LastCheckpoint):
                    callback.offer(self.trainer)
        finally:
            self.settled = None

    def on_save_checkpoint(self) -> dict[str, Any]:
        """Adds what the checkpoint is of."""
        return super().on_save_checkpoint() | {"settled": self.settled}

    def on_load_checkpoint(self, state_dict: dict[str, Any]) -> None:
        """Goes on where `on_save_checkpoint` was called."""
        super().on_load_checkpoint(state_dict)
        self.settled = state_dict.get("settled")


class _FitLoop(fit_loop._FitLoop):
    """Lightning's loop over epochs, which hands `LastCheckpoint` each epoch once all is over: validation, the judgement of
    the other checkpoints, the schedules."""

    epoch_loop: _EpochLoop

    def _iteration_based_training(self) -> bool:
        return False  # with max_steps, Lightning goes through an epoch that is over once more

    def on_advance_end(self) -> None:
        """Ends the epoch."""
        super().on_advance_end()
        self.epoch_loop.settled = "after batch"
        try:
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, LastCheckpoint):
                    callback.end_epoch(self.trainer)
        finally:
            self.epoch_loop.settled = None


class WholeCheckpoints(TorchCheckpointIO):
    """Writes checkpoints that are whole or absent; the former one of a name stays until the new one is on the disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes one.

        Raises:
            DiskError: the disk is full, broken or read-only.
        """
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as part, part.open("wb") as stream:
            torch.save(checkpoint, stream)


class BestCheckpoint(ModelCheckpoint):
    """Keeps ``best.ckpt``: the best value of the monitored metric, of equal ones that with the lower ``val/loss``, and of
    those the later. Where the validation has nothing to measure that metric on, the lowest ``val/loss``, or of a network
    that has none, the last.

    Args:
        folder: where.
        monitor: the metric.
        mode: whether the best is the least or the greatest, ``min`` or ``max``.
    """

    def __init__(self, folder: Path, monitor: str, mode: str) -> None:
        # Judged is at the end of a validation: at an epoch's end, its figures may be those of an earlier one.
        super().__init__(
            folder, "best", monitor, mode=mode, enable_version_counter=False, save_on_train_epoch_end=False
        )
        self._loss = math.inf  # of the best
        self._said = False

    def _monitor_candidates(self, trainer: L.Trainer) -> dict[str, torch.Tensor]:
        candidates = super()._monitor_candidates(trainer)
        if self.monitor not in candidates and any(key.startswith("val/") for key in candidates):
            loss = candidates.get("val/loss")
            if not self._said:
                which = "that of the last epoch" if loss is None else "that with the lowest val/loss"
                say(f"The validation split has nothing to measure {self.monitor} on: the best checkpoint is {which}.")
                self._said = True
            value = -candidates["step"].float() if loss is None else loss
            candidates[str(self.monitor)] = value if self.mode == "min" else -value
        return candidates

    def check_monitor_top_k(self, trainer: L.Trainer, current: torch.Tensor | None = None) -> bool:
        """Whether this is the best so far; all processes agree."""
        loss = float(trainer.callback_metrics.get("val/loss", math.inf))
        better = super().check_monitor_top_k(trainer, current)
        if not better and current is not None and self.best_model_score is not None:
            equal = bool(current == self.best_model_score.to(current.device))
            better = trainer.strategy.reduce_boolean_decision(equal and not loss > self._loss)
        if better:
            self._loss = loss
        return better

    def state_dict(self) -> dict[str, Any]:
        """Lightning's, with what it leaves out."""
        return super().state_dict() | {"loss": self._loss, "step": self._last_global_step_saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over which checkpoint is the best so far, also in a folder that was moved; not where it is missing."""
        file = Path(str(self.dirpath), Path(state_dict["best_model_path"]).name)
        if not state_dict["best_model_path"] or not file.exists():
            return
        own = {key: str(file) for key in ("best_model_path", "kth_best_model_path")}
        best = {str(file): state_dict["best_model_score"]}
        super().load_state_dict(state_dict | own | {"dirpath": self.dirpath, "best_k_models": best})
        self.current_score = state_dict["current_score"]
        self._loss, self._last_global_step_saved = state_dict.get("loss", math.inf), state_dict.get("step", 0)


class VisionTrainer(L.Trainer):
    """Lightning's trainer, from whose checkpoints a training goes on exactly, and which can show what a network is given
    to see."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        plain = self.fit_loop
        self.fit_loop = _FitLoop(self, plain.min_epochs, plain.max_epochs)
        self.fit_loop.epoch_loop = _EpochLoop(self, plain.min_steps, plain.max_steps)
        if (
            type(self.strategy.checkpoint_io) is TorchCheckpointIO
        ):  # not where a plugin of the user's writes checkpoints
            self.strategy.checkpoint_io = WholeCheckpoints()

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
        write_image(file, Image.fromarray(sheet))
        return file


class LastCheckpoint(Checkpoint):
    """Keeps ``last.ckpt``, from which a training goes on exactly: at each epoch's end, every so many seconds, and when
    Ctrl-C or SIGTERM ends the training, which they do after the step or the validation that is under way. Under SLURM so
    does SIGUSR1 (``--signal=SIGUSR1@90``), which also puts the job back into the queue.

    A checkpoint is of a moment at which nothing is half done. That of an epoch's end comes after all that belongs to the
    epoch: validation, the judgement of `BestCheckpoint`, the schedules. Works with `VisionTrainer` alone, whose loops say
    when such a moment is.

    Args:
        path: the file.
        seconds: longest time between two checkpoints, but for a validation.
    """

    recipe: dict[str, Any] | None = None  # what the training is of, for those who go on
    goes_on = False  # also where the training had ended early

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.seconds, self._saved = path, seconds, time.monotonic()
        self._signal = 0
        self._handlers: dict[int, Any] = {}

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.path, weights_only=False)
        self._saved = time.monotonic()

    def _note(self, number: int, frame: Any) -> None:
        if self._signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self._signal = number
        say(f"{signal.Signals(number).name}: the training ends after this step or validation, with a checkpoint.")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listens to signals."""
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if SLURMEnvironment.detect() else [])]
            self._handlers = {number: signal.signal(number, self._note) for number in numbers}

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds what the training is of, and whether it has ended early."""
        checkpoint["recipe"], checkpoint["stopped"] = self.recipe, trainer.should_stop

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Leaves a training that has ended early at its end; lets the command's patience count, not the checkpoint's."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        trainer.should_stop = checkpoint.get("stopped", False) and not self.goes_on
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EarlyStopping) and (state := checkpoint["callbacks"].get(callback.state_key)):
                state["patience"] = callback.patience

    def offer(self, trainer: L.Trainer) -> None:
        """Saves when it is time, and ends when a signal came; all processes do so together."""
        module: Any = trainer.lightning_module
        if module.holds_gradients(trainer.fit_loop.batch_idx):
            return
        state = 2 * self._signal + (time.monotonic() - self._saved >= self.seconds)
        if trainer.world_size > 1:
            if trainer.global_step % 20:
                return
            state = self._agreed(trainer, state)
        if state:
            self._save(trainer)
        self._end(trainer, state // 2)

    def end_epoch(self, trainer: L.Trainer) -> None:
        """Saves the epoch, and ends when a signal came."""
        self._save(trainer)
        self._end(trainer, self._agreed(trainer, self._signal))

    @staticmethod
    def _agreed(trainer: L.Trainer, number: int) -> int:
        """The greatest number of all processes."""
        if trainer.world_size == 1:
            return number
        device = trainer.strategy.root_device
        return int(trainer.strategy.reduce(torch.tensor(number, device=device), reduce_op="max"))

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


class RateFinder(LearningRateFinder):
    """Lightning's learning-rate finder, which also looks at all its rates where a training has fewer steps, and says what it
    found. Its arguments are those of Lightning's.
    """

    @classmethod
    def like(cls, other: LearningRateFinder) -> "RateFinder":
        """One with the settings of Lightning's."""
        twin = cls()
        vars(twin).update(vars(other))
        return twin

    def lr_find(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Goes through the rates, in as many epochs as that takes, without validation."""
        loop, epochs, every = trainer.fit_loop, trainer.fit_loop.max_epochs, trainer.check_val_every_n_epoch
        loop.max_epochs, trainer.check_val_every_n_epoch = -1, every and sys.maxsize
        try:
            super().lr_find(trainer, pl_module)
        finally:
            loop.max_epochs, trainer.check_val_every_n_epoch = epochs, every
        loop._combined_loader = None  # the data may plan by the number of epochs
        loop.setup_data()
        found = self.optimal_lr and self.optimal_lr.suggestion()
        steps = len(self.optimal_lr.results["lr"]) if self.optimal_lr else 0
        if found:
            say(f"LearningRateFinder takes a rate of {found:.3g}, found in {steps} steps.")
        else:
            say(f"LearningRateFinder found no rate in {steps} steps: --model.optimization.lr stays as it is.")
