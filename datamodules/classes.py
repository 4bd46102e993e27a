"""Aligning the class numbers of a data set with those of a trained network."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from datamodules.base import VisionDataModule
from datamodules.errors import DataError, listed
from datamodules.labelled.sources import ColumnSource
from datamodules.loading import Sample, Source

IGNORED = 255  # in masks


class Renumbered:
    """A source with other class numbers, in the ``label``, ``labels`` and ``mask`` of its samples and in its arrays.

    Args:
        source: the samples.
        numbers: int64 K, the new number of each class.
    """

    def __init__(self, source: Source, numbers: NDArray[np.int64]) -> None:
        self.source, self.numbers = source, numbers

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        return self._renumbered(self.source[index])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("source", "numbers"):  # as pickle asks before there are any
            raise AttributeError(name)
        value = getattr(self.source, name)
        if value is None:
            return None
        if name in ("batch", "cut"):
            return lambda *place: self._renumbered(value(*place))
        if name == "reduced":
            return lambda reduction: Renumbered(value(reduction), self.numbers)
        if name == "labels":
            return self.numbers[value]
        if name == "counts":  # by class
            counts = np.zeros(max(len(value), self.numbers.max() + 1), value.dtype)
            counts[self.numbers] = value[: len(self.numbers)]
            return counts
        return value

    def _renumbered(self, sample: Sample) -> Sample:
        sample, boxes = dict(sample), "labels" in sample
        for key in ("label", "labels"):
            if key in sample:
                sample[key] = self.numbers[sample[key]]
        if "mask" in sample:  # that of boxes has the background as 0, and is one ahead
            table = np.arange(256, dtype=np.uint8)
            table[boxes : len(self.numbers) + boxes] = self.numbers + boxes
            table[IGNORED] = IGNORED
            sample["mask"] = table[sample["mask"]]
        return sample


def adopt_classes(data: VisionDataModule, names: Sequence[str]) -> None:
    """Renumbers the classes of a data set to match a network that has been trained on them.

    They are matched by name: the data may lack some, and may have them in another order. `identity` of the data does
    not change.

    Raises:
        DataError: the data have a class that the network does not have.
    """
    own, counted = list(cast(Any, data).label_names), getattr(data, "count_names", [])
    if own == list(names) or (counted and counted == list(names)[: len(counted)]):
        return
    if unknown := sorted(set(own) - set(names)):
        raise DataError(
            f"{data.title} has {unknown[0]!r} among its {data.labels_are}, which the network has not learned. The data have {listed(own)}; "
            f"the network knows {listed(names)}. Name them as the network does, or choose other weights."
        )
    numbers = np.asarray([list(names).index(name) for name in own], np.int64)
    identity = data.identity()
    sources: dict[str, Any] = {
        split: source.renumbered(numbers, list(names))
        if isinstance(source, ColumnSource)
        else Renumbered(source, numbers)
        for split, source in data.sources.items()
    }
    vars(data).update(label_names=list(names), sources=sources, identity=lambda: identity)
