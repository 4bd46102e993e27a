"""Labelled images in tar and Parquet files, and a writer of tar files for WebDataset."""

import io
import itertools
import re
import tarfile
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from typing_extensions import override

from datamodules.errors import DataError, listed
from datamodules.files import Folder
from datamodules.labelled.base import ClassificationDataModule
from datamodules.labelled.files import ClassFiles
from datamodules.labelled.rows import Objects, Rows, objects
from datamodules.labelled.sources import LabelledSource
from datamodules.paths import content_of
from datamodules.shards import Members, index_of, names_beside, numbered, shard_files
from datamodules.splits import hinted
from datamodules.writing import new_folder

SHARD = 256 << 20  # bytes of pictures in a file that is written


@dataclass(eq=False, repr=False)
class Shards(Folder, ClassFiles):
    """Images in tar files, as for WebDataset, or in Parquet files, as in Hugging Face's data sets.

    In a tar, an image ``000001.jpg`` has its label in ``000001.cls``, ``000001.json`` or ``000001.txt``. A Parquet file has a column
    ``image`` of bytes, or of ``bytes`` and ``path``, and a column of labels. The split is taken from the names of the files, such as
    ``train-0000.tar``, or of their folder; missing splits are drawn as for `ImageFolder`. Images are read individually, so that
    samples have the same order as with files.

    Args:
        root: folder of the files, a file, or a pattern such as ``train-*.tar`` or ``train-{0000..0146}.tar``; also as a URL of
            fsspec, such as ``s3://bucket/folder`` or ``https://host/train-{00..15}.tar``.
        label_column: key of the label in JSON, or its column in Parquet.
    """

    _: KW_ONLY
    label_column: str = "label"

    labelled: ClassVar[bool] = True

    @property
    @override
    def title(self) -> str:
        """See `VisionDataModule.title`; the last part of the path that is no pattern."""
        names = [name for name in re.split(r"[/\\]", self.root) if name and not re.search(r"[*?{\[]|^\w+:$", name)]
        return names[-1].partition(".")[0] if names else "shards"

    @cached_property
    def _index(self) -> dict[str, tuple[pd.DataFrame, list[str]]]:
        found = {shard: index_of(shard, self.label_column) for shard in shard_files(self.root)}
        if not any(len(table) for table, _ in found.values()):
            raise DataError(
                f"The {len(found)} files of {self.root} have no pictures; the first is {next(iter(found))}."
            )
        return found

    @cached_property
    def _classes(self) -> list[str]:
        """Names of the classes by index, if the files or ``classnames.txt`` have them."""
        said = {tuple(names) for _, names in self._index.values() if names}
        if len(said) > 1:
            raise DataError(f"The files of {self.root} have different names of classes: give those of one data set.")
        return list(*said) or names_beside([*self._index])

    @cached_property
    def _names(self) -> Objects:
        """Class of each image of all files."""
        if not self.labelled:
            return np.full(sum(len(table) for table, _ in self._index.values()), ".", object)
        for shard, (table, _) in self._index.items():
            if len(without := table.index[table["label"].isna()]):
                remedy = (
                    "name the column of labels with --data.label_column, or fill it in"
                    if shard.lower().endswith(".parquet")
                    else "put a member of its name with .cls, .txt or .json beside it, or name the key in the JSON with --data.label_column"
                )
                raise DataError(
                    f"{len(without)} of {len(table)} pictures in {shard} have no label; the first is {table['name'][without[0]]}: "
                    f"{remedy}. Tasks without labels take --data UnlabelledShards."
                )
        labels = pd.concat([table["label"] for table, _ in self._index.values()], ignore_index=True)
        there = labels.unique().tolist()
        if not self._classes or (not numbered(there) and set(there) <= set(self._classes)):
            return objects(labels)
        for label in there:
            if not numbered([label]) or int(label) >= len(self._classes):
                raise DataError(
                    f"{self.root} has the label {label!r}, and the files' metadata or classnames.txt name {len(self._classes)} classes, "
                    f"counted from 0: {listed(self._classes)}. Correct one of the two."
                )
        return objects(labels, lambda number: self._classes[int(number)])

    @cached_property
    def _splits(self) -> Objects:
        """Split of each image of all files."""
        found = {shard: hinted(shard) for shard in self._index}
        if len({bool(split) for split in found.values()}) > 1:
            unclear = [shard for shard, split in found.items() if not split]
            raise DataError(
                f"Some files of {self.root} are named as splits, and {unclear[0]} is not: name all train-…, val-… and test-…, or none."
            )
        counts = [len(table) for table, _ in self._index.values()]
        return np.repeat(np.array([split or "all" for split in found.values()], object), counts)

    @cached_property
    def label_names(self) -> list[str]:
        """Names of the classes: in the order of the files' metadata, or else sorted, whole numbers numerically."""
        if not self.labelled:
            return ["."]
        there = set(self._names)
        learned = set(self._names[np.isin(self._splits, ("train", "all"))]) or there
        if unknown := sorted(there - learned):
            raise DataError(
                f"{self.root} has the class {unknown[0]!r} outside training alone: the classes there are {listed(sorted(learned))}."
            )
        if self._classes:
            return self._classes
        return sorted(learned, key=int if numbered([*learned]) else None)

    @override
    def load(self) -> dict[str, LabelledSource]:
        members = Members.in_shards({shard: table for shard, (table, _) in self._index.items()})
        return self._read(Rows(members, self._names, self._splits))


class UnlabelledShards(Shards):
    """Images in tar or Parquet files without labels; see `Shards`. Labels in batches are 0."""

    labelled = False


def write_shards(data: ClassificationDataModule, folder: str) -> None:
    """Writes all splits as tar files for WebDataset.

    The files are ``train-000000.tar`` and so on, with members such as ``00000000.jpg`` and ``00000000.cls``, the class index.
    ``classnames.txt`` has the names of the classes. Image files are copied unchanged.

    Raises:
        DataError: the folder exists, or the images do not have 8 bits.
    """
    sources = data.sources
    with new_folder(folder) as part:
        part.mkdir()
        (part / "classnames.txt").write_text("".join(f"{name}\n" for name in data.label_names), encoding="utf-8")
        for split, source in sources.items():
            index = 0
            for number in itertools.count():
                if index == len(source):
                    break
                with tarfile.open(part / f"{split}-{number:06}.tar", "w") as archive:
                    size = 0
                    while index < len(source) and size < SHARD:
                        kind, picture = _picture(source, index)
                        _add(archive, f"{index:08}.{kind}", picture)
                        _add(archive, f"{index:08}.cls", str(int(source.labels[index])).encode())
                        index, size = index + 1, size + len(picture)


def _picture(source: LabelledSource, index: int) -> tuple[str, bytes]:
    """Returns suffix and content of an image file."""
    if source.paths is not None:
        return Path(source.paths[index]).suffix.lower().lstrip("."), content_of(source.paths.at(index))
    pixels: NDArray[Any] = source[index]["image"]
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
        raise DataError("Shards hold pictures of 8 bits, grey or RGB: these data have others.")
    return "png", cv2.imencode(".png", pixels if pixels.shape[2] == 1 else pixels[..., ::-1])[1].tobytes()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
