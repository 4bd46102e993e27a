"""Labelled image files that one has oneself: a folder for each class or person, a folder without classes, tables of paths."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pandas as pd
from annotated_types import Ge
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from typing_extensions import override

from datamodules.base import DataError, listed
from datamodules.decoded import ImageFiles
from datamodules.finding import paths_in
from datamodules.images import (
    EXTENSIONS,
    KINDS,
    check_images,
    composed,
    images_in,
    is_image,
    sub_folders,
    warn_of_cut,
    warn_of_left_out,
    warn_of_shared,
    warn_of_two_names,
)
from datamodules.labelled.base import ClassificationDataModule, LabelledDataModule, S
from datamodules.labelled.people import FaceDataModule, by_person
from datamodules.labelled.sources import LabelledSource, PeopleSource
from datamodules.options import Files, Folder, NonNegativeInt
from datamodules.splits import SPLITS, fold_of, split_folders, stratified, stratified_by_group
from datamodules.tables import by_split, check_table, read_table, spelled, text_of, warn_of_alike

Row = tuple[str, str, str]  # path; name of the class or the person; split, or ``all``
Indices = NDArray[np.intp]
DRAWN = 0.15  # of the files, for the test, and of the rest, for validation


def warn_of_shared_parts(parts: Mapping[str, LabelledSource]) -> None:
    """Warns of images that are in more than one split."""
    files = {name: part.images for name, part in parts.items()}
    warn_of_shared({name: (own.paths, own.digests) for name, own in files.items() if isinstance(own, ImageFiles)})


@dataclass(kw_only=True, eq=False, repr=False)
class LabelledFiles(Files, LabelledDataModule[S]):
    """Base of the modules that read labelled files.

    Args:
        folds: cross-validation: divide data without splits into so many parts of equal size, always the same. Part ``fold``
            is the test split; validation is drawn from the others.
        fold: which one, from 0.
    """

    folds: Annotated[int, Ge(2)] | None = None
    fold: NonNegativeInt | None = None

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
                f"--data.fold {self.fold} is none of {self.folds} folds, whose numbers are 0 to {self.folds - 1}."
            )

    def check_folds(self, splits: Iterable[str]) -> None:
        """Makes sure that data which are to be divided into folds have no splits.

        Raises:
            DataError: they have.
        """
        if self.folds is not None and (found := sorted(set(splits) - {"all"})):
            raise DataError(
                f"--data.folds {self.folds} divides data without splits, and {self.title} has {listed(found)}: leave --data.folds "
                "out, or give all images as one."
            )

    def inspected(self, rows: Sequence[Row]) -> tuple[ImageFiles, NDArray[Any], NDArray[Any], NDArray[np.bool_]]:
        """Looks at image files once, before training, and warns of what is strange about them.

        Args:
            rows: the files.

        Returns:
            The files, the names and the splits of the rows, and whether they can be used.
        """
        paths, names, splits = map(np.asarray, zip(*rows, strict=True))
        table, self.bad_files = check_images(paths, self.on_bad_file)
        digests, good = table["digest"].to_numpy(np.str_), (table["error"] == "").to_numpy()
        sizes = table[["height", "width"]].to_numpy(np.int64)
        if self.preprocessing.fit == "crop":
            warn_of_cut(paths[good], sizes[good])
        warn_of_two_names(paths[good], digests[good], names[good])
        warn_of_alike(np.unique(names).tolist())
        return ImageFiles(paths, digests, sizes, self.in_chans, self.cache), names, splits, good

    def shared_out(
        self,
        whole: S,
        splits: NDArray[np.str_],
        good: NDArray[np.bool_],
        strata: Callable[[NDArray[Any]], tuple[NDArray[np.int64], Sequence[str]]],
        groups: NDArray[np.str_] | None = None,
    ) -> dict[str, S]:
        """The splits, of which those that are missing are drawn.

        Args:
            whole: all files.
            splits: which split each is of, or ``all``.
            good: whether each can be used.
            strata: what of labels is to be in all splits alike: numbers of classes, or of other groups, int64 N, and their
                names.
            groups: what each file is of, such as a patient; nothing of one is in two splits.
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
class _ClassFiles(LabelledFiles[LabelledSource], ClassificationDataModule):
    """Shared by the modules that read files of classes."""

    def _read(self, rows: Sequence[Row], groups: NDArray[np.str_] | None = None) -> dict[str, LabelledSource]:
        """Looks at the files, and shares them out."""
        files, names, splits, good = self.inspected(rows)
        numbers = {name: k for k, name in enumerate(self.label_names)}
        whole = LabelledSource(files, np.array([numbers[name] for name in names.tolist()]))
        learned = whole.labels[good & np.isin(splits, ("train", "all"))]
        empty = sorted(set(numbers.values()) - set(learned.tolist())) if {"train", "all"} & set(splits) else []
        if empty:
            raise DataError(
                f"No image to train on in class {self.label_names[empty[0]]!r} of {self.title} ({len(empty)} of "
                f"{len(numbers)} classes are empty): add images, or remove the class."
            )
        return self.shared_out(whole, splits, good, lambda labels: (labels, self.label_names), groups)


