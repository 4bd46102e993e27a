"""Sends metrics, images, tables, texts and tags of a training to its loggers."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from modules.training_data import Batch

if TYPE_CHECKING:
    from modules.base import Stage, VisionModule

Image = NDArray[np.uint8]


@runtime_checkable
class PictureLogger(Protocol):
    """A logger that accepts images and tables."""

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        """Logs images, uint8 H×W×3."""

    def log_table(self, key: str, columns: list[str], rows: list[list[Any]], step: int | None = None) -> None:
        """Logs a table."""


@runtime_checkable
class NoteLogger(Protocol):
    """A logger that accepts texts and tags."""

    def log_text(self, key: str, text: str) -> None:
        """Logs a text in Markdown."""

    def set_tag(self, key: str, value: str) -> None:
        """Sets a tag of the run."""


@runtime_checkable
class FilmLogger(Protocol):
    """A logger that accepts videos."""

    def log_film(self, key: str, frames: Iterable[Image]) -> None:
        """Logs a video from its frames, uint8 H×W×3."""


@dataclass
class Report:
    """Results of an evaluation, by name.

    Args:
        figures: scalar metrics, the same in all processes.
        pictures: functions that draw images, uint8 H×W×3; only called if a logger accepts images.
        tables: column names, and rows.
        films: functions that draw the frames of videos, uint8 H×W×3; only called if a logger accepts videos.
    """

    figures: dict[str, Tensor | float] = field(default_factory=dict)
    pictures: dict[str, Callable[[], Image]] = field(default_factory=dict)
    tables: dict[str, tuple[list[str], list[list[Any]]]] = field(default_factory=dict)
    films: dict[str, Callable[[], Iterable[Image]]] = field(default_factory=dict)


class Publisher(L.Callback):
    """Sends each logger of a trainer what it accepts. An error in drawing never stops a training: it is reported once
    per image."""

    def __init__(self) -> None:
        self._undrawn: set[str] = set()  # keys of images that could not be drawn

    @contextmanager
    def optional(self, key: str) -> Iterator[None]:
        """Context manager that turns an error into a warning, once per key.

        Args:
            key: name of the image that is drawn.
        """
        try:
            yield
        except Exception as error:
            if key not in self._undrawn:
                self._undrawn.add(key)
                why = f"{type(error).__name__}: {error}"
                rank_zero_warn(f"The picture {key} could not be made ({why}). The training goes on without it.")

    def figures(self, trainer: L.Trainer, figures: Mapping[str, float], step: int) -> None:
        """Logs scalars immediately; Lightning would do so only after the checkpoint of the same step."""
        for logger in trainer.loggers:
            logger.log_metrics(dict(figures), step)

    def picture(self, trainer: L.Trainer, key: str, draw: Callable[[], Image], step: int) -> None:
        """Logs an image.

        Args:
            trainer: the trainer with the loggers.
            key: name of the image.
            draw: draws it, uint8 H×W×3; only called if a logger accepts images.
            step: step at which it is logged.
        """
        takers = [logger for logger in trainer.loggers if isinstance(logger, PictureLogger)]
        if takers and trainer.is_global_zero and not trainer.sanity_checking:
            with self.optional(key):
                image = draw()
                for logger in takers:
                    logger.log_image(key, [image], step=step)

    def table(self, trainer: L.Trainer, key: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
        """Logs a table."""
        if trainer.is_global_zero and not trainer.sanity_checking:
            for logger in trainer.loggers:
                if isinstance(logger, PictureLogger):
                    logger.log_table(key, columns, rows, step=step)

    def film(self, trainer: L.Trainer, key: str, draw: Callable[[], Iterable[Image]]) -> None:
        """Logs a video; see `picture`."""
        takers = [logger for logger in trainer.loggers if isinstance(logger, FilmLogger)]
        if takers and trainer.is_global_zero and not trainer.sanity_checking:
            with self.optional(key):
                for logger in takers:
                    logger.log_film(key, draw())

    def text(self, trainer: L.Trainer, key: str, text: str, tags: Mapping[str, str] | None = None) -> None:
        """Logs a text in Markdown, and sets tags of the run."""
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                if isinstance(logger, NoteLogger):
                    logger.log_text(key, text)
        self.tags(trainer, tags or {})

    def tags(self, trainer: L.Trainer, tags: Mapping[str, str]) -> None:
        """Sets tags of the run."""
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                if isinstance(logger, NoteLogger):
                    for key, value in tags.items():
                        logger.set_tag(key, value)

    def _publish(self, trainer: L.Trainer, module: "VisionModule", stage: "Stage") -> None:
        """Logs the module's report of a stage."""
        report = module.report(stage)
        for name, value in report.figures.items():
            module.log(f"{stage}/{name}", value, prog_bar=f"{stage}/{name}" == module.monitor)
        for name, draw in report.pictures.items():
            self.picture(trainer, f"{stage}/{name}", draw, module.clock)
        for name, (columns, rows) in report.tables.items():
            self.table(trainer, f"{stage}/{name}", columns, rows, module.clock)
        for name, frames in report.films.items():
            self.film(trainer, f"{stage}/{name}", frames)

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._publish(trainer, cast("VisionModule", pl_module), "val")

    @override
    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._publish(trainer, cast("VisionModule", pl_module), "test")

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Logs the first training batch once, as the network sees it."""
        if trainer.global_step == 0 and batch_idx == 0 and trainer.is_global_zero:
            module = cast("VisionModule", pl_module)
            with self.optional("train/samples"):
                few = move_data_to_device({key: value[:32] for key, value in batch.items()}, torch.device("cpu"))
                self.picture(trainer, "train/samples", lambda: module.draw_samples(few), 0)
