"""Checkpoints of a training: the last one, from which it resumes exactly, and the best."""

import math
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus

from modules.training_data import settings_of
from pipelines.engine.disk import whole
from pipelines.engine.signals import end, endings
from pipelines.engine.terminal import say


class WholeCheckpoints(TorchCheckpointIO):
    """Writes each checkpoint atomically: the previous file of that name stays until the new one is on the disk."""

    twins: Sequence[Path] = ()  # other names of the next one

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes one.

        Raises:
            DiskError: the disk is full, broken or read-only.
        """
        with whole(path, self.twins) as part, part.open("wb") as stream:
            torch.save(checkpoint, stream)


def save(trainer: L.Trainer, file: Path) -> None:
    """Saves the checkpoint of a validation. At the end of an epoch this is a second name for the last checkpoint."""
    loop, last = trainer.fit_loop.epoch_loop, None
    if isinstance(trainer.strategy.checkpoint_io, WholeCheckpoints) and loop._is_training_done:
        last = next((one for one in settings_of(trainer).callbacks if isinstance(one, LastCheckpoint)), None)
    if last is None:
        trainer.save_checkpoint(file, weights_only=False)
    else:
        last.twins.append(file)


class BestCheckpoint(ModelCheckpoint):
    """Keeps ``best.ckpt``: the best value of the monitored metric; among equal values the one with the lower
    ``val/loss``, and among those the latest. If the metric is undefined for the validation set, the lowest ``val/loss``
    counts, or, for a network without one, the latest.

    Args:
        folder: where.
        monitor: the metric.
        mode: whether the best is the least or the greatest, ``min`` or ``max``.
        strict: end a training whose validation does not measure the metric.
    """

    on_train_batch_end = L.Callback.on_train_batch_end  # does nothing: no checkpoint is between validations

    def __init__(self, folder: Path, monitor: str, mode: str, strict: bool = False) -> None:
        # Judged is at the end of a validation: at an epoch's end, its figures may be those of an earlier one.
        super().__init__(
            folder, "best", monitor, mode=mode, enable_version_counter=False, save_on_train_epoch_end=False
        )
        self.strict = strict
        self.first: float | None = None  # the metric before the first step, if that was judged
        self.trained: float | None = None  # the best since
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
        if current is not None and trainer.global_step:
            found = [float(current), *([] if self.trained is None else [self.trained])]
            self.trained = max(found) if self.mode == "max" else min(found)
        loss = float(trainer.callback_metrics.get("val/loss", math.inf))
        better = super().check_monitor_top_k(trainer, current)
        if not better and current is not None and self.best_model_score is not None:
            equal = bool(current == self.best_model_score.to(current.device))
            better = trainer.strategy.reduce_boolean_decision(equal and not loss > self._loss)
        if better:
            self._loss = loss
        return better

    def judge_first(self, trainer: L.Trainer) -> None:
        """Saves the weights that were validated before the first step as the best so far."""
        candidates = self._monitor_candidates(trainer)
        self.first = float(candidates[str(self.monitor)])
        self._save_topk_checkpoint(trainer, candidates)

    @property
    def is_first(self) -> bool:
        """Whether the best weights are those of `judge_first`."""
        return self.first is not None and self._last_global_step_saved == 0

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        save(trainer, Path(filepath))
        self._last_global_step_saved, self._last_checkpoint_saved = trainer.global_step, filepath

    def rank(self, trainer: L.Trainer) -> tuple[float, float]:
        """Sort key of the last validation, larger is better: (metric, -``val/loss``)."""
        candidates = self._monitor_candidates(trainer)
        value, loss = (float(candidates.get(key, math.nan)) for key in (str(self.monitor), "val/loss"))
        value = value if self.mode == "max" else -value
        return tuple(-math.inf if math.isnan(number) else number for number in (value, -loss))  # type: ignore[return-value]

    def state_dict(self) -> dict[str, Any]:
        """Adds what Lightning's state leaves out."""
        own = {"loss": self._loss, "step": self._last_global_step_saved, "first": self.first, "trained": self.trained}
        return super().state_dict() | own

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores which checkpoint is the best, also if the folder was moved; not if the file is missing."""
        file = Path(str(self.dirpath), Path(state_dict["best_model_path"]).name)
        if not state_dict["best_model_path"] or not file.exists():
            return
        own = {key: str(file) for key in ("best_model_path", "kth_best_model_path")}
        best = {str(file): state_dict["best_model_score"]}
        super().load_state_dict(state_dict | own | {"dirpath": self.dirpath, "best_k_models": best})
        self.current_score = state_dict["current_score"]
        self._loss, self._last_global_step_saved = state_dict.get("loss", math.inf), state_dict.get("step", 0)
        self.first, self.trained = state_dict.get("first"), state_dict.get("trained")


class KeptCheckpoints(Checkpoint):
    """Keeps the k best validations as ``kept/STEP.ckpt`` beside ``best.ckpt``, ranked in the same way. Each is a
    complete checkpoint.

    Args:
        folder: of the training.
        count: how many.
        best: what judges validations; its turn comes before.
    """

    def __init__(self, folder: Path, count: int, best: BestCheckpoint) -> None:
        self.folder, self.count, self.best = folder / "kept", count, best
        self.ranks: dict[int, tuple[float, float]] = {}  # by step

    @property
    def files(self) -> dict[Path, tuple[float, float]]:
        """Paths of the checkpoints, best first, with their ranks; see `BestCheckpoint.rank`."""
        order = sorted(self.ranks, key=lambda step: (self.ranks[step], step), reverse=True)
        return {self.folder / f"{step}.ckpt": self.ranks[step] for step in order}

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves this validation if it is among the k best, and deletes the one that no longer is."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        step = trainer.global_step
        self.ranks[step] = trainer.strategy.broadcast(self.best.rank(trainer))
        names = list(self.files)[: self.count]
        self.ranks = {number: self.ranks[number] for number in (int(file.stem) for file in names)}
        if step in self.ranks:
            save(trainer, self.folder / f"{step}.ckpt")
        if trainer.is_global_zero and self.folder.is_dir():
            for file in self.folder.glob("[0-9]*.ckpt"):
                if file not in names:
                    file.unlink(missing_ok=True)

    def state_dict(self) -> dict[str, Any]:
        """The checkpoints that are kept."""
        return {"ranks": {step: list(rank) for step, rank in self.ranks.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the list of kept checkpoints, including any that a later, repeated validation will delete again."""
        self.ranks = {int(step): (float(value), float(loss)) for step, (value, loss) in state_dict["ranks"].items()}


