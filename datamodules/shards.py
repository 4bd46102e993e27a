"""Random access to images in tar and Parquet files, on a disk or at any URL of fsspec.

The index of each file has the position of every image. Images can thus be read in any order by any
process, so that the order of an epoch and a resume within it are the same as for image files. (WebDataset's own readers stream a tar
sequentially, which allows neither.)
"""

import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from fsspec.core import url_to_fs
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from typing_extensions import override

from datamodules.cache import Cache
from datamodules.errors import DataError
from datamodules.paths import Member, Paths, binary, is_remote
from datamodules.shard_index import file_beside, index_of, mark_of, opened, picture_column, shard_files
from datamodules.splits import hinted
from datamodules.tables import LIST, text_of

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

GROUPS = 256 << 20  # bytes of the row groups that a process keeps


class Members(Paths):
    """Images in tar and Parquet files; see `Paths`.

    Args:
        shards: the tar and Parquet files, S.
        places: number of each image's file, int32 N.
        names: names of the images in their files, N.
        spans: ``start`` and ``size`` of each image, int64 N×2; see `index_of`.
        marks: size and time of each file, int64 S×2.
    """

    def __init__(
        self,
        shards: list[str],
        places: NDArray[np.int32],
        names: "pa.LargeBinaryArray",
        spans: NDArray[np.int64],
        marks: Any,
    ) -> None:
        super().__init__(binary(os.fsencode(shard) + b"/" for shard in shards), places, names)
        self.shards, self.spans, self.marks = shards, spans, marks
        self._groups: Cache[tuple[Any, ...]] = Cache(GROUPS)

    @classmethod
    @override
    def joined(cls, parts: Sequence[Paths]) -> "Members":
        import pyarrow as pa

        own = [part for part in parts if isinstance(part, Members)]
        first = np.cumsum([0, *(len(part.shards) for part in own)])
        return cls(
            [shard for part in own for shard in part.shards],
            np.concatenate([part.places + np.int32(start) for part, start in zip(own, first, strict=False)]),
            pa.concat_arrays([part.names for part in own]),
            np.concatenate([part.spans for part in own]),
            np.concatenate([part.marks for part in own]),
        )

    @override
    def _taken(self, chosen: NDArray[np.int64]) -> "Members":
        import pyarrow as pa

        names = self.names.take(pa.array(chosen))
        return Members(self.shards, self.places[chosen], names, self.spans[chosen], self.marks)

    @property
    @override
    def signatures(self) -> NDArray[np.int64]:
        return cast("NDArray[np.int64]", self.marks[self.places])

    @override
    def at(self, index: int) -> Member:
        return Member(self[index], partial(self._read, int(self.places[index]), *self.spans[index].tolist()))

    def _read(self, place: int, start: int, size: int) -> bytes:
        """Returns the bytes of an image.

        Raises:
            OSError: they cannot be read.
        """
        shard = self.shards[place]
        try:
            data = self._of_row(place, start, size) if shard.lower().endswith(".parquet") else _part(shard, start, size)
        except OSError:
            raise
        except Exception as error:  # of whatever fsspec opens it with
            raise OSError(f"{type(error).__name__}: {error}") from None
        return data

    def _of_row(self, place: int, group: int, row: int) -> bytes:
        def read(_: int) -> tuple[Any, ...]:
            import pyarrow as pa
            import pyarrow.parquet as pq

            with opened(self.shards[place]) as file:
                content = pq.ParquetFile(file)
                column = picture_column(content.schema_arrow, self.shards[place])
                struct = pa.types.is_struct(content.schema_arrow.field(column).type)
                found = content.read_row_group(group, [f"{column}.bytes" if struct else column])[
                    column
                ].combine_chunks()
                return (found.field("bytes") if struct else found,)

        data = self._groups.get((place << 32) + group, read)[0][row].as_py()
        if data is None:
            raise OSError("it has no bytes")
        return bytes(data)


def _part(shard: str, start: int, size: int) -> bytes:
    """Reads a range of a file."""
    if is_remote(shard):
        system, path = url_to_fs(shard)  # of this process: connections must not be shared
        data = bytes(system.cat_file(path, start, start + size))
    else:
        with open(shard, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, start)
    if len(data) != size:
        raise OSError(
            f"{len(data)} bytes came instead of {size}: the file has changed, or its server gives no parts of files"
        )
    return data


