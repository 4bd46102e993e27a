"""Faults that tests bring about."""

import os
import signal
from typing import Any

import lightning as L


class Kill(L.Callback):
    """Sends this process a signal in the middle of an optimiser step.

    Args:
        step: the step.
        signal_name: which signal.
    """

    def __init__(self, step: int, signal_name: str = "SIGKILL") -> None:
        self.step, self.signal_name = step, signal_name

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), getattr(signal, self.signal_name))


class Crash(L.Callback):
    """Raises an error in the middle of a training."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 3:
            raise ZeroDivisionError("on purpose")
