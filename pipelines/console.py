"""What a user sees on the terminal."""

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import lightning as L
from jsonargparse import ArgumentError
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from mlflow.exceptions import MlflowException
from requests import RequestException
from rich.console import Console
from rich.table import Table

from pipelines.redaction import redact

NOISE = (  # true of what is done here, and meant so
    "Checkpoint directory .* exists and is not empty",
    "Using padding='same' with even kernel lengths",
    "Found .* module.s. in eval mode at the start of training",
    "It is recommended to use .self.log.*sync_dist=True",
    "Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need to be provided",
    ".*isinstance.treespec, LeafSpec.",
    "LightningCLI's args parameter is intended to run from within Python",
    "The number of training batches .* is smaller than the logging interval",
)


@rank_zero_only
def say(message: str) -> None:
    """Tells the user something, beside what a command prints."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(message, markup=False)


class ProgressBar(RichProgressBar):
    """Lightning's progress bar with the figures that one watches."""

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """The figures at the end of the bar."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


def quieten() -> None:
    """Silences what libraries say that no user can act on."""
    for library in ("lightning.pytorch", "lightning.fabric", "mlflow", "alembic"):
        logging.getLogger(library).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it would tell of each retry
    logging.getLogger("timm.models._builder").setLevel(logging.ERROR)  # it would list the weights of the head left out
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # a line for each attempt to reach a server that is gone
    for message in NOISE:
        warnings.filterwarnings("ignore", message)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


def refuse(message: str) -> NoReturn:
    """Ends the command with exit code 2 and one paragraph, which says what is wrong and what to give instead."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {message}", style="red", markup=False)
    sys.exit(2)


@contextmanager
def mistakes(*kinds: type[Exception]) -> Iterator[None]:
    """What every command runs in: a mistake of the user's is told as `refuse` does; what is none stays an error.

    Args:
        kinds: errors that are mistakes; by default those that a command which trains nothing raises of itself.
    """
    quieten()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be text
    kinds = kinds or (ValueError, OSError, MlflowException, RequestException)
    try:
        yield
    except BrokenPipeError:  # as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)
    except ArgumentError as error:
        refuse(_plain(str(error)))
    except (MlflowException, RequestException) as error:
        if not isinstance(error, kinds):
            raise
        refuse(redact(str(error)))  # they may name the server with its login
    except (*kinds, MisconfigurationException) as error:
        refuse(str(error))
    except ValueError as error:  # jsonargparse wraps what a constructor raises
        if not isinstance(error.__cause__, (*kinds, MisconfigurationException)):
            raise
        refuse(str(error.__cause__))


def _plain(message: str) -> str:
    """What jsonargparse says, without what it says about types that are not asked for."""
    lines = [line.strip(" -") for line in message.splitlines()]
    dull = (
        "Does not validate",
        "Subtypes:",
        "Errors:",
        "Given value type",
        "Given value: N",
        "Expected a <class 'NoneType'>",
    )
    return " ".join(line for line in lines if line and not line.startswith(dull)) + " See --help, or --data.help NAME."


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """A table for people: a row for each mapping, a column for each key."""
    rows, shown = list(rows), Table()
    for key in (columns := dict.fromkeys(key for row in rows for key in row)):
        shown.add_column(key, overflow="fold")
    for row in rows:
        values = (row.get(key, "") for key in columns)
        shown.add_row(*(f"{value:.4f}" if isinstance(value, float) else str(value) for value in values))
    with (console := _wide()).capture() as captured:
        console.print(shown)
    return captured.get().strip("\n")


@rank_zero_only
def print_table(title: str, rows: dict[str, str]) -> None:
    """Prints what a command came to."""
    shown = Table(title=title, show_header=False, title_justify="left")
    shown.add_column(style="bold")
    shown.add_column(overflow="fold")
    for key, value in rows.items():
        shown.add_row(key, value)
    _wide().print(shown)


def _wide() -> Console:
    """Prints tables; only on a terminal they are folded."""
    return Console(width=None if sys.stdout.isatty() else 10_000, markup=False)