class ShardSet:
    """All samples of tar and Parquet files: pictures, masks, and what is said of them.

    Args:
        root: see `shard_files`.

    Attributes:
        root: see there.
        shards: the files.
        index: of all files; see `index_of`.

    Raises:
        DataError: see `shard_files` and `index_of`; or there are no pictures.
    """

    def __init__(self, root: str) -> None:
        import pandas as pd

        found = {shard: index_of(shard) for shard in shard_files(root)}
        counts = [len(table) for table, _ in found.values()]
        self.root, self.shards = root, [*found]
        if empty := [shard for shard, count in zip(found, counts, strict=True) if not count]:
            if len(empty) == len(found):
                raise DataError(f"The {len(found)} files of {root} have no pictures; the first is {self.shards[0]}.")
            rank_zero_warn(f"{len(empty)} of the {len(found)} files of {root} have no pictures; the first: {empty[0]}.")
        self.index = pd.concat([table for table, _ in found.values() if len(table)], ignore_index=True)
        self._places = np.repeat(np.arange(len(found), dtype=np.int32), counts)
        self._features = [features for _, features in found.values()]
        self._marks = np.array([mark_of(shard) for shard in found], np.int64)

    @cached_property
    def members(self) -> Members:
        """The pictures, N."""
        return self._members("name", ["start", "size"])

    @cached_property
    def masks(self) -> Members:
        """The mask of each picture, N.

        Raises:
            DataError: a picture has none.
        """
        if (without := np.flatnonzero(self.index["mask_size"] < 0)).size:
            raise DataError(
                f"{without.size} of {len(self.index)} pictures have no mask; the first is {self.members[int(without[0])]}: put a member of "
                "its name with .mask.png beside it. Objects with outlines are read by --data COCOSegmentation."
            )
        return self._members("mask", ["mask_start", "mask_size"])

    def _members(self, name: str, span: list[str]) -> Members:
        names = binary(map(os.fsencode, self.index[name]))
        return Members(self.shards, self._places, names, self.index[span].to_numpy(np.int64), self._marks)

    @cached_property
    def said(self) -> list[dict[str, Any]]:
        """What the JSON of each picture says, N; empty where there is none.

        Raises:
            DataError: it cannot be read, or is no object.
        """
        found: list[dict[str, Any]] = []
        for k, text in enumerate(self.index["json"].tolist()):
            try:
                own = json.loads(text) if isinstance(text, str) else {}
            except (ValueError, RecursionError) as error:
                raise DataError(f"{self._beside(k)} cannot be read as JSON ({error}): correct it.") from None
            if not isinstance(own, dict):
                raise DataError(f'{self._beside(k)} is not an object of keys and values: write it as {{"label": …}}.')
            found.append(own)
        return found

    def _beside(self, k: int) -> str:
        """Name of the JSON of a picture, for messages."""
        folder, slash, name = self.members[k].rpartition("/")
        return f"{folder}{slash}{name.partition('.')[0]}.json"

    @cached_property
    def splits(self) -> NDArray[np.object_]:
        """Split of each picture by the names of the files, N; or ``all``.

        Raises:
            DataError: some files are named as splits, others are not.
        """
        found = [hinted(shard) for shard in self.shards]
        if len({bool(split) for split in found}) > 1:
            unclear = self.shards[found.index(None)]
            raise DataError(
                f"Some files of {self.root} are named as splits, and {unclear} is not: name all train-…, val-… and test-…, or none."
            )
        return np.array([split or "all" for split in found], object)[self._places]

    def class_names(self, column: str) -> list[str]:
        """Returns the names of the classes by index: those that Hugging Face's metadata have for a column, or those in
        ``classnames.txt``; none if there are none.

        Raises:
            DataError: the files have different ones.
        """
        said = {tuple(names) for features in self._features if (names := _names_in(features.get(column)))}
        if len(said) > 1:
            raise DataError(f"The files of {self.root} have different names of classes: give those of one data set.")
        file = None if said else file_beside(self.shards, "classnames.txt")
        return list(*said) if file is None else [line for line in map(str.strip, text_of(file).splitlines()) if line]

    def table(self, path_column: str) -> "pd.DataFrame":
        """Returns what the JSON says as a table of texts, as one in a CSV; with the names of the pictures, and the split where
        the files' names say it. Each value of a list is ended by `LIST`, with which objects, and lists of them, begin. The
        ``label`` may be that of .cls or .txt."""
        import pandas as pd

        names = dict.fromkeys(key for own in self.said for key in own)
        table = pd.DataFrame(
            {name: [_cell(own.get(name)) for own in self.said] for name in names}, range(len(self.index)), dtype=object
        )
        if "label" not in names and (labels := self.index["cls"].fillna(self.index["txt"])).notna().any():
            classes = self.class_names("label")
            indices = {str(k): name for k, name in enumerate(classes)}
            texts = [text.strip() if isinstance(text, str) else "" for text in labels]
            table["label"] = [indices.get(text, text) or None for text in texts]
        table[path_column] = self.index["name"]
        if set(self.splits) != {"all"}:
            table["split"] = self.splits
        return table


def _cell(value: Any) -> str | None:
    """A value of JSON as the text of a cell."""
    if isinstance(value, list) and not any(isinstance(each, list | dict) for each in value):
        return "".join(f"{each}{LIST}" for each in value)
    if isinstance(value, list | dict):
        return LIST + json.dumps(value)
    return None if value is None else str(value)


def _names_in(feature: Any) -> list[str]:
    """Names of the classes in the description of a column, which may be nested in lists of objects."""
    if isinstance(feature, dict):
        if isinstance(feature.get("names"), list):
            return [str(name) for name in feature["names"]]
        feature = list(feature.values())
    return next(filter(None, map(_names_in, feature)), []) if isinstance(feature, list) else []


def numbered(names: Iterable[str]) -> bool:
    """Whether all strings are whole numbers, such as class indices.

    >>> numbered(["0", "12"]), numbered(["0", "cat"])
    (True, False)
    """
    return all(name.isascii() and name.isdigit() for name in names)
