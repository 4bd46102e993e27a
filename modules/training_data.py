"""What a module may look at of its trainer, and of the data."""

from collections.abc import Iterable, Mapping, Sized
from typing import Any, Protocol, cast, runtime_checkable

import lightning as L
import torch
from torch import Tensor

from modules.networks import BackboneError


@runtime_checkable
class TrainingData(Protocol):
    """What a module may ask a data module of `datamodules`."""

    title: str
    batch_size: int
    sources: Mapping[str, Sized]

    def plain_loader(self, split: str, most: int | None = None, shared: bool = True) -> Iterable[dict[str, Any]]:
        """Each sample of a split once, in order and without augmentation, in batches.

        Args:
            split: ``train``, ``val`` or ``test``.
            most: how many samples at most, evenly spread.
            shared: whether each process has its share, or all.
        """

    def samples(self, split: str, count: int) -> dict[str, Tensor]:
        """A batch of samples, evenly spread and without augmentation."""


def given_data(trainer: L.Trainer) -> TrainingData | None:
    """The data module of a trainer; None where it was given loaders."""
    data = getattr(trainer, "datamodule", None)
    return data if isinstance(data, TrainingData) else None


def training_data(trainer: L.Trainer) -> TrainingData:
    """The data module of a trainer.

    Raises:
        BackboneError: it has none of `datamodules`.
    """
    data = given_data(trainer)
    if data is None:
        raise BackboneError(
            "This needs the data module: give the trainer a data module of `datamodules` instead of loaders."
        )
    return data


def share(trainer: L.Trainer, stage: str, done: int, total: int, size: int) -> Tensor:
    """Which images of a batch to keep so that those of an evaluation come from all over the split, which may be sorted by
    class.

    Args:
        trainer: Lightning's.
        stage: ``val`` or ``test``.
        done: batches of the evaluation before this one.
        total: images that are kept of all batches.
        size: images of the batch.

    Returns:
        int64, their places in the batch.
    """
    batches = int((trainer.num_val_batches if stage == "val" else trainer.num_test_batches)[0])
    count = min(total * (done + 1) // batches - total * done // batches, size)
    return torch.linspace(0, size - 1, count).long()


class _Settings(Protocol):
    callbacks: list[L.Callback]
    log_every_n_steps: int
    overfit_batches: float
    datamodule: Any


def settings_of(trainer: L.Trainer) -> _Settings:
    """A trainer with the attributes that Lightning sets without declaring them."""
    return cast(_Settings, trainer)
