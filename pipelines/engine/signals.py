"""Signals that end a command: SIGTERM, and SIGUSR1 under SLURM, which also requeues the job."""

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import lightning as L
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities.exceptions import SIGTERMException

from pipelines.engine.terminal import say


class Signals(_SignalConnector):
    """Lightning's signal connector without its handlers, which would only note a SIGTERM outside a training step and
    continue."""

    def register_signal_handlers(self) -> None:
        """Remembers the present handlers."""
        self._original_handlers = self._get_current_signal_handlers()


def endings() -> list[int]:
    """The signals that end a command."""
    return [signal.SIGTERM, *([signal.SIGUSR1] if SLURMEnvironment.detect() else [])]


def end(trainer: L.Trainer, number: int) -> NoReturn:
    """Raises the exception that ends the command.

    Raises:
        SIGTERMException: always.
    """
    if number == signal.SIGUSR1 and trainer.is_global_zero:
        try:
            subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
        except (OSError, subprocess.SubprocessError) as error:
            say(f"The job is not back in the queue ({error}): start it again with the same --output.")
    raise SIGTERMException


def stopped(error: BaseException | None) -> bool:
    """Whether a command was ended by the user or the scheduler (Ctrl-C or a signal) rather than by an error."""
    if isinstance(error, KeyboardInterrupt | SIGTERMException):
        return True
    # Lightning makes one of 1 out of a Ctrl-C in its loops
    return isinstance(error, SystemExit) and (
        error.code in (130, 143) or isinstance(error.__context__, KeyboardInterrupt)
    )


@contextmanager
def heard(trainer: L.Trainer) -> Iterator[Callable[[], None]]:
    """Context in which a signal ends the current work at once, except for training steps, which `LastCheckpoint` ends
    safely.

    Yields:
        What is called when the command has come to its end and only tells the run: a first signal, such as torchrun's to those
        that are left of a job, does not cut that short.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    ending = threading.Event()

    def act(number: int, frame: FrameType | None) -> None:
        signal.signal(number, before[number])  # a second one does not wait for the run to be ended
        if ending.is_set():
            return
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(number)
        end(trainer, number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *endings())}
    for number in endings():
        signal.signal(number, act)
    try:
        yield ending.set
    finally:
        for number, handler in before.items():  # Lightning ignores Ctrl-C from the first one on
            signal.signal(number, handler)
