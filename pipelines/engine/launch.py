"""How a process was launched (directly, by torchrun or by SLURM), and coordination between the processes of a job."""

import os
import platform
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import lightning as L
import psutil
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from pipelines.engine.command import UsageError


@dataclass(frozen=True)
class Launcher:
    """The launcher of all processes of a job.

    Args:
        name: of the launcher.
        processes: that it started.
        on_this_node: how many of them are on this machine.
    """

    name: str
    processes: int
    on_this_node: int

    @property
    def nodes(self) -> int:
        """Number of machines in the job."""
        return max(1, self.processes // self.on_this_node)

    def objection(self, world_size: int) -> str | None:
        """Why a trainer's settings do not fit the job, as a sentence for the user."""
        if world_size == self.processes:
            return None
        what = "each would train a model of its own" if world_size == 1 else "they would wait for each other for ever"
        return (
            f"{self.name} started {self.processes} {'process' if self.processes == 1 else 'processes'}, but the "
            f"trainer expects {world_size}: {what}. Give --trainer.devices {self.on_this_node} --trainer.num_nodes "
            f"{self.nodes}, and let every process see all devices of its machine (srun with --gpus-per-node instead "
            "of --gpus-per-task, no CUDA_VISIBLE_DEVICES for each process)."
        )


def launcher() -> Launcher | None:
    """The launcher that started this process; None if the command starts its own processes."""
    environment = os.environ
    if TorchElasticEnvironment.detect():
        total = int(environment["WORLD_SIZE"])
        return Launcher("torchrun", total, int(environment.get("LOCAL_WORLD_SIZE", total)))
    if SLURMEnvironment.detect():
        total = int(environment.get("SLURM_NTASKS", 1))
        nodes = int(environment.get("SLURM_NNODES") or environment.get("SLURM_JOB_NUM_NODES") or 1)
        # of several nodes SLURM writes "2(x3)"
        local = environment.get("SLURM_NTASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or ""
        return Launcher("SLURM", total, int(local.split("(")[0]) if local[:1].isdigit() else max(1, total // nodes))
    return None


def check_single(command: str, devices: Any) -> None:
    """Refuses several processes for a command that starts one training after the other.

    Args:
        command: its name.
        devices: ``trainer.devices`` of the trainings.

    Raises:
        ValueError: there are several processes, or would be.
    """
    job = launcher()
    several = len(devices) > 1 if isinstance(devices, list) else str(devices).isdecimal() and int(devices) > 1
    if several or (job and job.processes > 1):
        raise ValueError(
            f"{command} starts one training after the other, each in a single process: start it without torchrun or srun, and leave "
            "--trainer.devices out of --args and the recipe."
        )


@contextmanager
def agreed(trainer: L.Trainer) -> Iterator[None]:
    """Context for what each process does before they communicate: an error in one of them ends all, instead of leaving
    the others waiting.

    Raises:
        UsageError: another process came to an error.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    if launcher() is not None and trainer.world_size > 1:
        trainer.strategy.setup_environment()  # which Lightning does later, and leaves out where it was done
        said: list[str | None] = [None] * trainer.world_size
        torch.distributed.all_gather_object(said, str(error) if error else None)
        others = [f"Process {rank} of {len(said)} ends: {why}" for rank, why in enumerate(said) if why]
        if others:
            torch.distributed.destroy_process_group()
            raise error or UsageError(others[0])
    if error:
        raise error


def least(trainer: L.Trainer, number: int) -> int:
    """Minimum of a number over all launched processes."""
    if launcher() is None or trainer.world_size == 1:
        return number
    said = [number] * trainer.world_size
    torch.distributed.all_gather_object(said, number)  # `agreed` has connected them
    return min(said)


class LostError(RuntimeError):
    """Another process of the job has died or does not answer; the message names it."""


def processes(trainer: L.Trainer) -> list[tuple[str, int]]:
    """Host name and PID of each process of a job, by rank; empty for a single process."""
    if trainer.world_size == 1:
        return []
    found: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(found, (platform.node(), os.getpid()))
    return found


def lost(error: BaseException, others: Sequence[tuple[str, int]]) -> LostError | None:
    """A `LostError` if an error means that another process has stopped responding."""
    if not others or not isinstance(error, RuntimeError):
        return None
    if not isinstance(error, torch.distributed.DistError) and not re.search("gloo|nccl|by peer", str(error), re.I):
        return None
    here = {rank: pid for rank, (node, pid) in enumerate(others) if node == platform.node()}
    gone: list[int] = []
    for _ in range(20):  # the connection is closed a moment before the process is gone
        gone = [rank for rank, pid in here.items() if _status(pid) == psutil.STATUS_ZOMBIE]
        if gone:
            break
        time.sleep(0.1)
    stopped = [] if gone else [rank for rank, pid in here.items() if _status(pid) == psutil.STATUS_STOPPED]
    who = " and ".join(f"Process {rank} of {len(others)} (number {here[rank]} here)" for rank in gone or stopped)
    who = who or f"Another of the {len(others)} processes"
    again = "The same command with the same --output goes on from the last checkpoint"
    if stopped or (not gone and re.search("timed out", str(error), re.I)):
        return LostError(
            f"{who} did not answer in time: it was stopped, or waits for a disk or a device. {again}, once all processes have ended."
        )
    return LostError(
        f"{who} has ended: it was killed, as happens when memory runs out, or failed with an error that it printed itself. {again}."
    )


def without_gradient(error: BaseException, module: torch.nn.Module) -> UsageError | None:
    """A `UsageError` if an error means that a loss does not depend on all weights, whose gradients DDP waits for."""
    if not isinstance(error, RuntimeError) or "not used in producing" not in str(error):
        return None
    names = [name for name, value in module.named_parameters() if value.requires_grad and value.grad is None]
    what = f"{', '.join(names[:3])}{', …' if len(names) > 3 else ''}" if names else "some weights"
    return UsageError(
        f"The loss of a step did not depend on {what}, and several processes wait for the gradient of every weight: train with "
        "--trainer.strategy ddp_find_unused_parameters_true, which looks for such weights in each step."
    )


def _status(pid: int) -> str:
    """A process's status of psutil; one that is gone counts as a zombie, which has ended too."""
    try:
        return str(psutil.Process(pid).status())
    except psutil.NoSuchProcess:
        return psutil.STATUS_ZOMBIE


def is_child() -> bool:
    """Whether another process of this same command started this one, for a further device."""
    return "LOCAL_RANK" in os.environ and launcher() is None


def stamp() -> str:
    """Identifies a training: the current time, or within a job an identifier that all processes share, also after a
    restart."""
    if SLURMEnvironment.detect():
        return f"slurm-{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_STEP_ID', 0)}"
    start, parent = time.time(), ""
    if TorchElasticEnvironment.detect():  # torchrun is their parent
        if int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1:
            raise UsageError("Give --output a folder that all nodes see: their processes must agree on one.")
        start, parent = psutil.Process(os.getppid()).create_time(), f"-{os.getppid()}"
    return datetime.fromtimestamp(start).strftime("%Y%m%d-%H%M%S") + parent
