"""Lightning's loops with safe points for checkpoints: moments between steps at which no work is half done."""

from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.loops import fit_loop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from modules.training_data import settings_of
from pipelines.engine.checkpoint import LastCheckpoint

STEP_HOOKS = (
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
)
takes = cache(is_param_in_hook_signature)
Moment = Literal["before validation", "after batch"]  # at which nothing is half done


class NoProfiler(PassThroughProfiler):
    """Lightning's default, which measures nothing, without the context that it would make for each of a step's hooks."""

    _nothing = nullcontext()

    def profile(self, action_name: str) -> Any:
        """Does nothing."""
        return self._nothing


class _EpochLoop(_TrainingEpochLoop):
    """Lightning's training-epoch loop. It calls `LastCheckpoint` at safe points: between two batches, after everything
    that follows the first, and before a validation, which a resumed training then starts with.
    """

    settled: Moment | None = None  # what a checkpoint is of; else one within a hook

    @property
    def done(self) -> bool:
        """Whether all batches of the epoch are done and no validation is due."""
        return self.settled != "before validation" and super().done

    def reset(self) -> None:
        """Starts or resumes; after a checkpoint from a safe point there is nothing to catch up on."""
        super().reset()
        if self.settled:
            self.restarting = self.trainer.fit_loop._restarting = False  # the latter would leave out ReduceLROnPlateau

    def advance(self, data_fetcher: Any) -> None:
        """Trains on a batch, unless only the validation is left."""
        outstanding, self.settled = self.settled == "before validation", None
        if not outstanding:
            super().advance(data_fetcher)

    def _build_kwargs(self, kwargs: OrderedDict[str, Any], batch: Any, batch_idx: int) -> OrderedDict[str, Any]:
        """Returns the arguments of ``training_step``, whose signature Lightning would inspect in each step."""
        if takes(type(self.trainer.lightning_module).training_step, "batch_idx", min_args=2):
            return OrderedDict(batch=batch, batch_idx=batch_idx)
        return OrderedDict(batch=batch)

    def on_advance_end(self, data_fetcher: Any) -> None:
        """Validates if it is due."""
        stops = self.trainer.should_stop  # it is not known to the loop that goes on: the end of the epoch is waited for
        if not stops and not self._skip_next_val and self._should_check_val_fx(data_fetcher):
            self.save("before validation", LastCheckpoint.offer)
        super().on_advance_end(data_fetcher)
        if not (self.trainer.should_stop or self._is_training_done):
            self.save("after batch", LastCheckpoint.offer)

    def save(self, settled: Moment, way: Callable[[LastCheckpoint, L.Trainer], None]) -> None:
        """Lets `LastCheckpoint` save at a safe point."""
        self.settled = settled
        try:
            for callback in settings_of(self.trainer).callbacks:
                if isinstance(callback, LastCheckpoint):
                    way(callback, self.trainer)
        finally:
            self.settled = None

    def on_save_checkpoint(self) -> dict[str, Any]:
        """Records which safe point the checkpoint was saved at."""
        return super().on_save_checkpoint() | {"settled": self.settled}

    def on_load_checkpoint(self, state_dict: dict[str, Any]) -> None:
        """Resumes from the safe point that `on_save_checkpoint` recorded."""
        super().on_load_checkpoint(state_dict)
        self.settled = state_dict.get("settled")


class _FitLoop(fit_loop._FitLoop):
    """Lightning's epoch loop. It calls `LastCheckpoint` once an epoch is completely finished: validation, other
    checkpoints, learning-rate schedules."""

    epoch_loop: _EpochLoop

    def run(self) -> None:
        """Trains. PyTorch's optimisers ask in each step how many GPUs there are, and without one NVML is looked for each
        time: here it is asked once."""
        known = torch.cuda._cached_device_count
        torch.cuda._cached_device_count = torch.cuda.device_count()
        try:
            super().run()
        finally:
            torch.cuda._cached_device_count = known

    def setup_data(self) -> None:
        """Creates the data loaders.

        Raises:
            MisconfigurationException: there is never a validation between the steps at which it is asked for.
        """
        every = self.trainer.val_check_interval
        try:
            super().setup_data()
        except ValueError as error:
            if "val_check_interval" not in str(error):
                raise
            raise MisconfigurationException(
                f"--trainer.val_check_interval {every} is more than the {self.max_batches} steps of an epoch: give at most "
                "those, or a share of them below 1, or --trainer.check_val_every_n_epoch null to count over epochs."
            ) from None
        if self.trainer.val_check_batch == 0:
            raise MisconfigurationException(f"--trainer.val_check_interval must be more than 0, not {every}.")

    def _iteration_based_training(self) -> bool:
        return False  # with max_steps, Lightning goes through an epoch that is over once more

    def on_advance_end(self) -> None:
        """Ends the epoch."""
        super().on_advance_end()
        self.epoch_loop.save("after batch", LastCheckpoint.end_epoch)

    def on_run_start(self) -> None:
        """Begins, and spares each step what is known before: which callbacks do nothing in it (Lightning passes over
        ``None``), and whether the module or its data have a hook of batches."""
        selector: Any = self.trainer._data_connector._datahook_selector
        selector.get_instance = cache(selector.get_instance)
        for callback in settings_of(self.trainer).callbacks:
            for hook in STEP_HOOKS:
                own = vars(callback).get(hook, getattr(type(callback), hook))  # LambdaCallback's are the object's
                if own is getattr(L.Callback, hook):
                    setattr(callback, hook, None)
        super().on_run_start()
