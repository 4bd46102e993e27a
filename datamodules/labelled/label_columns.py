"""Images with a class from each of several columns of a table."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from datamodules.errors import DataError, listed, repeated
from datamodules.images import composed
from datamodules.labelled.base import NamedDataModule
from datamodules.labelled.files import LabelledFiles
from datamodules.labelled.label_sets import RARE, strata
from datamodules.labelled.manifest import Table
from datamodules.labelled.rows import Rows, objects
from datamodules.labelled.sources import ColumnSource, Images


class LabelColumnsSource(ColumnSource):
    """Images with a class per column. Samples have ``image``, and ``label/COLUMN``, int64, for each column.

    Args:
        images: see `LabelledSource`.
        labels: int64 N×K, the class of each column as an index into ``names``.
        names: COLUMN/CLASS, the classes of a column one after the other.
    """

    batch = None  # type: ignore[assignment]  # the keys of a sample depend on its columns

    def __init__(self, images: Images, labels: NDArray[np.int64], names: list[str]) -> None:
        super().__init__(images, labels)
        self.names, self.columns = names, [name.partition("/")[0] for name in names]

    @override
    def __getitem__(self, index: int) -> dict[str, Any]:
        own = {self.columns[k]: k for k in self.labels[index].tolist()}
        classes = {f"label/{column}": np.int64(k - self.columns.index(column)) for column, k in own.items()}
        return {"image": self.images[index], **classes}

    @override
    def subset(self, indices: NDArray[Any]) -> Self:
        return type(self)(self.images[indices], self.labels[indices], self.names)

    @override
    def renumbered(self, numbers: NDArray[np.int64], names: list[str]) -> Self:
        return type(self)(self.images, numbers[self.labels], names)


@dataclass(kw_only=True, eq=False, repr=False)
class LabelColumns(Table, LabelledFiles[LabelColumnsSource], NamedDataModule[LabelColumnsSource]):
    """A CSV or Parquet table with one row per image and several columns of classes, for multi-task learning.

    Without a column ``split``, 15 % of the images are drawn for testing and 15 % of the rest for validation, so that
    rare classes are in all three splits.

    Batches: ``image`` uint8 B×C×S×S with S = ``image_size``, and ``label/COLUMN`` int64 B for each column.

    Args:
        label_columns: two or more columns of classes; each is a task of its own.
    """

    label_columns: list[str]

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if twice := repeated(self.label_columns):
            raise DataError(f"--data.label_columns names the column {twice[0]!r} {twice[1]} times: once will do.")
        if odd := [name for name in self.label_columns if "/" in name or "." in name]:
            raise DataError(
                f"--data.label_columns {odd[0]}: rename this column of {self.file}, without a point or a slash."
            )

    @cached_property
    def _table(self) -> tuple[list[str], Rows, NDArray[np.int64], NDArray[np.str_] | None]:
        """The names of the classes; the rows, named by the classes of each; the classes, N×K; and the groups."""
        table = self.checked(dict.fromkeys(self.label_columns, "--data.label_columns"), self.label_columns)
        cells = np.stack([objects(table[name].astype(str), composed) for name in self.label_columns], 1)
        rows = self.rows(table, self.label_columns[0])._replace(
            names=np.array([", ".join(row) for row in cells], object)
        )
        learned = np.isin(rows.splits.astype(str), ("train", "all"))
        names: list[str] = []
        for column, values in zip(self.label_columns, cells.T, strict=True):
            own = sorted(set(values[learned]) or set(values))
            if len(own) < 2:
                raise DataError(f"{self.file} has only {own[0]!r} under {column!r}: there is nothing to tell apart.")
            if unknown := sorted(set(values) - set(own)):
                raise DataError(
                    f"{self.file} has {unknown[0]!r} under {column!r} in no row to train on: the classes there are {listed(own)}. Add some, or "
                    "remove the class."
                )
            names += [f"{column}/{value}" for value in own]
        numbers = {name: k for k, name in enumerate(names)}
        labels = [[numbers[f"{c}/{value}"] for c, value in zip(self.label_columns, row, strict=True)] for row in cells]
        return names, rows, np.array(labels, np.int64), self.groups(table)

    @cached_property  # not a property: `adopt_classes` replaces it
    @override
    def label_names(self) -> list[str]:
        return self._table[0]

    @property
    def targets(self) -> dict[str, list[str]]:
        """The classes of each column, by ``classification/COLUMN``."""
        found: dict[str, list[str]] = {}
        for column, _, value in (name.partition("/") for name in self.label_names):
            found.setdefault(f"classification/{column}", []).append(value)
        return found

    @override
    def _images(self, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.bincount(labels.ravel(), minlength=len(self.label_names))

    @override
    def load(self) -> dict[str, LabelColumnsSource]:
        names, rows, labels, groups = self._table
        files, _, splits, good = self.inspected(rows, groups)
        whole, least = LabelColumnsSource(files, labels, names), max(RARE, self.folds or 0)
        marks = np.eye(len(names), dtype=np.int64)  # whether a label is a class: int64 K×K
        return self.shared_out(whole, splits, good, lambda own: strata(marks[own].sum(1), least), groups)
