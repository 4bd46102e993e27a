"""Labelled image files: a folder per class, a folder without classes, tables of paths."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

import numpy as np
from annotated_types import Ge
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from typing_extensions import override

from datamodules.augmentations import normalized_keypoints
from datamodules.checking import digests_in, warn_of_cut, warn_of_shared, warn_of_two_names
from datamodules.decoded import ImageFiles
from datamodules.digests import digest_of_lines
from datamodules.errors import DataError, listed, repeated
from datamodules.files import Files, Folder
from datamodules.finding import paths_in
from datamodules.images import EXTENSIONS, KINDS, composed, is_image, names_in, sub_folders, warn_of_left_out
from datamodules.labelled.base import ClassificationDataModule, LabelledDataModule, S
from datamodules.labelled.sources import LabelledSource, TabularSource
from datamodules.options import Check, NonNegativeInt, Preprocessing, point_columns
from datamodules.paths import Paths
from datamodules.splits import fold_of, split_folders, stratified, stratified_by_group
from datamodules.tables import by_split, check_table, numeric_columns, read_table, spelled, warn_of_alike

if TYPE_CHECKING:
    import pandas as pd

Row = tuple[str, str, str]  # path; name of the class or person; split, or ``all``
Objects = NDArray[np.object_]  # of few texts, many times
Indices = NDArray[np.intp]
DRAWN = 0.15  # fraction for testing, and of the rest for validation


class Named(NamedTuple):
    """Files and their names.

    Attributes:
        paths: N.
        names: of the class or the person of each, N.
    """

    paths: Paths
    names: Objects


class Rows(NamedTuple):
    """Files, their names and their splits.

    Attributes:
        paths: N.
        names: of the class or the person of each, N.
        splits: of each, or ``all``.
    """

    paths: Paths
    names: Objects
    splits: Objects

    @classmethod
    def of(cls, rows: Iterable[Row]) -> "Rows":
        """Returns these rows as columns."""
        paths, names, splits = zip(*rows, strict=True)
        return cls(Paths.of(paths), np.array(names, object), np.array(splits, object))


def warn_of_shared_parts(parts: Mapping[str, LabelledSource]) -> None:
    """Warns of images that are in more than one split."""
    files = {name: part.images for name, part in parts.items()}
    warn_of_shared({name: (own.paths, own.digests) for name, own in files.items() if isinstance(own, ImageFiles)})


@dataclass(kw_only=True, eq=False, repr=False)
class LabelledFiles(Files, LabelledDataModule[S]):
    """Base class of modules that read labelled files.

    Args:
        folds: cross-validation: divide data without splits into this many folds of equal size; deterministic. Fold
            ``fold`` is the test split; validation is drawn from the others.
        fold: index of the fold, from 0.
        check: which files are decoded once before the training, to find broken files, duplicates in two splits and
            images under two names: ``all``; a fixed ``sample`` of a thousand; or ``none``. The others only have to
            exist. The result is cached, so that unchanged files are not decoded again.
    """

    folds: Annotated[int, Ge(2)] | None = None
    fold: NonNegativeInt | None = None
    check: Check = "all"

    one_size = False

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.folds is None) != (self.fold is None):
            given, lacking = ("fold", "folds") if self.folds is None else ("folds", "fold")
            raise DataError(
                f"--data.{given} {getattr(self, given)} needs --data.{lacking} too: --data.folds 5 --data.fold 0 is the first of "
                "five. All of them, one after the other, are trained by python -m pipelines.cross_validate."
            )
        if self.folds is not None and self.fold is not None and self.fold >= self.folds:
            raise DataError(
                f"--data.fold {self.fold} does not exist: {self.folds} folds are numbered 0 to {self.folds - 1}."
            )
        if self.check != "all" and self.cache != "none":
            raise DataError(
                f"--data.cache {self.cache} needs to know every image, and --data.check {self.check} does not look at all of "
                "them: leave one of the two out."
            )
        if self.check == "none" and self.bits == "auto":
            raise DataError(
                "--data.bits auto takes as many bits as the images need, and --data.check none looks at none of them: give "
                "their number, such as --data.bits 16, or --data.check sample."
            )

    def check_folds(self, splits: Iterable[str]) -> None:
        """Checks that data to be divided into folds have no splits.

        Raises:
            DataError: they have.
        """
        if self.folds is not None and (found := sorted(set(splits) - {"all"})):
            raise DataError(
                f"--data.folds {self.folds} divides data without splits, and {self.title} has {listed(found)}: leave --data.folds "
                "out, or give all images as one."
            )

    def inspected(
        self, rows: Rows, groups: NDArray[np.str_] | None = None
    ) -> tuple[ImageFiles, Objects, Objects, NDArray[np.bool_]]:
        """Inspects image files before the training, and warns of anomalies.

        Args:
            rows: the files.
            groups: group of each file, such as a patient; see `shared_out`.

        Returns:
            The files, the names and the splits of the rows, and whether they are usable.
        """
        paths, names, splits = rows
        table = self.checked_files(paths)
        digests, good = digests_in(table), (table["error"] == "").to_numpy()
        sizes = table[["height", "width"]].to_numpy(np.int64)
        columns = [names] if groups is None else [names, groups]
        lines = zip(digests.tolist(), *columns, strict=True)
        self.content = digest_of_lines(
            b" ".join([first, *map(str.encode, rest)]) for first, *rest in lines
        )  # however divided
        del table
        if self.preprocessing.fit == "crop":
            warn_of_cut(paths[good], sizes[good], self.size)
        warn_of_two_names(paths[good], digests[good], names[good])
        warn_of_alike(sorted(set(names)))
        return self.opened(paths, digests, sizes), names, splits, good

    def checked_files(self, paths: Paths) -> "pd.DataFrame":
        """Inspects the files; see `Files.looked_at`."""
        return self.looked_at(paths, self.check)

    def opened(self, paths: Paths, digests: NDArray[np.bytes_], sizes: NDArray[np.int64]) -> ImageFiles:
        """Returns the files as an array of images."""
        return ImageFiles(paths, digests, sizes, self.reading, self.cache, self.check == "all")

    def shared_out(
        self,
        whole: S,
        splits: Objects,
        good: NDArray[np.bool_],
        strata: Callable[[NDArray[Any]], tuple[NDArray[np.int64], Sequence[str]]],
        groups: NDArray[np.str_] | None = None,
    ) -> dict[str, S]:
        """Divides files into splits, and draws missing ones.

        Args:
            whole: all files.
            splits: split of each file, or ``all``.
            good: whether each file is usable.
            strata: returns the strata of labels, int64 N, and their names: classes or other groups that all splits
                should have in equal proportions.
            groups: group of each file, such as a patient; no group is in two splits.
        """
        parts = {split: np.flatnonzero(good & (splits == split)) for split in dict.fromkeys(splits.tolist())}
        self.check_folds(parts)
        if groups is not None:
            self._check_groups(parts, groups)

        def drawn(own: Indices, purpose: str, least: int) -> tuple[Indices, Indices]:
            labels, names = strata(whole.labels[own])
            if groups is None:
                rest, part = stratified(labels, DRAWN, names, purpose, least)
            else:
                rest, part = stratified_by_group(labels, groups[own], DRAWN, names, purpose)
            return own[rest], own[part]

        def test(own: Indices) -> tuple[Indices, Indices]:
            if self.folds is None or self.fold is None:
                return drawn(own, "validation and test", 3)
            labels, names = strata(whole.labels[own])
            rest, part = fold_of(labels, self.folds, self.fold, names, None if groups is None else groups[own])
            return own[rest], own[part]

        indices = self.divide(parts, test, lambda own: drawn(own, "validation", 2))
        divided = {name: whole.subset(own) for name, own in indices.items()}
        warn_of_shared_parts(divided)
        return divided

    def _check_groups(self, parts: Mapping[str, Indices], groups: NDArray[np.str_]) -> None:
        owners: dict[str, str] = {}
        for split, own in parts.items():
            for group in np.unique(groups[own]).tolist():
                if owners.setdefault(group, split) != split:
                    raise DataError(
                        f"{self.title}: images of {group!r} are in the splits {owners[group]} and {split}. With --data.group_column "
                        "a group is in one split only: give all its images to one, or leave the column `split` out."
                    )


@dataclass(kw_only=True, eq=False, repr=False)
class ClassFiles(LabelledFiles[LabelledSource], ClassificationDataModule):
    """Base class of modules that read files of classes."""

    def source(self, files: ImageFiles, labels: NDArray[np.int64]) -> LabelledSource:
        """Returns the samples of all rows."""
        return LabelledSource(files, labels)

    def _read(self, rows: Rows, groups: NDArray[np.str_] | None = None) -> dict[str, LabelledSource]:
        """Inspects the files, and divides them into splits."""
        files, names, splits, good = self.inspected(rows, groups)
        numbers = {name: k for k, name in enumerate(self.label_names)}
        whole = self.source(files, np.array([numbers[name] for name in names.tolist()]))
        learned = whole.labels[good & np.isin(splits, ("train", "all"))]
        empty = sorted(set(numbers.values()) - set(learned.tolist())) if {"train", "all"} & set(splits) else []
        if empty:
            raise DataError(
                f"No image to train on in class {self.label_names[empty[0]]!r} of {self.title} ({len(empty)} of "
                f"{len(numbers)} classes are empty): add images, or remove the class."
            )
        return self.shared_out(whole, splits, good, lambda labels: (labels, self.label_names), groups)


@dataclass(eq=False, repr=False)
class ImageFolder(Folder, ClassFiles):
    """A folder with one sub-folder of images per class, whose name is the label.

    With ``train/`` and, optionally, ``val/`` and ``test/`` above the classes, in any common spelling, these are the
    splits; without ``val/``, 15 % of the training images are drawn for validation. Without splits, 15 % of all images
    are drawn for testing and 15 % of the rest for validation. Drawn splits are stratified and deterministic. A folder
    with only ``test/`` is for evaluation. Hidden files and files that systems and archives leave behind are skipped.
    """

    of_folders: ClassVar[bool] = True  # whether splits have a folder per class

    @cached_property
    def _folders(self) -> dict[str, Path]:
        root = Path(self.root)
        if not root.is_dir():
            raise DataError(f"There is no folder {root.resolve()}: give the folder of your images with --data.root.")
        return split_folders(root, self.of_folders) or {"all": root}

    @cached_property
    def label_names(self) -> list[str]:
        """Names of the class folders, sorted.

        Raises:
            DataError: there are none, or another split has one that training does not have.
        """
        found = {
            split: sorted({composed(entry.name) for entry in sub_folders(folder)})
            for split, folder in self._folders.items()
        }
        learned = next(split for split in ("all", "train", "test", "val") if split in found)
        names = found[learned]
        if not names:
            raise DataError(
                f"{self._folders[learned].resolve()} has no sub-folders: make one for each class, with its images."
            )
        for name, given in found.items():
            if unknown := sorted(set(given) - set(names)):
                raise DataError(
                    f"{self._folders[name]} has the class {unknown[0]!r}, which training does not have: "
                    f"the classes there are {listed(names)}."
                )
        return names

    @property
    @override
    def num_classes(self) -> int:
        for folder in self._folders.values():
            inner = (
                [part for own in sub_folders(folder) for part in sub_folders(own)] if len(self.label_names) == 1 else []
            )
            if len(inner) > 1:
                raise DataError(
                    f"{folder.resolve()} has only one sub-folder, {self.label_names[0]}, which would be the only "
                    f"class. Are the classes {listed(f.name for f in inner)} in it? Then move these one level up."
                )
        return super().num_classes

    @override
    def load(self) -> dict[str, LabelledSource]:
        parts: list[Rows] = []
        left_out: list[Path] = []
        for split, folder in self._folders.items():
            found = self._files(folder, left_out)
            if not len(found.paths):
                warn_of_left_out(left_out)
                raise DataError(f"{folder.resolve()} has no images in a supported format: {KINDS}.")
            parts.append(Rows(*found, np.full(len(found.paths), split, object)))
        warn_of_left_out(left_out)
        paths, names, splits = zip(*parts, strict=True)
        return self._read(Rows(Paths.joined(paths), np.concatenate(names), np.concatenate(splits)))

    def _files(self, folder: Path, left_out: list[Path]) -> Named:
        """Returns the images of a split with their classes, class by class."""
        if beside := [file for file in sorted(folder.iterdir()) if is_image(file)]:
            rank_zero_warn(
                f"Left out: {len(beside)} images that are not in the folder of a class; the first: {beside[0]}."
            )
        return named_files(folder, left_out)


class UnlabelledFolder(ImageFolder):
    """All images below a folder, without labels; or below ``train``, ``val`` and ``test`` in it.

    For tasks without labels, such as autoencoding. Batches are as those of `ImageFolder`, with label 0.
    """

    label_names: ClassVar[list[str]] = ["."]  # the only class is the folder itself
    of_folders = False

    @override
    def _files(self, folder: Path, left_out: list[Path]) -> Named:
        paths = names_in(folder, left_out)
        return Named(paths, np.full(len(paths), ".", object))


def named_files(root: Path, left_out: list[Path], extensions: tuple[str, ...] = EXTENSIONS) -> Named:
    """Returns the images in a folder with a sub-folder per class or person, with the sub-folders' names, sorted by these;
    see `names_in`."""
    folders = sorted(sub_folders(root), key=lambda folder: composed(folder.name))
    found = [names_in(folder, left_out, extensions) for folder in folders]
    names = np.array([composed(folder.name) for folder in folders], object)
    return Named(Paths.joined(found), np.repeat(names, [len(own) for own in found]))


def objects(column: "pd.Series[Any]", change: Callable[[str], str] = str) -> Objects:
    """Returns a column of repeated strings as an array of shared objects.

    Args:
        column: column of a table.
        change: function applied to each distinct string.
    """
    import pandas as pd

    numbers, texts = pd.factorize(column)
    return np.array([change(text) for text in texts], object)[numbers]


@dataclass(eq=False, repr=False)
class Table(Files):
    """Settings of data listed in a CSV or Parquet table, with one row per image.

    Args:
        file: the table. An optional column ``split`` has the values train, val and test.
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
        return Path(self.file).stem

    def rows(self, table: "pd.DataFrame", column: str) -> Rows:
        """Returns the rows of a `checked` table, with the names in a column."""
        paths = paths_in(table[self.path_column], Path(self.file))
        return Rows(paths, objects(table[column].astype(str), composed), objects(table["split"]))

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
        table = read_table(file, "--data.file")
        table = table.rename(columns=spelled(table, [self.path_column, *columns, *grouped, *others, "split"]))
        columns = {self.path_column: "--data.path_column", **columns, **grouped}
        check_table(table, file, columns, [self.path_column, *filled, *grouped], must_train=False)
        return pd.concat([part.assign(split=split) for split, part in by_split(table).items()])