@dataclass(eq=False, repr=False)
class ImageFolder(Folder, _ClassFiles):
    """Any folder with one sub-folder of images for each class, its name being the label.

    With ``train/`` and, optionally, ``val/`` and ``test/`` above the classes, in any usual spelling, these are the splits;
    without ``val/``, 15 % of the training images are drawn for validation. Without splits, 15 % of all are drawn for the
    test and 15 % of the rest for validation. What is drawn is stratified and always the same. A folder with ``test/``
    alone is for measuring only. Hidden files are left out, and so is what systems and archives leave behind.
    """

    of_folders: ClassVar[bool] = True  # a split has a folder for each class

    @cached_property
    def _folders(self) -> dict[str, Path]:
        root = Path(self.root)
        if not root.is_dir():
            raise DataError(f"There is no folder {root.resolve()}: give the folder of your images with --data.root.")
        return split_folders(root, self.of_folders) or {"all": root}

    @cached_property
    def label_names(self) -> list[str]:
        """The names of the class folders, sorted.

        Raises:
            DataError: there are none, or another split has one that training lacks.
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
                    f"{folder.resolve()} has one folder only, {self.label_names[0]}, which would be the one class. Are the "
                    f"classes {listed(f.name for f in inner)} in it? Then put these one level higher."
                )
        return super().num_classes

    @override
    def load(self) -> dict[str, LabelledSource]:
        rows: list[Row] = []
        left_out: list[Path] = []
        for split, folder in self._folders.items():
            found = self._files(folder, left_out)
            if not found:
                warn_of_left_out(left_out)
                raise DataError(f"{folder.resolve()} has no images; those read are {KINDS}.")
            rows += [(path, name, split) for path, name in found]
        warn_of_left_out(left_out)
        return self._read(rows)

    def _files(self, folder: Path, left_out: list[Path]) -> list[tuple[str, str]]:
        """The images of a split and their classes, class by class."""
        if beside := [file for file in sorted(folder.iterdir()) if is_image(file)]:
            rank_zero_warn(f"Left out: {len(beside)} images that are in no class's folder; the first: {beside[0]}.")
        return sorted(named_files(folder, left_out), key=lambda row: row[1])


class UnlabelledFolder(ImageFolder):
    """All images in a folder and in those below, without labels; or below ``train``, ``val`` and ``test`` in it.

    For tasks that need none, such as autoencoding. Batches are as those of `ImageFolder`, with label 0.
    """

    label_names: ClassVar[list[str]] = ["."]  # the one class is the folder itself
    of_folders = False

    @override
    def _files(self, folder: Path, left_out: list[Path]) -> list[tuple[str, str]]:
        return [(os.fspath(file), ".") for file in images_in(folder, left_out)]


def named_files(root: Path, left_out: list[Path]) -> list[tuple[str, str]]:
    """The images in a folder with a sub-folder for each class or person, and the sub-folders' names; see `images_in`."""
    return [
        (os.fspath(file), composed(folder.name)) for folder in sub_folders(root) for file in images_in(folder, left_out)
    ]


