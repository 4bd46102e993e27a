"""Number series whose next number is to be predicted."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from annotated_types import Ge, Le
from numpy.typing import NDArray
from typing_extensions import override

from datamodules.base import VisionDataModule
from datamodules.clips import as_objects
from datamodules.labelled.sources import LabelledSource
from datamodules.options import BatchSize, NonNegativeInt, Preprocessing
from datamodules.splits import SPLITS

LIMIT = 100  # numbers of series are below; greater ones, up to 255, mean nothing
HELD_OUT = 7  # one of this many arithmetic series is for validation, and one for testing
LONGEST = 1000  # maximum number of terms in a network's input

Kind = Literal["arithmetic", "geometric"]


def terms(kind: Kind, count: int) -> NDArray[np.uint8]:
    """Returns all series of a given length with terms below `LIMIT`, ascending and descending.

    >>> terms("geometric", 6).tolist()[:2]
    [[1, 2, 4, 8, 16, 32], [2, 4, 8, 16, 32, 64]]
    >>> len(terms("arithmetic", 4)), len(terms("geometric", 4))
    (3234, 32)

    Args:
        kind: ``arithmetic``, with an integer difference, or ``geometric``, with an integer ratio or its inverse.
        count: number of terms.

    Returns:
        uint8 N×count.
    """
    steps, span = np.arange(count), np.arange(1, LIMIT)
    if kind == "arithmetic":
        rising = (np.arange(LIMIT)[:, None] + steps * span[:, None, None]).reshape(-1, count)
    else:
        ratios = span[1 : 1 + int(LIMIT ** (1 / (count - 1)))]
        rising = (span[:, None] * ratios[:, None, None] ** steps).reshape(-1, count)
    rising = rising[rising[:, -1] < LIMIT]
    return np.concatenate([rising, rising[:, ::-1]]).astype(np.uint8)


@dataclass(kw_only=True, eq=False, repr=False)
class Series(VisionDataModule[LabelledSource]):
    """Arithmetic and geometric series of numbers below 100, such as 6, 7, 8 and 2, 4, 8; the label is the next number.

    A sample has three to five terms, since 2, 4 could continue as 2, 4, 6 or as 2, 4, 8; they are followed by as many
    numbers from 100 to 255 as the network has to remember the series over. Arithmetic series of validation and test do
    not occur in training; geometric ones, which are few, do.

    Batches: ``image`` uint8 B×T×1×1×1, the numbers as clips of one pixel; ``length`` int64 B; ``label`` int64 B, the
    next term.

    Args:
        kind: ``arithmetic``, ``geometric``, or ``mixed``, half of each.
        gap: number of meaningless terms after the series: the length of the dependence.
        train: number of training series.
        val: number of validation series.
        test: number of test series.
        series_seed: seed of the series; unlike ``seed`` it changes the data set.
    """

    kind: Literal["arithmetic", "geometric", "mixed"] = "mixed"
    gap: Annotated[int, Ge(0), Le(LONGEST - 5)] = 0
    train: NonNegativeInt = 20_000
    val: NonNegativeInt = 2000
    test: NonNegativeInt = 4000
    series_seed: int = 0
    batch_size: BatchSize = 128
    in_chans: ClassVar[int] = 1
    image_size: ClassVar[int] = 1
    num_classes: ClassVar[int] = LIMIT
    label_names: ClassVar[list[str]] = [str(number) for number in range(LIMIT)]

    @property
    @override
    def preprocessing(self) -> Preprocessing:
        return Preprocessing(1, 1, crop_pct=1.0, frames=LONGEST)

    @override
    def transform(self, training: bool) -> None:
        """None: numbers are not changed."""

    @override
    def load(self) -> dict[str, LabelledSource]:
        counts = {"train": self.train, "val": self.val, "test": self.test}
        return {name: self._drawn(name, count) for name, count in counts.items() if count}

    def _drawn(self, split: str, count: int) -> LabelledSource:
        rng = np.random.default_rng([self.series_seed, SPLITS.index(split)])
        kinds: list[Kind] = ["arithmetic", "geometric"] if self.kind == "mixed" else [self.kind]
        tables = {
            (kind, shown): _of_split(terms(kind, shown + 1), kind, split) for kind in kinds for shown in (3, 4, 5)
        }
        series, labels = [], []
        for _ in range(count):
            table = tables[kinds[rng.integers(len(kinds))], int(rng.integers(3, 6))]
            *shown, following = table[rng.integers(len(table))]
            passing = rng.integers(LIMIT, 256, self.gap, np.uint8)
            series.append(np.array([*shown, *passing], np.uint8).reshape(-1, 1, 1, 1))
            labels.append(int(following))
        return LabelledSource(as_objects(series), np.array(labels, np.int64))


def _of_split(rows: NDArray[np.uint8], kind: Kind, split: str) -> NDArray[np.uint8]:
    """Series of a split."""
    place = np.arange(len(rows)) % HELD_OUT
    return rows if kind == "geometric" else rows[{"train": place > 1, "val": place == 0, "test": place == 1}[split]]
