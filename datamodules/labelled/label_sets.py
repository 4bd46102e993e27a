"""Multi-label images from a table."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from typing_extensions import override

from datamodules.errors import DataError, listed
from datamodules.images import composed
from datamodules.labelled.base import MultiLabelDataModule
from datamodules.labelled.manifest import TabularTable
from datamodules.labelled.rows import Objects, Rows, objects
from datamodules.labelled.sources import LabelSetSource, TabularLabelSetSource
from datamodules.paths import Paths
from datamodules.tables import LIST

if TYPE_CHECKING:
    import pandas as pd

ANSWERS = {
    **dict.fromkeys(("1", "1.0", "true", "yes", "y"), 1),
    **dict.fromkeys(("0", "0.0", "false", "no", "n", ""), 0),
}
SEPARATORS = (LIST, "|", ";", ",", " ")
RARE = 7  # minimum number of images of a label for stratification


@dataclass(kw_only=True, eq=False, repr=False)
class MultiLabelTable(TabularTable[LabelSetSource], MultiLabelDataModule):
    """A CSV or Parquet table with one row per image; labels in one column, or in one column each; see also `TabularTable`.

    Without a column ``split``, 15 % of the images are drawn for testing and 15 % of the rest for validation, so that
    rare labels are in all three splits.

    Args:
        label_column: column whose cells list all labels of an image; empty for an image without labels.
        separator: separator of labels in a cell; None for the first of ``| ; ,`` and the space that occurs.
        label_columns: one column per label, with 1 and 0, true and false or yes and no; None for ``label_column``, or,
            in a table without it, all columns that only have such values.
    """

    label_column: str = "labels"
    separator: str | None = None
    label_columns: list[str] | None = None

    @property
    @override
    def answer_columns(self) -> dict[str, str]:
        if self.label_columns is None:
            return {self.label_column: "--data.label_column"}
        return dict.fromkeys(self.label_columns, "--data.label_columns")

    @cached_property
    def _table(self) -> tuple[list[str], tuple[Paths, Objects], NDArray[np.int64], "pd.DataFrame"]:
        """The labels' names; paths and splits; the labels, N×K; and the whole table."""
        file = Path(self.file)
        optional = [] if self.label_columns else [self.label_column]
        columns = dict.fromkeys(self.label_columns or [], "--data.label_columns") | self.input_columns
        table = self.checked(columns, [*self.input_columns], optional)
        names, labels = self._of_cells(table) if self._in_cells(table) else self._of_columns(table)
        if not names:
            lacking = (
                f"no label under {self.label_column!r}" if self._in_cells(table)
                else f"no column {self.label_column!r} and none of 1 and 0 alone; it has {listed(table.columns)}"
            )  # fmt: skip
            raise DataError(
                f"{file.resolve()} has {lacking}. Name the column of labels with --data.label_column, or a column each with "
                "--data.label_columns."
            )
        rows = self.paths(table), objects(table["split"])
        return names, rows, labels, table

    def _in_cells(self, table: "pd.DataFrame") -> bool:
        return self.label_columns is None and self.label_column in table

    def _of_cells(self, table: "pd.DataFrame") -> tuple[list[str], NDArray[np.int64]]:
        cells = table[self.label_column].fillna("").astype(str)
        if (nested := cells.str.startswith(LIST).to_numpy()).any():
            raise DataError(
                f"{self.paths(table)[int(nested.argmax())]} has objects or lists under {self.label_column!r}, where names of labels are "
                "expected: name another key or column with --data.label_column. Boxes are read by --data COCODetection."
            )
        separator = self.separator or next((s for s in SEPARATORS if cells.str.contains(s, regex=False).any()), "|")
        sets = [{composed(name.strip()) for name in cell.split(separator)} - {""} for cell in cells]
        learned = [own for own, split in zip(sets, table["split"], strict=True) if split in ("train", "all")] or sets
        names = sorted(set().union(*learned))
        said = [] if self._shards is None else self._shards.class_names(self.label_column)
        names = said if set(names) <= set(said) else names
        if unknown := sorted(set().union(*sets) - set(names)):
            raise DataError(
                f"{self.file} has the label {unknown[0]!r} in no row to train on: the labels there are {listed(names)}. Add some, or remove the "
                "label."
            )
        return names, np.array([[name in own for name in names] for own in sets], np.int64).reshape(len(sets), -1)

    def _of_columns(self, table: "pd.DataFrame") -> tuple[list[str], NDArray[np.int64]]:
        known = {self.path_column, self.group_column, "split", *self.input_columns}
        others = [name for name in table.columns if name not in known]
        cells = table.fillna("").astype(str).apply(lambda column: column.str.strip().str.casefold())
        names = self.label_columns or [name for name in others if cells[name].isin(ANSWERS).all() and cells[name].any()]
        for name in names:
            if wrong := sorted(set(cells[name]) - set(ANSWERS)):
                raise DataError(
                    f"{self.file} has {wrong[0]!r} under {name!r}: the column of a label has 1 and 0, true and false, or yes "
                    "and no."
                )
        return names, cells[names].replace(ANSWERS).to_numpy(np.int64)

    @cached_property  # not a property: `adopt_classes` replaces it
    @override
    def label_names(self) -> list[str]:
        return self._table[0]

    @override
    def load(self) -> dict[str, LabelSetSource]:
        names, (paths, splits), labels, table = self._table
        groups = self.groups(table)
        sets = [", ".join(name for name, has in zip(names, row, strict=True) if has) for row in labels]
        files, _, _, good = self.inspected(Rows(paths, np.array(sets, object), splits), groups)
        whole: LabelSetSource = self.with_inputs(files, labels, table, LabelSetSource, TabularLabelSetSource)
        least = max(RARE, self.folds or 0)
        divided = self.shared_out(whole, splits, good, lambda own: strata(own, least), groups)
        if "train" in divided:
            for name, count in zip(names, divided["train"].labels.sum(0).tolist(), strict=True):
                if count in (0, len(divided["train"])):
                    each = "no" if count == 0 else "every"
                    rank_zero_warn(
                        f"{self.title}: {each} image to train on has the label {name!r}; nothing can be learned "
                        "about it."
                    )
        return divided


def strata(labels: NDArray[np.int64], least: int = RARE) -> tuple[NDArray[np.int64], list[str]]:
    """Strata for splitting multi-label images: by the rarest label of each, so that the parts have nearly the same
    label shares.

    >>> strata(np.array([[1, 0], [1, 1], [0, 0]] * 8))[0].tolist()[:3]
    [1, 0, 2]

    Args:
        labels: int64 N×K of 0 and 1.
        least: minimum size of a stratum; smaller ones are merged into the largest.

    Returns:
        The stratum of each image, int64 N, and the names of the strata.
    """
    rank = labels.sum(0).argsort(kind="stable").argsort(kind="stable")
    order = np.where(labels == 1, rank, labels.shape[1]).min(1)
    _, group, sizes = np.unique(order, return_inverse=True, return_counts=True)
    group = np.where(sizes[group] < least, sizes.argmax(), group)
    found = np.unique(group, return_inverse=True)[1].astype(np.int64)
    return found, [f"of {k}" for k in range(found.max(initial=0) + 1)]