class LastCheckpoint(Checkpoint):
    """Keeps ``last.ckpt``, from which a training resumes exactly. It is written at the end of each epoch, at regular
    intervals, and when Ctrl-C or SIGTERM ends the training, which happens after the current step or validation. Under
    SLURM, SIGUSR1 (``--signal=SIGUSR1@90``) does the same and requeues the job.

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
        self.twins: list[Path] = []  # other names of the next one
        self._signal = 0
        self._handlers: dict[int, Any] = {}

    def _save(self, trainer: L.Trainer) -> None:
        files, self.twins = self.twins, []
        if files:
            cast(WholeCheckpoints, trainer.strategy.checkpoint_io).twins = files
        try:
            trainer.save_checkpoint(self.path, weights_only=False)
        finally:
            if files:
                cast(WholeCheckpoints, trainer.strategy.checkpoint_io).twins = ()
        self._saved = time.monotonic()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self._signal = number
        again = "; Ctrl-C again ends it at once" if number == signal.SIGINT else ""
        say(
            f"{signal.Signals(number).name}: the training ends after this step or validation, with a checkpoint{again}."
        )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Installs the signal handlers."""
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._note) for number in (signal.SIGINT, *endings())}

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the training's identity and whether it has been stopped early."""
        checkpoint["recipe"], checkpoint["stopped"] = self.recipe, trainer.should_stop

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keeps an early-stopped training at its end; the patience on the command line replaces the checkpoint's."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        trainer.should_stop = checkpoint.get("stopped", False) and not self.goes_on
        for callback in settings_of(trainer).callbacks:
            if isinstance(callback, EarlyStopping) and (state := checkpoint["callbacks"].get(callback.state_key)):
                state["patience"] = callback.patience

    def offer(self, trainer: L.Trainer) -> None:
        """Saves if it is time, and stops if a signal has arrived; all processes act together."""
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
        """Saves the epoch, and stops if a signal has arrived."""
        self._save(trainer)
        self._end(trainer, self._agreed(trainer, self._signal))

    @staticmethod
    def _agreed(trainer: L.Trainer, number: int) -> int:
        """Maximum of a number over all processes."""
        if trainer.world_size == 1:
            return number
        device = trainer.strategy.root_device
        return int(trainer.strategy.reduce(torch.tensor(number, device=device), reduce_op="max"))

    @staticmethod
    def _end(trainer: L.Trainer, number: int) -> None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if number:
            end(trainer, number)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restores the previous signal handlers and passes on a signal that came after the last step."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
        number, self._signal = self._signal, 0
        if number and trainer.state.status != TrainerStatus.INTERRUPTED:
            signal.raise_signal(number)