@dataclass(eq=False, repr=False)
class Table(Files):
    """Settings of data that a CSV or Parquet table lists, with a row for each image.

    Args:
        file: the table. A column ``split`` with train, val and test, where there is one, says which is which.
        path_column: column with the images' paths, relative to the table or absolute.
        group_column: column that says what an image is of, such as a patient or a place; splits and folds are drawn so that
            nothing is in two of them.
    """

    file: str
    _: KW_ONLY
    path_column: str = "path"
    group_column: str | None = None

    @property
    def title(self) -> str:
        """See `VisionDataModule.title`; the table's name."""
        return Path(self.file).stem

    def rows(self, table: pd.DataFrame, column: str) -> list[Row]:
        """The rows of a table that was `checked`, with the names in a column."""
        paths, names = paths_in(table[self.path_column], Path(self.file)), map(composed, table[column].astype(str))
        return list(zip(paths, names, table["split"].tolist(), strict=True))

    def groups(self, table: pd.DataFrame) -> NDArray[np.str_] | None:
        """What each row of a table that was `checked` is of; None where no column says it."""
        return None if self.group_column is None else table[self.group_column].astype(str).to_numpy(np.str_)

    def checked(self, columns: dict[str, str], filled: Sequence[str], others: Sequence[str] = ()) -> pd.DataFrame:
        """The table, sorted by splits, which its column ``split`` names as `by_split` does.

        Args:
            columns: those that it must have beside the paths, each with the setting that names it.
            filled: those of which no cell may be empty.
            others: those that it may have.

        Raises:
            DataError: see `check_table`.
        """
        file = Path(self.file)
        grouped = {} if self.group_column is None else {self.group_column: "--data.group_column"}
        table = read_table(file, "--data.file")
        table = table.rename(columns=spelled(table, [self.path_column, *columns, *grouped, *others, "split"]))
        columns = {self.path_column: "--data.path_column", **columns, **grouped}
        check_table(table, file, columns, [self.path_column, *filled, *grouped], must_train=False)
        return pd.concat([part.assign(split=split) for split, part in by_split(table).items()])


@dataclass(kw_only=True, eq=False, repr=False)
class Manifest(Table, _ClassFiles):
    """A CSV or Parquet table with a row for each image.

    Args:
        label_column: column with the labels.
    """

    label_column: str = "label"

    @cached_property
    def _table(self) -> pd.DataFrame:
        return self.checked({self.label_column: "--data.label_column"}, [self.label_column])

    @cached_property
    def _rows(self) -> list[Row]:
        return self.rows(self._table, self.label_column)

    @cached_property
    def label_names(self) -> list[str]:
        """The labels that occur in training, sorted."""
        return sorted(
            {name for _, name, split in self._rows if split == "train"} or {name for _, name, _ in self._rows}
        )

    @override
    def load(self) -> dict[str, LabelledSource]:
        names = self.label_names
        if unknown := next((row for row in self._rows if row[1] not in names), None):
            raise DataError(
                f"{self.file}: the {unknown[2]} split has the label {unknown[1]!r}, which training does not have: "
                f"the labels there are {listed(names)}."
            )
        return self._read(self._rows, self.groups(self._table))


@dataclass(kw_only=True, eq=False, repr=False)
class _FaceFiles(LabelledFiles[PeopleSource], FaceDataModule):
    """Shared by the modules that read files of people.

    Args:
        on_lone_picture: what a person to train on with a single picture means: stop and name him, or go on without.
    """

    on_lone_picture: Literal["error", "skip"] = "error"

    def _read(self, rows: Sequence[Row]) -> dict[str, PeopleSource]:
        """Looks at the files, and shares them out."""
        files, people, splits, good = self.inspected(rows)
        whole = PeopleSource(files, people)
        parts = {split: whole.subset(good & (splits == split)) for split in np.unique(splits[good]).tolist()}
        self.check_folds(parts)
        divided = self.divide_people(parts, partial(by_person, folds=self.folds, fold=self.fold or 0))
        warn_of_shared_parts(divided)
        train = divided.get("train")
        if train is not None and self.on_lone_picture == "skip" and (lone := train.counts < 2).any():
            rank_zero_warn(f"Left out of training: {int(lone.sum())} people with a single picture.")
            divided["train"] = train.subset(~lone[train.labels])
        return divided


