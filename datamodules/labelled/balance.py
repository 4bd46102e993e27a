"""Class imbalance: class weights for the loss, and balanced sampling."""

from collections.abc import Sequence
from typing import Literal

import albumentations as A
import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from typing_extensions import override

from datamodules.labelled.sources import LabelledSource
from datamodules.loading import KeyedDataset

Weighting = Literal["none", "balanced", "sqrt"] | list[float]
Sampling = Literal["none", "balanced", "sqrt"]
RARE = 20  # ratio to the largest class from which a class is reported as rare


class BalancedDataset(KeyedDataset):
    """Orders an epoch, as long as the split, so that classes appear equally often, or in proportion to the square root
    of their sizes.

    All images of a class are drawn equally often: those of a small class several times, each time with another
    augmentation; those of a large class not in every epoch.

    Args:
        source: the images.
        transform: see `KeyedDataset`.
        seed: seed of the run.
        sampling: ``balanced`` or ``sqrt``.
    """

    source: LabelledSource

    def __init__(
        self,
        source: LabelledSource,
        transform: A.Compose | None,
        seed: int,
        sampling: Sampling,
        views: Sequence[A.Compose] = (),
    ) -> None:
        super().__init__(source, transform, seed, views)
        self.sampling = sampling

    @override
    def order(self, generator: np.random.Generator) -> NDArray[np.int64]:
        _, classes, counts = np.unique(self.source.labels, return_inverse=True, return_counts=True)
        own = np.split(np.argsort(classes, kind="stable"), counts.cumsum()[:-1])
        shares = counts ** (0.5 if self.sampling == "sqrt" else 0.0)
        ends = np.floor(len(self) * shares.cumsum() / shares.sum() + 0.5).astype(int)
        parts = np.diff(ends, prepend=0)
        return generator.permutation(
            np.concatenate([self.taken(generator, mine, part) for mine, part in zip(own, parts.tolist(), strict=True)])
        )


def class_weights(counts: NDArray[np.int64], weighting: Weighting) -> list[float]:
    """Class weights for the loss, normalised so that the average over images is 1; empty classes get weight 0.

    >>> class_weights(np.array([60, 30]), "balanced")
    [0.75, 1.5]

    Args:
        counts: number of images of each class, int64 K.
        weighting: ``balanced``, the inverse of the number of images, as in scikit-learn, or ``sqrt``, its square root.
    """
    power = 0.5 if weighting == "sqrt" else 1.0
    weights = np.where(counts > 0, 1 / np.maximum(counts, 1) ** power, 0.0)
    return (weights * counts.sum() / (weights * counts).sum()).tolist()


def warn_of_rare(names: Sequence[str], counts: NDArray[np.int64], remedy: str) -> None:
    """Warns of classes with less than a twentieth of the images of the largest.

    Args:
        names: class names.
        counts: number of training images of each class, int64 K.
        remedy: advice for the message.
    """
    rare, largest = np.flatnonzero((counts > 0) & (counts * RARE < counts.max())), int(counts.argmax())
    if len(rare):
        least = int(rare[counts[rare].argmin()])
        others = f", and {len(rare) - 1} more are as rare" if len(rare) > 1 else ""
        rank_zero_warn(
            f"Class {names[least]!r} has {counts[least]} images to train on, {names[largest]!r} has {counts[largest]}: less "
            f"than a twentieth{others}. {remedy}"
        )
