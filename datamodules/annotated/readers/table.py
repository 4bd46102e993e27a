"""Boxes in CSV and Parquet tables."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from typing_extensions import override

from datamodules.annotated.boxes import BoxFiles
from datamodules.annotated.sample import COLUMNS, Box, Record, as_flag, four_numbers, merged, occurring
from datamodules.finding import Finder
from datamodules.images import composed
from datamodules.tables import by_split, check_table, read_table, spelled

if TYPE_CHECKING:
    import pandas as pd


@dataclass(kw_only=True, eq=False, repr=False)
class CSVDetection(BoxFiles):
    """A CSV or Parquet table with one row per box.

    Args:
        root: the table. An optional column ``split`` has the values train, val and test; an optional column
            ``difficult`` marks boxes to ignore. An image without objects has one row with empty cells.
        path_column: column with the images' paths, relative to the table or absolute; ``image_path``, ``filename``,
            ``image`` and ``ImageID`` are recognised too.
        label_column: column with the classes; ``class`` and ``LabelName`` are recognised too.
        box_columns: four columns; ``x_min`` or ``x1`` and so on are recognised too.
        box_format: ``xyxy`` for corners in pixels; ``xywh`` for x, y, width, height.
    """

    noun = "row"
    remedy = "Say so: --data.box_format xywh, or xyxy."

    path_column: str = "path"
    label_column: str = "label"
    box_columns: tuple[str, str, str, str] = COLUMNS
    box_format: Literal["xyxy", "xywh"] = "xyxy"
    masks: bool = field(default=False, init=False)  # a table has no outlines

    @override
    def read(self) -> tuple[dict[str, list[Record]], list[str]]:
        file = Path(self.root)
        table = read_table(file, "--data.root")
        names = [self.path_column, self.label_column, *self.box_columns]
        table = table.rename(columns=spelled(table, [*names, "split", "difficult"]))
        path_column, label_column, *box_columns = names
        columns = {path_column: "--data.path_column", label_column: "--data.label_column"}
        columns |= dict.fromkeys(box_columns, "--data.box_columns")
        check_table(table, file, columns, [path_column])
        table[label_column] = _labels_of(table[label_column])
        splits = {
            name: self._rows(part, path_column, label_column, box_columns) for name, part in by_split(table).items()
        }
        return splits, occurring(splits)

    def _rows(
        self, table: "pd.DataFrame", path_column: str, label_column: str, box_columns: Sequence[str]
    ) -> list[Record]:
        """Images of a split; an image without objects has one row with empty cells."""
        import pandas as pd

        file = Path(self.root)
        records: dict[str, Record] = {}
        finder = Finder(file.parent, [file.parent, file.parent / "images"], self.notes)
        cells = table[list(box_columns)].astype(object)
        numbers = [four_numbers([str(v).replace(",", ".") for v in row]) for row in cells.itertuples(index=False)]
        empty = table[[*box_columns, label_column]].isna().all(axis=1).to_numpy()
        difficult = table["difficult"].map(as_flag).to_numpy() if "difficult" in table else np.zeros(len(table), bool)
        rows = zip(table[path_column].astype(str), table[label_column], numbers, empty, difficult, strict=True)
        for row, (path, label, values, without, hard) in zip(table.index, rows, strict=True):
            if path not in records:
                found = finder.find(path, f"{file}, row {int(row) + 1}")
                records[path] = Record(str(found or file.parent / path), str(file))
            if not without:
                records[path].boxes.append(Box(values, None if pd.isna(label) else label, int(row) + 1, bool(hard)))
        return merged(records.values(), self.notes)


def _labels_of(column: "pd.Series[Any]") -> list[str | None]:
    """Class labels of a table as text. A column of integers stays integer despite empty cells, which become None."""
    import pandas as pd

    labels = [None if pd.isna(cell) else composed(str(cell).strip()) for cell in column]
    if None in labels and all(label is None or re.fullmatch(r"-?\d+\.0", label) for label in labels):
        return [label and label[:-2] for label in labels]
    return [label or None for label in labels]
