"""A task: its module, its default data, and its extra commands."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pipelines.__main__ import TASKS
from pipelines.engine.command import UsageError, command, explained, mistakes
from pipelines.engine.process import ending, importing
from pipelines.engine.recipes import check_recipes, expand, import_code, with_recipe
from pipelines.engine.settings import present
from pipelines.engine.terminal import print_table

if TYPE_CHECKING:
    import lightning as L

    from pipelines.engine.cli import VisionCLI

SUBCOMMANDS = {
    "fit": "Train, test the best checkpoint, and register it if --register names a model.",
    "validate": "Measure a checkpoint on the validation split.",
    "test": "Measure a checkpoint on the test split.",
    "predict": "Write a checkpoint's answers for the test split to predictions.jsonl.",
    "preview": "Draw a sheet of training samples with and without augmentation.",
}


@dataclass(frozen=True, eq=False)
class Task:
    """A task and its command line, defined in ``pipelines/NAME.py``.

    Its parts are given as import paths, so that help and errors of the command line need no import of PyTorch, which takes
    seconds.

    Args:
        name: of the file, of the recipes' folder and of the MLflow experiment.
        module_class: what learns.
        default_data: the data that a run without arguments learns from.
        commands: what only this task does with a trained model, each a function by whose name it is called.
    """

    name: str
    module_class: str
    default_data: str
    commands: tuple[str, ...] = ()

    def __call__(self, args: Sequence[str] | None = None, callbacks: "Sequence[L.Callback]" = ()) -> "VisionCLI":
        """Runs a subcommand; a user error ends in one paragraph and exit code 2.

        Args:
            args: the command line; None takes the process's own. Without any argument it is ``fit``.
            callbacks: of the trainer, beside those that the command line names.
        """
        with mistakes(self.name, UsageError):
            return self.run(sys.argv[1:] if args is None else args, callbacks)

    def run(self, args: Sequence[str], callbacks: "Sequence[L.Callback]" = ()) -> "VisionCLI":
        """Runs a subcommand from Python.

        Args:
            args: the command line. Without any argument it is ``fit``.
            callbacks: of the trainer, beside those that the command line names.

        Raises:
            UsageError: it cannot be done as given; the message says what to give instead.
        """
        with explained(self.name, UsageError):
            given = present(expand(args)) or ["fit"]
            self._check_verb(given[0])
            whole = with_recipe(given)
            check_recipes(whole)

        with importing():
            from datamodules import DataError
            from modules import BackboneError
            from modules.callbacks.divergence import DivergenceError
            from pipelines.engine.cli import VisionCLI
            from pipelines.engine.disk import DiskError, LockError
            from pipelines.engine.launch import LostError
            from pipelines.engine.start import with_start

        errors = (BackboneError, DataError, DiskError, DivergenceError, LockError, LostError, UsageError)
        with explained(self.name, *errors):
            import_code(whole)
            with importing():
                kind = imported(self.module_class)
            whole, start = with_start(whole, kind)
            return VisionCLI(self.name, kind, self.default_data, whole, callbacks, start)

    def main(self, args: Sequence[str] | None = None) -> None:
        """The whole command line: the subcommands of training and evaluation, which end with a table, and the task's own
        commands.

        Args:
            args: the command line; None takes the process's own.
        """
        own = {path.rpartition(".")[2]: path for path in self.commands}
        with ending() if args is None else nullcontext():
            given = list(sys.argv[1:] if args is None else args)
            if given and given[0] in own:
                command(imported(own[given[0]]), given[1:], f"{self.name} {given[0]}")
            else:
                print_table(self.name.replace("_", " "), self(given).rows)

    def _check_verb(self, verb: str) -> None:
        """Tells what there is to do, if that is asked for.

        Raises:
            UsageError: there is nothing of this name.
        """
        own = [path.rpartition(".")[2] for path in self.commands]
        if verb in ("-h", "--help"):
            about = f"Fovea, {self.name}. Recipes are in configs/{self.name}. Without arguments: fit, on {self.default_data.split('.')[-1]}."
            if own:
                about += f" Of a trained model, each with its own --help: {', '.join(own)}."
            parser = argparse.ArgumentParser(f"python -m pipelines.{self.name}", description=about)
            subcommands = parser.add_subparsers(title="commands", metavar="COMMAND", prog="")
            for name, text in SUBCOMMANDS.items():
                subcommands.add_parser(name, help=text)
            parser.parse_args([verb])
        if not verb.startswith("-") and verb not in SUBCOMMANDS:
            near = get_close_matches(verb, names := [*SUBCOMMANDS, *own], 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UsageError(f"{self.name} has no {verb}, but {', '.join(names)}.{hint}")


def imported(path: str) -> Any:
    """A class or function by its import path."""
    place, _, name = path.rpartition(".")
    return getattr(import_module(place), name)


def find_task(name: str) -> Task:
    """Imports and returns the task of a name.

    Raises:
        ValueError: there is none.
    """
    try:
        task = getattr(import_module(f"pipelines.{name}"), name)
    except (ImportError, AttributeError, TypeError):
        task = None
    if not isinstance(task, Task):
        near = get_close_matches(name, TASKS, 1)
        raise ValueError(
            f"There is no task {name!r}, but {', '.join(TASKS)}.{f' Did you mean {near[0]}?' if near else ''}"
        )
    return task
