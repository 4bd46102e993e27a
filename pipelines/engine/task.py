"""A task: its module, its default data, and its extra commands."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module

import lightning as L

from datamodules import DataError
from modules import BackboneError, VisionModule
from modules.callbacks.divergence import DivergenceError
from pipelines.__main__ import TASKS
from pipelines.engine.cli import VisionCLI
from pipelines.engine.command import UsageError, command, explained, mistakes
from pipelines.engine.disk import DiskError, LockError
from pipelines.engine.launch import LostError
from pipelines.engine.recipes import check_recipes, expand, import_code, with_recipe
from pipelines.engine.settings import present
from pipelines.engine.start import with_start
from pipelines.engine.terminal import print_table
from pipelines.tracking.client import TrackingError

MISTAKES = (
    BackboneError,
    DataError,
    DiskError,
    DivergenceError,
    LockError,
    LostError,
    TrackingError,
    UsageError,
)


@dataclass(frozen=True, eq=False)
class Task:
    """A task and its command line, defined in ``pipelines/NAME.py``.

    Args:
        name: of the file, of the recipes' folder and of the MLflow experiment.
        module_class: what learns.
        default_data: class path of the data that a run without arguments learns from.
        commands: what only this task does with a trained model, each named as its function.
    """

    name: str
    module_class: type[VisionModule]
    default_data: str
    commands: tuple[Callable[..., str], ...] = ()

    def __call__(self, args: Sequence[str] | None = None, callbacks: Sequence[L.Callback] = ()) -> VisionCLI:
        """Runs a subcommand; a user error ends in one paragraph and exit code 2.

        Args:
            args: the command line; None takes the process's own. Without any argument it is ``fit``.
            callbacks: of the trainer, beside those that the command line names.
        """
        with mistakes(self.name, UsageError):
            return self.run(sys.argv[1:] if args is None else args, callbacks)

    def run(self, args: Sequence[str], callbacks: Sequence[L.Callback] = ()) -> VisionCLI:
        """Runs a subcommand from Python.

        Args:
            args: the command line. Without any argument it is ``fit``.
            callbacks: of the trainer, beside those that the command line names.

        Raises:
            UsageError: it cannot be done as given; the message says what to give instead.
        """
        given = present(expand(args)) or ["fit"]
        with explained(self.name, *MISTAKES):
            whole = with_recipe(given)
            check_recipes(whole)
            import_code(whole)
            whole, start = with_start(whole, self.module_class)
            return VisionCLI(
                self.name, self.module_class, self.default_data, whole, callbacks, start, [*self._commands]
            )

    def main(self, args: Sequence[str] | None = None) -> None:
        """The whole command line: the subcommands of training and evaluation, which end with a table, and the task's
        own commands.

        Args:
            args: the command line; None takes the process's own.
        """
        given = list(sys.argv[1:] if args is None else args)
        if given and given[0] in self._commands:
            command(self._commands[given[0]], given[1:], f"{self.name} {given[0]}")
        else:
            print_table(self.name.replace("_", " "), self(given).rows)

    @property
    def _commands(self) -> dict[str, Callable[..., str]]:
        return {function.__name__: function for function in self.commands}


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