@dataclass(kw_only=True, eq=False, repr=False)
class Manifest(Table, ClassFiles):
    """A CSV or Parquet table with one row per image.

    With ``tabular`` or ``keypoints``, batches also have ``tabular``, float32 B×V: x and y of each keypoint, normalised by
    `KeypointCompose`, followed by the numbers.

    Args:
        label_column: column with the labels.
        tabular: columns of numbers, such as an age, used as additional inputs of the network.
        keypoints: keypoints used as additional inputs of the network, each in columns NAME_x and NAME_y, in pixels.
            They are augmented with the image, and normalised for position and scale.
    """

    label_column: str = "label"
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

    @property
    @override
    def preprocessing(self) -> Preprocessing:
        return replace(super().preprocessing, tabular=self.tabular or None, keypoints=self.keypoints or None)

    @property
    def _columns(self) -> list[str]:
        """Columns of the tabular inputs."""
        return [*point_columns(self.keypoints or ()), *(self.tabular or ())]

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

    @cached_property
    def _read_table(self) -> tuple[Rows, NDArray[np.str_] | None, "pd.DataFrame"]:
        """Rows; groups; and the columns of numbers."""
        options = dict.fromkeys(self.tabular or (), "--data.tabular")
        options |= dict.fromkeys(point_columns(self.keypoints or ()), "--data.keypoints")
        table = self.checked({self.label_column: "--data.label_column", **options}, [self.label_column, *options])
        return self.rows(table, self.label_column), self.groups(table), table[[*options]]

    @override
    def source(self, files: ImageFiles, labels: NDArray[np.int64]) -> LabelledSource:
        if not self._columns:
            return super().source(files, labels)
        file, table = Path(self.file), self._read_table[2]
        columns = point_columns(self.keypoints or ())
        points = numeric_columns(table, columns, file).reshape(len(labels), len(columns) // 2, 2)
        lone = np.flatnonzero((points == points[:, :1]).all((1, 2)))
        if self.keypoints and lone.size:
            raise DataError(
                f"{file.resolve()}: in row {table.index[lone[0]] + 1} all points of --data.keypoints are at one place: correct them, "
                "or remove the row."
            )
        return TabularSource(files, labels, numeric_columns(table, self.tabular or [], file), points)

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
                f"{self.file}: the {splits[row]} split has the label {names[row]!r}, which training does not have: "
                f"the labels there are {listed(self.label_names)}."
            )
        return self._read(rows, groups)
