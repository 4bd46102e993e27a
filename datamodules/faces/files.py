"""People in the formats in which their pictures are kept: folders, LFW's pairs, CelebA, tables."""

import os
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray

from datamodules.base import DataError, Source
from datamodules.faces.base import FaceDataModule, FaceSource, split_by_person
from datamodules.images import (
    EXTENSIONS,
    KINDS,
    check_images,
    composed,
    images_in,
    sub_folders,
    warn_of_cut,
    warn_of_left_out,
    warn_of_shared,
    warn_of_two_names,
)
from datamodules.options import Files
from datamodules.readers import paths_in
from datamodules.splits import SPLITS, split_folders, split_of
from datamodules.tables import check_table, read_table, spelled, text_of, warn_of_alike


@dataclass(kw_only=True, eq=False, repr=False)
class _FaceFiles(Files, FaceDataModule):
    """Shared by the modules that read files of people.

    Args:
        on_lone_picture: what a person to train on with a single picture means: stop and name him, or go on without.
    """

    on_lone_picture: Literal["error", "skip"] = "error"

    def _read(self, paths: Sequence[str], people: Sequence[str], splits: Sequence[str] | None) -> dict[str, FaceSource]:
        """Checks the files and shares them out."""
        files = np.asarray(paths, np.str_)
        table, self.bad_files = check_images(files, self.on_bad_file)
        good = (table["error"] == "").to_numpy()
        source = FaceSource(files, np.asarray(people, np.str_), self.in_chans, table["digest"].to_numpy(np.str_))
        if self.fit == "crop":
            warn_of_cut(files[good], table.loc[good, ["height", "width"]].to_numpy(np.int64))
        warn_of_two_names(files[good], source.digests[good], source.people[good])  # type: ignore[index]
        warn_of_alike(source.names.tolist())
        self.drawn = splits is None and not self.undivided
        if splits is None and self.undivided:
            return {"test": source.subset(good)}
        parts = split_by_person(
            source.subset(good), self.title, None if splits is None else np.asarray(splits, np.str_)[good]
        )
        warn_of_shared({name: (part.paths, part.digests) for name, part in parts.items()})  # type: ignore[misc]
        if self.on_lone_picture == "skip" and "train" in parts:
            train = parts["train"]
            lone = train.counts < 2
            if lone.any():
                rank_zero_warn(f"Left out of training: {int(lone.sum())} people with a single picture.")
                parts["train"] = train.subset(~lone[train.identities])
        return parts


@dataclass(eq=False, repr=False)
class PeopleFolder(_FaceFiles):
    """Any folder with one sub-folder of pictures for each person: LFW, VGGFace2, CASIA-WebFace and others as they are.

    With ``train/`` and, optionally, ``val/`` and ``test/`` above the people, in any usual spelling, these are the splits. What is missing is
    drawn, by person: 15 % of the people for the test, 15 % of the rest for validation. With a file of pairs, as LFW
    has them, the pictures that it names are the test split, and verification is measured on these pairs; nobody in them
    is trained on.

    Args:
        root: the folder.
        test_root: another folder of people for the test, such as LFW's.
        pairs: a file of pairs in LFW's format (``pairs.txt``), of pictures in ``test_root`` or else in ``root``.
    """

    root: str
    _: KW_ONLY
    test_root: str | None = None
    pairs: str | None = None

    @property
    def title(self) -> str:
        """The folder's name."""
        return Path(self.root).resolve().name

    def load(self) -> dict[str, Source]:
        """See `VisionDataModule.load`."""
        root = Path(self.root)
        folders = (split_folders(root) if root.is_dir() else {}) or {"": root}
        rows = [(path, person, part) for part, folder in folders.items() for path, person in people_in(folder)]
        if self.test_root:
            rows = [(path, person, part or "train") for path, person, part in rows if part != "test"]
            rows += [(path, person, "test") for path, person in people_in(Path(self.test_root))]
        protocol = None
        if self.pairs:
            paths, people, protocol = read_pairs(self.pairs, self.test_root or root)
            tested = set(people)
            rows = [
                (path, person, part or "train")
                for path, person, part in rows
                if person not in tested and part != "test"
            ]
            rows += [(path, person, "test") for path, person in zip(paths, people, strict=True)]
        given = [part for *_, part in rows]
        parts = self._read(
            [path for path, *_ in rows], [person for _, person, _ in rows], given if any(given) else None
        )
        if protocol is not None:
            if len(parts["test"]) != len(paths):
                raise DataError(f"{self.pairs} names pictures that cannot be read: the protocol needs all of them.")
            parts["test"].pairs = protocol
        return dict(parts)


def people_in(root: Path) -> list[tuple[str, str]]:
    """The pictures in a folder with a sub-folder for each person, as (path, person), sorted; see `images_in`.

    Raises:
        DataError: there is no such folder, or there are no pictures in sub-folders.
    """
    if not root.is_dir():
        raise DataError(f"There is no folder {root.resolve()}: give the folder of people with --data.root.")
    left_out: list[Path] = []
    found = [
        (os.fspath(file), composed(folder.name)) for folder in sub_folders(root) for file in images_in(folder, left_out)
    ]
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

    def load(self) -> dict[str, Source]:
        """See `VisionDataModule.load`."""
        listed = self._find("identity_CelebA.txt", "Anno/identity_CelebA.txt")
        images = self._find("img_align_celeba", "Img/img_align_celeba")
        if listed is None or images is None:
            missing = "identity_CelebA.txt" if listed is None else "img_align_celeba/"
            raise DataError(f"{Path(self.root).resolve()} has no {missing}: give CelebA's folder with --data.root.")
        rows = _pairs(listed)
        splits = None
        if partition := self._find("list_eval_partition.txt", "Eval/list_eval_partition.txt"):
            names = dict(zip("012", SPLITS, strict=True))
            numbers = _pairs(partition)
            if lacking := next((file for file in rows if numbers.get(file) not in names), None):
                raise DataError(
                    f"{partition} does not say which split {lacking} is of: write a line '{lacking} 0', or 1 or 2."
                )
            splits = [names[numbers[file]] for file in rows]
        return dict(self._read([str(images / file) for file in rows], list(rows.values()), splits))


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


@dataclass(eq=False, repr=False)
class PeopleTable(_FaceFiles):
    """A CSV or Parquet table with a row for each picture.

    Args:
        file: the table. A column ``split`` with train, val and test, where there is one, says which is which.
        path_column: column with the pictures' paths, relative to the table or absolute.
        person_column: column that says who is on it.
    """

    file: str
    _: KW_ONLY
    path_column: str = "path"
    person_column: str = "identity"

    @property
    def title(self) -> str:
        """The table's name."""
        return Path(self.file).stem

    def load(self) -> dict[str, Source]:
        """See `VisionDataModule.load`."""
        file = Path(self.file)
        table = read_table(file, "--data.file")
        table = table.rename(columns=spelled(table, [self.path_column, self.person_column, "split"]))
        columns = {self.path_column: "--data.path_column", self.person_column: "--data.person_column"}
        check_table(table, file, columns, list(columns), must_train=False)
        splits = table["split"].map(split_of).tolist() if "split" in table else None
        people = table[self.person_column].astype(str).map(composed).tolist()
        return dict(self._read(paths_in(table[self.path_column], file), people, splits))
