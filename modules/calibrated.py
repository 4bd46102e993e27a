"""Base class of modules whose decision thresholds are calibrated on the validation set."""

from typing import Any

from torch import Tensor
from typing_extensions import override

from modules.base import VisionModule


class CalibratedModule(VisionModule):
    """Stores decision thresholds with the weights. Thresholds are measured, so they are not part of a moving average of
    the weights.

    A subclass calls `keep_thresholds` in its constructor, and `calibrate` when it reports on the validation set.
    """

    threshold: Tensor
    measured: Tensor

    def keep_thresholds(self, values: Tensor) -> None:
        """Registers the initial thresholds, float of any shape."""
        self.register_buffer("threshold", values)
        self.measured = values.clone()

    def calibrate(self, values: Tensor) -> None:
        """Sets the thresholds to those that were best on the validation set."""
        self.measured = values.detach().cpu().clone()
        self.threshold.copy_(values)

    def save_thresholds(self, state: dict[str, Tensor], prefix: str = "") -> None:
        """Writes the measured thresholds into a checkpoint's state dict, under names that begin with ``prefix``."""
        state[f"{prefix}threshold"] = self.measured.clone()

    def load_thresholds(self, state: dict[str, Tensor], prefix: str = "") -> None:
        """Reads the measured thresholds from a checkpoint's state dict."""
        self.measured = state[f"{prefix}threshold"].cpu().clone()

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        self.save_thresholds(checkpoint["state_dict"])

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.load_thresholds(checkpoint["state_dict"])

    def on_train_end(self) -> None:
        """Restores the measured thresholds after averaged weights have replaced the trained ones."""
        self.threshold.copy_(self.measured)
