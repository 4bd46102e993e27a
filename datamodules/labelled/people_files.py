"""Files of people: folders, tables, pairs of LFW, CelebA."""

from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from typing_extensions import override

from datamodules.errors import DataError
from datamodules.files import Folder
from datamodules.images import EXTENSIONS, KINDS, warn_of_left_out
from datamodules.labelled.files import LabelledFiles, warn_of_shared_parts
from datamodules.labelled.manifest import Table
from datamodules.labelled.people import FaceDataModule, by_person
from datamodules.labelled.rows import Rows, named_files
from datamodules.labelled.sources import PeopleSource
from datamodules.splits import SPLITS, split_folders
from datamodules.tables import text_of


@dataclass(kw_only=True, eq=False, repr=False)
class _FaceFiles(LabelledFiles[PeopleSource], FaceDataModule):
    """Base class of the modules that read files of people.

    Args:
        on_lone_picture: what to do about a training person with a single image: raise an error, or skip the person.
    """

    on_lone_picture: Literal["error", "skip"] = "error"

    def _read(self, rows: Rows) -> dict[str, PeopleSource]:
        """Checks the files and divides them into splits."""
        files, people, splits, good = self.inspected(rows)
        whole = PeopleSource(files, people.astype(np.str_))
        parts = {split: whole.subset(good & (splits == split)) for split in sorted(set(splits[good]))}
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
    """A folder with one sub-folder of pictures for each person: LFW, VGGFace2, CASIA-WebFace and others as they are.

    With ``train/`` and, optionally, ``val/`` and ``test/`` above the people, in any common spelling, these are the
    splits. Missing ones are drawn by person: 15 % of the people for testing, 15 % of the rest for validation. With a
    file of pairs in the format of LFW, the images in it are the test split, verification is evaluated on these pairs,
    and the people in them are excluded from training.

    Args:
        test_root: another folder of people for testing, such as LFW's.
        pairs: file of pairs in the format of LFW (``pairs.txt``), of images in ``test_root``, or otherwise in ``root``.
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
        parts = self._read(Rows.of(rows))
        if self.pairs:
            if len(parts["test"]) != len(named):
                raise DataError(
                    f"{self.pairs} names pictures that cannot be read, and verification needs all of them: repair them, or leave --data.pairs out."
                )
            parts["test"].pairs = protocol
        return parts


def people_in(root: Path) -> list[tuple[str, str]]:
    """Finds images and people as `named_files`, sorted by image.

    Raises:
        DataError: the folder does not exist, or has no images in sub-folders.
    """
    if not root.is_dir():
        raise DataError(f"There is no folder {root.resolve()}: give the folder of people with --data.root.")
    left_out: list[Path] = []
    found = list(zip(*named_files(root, left_out), strict=True))
    warn_of_left_out(left_out)
    if not found:
        raise DataError(
            f"{root.resolve()} has no pictures in sub-folders: make one for each person, with pictures of the kinds "
            f"{KINDS}."
        )
    return sorted(found)


def read_pairs(file: str | Path, root: str | Path) -> tuple[list[str], list[str], NDArray[np.int64]]:
    """Reads a verification protocol in the format of Labelled Faces in the Wild.

    The first line has the number of folds and of pairs of each kind per fold (one number: a single fold). A line ``name
    1 2`` is a pair of one person, ``name 1 other 2`` one of two people; image 1 of ``name`` is ``name/name_0001.jpg``.

    Returns:
        Paths of the images, N; their people, N; the pairs, int64 M×4: two indices of images, whether they are of the
        same person, and the fold.

    Raises:
        DataError: a line cannot be read, or its image does not exist.
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
            raise DataError(f"{file.resolve()}, line {line}: {' '.join(fields)!r} is not a pair such as 'name 1 2' or 'name 1 other 2'.")  # fmt: skip
        other = fields[0] if mates else fields[2]
        rows.append((place(fields[0], fields[1], line), place(other, fields[-1], line), mates, len(rows) // size))
    if len(rows) != size * (int(header[0]) if len(header) == 2 else 1):
        raise DataError(f"{file.resolve()} announces {' × 2 × '.join(header)} pairs and has {len(rows)}.")
    return list(places), people, np.array(rows, np.int64)


@dataclass(eq=False, repr=False)
class CelebA(_FaceFiles):
    """CelebA: 202,599 images of 10,177 people (Liu et al. 2015, arXiv:1411.7766), with its identity file.

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
                    f"{partition} does not say which split {lacking} belongs to: write a line '{lacking} 0', or 1 or 2."
                )
        rows = [(str(images / file), who, splits.get(file) or "all") for file, who in people.items()]
        return self._read(Rows.of(rows))


def _pairs(file: Path) -> dict[str, str]:
    """Reads two words per line of a list of CelebA.

    Raises:
        DataError: a line does not have two.
    """
    lines = [line.split() for line in text_of(file).splitlines() if line.strip()]
    if wrong := next((line for line in lines if len(line) != 2), None):
        raise DataError(
            f"{file}: {' '.join(wrong)[:80]!r} is not a picture and its number, as CelebA's lists have them."
        )
    return dict(lines)


@dataclass(kw_only=True, eq=False, repr=False)
class PeopleTable(Table, _FaceFiles):
    """A CSV or Parquet table with one row per image.

    Args:
        person_column: column with the person.
    """

    person_column: str = "identity"
    group_column: None = field(default=None, init=False)  # people are the groups

    @override
    def load(self) -> dict[str, PeopleSource]:
        table = self.checked({self.person_column: "--data.person_column"}, [self.person_column])
        return self._read(self.rows(table, self.person_column))
