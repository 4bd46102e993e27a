"""Images of classes in tar and Parquet files."""

import re
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from typing_extensions import override

from datamodules.errors import DataError, listed
from datamodules.files import Folder
from datamodules.labelled.files import ClassFiles
from datamodules.labelled.rows import Objects, Rows, objects
from datamodules.labelled.sources import LabelledSource
from datamodules.shards import ShardSet, numbered


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

    @cached_property
    def _shards(self) -> ShardSet:
        return ShardSet(self.root)

    @cached_property
    def _names(self) -> Objects:
        """Class of each image of all files."""
        import pandas as pd

        shards = self._shards
        index, members = shards.index, shards.members
        if not self.labelled:
            return np.full(len(index), ".", object)
        labels = [self._label(*row) for row in zip(index["cls"], shards.said, index["txt"], strict=True)]
        wrong = next((k for k, label in enumerate(labels) if isinstance(label, list | dict | float)), None)
        if wrong is not None and isinstance(labels[wrong], float):
            raise DataError(
                f"{members[wrong]} has the label {labels[wrong]:g}, which is a quantity and no class: learn it by pipelines.regression with "
                f"--data RegressionTable --data.file {self.root}."
            )
        if wrong is not None:
            raise DataError(
                f"{members[wrong]} has a list or an object under {self.label_column!r}, and an image has one class here: name another "
                "key or column with --data.label_column. Several labels are read by --data MultiLabelTable, boxes by --data COCODetection."
            )
        texts = pd.Series([None if label is None else str(label) for label in labels], dtype=object)
        for place, shard in enumerate(shards.shards):
            own = texts[members.places == place]
            if len(without := own.index[own.isna()]):
                remedy = (
                    "name the column of labels with --data.label_column, or fill it in"
                    if shard.lower().endswith(".parquet")
                    else "put a member of its name with .cls, .txt or .json beside it, or name the key in the JSON with --data.label_column"
                )
                raise DataError(
                    f"{len(without)} of {len(own)} pictures in {shard} have no label; the first is {index['name'][without[0]]}: "
                    f"{remedy}. Tasks without labels take --data UnlabelledShards."
                )
        there = texts.unique().tolist()
        if not self._classes or (not numbered(there) and set(there) <= set(self._classes)):
            return objects(texts)
        for label in there:
            if not numbered([label]) or int(label) >= len(self._classes):
                raise DataError(
                    f"{self.root} has the label {label!r}, and the files' metadata or classnames.txt name {len(self._classes)} classes, "
                    f"counted from 0: {listed(self._classes)}. Correct one of the two."
                )
        return objects(texts, lambda number: self._classes[int(number)])

    def _label(self, written: Any, said: dict[str, Any], text: Any) -> Any:
        """Returns the label of a sample, from its .cls, from a key of its JSON, or from its .txt; a float that is no whole number
        is a quantity."""
        if isinstance(written, str):
            label: Any = written.strip()
            label = float(label) if re.fullmatch(r"[-+]?\d*\.\d+", label) else label
        else:
            label = said.get(self.label_column)
        if label is None and isinstance(text, str):
            return text.strip() or None
        return int(label) if isinstance(label, float) and label.is_integer() else None if label == "" else label

    @cached_property
    def _classes(self) -> list[str]:
        """Names of the classes by index, if the files or ``classnames.txt`` have them."""
        return self._shards.class_names(self.label_column)

    @cached_property
    def label_names(self) -> list[str]:
        """Names of the classes: in the order of the files' metadata, or else sorted, whole numbers numerically."""
        if not self.labelled:
            return ["."]
        there = set(self._names)
        splits = self._shards.splits
        learned = set(self._names[np.isin(splits, ("train", "all"))]) or there
        if unknown := sorted(there - learned):
            raise DataError(
                f"{self.root} has the class {unknown[0]!r} in no image to train on: the classes there are {listed(sorted(learned))}. Add "
                "some, or remove the class."
            )
        if self._classes:
            return self._classes
        return sorted(learned, key=int if numbered([*learned]) else None)

    @override
    def load(self) -> dict[str, LabelledSource]:
        return self._read(Rows(self._shards.members, self._names, self._shards.splits))


class UnlabelledShards(Shards):
    """Images in tar or Parquet files without labels; see `Shards`. Labels in batches are 0."""

    labelled = False
