"""Images that a table lists with their classes, and with numbers and keypoints as further inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from typing_extensions import override

from datamodules.augmentations import normalized_keypoints
from datamodules.decoded import ImageFiles
from datamodules.errors import DataError, listed, repeated
from datamodules.files import Files, shards_at, titled
from datamodules.finding import paths_in
from datamodules.images import composed
from datamodules.labelled.base import S
from datamodules.labelled.files import ClassFiles, LabelledFiles
from datamodules.labelled.rows import Rows, objects
from datamodules.labelled.sources import LabelledSource, TabularSource
from datamodules.options import Preprocessing, point_columns
from datamodules.paths import Paths
from datamodules.tables import LIST, by_split, check_table, numbered, numeric_columns, read_table, spelled

if TYPE_CHECKING:
    import pandas as pd

    from datamodules.shards import ShardSet


@dataclass(eq=False, repr=False)
class Table(Files):
    """Settings of data listed in a CSV or Parquet table, with one row per image.

    Args:
        file: the table. An optional column ``split`` has the values train, val and test. Or tar or Parquet files of pictures, as
            for `Shards`: the keys of the JSON beside each picture, or the other columns, are the columns.
        path_column: column with the images' paths, relative to the table or absolute.
        group_column: column that groups the images, such as by patient or place; splits and folds are drawn so that no
            group is in two of them.
    """

    file: str
    _: KW_ONLY
    path_column: str = "path"
    group_column: str | None = None

    @property
    def title(self) -> str:
        """See `VisionDataModule.title`; the name of the table."""
        return titled(self.file)

    @cached_property
    def _shards(self) -> "ShardSet | None":
        return shards_at(self.file, or_table=True)

    def paths(self, table: "pd.DataFrame") -> Paths:
        """Returns the images of the rows of a `checked` table."""
        if self._shards is not None:
            return self._shards.members[table.index.to_numpy(np.int64)]
        return paths_in(table[self.path_column], Path(self.file))

    def rows(self, table: "pd.DataFrame", column: str) -> Rows:
        """Returns the rows of a `checked` table, with the names in a column."""
        return Rows(self.paths(table), objects(table[column].astype(str), composed), objects(table["split"]))

    def row(self, table: "pd.DataFrame", row: int) -> str:
        """Name of a row for messages: its picture in shards, or its number."""
        return numbered(table, row) if self._shards is None else self.paths(table)[row]

    def groups(self, table: "pd.DataFrame") -> NDArray[np.str_] | None:
        """Returns the group of each row of a `checked` table; None without a column of groups."""
        return None if self.group_column is None else table[self.group_column].astype(str).to_numpy(np.str_)

    def checked(self, columns: dict[str, str], filled: Sequence[str], others: Sequence[str] = ()) -> "pd.DataFrame":
        """Reads and checks the table, sorted by split; see `by_split`.

        Args:
            columns: required columns besides the paths, each with the setting that names it.
            filled: columns without empty cells.
            others: optional columns.

        Raises:
            DataError: see `check_table`.
        """
        import pandas as pd

        file = Path(self.file)
        grouped = {} if self.group_column is None else {self.group_column: "--data.group_column"}
        table = read_table(file, "--data.file") if self._shards is None else self._shards.table(self.path_column)
        table = table.rename(columns=spelled(table, [self.path_column, *columns, *grouped, *others, "split"]))
        columns = {self.path_column: "--data.path_column", **columns, **grouped}
        check_table(table, file, columns, [self.path_column, *filled, *grouped], False, self.row)
        self._check_single(table, columns)
        return pd.concat([part.assign(split=split) for split, part in by_split(table).items()])

    def _check_single(self, table: "pd.DataFrame", columns: Mapping[str, str]) -> None:
        """Refuses lists and objects of JSON where one value is expected, in columns, each with its setting."""
        for name, setting in columns.items() if self._shards is not None else ():
            several = table[name].astype(str).str.contains(LIST, regex=False).to_numpy()
            if several.any():
                raise DataError(
                    f"{self.paths(table)[int(several.argmax())]} has a list or an object under {name!r}, where one value is expected: name "
                    f"another key or column with {setting}. Several labels are read by --data MultiLabelTable, boxes by --data COCODetection."
                )


@dataclass(kw_only=True, eq=False, repr=False)
class TabularTable(Table, LabelledFiles[S]):
    """Base class of tables that may have tabular inputs of the network.

    With ``tabular`` or ``keypoints``, batches also have ``tabular``, float32 B×V: x and y of each keypoint, normalised by
    `KeypointCompose`, followed by the numbers.

    Args:
        tabular: columns of numbers, such as an age, used as additional inputs of the network.
        keypoints: keypoints used as additional inputs of the network, each in columns NAME_x and NAME_y, in pixels.
            They are augmented with the image, and normalised for position and scale.
    """

    tabular: list[str] | None = None
    keypoints: list[str] | None = None

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keypoints is not None and len(self.keypoints) == 1:
            raise DataError(
                f"--data.keypoints {self.keypoints[0]} is a single keypoint, whose position is lost by normalisation: give two or more, "
                "or its columns as --data.tabular."
            )
        if twice := repeated(self._columns):
            raise DataError(
                f"--data.tabular and --data.keypoints name the column {twice[0]!r} {twice[1]} times: once will do."
            )
        if both := [name for name in self.answer_columns if name in self.input_columns]:
            raise DataError(
                f"{self.input_columns[both[0]]} and {self.answer_columns[both[0]]} both name the column {both[0]!r}: the network would be "
                "told what it is to predict. Leave it out of one of them."
            )

    @property
    @override
    def preprocessing(self) -> Preprocessing:
        return replace(super().preprocessing, tabular=self.tabular or None, keypoints=self.keypoints or None)

    @property
    def _columns(self) -> list[str]:
        """Columns of the tabular inputs."""
        return [*point_columns(self.keypoints or ()), *(self.tabular or ())]

    @property
    def input_columns(self) -> dict[str, str]:
        """Columns of the tabular inputs, each with the setting that names it."""
        points = dict.fromkeys(point_columns(self.keypoints or ()), "--data.keypoints")
        return dict.fromkeys(self.tabular or (), "--data.tabular") | points

    @property
    def answer_columns(self) -> dict[str, str]:
        """Columns of what is predicted, as far as they are named, each with the setting that names it."""
        raise NotImplementedError

    @property
    def tabular_names(self) -> list[str] | None:
        """Names of the tabular inputs; None for none."""
        return self._columns or None

    @property
    def tabular_mean(self) -> list[float] | None:
        """Mean of each tabular input over the training split, without augmentation; None without a training split."""
        return None if (inputs := self._training_inputs) is None else inputs.mean(0).tolist()

    @property
    def tabular_std(self) -> list[float] | None:
        """Standard deviation of each tabular input, 1 for constant ones; None without a training split."""
        if (inputs := self._training_inputs) is None:
            return None
        std = inputs.std(0)
        return np.where(std > 1e-6, std, 1.0).tolist()

    @property
    def _training_inputs(self) -> NDArray[np.float64] | None:
        """Tabular inputs of the training split, N×V."""
        source = self.sources.get("train") if self._columns else None
        if not isinstance(source, TabularSource):
            return None
        points = (
            normalized_keypoints(source.keypoints).reshape(len(source), -1) if self.keypoints else source.tabular[:, :0]
        )
        return np.concatenate([points, source.tabular], 1).astype(np.float64)

    def with_inputs(
        self,
        files: ImageFiles,
        labels: NDArray[Any],
        table: "pd.DataFrame",
        plain: type[LabelledSource],
        tabular: type[TabularSource],
    ) -> Any:
        """Returns the samples of all rows.

        Args:
            files: the images.
            labels: of each, as ``plain`` takes them.
            table: a `checked` table, whose `input_columns` are read.
            plain: class of the samples without tabular inputs.
            tabular: class of those with some.

        Raises:
            DataError: a number lacks, or the keypoints of an image are all at one place.
        """
        if not self._columns:
            return plain(files, labels)
        file = Path(self.file)
        columns = point_columns(self.keypoints or ())
        points = numeric_columns(table, columns, file, self.row).reshape(len(labels), len(columns) // 2, 2)
        lone = np.flatnonzero((points == points[:, :1]).all((1, 2)))
        if self.keypoints and lone.size:
            raise DataError(
                f"{file.resolve()}: in {self.row(table, int(lone[0]))} all points of --data.keypoints are at one place: correct them, "
                "or remove the row."
            )
        self._warn_of_points_outside(files, points)
        return tabular(files, labels, numeric_columns(table, self.tabular or [], file, self.row), points)

    def _warn_of_points_outside(self, files: ImageFiles, points: NDArray[np.float32]) -> None:
        """Warns of images with keypoints, float32 N×K×2, outside of them, as if they were those of another size."""
        looked_at = files.sizes.min(1) > 0
        outside = ((points < 0) | (points > files.sizes[:, None, ::-1])).any(2) & looked_at[:, None]
        if (images := outside.any(1)).any():
            row = int(images.argmax())
            name, (x, y) = (self.keypoints or ())[int(outside[row].argmax())], points[row][outside[row]][0]
            height, width = files.sizes[row]
            rank_zero_warn(
                f"{images.sum()} of {len(files)} images have points of --data.keypoints outside of them; the first: {files.paths[row]}, "
                f"{width}×{height} pixels, has {name} at ({x:g}, {y:g}). Points are in pixels of the file, from its upper left corner."
            )


@dataclass(kw_only=True, eq=False, repr=False)
class Manifest(TabularTable[LabelledSource], ClassFiles):
    """A CSV or Parquet table with one row per image; see also `TabularTable`.

    Args:
        label_column: column with the labels.
    """

    label_column: str = "label"

    @property
    @override
    def answer_columns(self) -> dict[str, str]:
        return {self.label_column: "--data.label_column"}

    @cached_property
    def _read_table(self) -> tuple[Rows, NDArray[np.str_] | None, "pd.DataFrame"]:
        """Rows; groups; and the columns of tabular inputs."""
        inputs = self.input_columns
        table = self.checked(self.answer_columns | inputs, [self.label_column, *inputs])
        return self.rows(table, self.label_column), self.groups(table), table[[*inputs]]

    @override
    def source(self, files: ImageFiles, labels: NDArray[np.int64]) -> LabelledSource:
        source: LabelledSource = self.with_inputs(files, labels, self._read_table[2], LabelledSource, TabularSource)
        return source

    @cached_property
    def label_names(self) -> list[str]:
        """Labels that occur in training, sorted."""
        _, names, splits = self._read_table[0]
        return sorted(set(names[splits == "train"]) or set(names))

    @override
    def load(self) -> dict[str, LabelledSource]:
        rows, groups, _ = self._read_table
        _, names, splits = rows
        if unknown := set(names) - set(self.label_names):
            row = next(row for row, name in enumerate(names) if name in unknown)
            raise DataError(
                f"{self.file}: the {splits[row]} split has the label {names[row]!r}, which no row to train on has: the "
                f"labels there are {listed(self.label_names)}. Add some, or remove the label."
            )
        return self._read(rows, groups)
