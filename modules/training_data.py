"""Access of modules to their trainer and its data module."""

from collections.abc import Iterable, Mapping, Sized
from typing import Any, Protocol, cast, runtime_checkable

import lightning as L
import torch
from torch import Tensor

from modules.networks import BackboneError

Batch = dict[str, Any]  # of a loader: ``image`` and the task's own keys, as tensors or as lists of tensors


@runtime_checkable
class TrainingData(Protocol):
    """Interface of the data modules in `datamodules` that modules use."""

    title: str
    batch_size: int
    seed: int
    sources: Mapping[str, Sized]

    def plain_loader(self, split: str, most: int | None = None, shared: bool = True) -> Iterable[Batch]:
        """Loads each sample of a split once, in order and without augmentation, in batches.

        Args:
            split: ``train``, ``val`` or ``test``.
            most: maximum number of samples, evenly spread; None for all.
            shared: whether each process loads its share, or all samples.
        """

    def samples(self, split: str, count: int) -> dict[str, Tensor]:
        """Returns a batch of evenly spread samples, without augmentation."""


def given_data(trainer: L.Trainer) -> TrainingData | None:
    """Returns the data module of a trainer; None if it was given loaders."""
    data = getattr(trainer, "datamodule", None)
    return data if isinstance(data, TrainingData) else None


def training_data(trainer: L.Trainer) -> TrainingData:
    """Returns the data module of a trainer.

    Raises:
        BackboneError: it has none of `datamodules`.
    """
    data = given_data(trainer)
    if data is None:
        raise BackboneError(
            "This needs the data module: give the trainer a data module of `datamodules` instead of loaders."
        )
    return data


def evaluated(trainer: L.Trainer, stage: str) -> Any:
    """Returns the data set that a stage, ``val`` or ``test``, is evaluated on; None for loaders without one."""
    loader = trainer.test_dataloaders if stage == "test" else trainer.val_dataloaders
    return getattr(loader, "dataset", None)


def share(trainer: L.Trainer, stage: str, done: int, total: int, size: int) -> Tensor:
    """Chooses the images of a batch to keep as examples, so that the examples of an evaluation are spread evenly over
    the split, which may be sorted by class.

    Args:
        trainer: Lightning's.
        stage: ``val`` or ``test``.
        done: number of batches evaluated before this one.
        total: number of images to keep over all batches.
        size: number of images in the batch.

    Returns:
        int64, their indices in the batch.
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
    """Returns the trainer, typed with attributes that Lightning sets without declaring them."""
    return cast(_Settings, trainer)