@dataclass(kw_only=True, eq=False, repr=False)
class PeopleFolder(Folder, _FaceFiles):
    """Any folder with one sub-folder of pictures for each person: LFW, VGGFace2, CASIA-WebFace and others as they are.

    With ``train/`` and, optionally, ``val/`` and ``test/`` above the people, in any usual spelling, these are the splits. What is missing is
    drawn, by person: 15 % of the people for the test, 15 % of the rest for validation. With a file of pairs, as LFW
    has them, the pictures that it names are the test split, and verification is measured on these pairs; nobody in them
    is trained on.

    Args:
        test_root: another folder of people for the test, such as LFW's.
        pairs: a file of pairs in LFW's format (``pairs.txt``), of pictures in ``test_root`` or else in ``root``.
    """

    test_root: str | None = None
    pairs: str | None = None

    @override
    def load(self) -> dict[str, PeopleSource]:
        root = Path(self.root)
        folders = (split_folders(root) if root.is_dir() else {}) or {"all": root}
        rows = [(path, person, split) for split, folder in folders.items() for path, person in people_in(folder)]
        named: list[str] = []
        if self.test_root or self.pairs:
            rows = [
                (path, person, "train" if split == "all" else split) for path, person, split in rows if split != "test"
            ]
        if self.pairs:
            named, people, protocol = read_pairs(self.pairs, self.test_root or root)
            rows = [row for row in rows if row[1] not in set(people)]
            rows += [(path, person, "test") for path, person in zip(named, people, strict=True)]
        elif self.test_root:
            rows += [(path, person, "test") for path, person in people_in(Path(self.test_root))]
        parts = self._read(rows)
        if self.pairs:
            if len(parts["test"]) != len(named):
                raise DataError(f"{self.pairs} names pictures that cannot be read: the protocol needs all of them.")
            parts["test"].pairs = protocol
        return parts


def people_in(root: Path) -> list[tuple[str, str]]:
    """See `named_files`; sorted by the pictures.

    Raises:
        DataError: there is no such folder, or there are no pictures in sub-folders.
    """
    if not root.is_dir():
        raise DataError(f"There is no folder {root.resolve()}: give the folder of people with --data.root.")
    left_out: list[Path] = []
    found = named_files(root, left_out)
    warn_of_left_out(left_out)
    if not found:
        raise DataError(
            f"{root.resolve()} has no pictures in sub-folders: make one for each person, with pictures of the kinds "
            f"{KINDS}."
        )
    return sorted(found)


