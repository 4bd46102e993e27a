"""Output on the terminal."""

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_only
from rich.console import Console
from rich.table import Table

NOISE = (  # true of what is done here, and meant so
    "Checkpoint directory .* exists and is not empty",
    "Using padding='same' with even kernel lengths",
    "Found .* module.s. in eval mode at the start of training",
    "It is recommended to use .self.log.*sync_dist=True",
    "Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need to be provided",
    ".*isinstance.treespec, LeafSpec.",
    "LightningCLI's args parameter is intended to run from within Python",
    "The given NumPy array is not writable",  # nobody writes to it
    "The ``compute`` method of metric Mean was called before",  # one of what comes less often than every epoch
    "The number of training batches .* is smaller than the logging interval",
    "Detected call of `lr_scheduler.step\\(\\)` before",  # a training that goes on at an epoch's end begins with its schedule
    "`ModelCheckpoint.monitor=.* could not find the monitored key",  # there was no validation yet: the end tells of none
)


QUIET = (
    "mlflow",
    "alembic",
    "lightning.pytorch",
    "lightning.fabric",
    # Lightning sets the level of these two when it is imported, which may be later, but not of:
    "lightning.pytorch.utilities.rank_zero",
    "lightning.pytorch.accelerators.cuda",
    "lightning.pytorch.trainer.connectors.checkpoint_connector",
    "lightning.fabric.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
)

_rank = next(filter(None, map(os.environ.get, ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"))), "0")
rank_zero_only.rank = getattr(rank_zero_only, "rank", int(_rank))  # type: ignore[attr-defined]  # as Lightning does


@rank_zero_only
def say(message: str) -> None:
    """Prints a message for the user on stderr, separate from a command's output."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(message, markup=False)


def quieten() -> None:
    """Silences library warnings that a user cannot act on."""
    for library in QUIET:
        logging.getLogger(library).setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # the report of --trainer.profiler
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it would tell of each retry
    logging.getLogger("timm.models._builder").setLevel(logging.ERROR)  # it would list the weights of the head left out
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # a line for each attempt to reach a server that is gone
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it would print a traceback for each attempt
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # where in the code is nobody's concern
    for message in NOISE:
        warnings.filterwarnings("ignore", message)
    # They are for those who write code.
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # of its own loggers, which it sets when it is imported


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """A table: one row for each mapping, one column for each key."""
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
    """Prints the result of a command as a table, if there is any."""
    if not rows:
        return
    shown = Table(title=title, show_header=False, title_justify="left")
    shown.add_column(style="bold")
    shown.add_column(overflow="fold")
    for key, value in rows.items():
        shown.add_row(key, value)
    _wide().print(shown)


def _wide() -> Console:
    """Prints tables, wrapped only on a terminal."""
    return Console(width=None if sys.stdout.isatty() else 10_000, markup=False)
