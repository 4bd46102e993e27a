"""Modules whose answers hang on thresholds that validation measures."""

from typing import Any

from torch import Tensor
from typing_extensions import override

from modules.base import VisionModule


class CalibratedModule(VisionModule):
    """Keeps thresholds with the weights. A threshold is a measurement: where weights are averaged, it is not.

    A subclass calls `keep_thresholds` when its network is made, and `calibrate` in its report of the validation.
    """

    threshold: Tensor
    measured: Tensor

    def keep_thresholds(self, values: Tensor) -> None:
        """Begins with these, float of any shape."""
        self.register_buffer("threshold", values)
        self.measured = values.clone()

    def calibrate(self, values: Tensor) -> None:
        """Takes what validation found to be best."""
        self.measured = values.detach().cpu().clone()
        self.threshold.copy_(values)

    def save_thresholds(self, state: dict[str, Tensor], prefix: str = "") -> None:
        """Puts those that were measured among the weights of a checkpoint, whose names begin with ``prefix``."""
        state[f"{prefix}threshold"] = self.measured.clone()

    def load_thresholds(self, state: dict[str, Tensor], prefix: str = "") -> None:
        """Takes them from there."""
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
        """Takes what was measured last, where the weights became their average."""
        self.threshold.copy_(self.measured)
