"""What started a command and with which arguments, and where an evaluation finds its recipe and its weights, and writes to."""

import argparse
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from pathlib import Path

import lightning as L
import psutil
import torch
import yaml
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from pipelines.engine.command import UsageError

LOOKS = ("validate", "test", "predict", "preview")  # they change nothing of a training
MACHINE = (  # settings of the machine that trained, which need not be the one that evaluates
    "--trainer.accelerator=auto",
    "--trainer.devices=auto",
    "--trainer.num_nodes=1",
    "--trainer.strategy=auto",
)


@dataclass(frozen=True)
class Launcher:
    """What started all processes of a job.

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
        """Machines of the job."""
        return max(1, self.processes // self.on_this_node)

    def objection(self, world_size: int) -> str | None:
        """Why a trainer cannot train one model with others, in a sentence for the user.

        Args:
            world_size: processes that the trainer counts on.
        """
        if world_size == self.processes:
            return None
        what = "each would train a model of its own" if world_size == 1 else "they would wait for each other for ever"
        return (
            f"{self.name} started {self.processes} {'process' if self.processes == 1 else 'processes'}, but the trainer "
            f"counts on {world_size}: {what}. Give --trainer.devices {self.on_this_node} --trainer.num_nodes {self.nodes}, "
            "and let every process see all devices of its machine (srun with --gpus-per-node instead of --gpus-per-task, no "
            "CUDA_VISIBLE_DEVICES for each process)."
        )


def launcher() -> Launcher | None:
    """What started this process together with others; None where the command starts its processes itself."""
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


@contextmanager
def agreed(trainer: L.Trainer) -> Iterator[None]:
    """What is done by each process of a job before they work together: what one of them refuses, all refuse, where they would
    wait for it.

    Args:
        trainer: Lightning's.

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


def is_child() -> bool:
    """Whether another process of this very command started this one, for a further device."""
    return "LOCAL_RANK" in os.environ and launcher() is None


def expand(args: Sequence[str]) -> list[str]:
    """Undoes what `mlflow run` does to arguments.

    The value of ``--args`` is split as a shell would split it, though by no shell, and an option with an empty value
    counts as not given.
    """
    result: list[str] = []
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        if arg == "--args" and rest:
            result += shlex.split(rest.pop(0))
        elif arg.startswith("--") and "=" not in arg and rest and rest[0] == "":
            rest.pop(0)
        else:
            result.append(arg)
    return result


def recipes(args: Sequence[str]) -> list[str]:
    """What is given with ``--config``, which need not be a file."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    return list(parser.parse_known_args(args)[0].config)


def last_of(args: Sequence[str], *options: str) -> dict[str, str | None]:
    """What a command line gives for some options such as ``--output``, the last of each; None where it gives nothing."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in options:
        parser.add_argument(option)
    return vars(parser.parse_known_args(args)[0])


def data_class(args: Sequence[str], default: str) -> str:
    """The class of the data that a command line asks for, by its name or path: the last one given, there or in a recipe.

    Args:
        args: the command line.
        default: the class where none is given.
    """

    def given(text: str) -> str | None:
        settings = yaml.safe_load(text)
        return settings.get("class_path") if isinstance(settings, dict) else settings

    def recipe(text: str) -> str | None:
        settings = yaml.safe_load(Path(text).read_text() if os.path.isfile(text) else text)
        return given(str(settings.get("data"))) if isinstance(settings, dict) else None

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-c", "--config", dest="data", action="append", type=recipe)
    parser.add_argument("--data", "--data.class_path", dest="data", action="append", type=given)
    try:
        named = parser.parse_known_args(args)[0].data or []
    except (argparse.ArgumentError, OSError, ValueError, yaml.YAMLError):
        return default  # whoever reads the command line for good says what is wrong
    return next((name for name in reversed(named) if isinstance(name, str)), default)


def check_recipes(args: Sequence[str]) -> None:
    """Makes sure that the files given with ``--config`` are recipes.

    Raises:
        UsageError: one is none.
    """
    for file in filter(os.path.isfile, recipes(args)):
        try:
            settings = yaml.safe_load(Path(file).read_text())
        except OSError as error:
            raise UsageError(f"--config {file} cannot be read ({error.strerror}).") from None
        except UnicodeDecodeError:
            weights = (
                " Weights go with --ckpt_path, or with --start." if file.endswith((".ckpt", ".safetensors")) else ""
            )
            raise UsageError(f"--config {file} is no text in UTF-8: give a recipe in YAML.{weights}") from None
        except yaml.YAMLError as error:
            raise UsageError(f"--config {file} is no YAML: {' '.join(str(error).split())}.") from None
        if not isinstance(settings, dict):
            raise UsageError(f"--config {file} is no recipe: it has no settings such as model: and trainer: in it.")
        for part in ("model", "trainer"):
            if not isinstance(settings.get(part) or {}, dict):
                raise UsageError(f"--config {file}: {part} has settings by their names, not {settings[part]!r}.")


def with_recipe(args: Sequence[str]) -> list[str]:
    """The arguments of an evaluation with the recipe of the training that is evaluated, where none is given.

    Args:
        args: the command line; those of other commands stay as they are.
    """
    verb, *rest = args
    if verb not in LOOKS or recipes(rest):
        return [*args]
    checkpoint, output = last_of(rest, "--ckpt_path", "--output").values()
    folders = [Path(checkpoint).parent] if checkpoint else []
    folders += [Path(output)] if output else []
    training = next((f for f in folders if (f / "config.yaml").exists() and is_training(f)), None)
    if training is None:
        return [*args]
    unset = [f"--{name}=null" for name in ("run_name", "register", "output", "start")]
    own = ["--config", str(training / "config.yaml"), *unset, *MACHINE]
    best = training / "best.ckpt"
    return [verb, *own, f"--ckpt_path={best if verb != 'preview' and best.exists() else 'null'}", *rest]


def is_training(folder: Path) -> bool:
    """Whether there are weights in a folder, which an evaluation has none of."""
    return any(folder.glob("*.ckpt"))


def own_folder(folder: Path, verb: str, stamp: str) -> Path:
    """Where an evaluation writes to: the folder that is given, or a new one in it where another run is at home there.

    Args:
        folder: that is given.
        verb: the command.
        stamp: what tells evaluations apart.
    """
    if is_child():
        return folder
    run, since = folder / "run.json", time.time()
    if launcher() is not None:  # another process of this job may have begun the run
        since = psutil.Process(os.getppid()).create_time()
    if not is_training(folder) and not (run.exists() and run.stat().st_mtime < since):
        return folder
    place, number = folder / f"{verb}-{stamp}", 1
    while launcher() is None and place.exists():
        number += 1
        place = folder / f"{verb}-{stamp}+{number}"
    return place


def stamp() -> str:
    """What tells trainings apart: the time, or what is the same in all processes of a job, also after a restart."""
    if SLURMEnvironment.detect():
        return f"slurm-{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_STEP_ID', 0)}"
    start, parent = time.time(), ""
    if TorchElasticEnvironment.detect():  # torchrun is their parent
        if int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1:
            raise UsageError("Give --output a folder that all nodes see: their processes must agree on one.")
        start, parent = psutil.Process(os.getppid()).create_time(), f"-{os.getppid()}"
    return datetime.fromtimestamp(start).strftime("%Y%m%d-%H%M%S") + parent


def new_folder(folder: Path) -> Path:
    """Makes a folder, with a number where there is one of this name; but the processes of a job share theirs."""
    if launcher() is not None:
        return folder
    for number in count(2):
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            folder = folder.with_name(f"{folder.name.partition('+')[0]}+{number}")
    return folder
