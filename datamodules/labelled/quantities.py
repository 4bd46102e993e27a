"""Images with numeric targets, from a table."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from typing_extensions import override

from datamodules.errors import DataError, listed
from datamodules.labelled.base import LabelledDataModule
from datamodules.labelled.manifest import TabularTable
from datamodules.labelled.rows import Objects, Rows, objects
from datamodules.labelled.sources import QuantitySource, TabularQuantitySource
from datamodules.paths import Paths
from datamodules.tables import check_distinct, numbers_in, unclear

if TYPE_CHECKING:
    import pandas as pd


@dataclass(kw_only=True, eq=False, repr=False)
class RegressionDataModule(LabelledDataModule[QuantitySource]):
    """Base class of images with numeric targets. Batches: ``image`` uint8 B×C×S×S, ``target`` float32 B×K, NaN if
    unknown."""

    labels_are = "quantities"

    @property
    def label_names(self) -> list[str]:
        """Names of the quantities."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """Number of quantities."""
        return len(self.label_names)

    @property
    def target_mean(self) -> list[float] | None:
        """Mean of each quantity over the training images; None if there are none."""
        return None if "train" not in self.sources else self._moments[0].tolist()

    @property
    def target_std(self) -> list[float] | None:
        """Standard deviation of each quantity over the training images; 1 if it is constant."""
        return None if "train" not in self.sources else self._moments[1].tolist()

    @cached_property
    def _moments(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        values = self.sources["train"].labels.astype(np.float64)
        known = np.isfinite(values).sum(0) > 0
        if empty := [self.label_names[k] for k in np.flatnonzero(~known)]:
            raise DataError(
                f"No training image of {self.title} has a value for {empty[0]!r}: fill it in, or leave the column out."
            )
        std = np.nanstd(values, 0)
        return np.nanmean(values, 0), np.where(std > 0, std, 1.0)


@dataclass(kw_only=True, eq=False, repr=False)
class RegressionTable(TabularTable[QuantitySource], RegressionDataModule):
    """A CSV or Parquet table with one row per image and one numeric column per quantity; see also `TabularTable`.

    Without a column ``split``, 15 % of the images are drawn for testing and 15 % of the rest for validation, stratified
    by the first quantity. An empty cell is an unknown value.

    Args:
        columns: columns of the quantities; None for all columns that only have numbers and are no tabular inputs.
    """

    columns: list[str] | None = None

    @property
    @override
    def answer_columns(self) -> dict[str, str]:
        return dict.fromkeys(self.columns or [], "--data.columns")

    @cached_property
    def _table(self) -> tuple[list[str], tuple[Paths, Objects], NDArray[np.float32], "pd.DataFrame"]:
        """The quantities' names; paths and splits; the values, N×K; and the whole table."""
        file = Path(self.file)
        inputs = self.input_columns
        table = self.checked(self.answer_columns | inputs, [*inputs])
        known = {self.path_column, self.group_column, "split", *inputs}
        others = [name for name in table.columns if name not in known]
        read = {name: numbers_in(table[name]) for name in self.columns or others}
        names = self.columns or [name for name, (_, wrong) in read.items() if not wrong]
        for name in names:
            if wrong := read[name][1]:
                raise DataError(f"{file.resolve()} has {wrong[0]!r} under {name!r}, where numbers are expected.")
        if not names:
            near = min(others, key=lambda name: len(read[name][1]), default=None)
            hint = "" if near is None else f" The nearest to one is {near!r}, which also has {read[near][1][0]!r}."
            raise DataError(
                f"{file.resolve()} has no column with only numbers beside {self.path_column!r}, but "
                f"{listed(others) or 'no other'}.{hint} "
                "Name the columns of the quantities with --data.columns."
            )
        for name in names:
            if doubtful := unclear(table[name]):
                raise DataError(
                    f"Is {doubtful!r} under {name!r} in {file.resolve()} a thousand times more than it would be with a decimal "
                    "comma? Write numbers without a mark between thousands, and with a point for the decimals."
                )
            check_distinct(table[name], file)
        for name in sorted({*others} - {*names}) if self.columns is None else ():
            numbers, wrong = read[name]
            if np.isfinite(numbers).sum() > len(numbers) // 2:
                rank_zero_warn(
                    f"{name!r} in {file.resolve()} is mostly numbers, but no quantity here, since it has {wrong[0]!r}: "
                    "write a number there or nothing, or name the quantities with --data.columns."
                )
        rows = self.paths(table), objects(table["split"])
        return names, rows, np.stack([read[name][0] for name in names], 1), table

    @cached_property  # not a property: `adopt_classes` replaces it
    @override
    def label_names(self) -> list[str]:
        return self._table[0]

    @override
    def load(self) -> dict[str, QuantitySource]:
        _, (paths, splits), values, table = self._table
        groups = self.groups(table)
        names = np.array([" ".join(map(str, own)) for own in values.tolist()], object)
        files, _, _, good = self.inspected(Rows(paths, names, splits), groups)
        whole: QuantitySource = self.with_inputs(files, values, table, QuantitySource, TabularQuantitySource)
        return self.shared_out(whole, splits, good, lambda own: _strata(own, max(20, self.folds or 0)), groups)


def _strata(values: NDArray[Any], least: int) -> tuple[NDArray[np.int64], list[str]]:
    """Strata of images by the first quantity: at most ten, each with a minimum number of images, and their names."""
    if len(values) < 4:
        few = f"{len(values)} image{' is' if len(values) == 1 else 's are'}"
        raise DataError(f"{few} too few to draw splits from: add some, or assign them in a column 'split'.")
    count = max(1, min(10, len(values) // least))
    ranks = np.nan_to_num(values[:, 0], nan=-np.inf).argsort(kind="stable").argsort(kind="stable")
    return ranks * count // max(1, len(values)), [f"of {k}" for k in range(count)]
