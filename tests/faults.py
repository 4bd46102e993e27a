"""Faults that tests bring about."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from mlflow.tracking import MlflowClient


class Kill(L.Callback):
    """Sends this process a signal in the middle of an optimiser step.

    Args:
        step: the step.
        signal_name: which signal.
        rank: of the process that alone gets it; by default all do.
    """

    def __init__(self, step: int, signal_name: str = "SIGKILL", rank: int | None = None) -> None:
        self.step, self.signal_name, self.rank = step, signal_name, rank

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        if trainer.global_step == self.step and self.rank in (None, trainer.global_rank):
            os.kill(os.getpid(), getattr(signal, self.signal_name))


class Send(L.Callback):
    """Sends this process a signal in one of the trainer's hooks, the first time.

    Args:
        hook: its name.
        signal_name: which signal.
    """

    def __init__(self, hook: str, signal_name: str = "SIGTERM") -> None:
        self.signal_name, self.sent = signal_name, False
        setattr(self, hook, self.send)

    def send(self, *args: Any) -> None:
        if not self.sent:
            self.sent = True
            signal.raise_signal(getattr(signal, self.signal_name))


class Crash(L.Callback):
    """Raises an error in the middle of a training.

    Args:
        step: the step.
    """

    def __init__(self, step: int = 3) -> None:
        self.step = step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            raise ZeroDivisionError("on purpose")


class Spoil(L.Callback):
    """Makes a weight NaN once an optimiser step is done.

    Args:
        step: the step.
        parameter: whose weight.
    """

    def __init__(self, step: int, parameter: str) -> None:
        self.step, self.parameter = step, parameter

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            pl_module.get_parameter(self.parameter).data[0] = float("nan")


class SpoilLoss(L.Callback):
    """Makes what one process's head says infinite, and with it its loss.

    Args:
        step: from this step on.
        rank: the process.
    """

    def __init__(self, step: int, rank: int) -> None:
        self.step, self.rank = step, rank

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            pl_module.head.register_forward_hook(lambda part, given, made: made * float("inf"))


class Idle(L.Callback):
    """Adds a weight that no loss depends on."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        pl_module.idle = torch.nn.Parameter(torch.zeros(1))


class Notify(L.Callback):
    """Has settings that are nobody's business."""

    def __init__(self, address: str, api_key: str) -> None: ...


PASSWORD = "correct-horse-battery"


class Server:
    """An `mlflow server` with a store of its own, on a free port; ``more`` are further arguments of its command."""

    current: ClassVar["Server"]

    def __init__(self, folder: Path, *more: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.uri, self.more = folder, f"http://127.0.0.1:{self.port}", more
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", "1",
                   "--backend-store-uri", f"sqlite:///{self.folder}/server.db",
                   "--artifacts-destination", str(self.folder / "artifacts"), *self.more]  # fmt: skip
        environment = os.environ | {
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "for tests",
            "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
        }
        with (self.folder / "server.log").open("a") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, cwd=self.folder, env=environment
            )

    def answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def wait(self) -> None:
        while not self.answers():
            assert self._process is not None
            assert self._process.poll() is None, (self.folder / "server.log").read_text()[-2000:]
            time.sleep(0.2)

    def stop(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


class Outage(L.Callback):
    """Stops the server in the middle of a training.

    Args:
        begin: the step.
        end: the step at which it is started again, if it is.
    """

    def __init__(self, begin: int, end: int = -1) -> None:
        self.begin, self.end = begin, end

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.begin:
            Server.current.stop()
        if trainer.global_step == self.end:
            assert not Server.current.answers()
            Server.current.start()


class DeleteRun(L.Callback):
    """Deletes the run in the middle of a training.

    Args:
        step: the step.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            MlflowClient().delete_run(trainer.logger.run_id)


class Points(L.Callback):
    """Counts the moments of a training, and does something at them: before and after each step, validation batch, and write of
    a checkpoint or picture in a folder.

    Args:
        folder: of the training.
        at: the number of the moment at which a signal is sent; none by default.
        signal_name: which signal.
    """

    act: ClassVar[Callable[[int, str], None] | None] = None  # in this process
    current: ClassVar["Points | None"] = None
    hooked = False

    def __init__(self, folder: str, at: int = -1, signal_name: str = "SIGKILL") -> None:
        self.folder, self.at, self.signal_name = os.path.abspath(folder), at, signal_name
        self.names: list[str] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            if not Points.hooked:
                sys.addaudithook(Points.watch)
            Points.hooked, Points.current = True, self

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        Points.current = None

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        Points.current = None

    @staticmethod
    def watch(event: str, args: tuple[Any, ...]) -> None:
        self = Points.current
        if self is None or event not in ("open", "os.rename") or not isinstance(args[0], str | os.PathLike):
            return
        file = os.path.abspath(args[0])
        if (
            file.startswith(self.folder)
            and file.endswith((".ckpt", ".new", ".png"))
            and (event != "open" or "w" in (args[1] or ""))
        ):
            self.reach(f"{event} {os.path.basename(file)}")

    def reach(self, name: str) -> None:
        number = len(self.names)
        self.names.append(name)
        if number == self.at:
            os.kill(os.getpid(), getattr(signal, self.signal_name))
        if Points.act is not None:
            Points.act(number, name)

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.reach(f"before step {trainer.global_step}")

    def on_before_optimizer_step(self, trainer: L.Trainer, *args: Any) -> None:
        self.reach(f"in step {trainer.global_step}")

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.reach(f"after step {trainer.global_step}")

    def on_validation_batch_start(self, *args: Any) -> None:
        self.reach("before validation batch")

    def on_validation_batch_end(self, *args: Any) -> None:
        self.reach("after validation batch")
