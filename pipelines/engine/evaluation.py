"""The weights that are evaluated, their classes, and the data that they were trained on."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import torch

from datamodules import VisionDataModule
from modules import VisionModule
from modules.checkpoints import classes_of, read_checkpoint, shapes_of
from pipelines.engine.disk import write_text
from pipelines.engine.terminal import say


@dataclass(frozen=True)
class Weights:
    """A checkpoint to evaluate.

    Args:
        file: it.
        architecture: the network that it is of.
        shapes: shape of each weight by name.
        learned: what its training was of, see `pipelines.engine.resume.identity`; nothing where it does not say.
    """

    file: Path
    architecture: dict[str, Any]
    shapes: dict[str, torch.Size]
    learned: dict[str, Any]

    @classmethod
    def read(cls, file: Path) -> "Weights":
        """Reads a checkpoint's metadata."""
        checkpoint = read_checkpoint(file)
        shapes = shapes_of(checkpoint["state_dict"])
        return cls(file, checkpoint["architecture"], shapes, checkpoint.get("recipe") or {})

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes."""
        return classes_of(self.architecture)

    @property
    def place(self) -> dict[str, Any]:
        """Settings of the data that the network was trained on."""
        begin, settings = "data.init_args.", self.learned.get("settings", {})
        return {key.removeprefix(begin): value for key, value in settings.items() if key.startswith(begin)}

    @property
    def digests(self) -> set[str]:
        """Digests of their splits; none where the checkpoint does not say."""
        return set(self.learned.get("data", {}).values())


class Learner(Protocol):
    """What was trained, and what it remembers of its data."""

    @property
    def place(self) -> dict[str, Any]:
        """Settings of the data."""

    @property
    def digests(self) -> set[str]:
        """Digests of their splits."""


def take_unseen(data: VisionDataModule, learner: Learner) -> None:
    """Uses data without splits as the test set as a whole, unless the network was trained on them.

    What may flatter the figures is told: data of the training that have changed, whose splits are drawn anew, and images
    that other data share with the training.
    """
    if not (data.sources and data.drawn):
        return
    if not learner.digests.isdisjoint(split["digest"] for split in data.identity()["splits"].values()):
        return
    if data.shares_place_with(learner.place):
        if not learner.digests:
            return
        say(
            f"{data.title} is not as it was in the training: its images or the way they are read have changed, so the test split "
            "is drawn anew and may have images of the training, which flatter the figures. Measure on a folder of images "
            "that the network has not seen."
        )
        return
    data.take_whole()
    say(
        f"{data.title} has no splits, and is not what the network was trained on: all of it is the test split. Images that "
        "both have flatter the figures."
    )


def write_predictions(
    batches: Any, trainer: L.Trainer, model: VisionModule, datamodule: VisionDataModule, file: Path
) -> int:
    """Writes the predictions of all processes for the test split, one JSON object per picture, in the split's order.

    Returns:
        How many answers there are.
    """
    numbers = range(trainer.global_rank, sys.maxsize, trainer.world_size)
    rows = list(zip(numbers, (row for batch in batches for row in batch), strict=False))
    if trainer.world_size > 1:
        shares: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(shares, rows)
        rows = sorted((each for share in shares for each in share), key=lambda each: each[0])
    if not trainer.is_global_zero:
        return len(rows)
    from pipelines.serving.answers import whole_pictures

    source = datamodule.predict_dataloader().dataset.source
    answers = whole_pictures(rows, source, getattr(model, "across_classes", False))
    write_text(file, "".join(f"{json.dumps(answer)}\n" for answer in answers))
    return len(answers)