def read_pairs(file: str | Path, root: str | Path) -> tuple[list[str], list[str], NDArray[np.int64]]:
    """Reads a verification protocol in the format of Labeled Faces in the Wild.

    The first line gives the number of folds and of pairs of each kind in a fold (one number: a single fold). A line
    ``name 1 2`` is a pair of one person, ``name 1 other 2`` one of two people; picture 1 of ``name`` is
    ``name/name_0001.jpg``.

    Args:
        file: the list of pairs.
        root: folder with a sub-folder for each person.

    Returns:
        Paths of the pictures that are named, N; their people, N; the pairs, int64 M×4: two places among the N, whether
        they are of one person, and the fold.

    Raises:
        DataError: a line cannot be read, or names a picture that is not there.
    """
    file, root = Path(file), Path(root)
    if not file.is_file():
        raise DataError(f"There is no file of pairs {file.resolve()}: give LFW's pairs.txt with --data.pairs.")
    lines = [line.split() for line in text_of(file).splitlines()]
    header = lines[0] if lines else []
    if len(header) not in (1, 2) or not all(map(str.isdigit, header)):
        raise DataError(
            f"{file.resolve()} does not begin as LFW's pairs.txt does, with the number of folds and of pairs in each, "
            f"such as '10 300', but with {' '.join(header)[:80]!r}."
        )
    size = 2 * int(header[-1])
    places: dict[str, int] = {}
    people: list[str] = []
    rows: list[tuple[int, int, bool, int]] = []

    def place(person: str, number: str, line: int) -> int:
        stem = root / person / f"{person}_{int(number):04d}"
        path = next((p for e in EXTENSIONS if (p := stem.with_name(stem.name + e)).is_file()), None)
        if path is None:
            raise DataError(
                f"{file.resolve()}, line {line}, names picture {number} of {person}, but there is no {stem.resolve()}.jpg: "
                "give the folder that the list was made for."
            )
        if str(path) not in places:
            places[str(path)] = len(people)
            people.append(person)
        return places[str(path)]

    for line, fields in enumerate(lines[1:], 2):
        if not fields:
            continue
        mates = len(fields) == 3
        if not (mates or len(fields) == 4) or not (fields[1].isdigit() and fields[-1].isdigit()):
            raise DataError(f"{file.resolve()}, line {line}: {' '.join(fields)!r} is no pair such as 'name 1 2' or 'name 1 other 2'.")  # fmt: skip
        other = fields[0] if mates else fields[2]
        rows.append((place(fields[0], fields[1], line), place(other, fields[-1], line), mates, len(rows) // size))
    if len(rows) != size * (int(header[0]) if len(header) == 2 else 1):
        raise DataError(f"{file.resolve()} announces {' × 2 × '.join(header)} pairs and has {len(rows)}.")
    return list(places), people, np.array(rows, np.int64)


@dataclass(eq=False, repr=False)
class CelebA(_FaceFiles):
    """CelebA's 202,599 pictures of 10,177 people (Liu et al. 2015, arXiv:1411.7766), by its own identity file.

    Args:
        root: folder with ``identity_CelebA.txt``, ``img_align_celeba/`` and, for the published splits,
            ``list_eval_partition.txt``; also in the sub-folders ``Anno``, ``Img`` and ``Eval`` that they come in.
    """

    root: str = "data/celeba"
    _: KW_ONLY
    on_lone_picture: Literal["error", "skip"] = "skip"

    def _find(self, *places: str) -> Path | None:
        return next((path for place in places if (path := Path(self.root, place)).exists()), None)

    @override
    def load(self) -> dict[str, PeopleSource]:
        listed = self._find("identity_CelebA.txt", "Anno/identity_CelebA.txt")
        images = self._find("img_align_celeba", "Img/img_align_celeba")
        if listed is None or images is None:
            missing = "identity_CelebA.txt" if listed is None else "img_align_celeba/"
            raise DataError(f"{Path(self.root).resolve()} has no {missing}: give CelebA's folder with --data.root.")
        people, splits = _pairs(listed), {}
        if partition := self._find("list_eval_partition.txt", "Eval/list_eval_partition.txt"):
            names = dict(zip("012", SPLITS, strict=True))
            splits = {file: names.get(number) for file, number in _pairs(partition).items()}
            if lacking := next((file for file in people if not splits.get(file)), None):
                raise DataError(
                    f"{partition} does not say which split {lacking} is of: write a line '{lacking} 0', or 1 or 2."
                )
        return self._read([(str(images / file), who, splits.get(file) or "all") for file, who in people.items()])


def _pairs(file: Path) -> dict[str, str]:
    """The two words of each line of a list of CelebA's.

    Raises:
        DataError: a line has not two.
    """
    lines = [line.split() for line in text_of(file).splitlines() if line.strip()]
    if wrong := next((line for line in lines if len(line) != 2), None):
        raise DataError(
            f"{file}: {' '.join(wrong)[:80]!r} is not a picture and its number, as CelebA's lists have them."
        )
    return dict(lines)


@dataclass(kw_only=True, eq=False, repr=False)
class PeopleTable(Table, _FaceFiles):
    """A CSV or Parquet table with a row for each picture.

    Args:
        person_column: column that says who is on it.
    """

    person_column: str = "identity"
    group_column: None = field(default=None, init=False)  # people are the groups

    @override
    def load(self) -> dict[str, PeopleSource]:
        table = self.checked({self.person_column: "--data.person_column"}, [self.person_column])
        return self._read(self.rows(table, self.person_column))
