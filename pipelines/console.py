"""What a user sees on the terminal."""

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import lightning as L
import torch
from jsonargparse import ArgumentError
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.trainer.states import TrainerFn
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
    "The given NumPy array is not writable",  # nobody writes to it
    "The number of training batches .* is smaller than the logging interval",
    "`ModelCheckpoint.monitor=.* could not find the monitored key",  # there was no validation yet: the end tells of none
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


class Summary(L.Callback):
    """Says at the start of a training or an evaluation what the data are, on what it runs, and how long it is."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What is ahead of a training, also of one that goes on."""
        steps, total = (
            -(-trainer.num_training_batches // trainer.accumulate_grad_batches),
            trainer.estimated_stepping_batches,
        )
        ahead = f"{steps:,} steps an epoch" + (f", {total:,} in all" if total != float("inf") else "")
        self._say(trainer, ahead + (f", of which {trainer.global_step:,} are done" if trainer.global_step else ""))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What an evaluation on the validation split is of; one within a training or after it says nothing."""
        if trainer.state.fn == TrainerFn.VALIDATING and not trainer.fit_loop.epoch_progress.current.ready:
            self._say(trainer, f"{sum(trainer.num_val_batches):,} batches of the validation split")

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What an evaluation on the test split is of; the one after a training says nothing."""
        if not trainer.fit_loop.epoch_progress.current.ready:
            self._say(trainer, f"{sum(trainer.num_test_batches):,} batches of the test split")

    @staticmethod
    def _say(trainer: L.Trainer, ahead: str) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        parts = [", ".join(f"{len(source):,} {split}" for split, source in data.sources.items())]
        if len(names := [*getattr(data, "label_names", [])]) > 1:
            shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
            parts.append(f"{len(names)} classes ({shown})")
        if data.bad_files:
            parts.append(f"{len(data.bad_files)} unreadable files left out, the first {min(data.bad_files)}")
        say(f"Data: {data.name}: {'; '.join(parts)}.")
        device = trainer.strategy.root_device
        kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        processes = f"{trainer.world_size} processes on {kind}" if trainer.world_size > 1 else f"on {kind}"
        say(f"{processes[0].upper()}{processes[1:]}: {ahead}, {data.batch_size * trainer.world_size} images a batch.")


def quieten() -> None:
    """Silences what libraries say that no user can act on."""
    for library in ("lightning.pytorch", "lightning.fabric", "mlflow", "alembic"):
        logging.getLogger(library).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it would tell of each retry
    logging.getLogger("timm.models._builder").setLevel(logging.ERROR)  # it would list the weights of the head left out
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # a line for each attempt to reach a server that is gone
    for message in NOISE:
        warnings.filterwarnings("ignore", message)
    # They are for those who write code.
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category)
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
    ours: tuple[type[Exception], ...] = (*kinds, MisconfigurationException)
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
    except ours as error:
        refuse(str(error))
    except RuntimeError as error:
        if "conditioned on metric" not in str(error):  # what EarlyStopping says of a monitor that there is not
            raise
        refuse(" ".join(str(error).split()))
    except ValueError as error:  # jsonargparse wraps what a constructor raises
        if not isinstance(error.__cause__, ours):
            raise
        refuse(str(error.__cause__))


def _plain(message: str) -> str:
    """What jsonargparse says, without what it says about types that are not asked for."""
    if out := re.search(r"Input should be ([\w ]*?-?[\d.]*)\s*\[type=\w+, input_value='?(.+?)'?, input_type", message):
        bound, value = out.groups()  # jsonargparse takes a bound out of the text that is the value itself
        bound = bound if bound[-1:].isdigit() or "valid" in bound else f"{bound.strip()} {value}"
        option = ".".join(re.findall('Parser key "([^"]+)"', message))
        return f"--{option} must be {bound}, not {value}."
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
