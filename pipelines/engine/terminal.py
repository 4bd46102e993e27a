"""Output on the terminal."""

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table
from typing_extensions import override

from datamodules.augmentations import sides
from modules.optimization import images_a_step, rate_factor
from modules.training_data import settings_of

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


@rank_zero_only
def say(message: str) -> None:
    """Prints a message for the user on stderr, separate from a command's output."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(message, markup=False)


class ProgressBar(RichProgressBar):
    """Lightning's progress bar with the most useful metrics."""

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Metrics at the end of the bar."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics

    @override
    def _get_train_description(self, current_epoch: int) -> str:
        epochs = self.trainer.max_epochs or -1
        text = f"Epoch {current_epoch + 1}{f' of {epochs}' if epochs > 0 else ''}"  # Lightning counts from zero
        return f"{text:{len(self.validation_description)}}"


class Summary(L.Callback):
    """Prints a summary when a training or evaluation starts: data, device, batches and steps."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Summarises the training ahead, also when it resumes."""
        steps = -(-trainer.num_training_batches // trainer.accumulate_grad_batches)
        total = trainer.estimated_stepping_batches
        ahead = f"{steps:,} step{'s' * (steps != 1)} an epoch" + (
            f", {total:,} in all" if total != float("inf") else ""
        )
        self._say(trainer, ahead + (f", of which {trainer.global_step:,} are done" if trainer.global_step else ""))
        module: Any = pl_module
        if stated := module.optimization.lr_batch_size:
            rate = max(group.get("initial_lr", group["lr"]) for group in trainer.optimizers[0].param_groups)
            say(
                f"Learning rate: {rate:.4g} for {images_a_step(module):,} images a step, stated as {rate / rate_factor(module):.4g} "
                f"for {stated:,}."
            )

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Summarises a stand-alone evaluation on the validation split."""
        if trainer.state.fn == TrainerFn.VALIDATING and not trainer.fit_loop.epoch_progress.current.ready:
            self._say(trainer, f"{sum(trainer.num_val_batches):,} batches of the validation split")

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Summarises a stand-alone evaluation on the test split."""
        if not trainer.fit_loop.epoch_progress.current.ready:
            self._say(trainer, f"{sum(trainer.num_test_batches):,} batches of the test split")

    @staticmethod
    def _say(trainer: L.Trainer, ahead: str) -> None:
        data: Any = settings_of(trainer).datamodule
        parts = [", ".join(f"{len(source):,} {split}" for split, source in data.sources.items())]
        if len(names := [*getattr(data, "label_names", [])]) > 1:
            shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
            parts.append(f"{len(names)} {data.labels_are} ({shown})" + _extremes(names, data.class_counts))
        height, width = sides(data.image_size)
        pixels = "" if data.preprocessing.numbers else f"{height} × {width} pixels, "
        parts.append(f"{pixels}{data.in_chans} channel{'s' * (data.in_chans > 1)}")
        if data.bad_files:
            parts.append(f"{len(data.bad_files)} unreadable files left out, the first {min(data.bad_files)}")
        say(f"Data: {data.title}: {'; '.join(parts)}.")
        device = trainer.strategy.root_device
        kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        network: Any = trainer.lightning_module
        weights = sum(parameter.numel() for parameter in network.parameters())
        say(f"Network: {network.backbone.recipe['backbone']}; {weights:,} parameters in all.")
        processes = f"{trainer.world_size} processes on {kind}" if trainer.world_size > 1 else f"on {kind}"
        say(f"{processes[0].upper()}{processes[1:]}: {ahead}, {data.batch_size * trainer.world_size} images a batch.")
        if device.type == "cpu" and str(trainer.precision).startswith("bf16") and not has_bfloat16():
            say(
                f"This processor has no instructions for bfloat16: --trainer.precision {trainer.precision} takes several times as "
                "long here as 32, which is the default."
            )


def has_bfloat16() -> bool:
    """Whether the processor computes with bfloat16 itself; what this torch cannot tell counts as yes."""
    tells = getattr(torch.cpu, "get_capabilities", None)  # an older torch lacks it
    known = {"bf16": True} if tells is None else tells()
    return any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _extremes(names: list[str], counts: list[int]) -> str:
    """The classes with the fewest and the most training images."""
    if len(set(counts)) < 2:
        return f", {counts[0]:,} images to train on of each" if counts else ""
    (least, rarest), *_, (most, commonest) = sorted(zip(counts, names, strict=True))
    return f", from {least:,} images of {rarest} to {most:,} of {commonest} to train on"


def quieten() -> None:
    """Silences library warnings that a user cannot act on."""
    for library in ("lightning.pytorch", "lightning.fabric", "mlflow", "alembic"):
        logging.getLogger(library).setLevel(logging.WARNING)
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
