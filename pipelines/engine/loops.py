"""Lightning's loops with safe points for checkpoints: moments between steps at which no work is half done."""

from collections.abc import Callable
from typing import Any, Literal

import lightning as L
from lightning.pytorch.loops import fit_loop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from modules.training_data import settings_of
from pipelines.engine.checkpoint import LastCheckpoint
from pipelines.engine.overhead import spared

Moment = Literal["before validation", "after batch"]  # at which nothing is half done


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

    def _should_accumulate(self) -> bool:
        return self.trainer.accumulate_grad_batches > 1 and super()._should_accumulate()

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
        """Trains."""
        with spared(self.trainer):
            super().run()

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
