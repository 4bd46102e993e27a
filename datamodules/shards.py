"""Random access to images in tar and Parquet files, on a disk or at any URL of fsspec.

An index of each file, built once and cached, has the position of every image. Images can thus be read in any order by any
process, so that the order of an epoch and a resume within it are the same as for image files. (WebDataset's own readers stream a tar
sequentially, which allows neither.)
"""

import glob
import json
import os
import re
import tarfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from typing_extensions import override

from datamodules.cache import Cache, cache_folder
from datamodules.digests import digest_of
from datamodules.errors import DataError, listed
from datamodules.images import EXTENSIONS
from datamodules.paths import PACKED, SHARDS, Member, Paths, binary, is_remote, signature
from datamodules.splits import hinted
from datamodules.tables import LIST

MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # of gzip, bzip2, xz and zstd
PICTURES = ("image", "img", "picture", "jpg", "png")  # columns of Parquet
GROUPS = 256 << 20  # bytes of the row groups that a process keeps
SAID = ("cls", "json", "txt")  # members of a sample that describe its picture
SPANS = ["start", "size", "mask_start", "mask_size"]
INDEX = ["name", "mask", *SPANS, *SAID]
VERSION = 2  # of the index, as it is cached
SETTLED = 2_000_000_000  # ns after which a change of a file changes its time, whatever the file system


def shard_files(root: str) -> list[str]:
    """Returns the tar and Parquet files of a folder or pattern, sorted.

    Args:
        root: a folder, a file or a pattern such as ``train-*.tar`` or ``train-{0000..0146}.tar``, also as a URL such as
            ``s3://bucket/folder``.

    Raises:
        DataError: there are none, or the URL cannot be opened.
    """
    found: list[str] = []
    for place in _expanded(root):
        with _told(place):
            found += _remote_files(place) if is_remote(place) else _local_files(place)
    if not found:
        raise DataError(
            f"{root} has no file of the kinds {', '.join(SHARDS)}: give their folder, a pattern such as 'FOLDER/train-*.tar', or their "
            "address with --data.root."
        )
    if packed := next((place for place in found if place.lower().endswith(PACKED)), None):
        raise DataError(f"{packed} is compressed, so that no picture can be read by itself: unpack it to a .tar.")
    if other := next((place for place in found if not place.partition("?")[0].lower().endswith(SHARDS)), None):
        raise DataError(
            f"{other} is neither a .tar nor a .parquet file: give such files, or their folder, with --data.root."
        )
    return sorted(dict.fromkeys(found))


def _expanded(root: str) -> list[str]:
    """Returns a pattern for each number in its braces."""
    if os.path.exists(root) or not (braces := re.search(r"\{(\d+)\.\.(\d+)\}", root)):
        return [root]
    first, last = braces.groups()
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return [place for n in numbers for place in _expanded(root[: braces.start()] + n + root[braces.end() :])]


def _local_files(place: str) -> list[str]:
    if os.path.isdir(place):
        return [
            str(file)
            for file in Path(place).rglob("*")
            if file.name.lower().endswith((*SHARDS, *PACKED)) and file.is_file()
        ]
    return glob.glob(place) if glob.has_magic(place) and not os.path.exists(place) else [place]


def _remote_files(place: str) -> list[str]:
    system, path = url_to_fs(place)
    if glob.has_magic(path):
        found = system.glob(path)
    elif path.endswith((*SHARDS, *PACKED)):
        found = [path]
    else:
        found = [each for each in system.find(path) if each.endswith((*SHARDS, *PACKED))]
    return [str(system.unstrip_protocol(each)) for each in found]


@contextmanager
def _told(place: str) -> Iterator[None]:
    """Turns any error of reading a file into a `DataError` that names it."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        why = " ".join(str(getattr(error, "strerror", None) or error).split())[:300]
        if not why or why.strip("/") in place:  # some say the place alone
            why = "no such file, or no answer" if isinstance(error, FileNotFoundError) else type(error).__name__
        raise DataError(f"{place} cannot be read ({why.rstrip('.')}): repair it, or give other files.") from None


def _opened(shard: str) -> IO[bytes]:
    return cast("IO[bytes]", fsspec.open(shard, "rb").open()) if is_remote(shard) else Path(shard).open("rb")


def _mark(shard: str) -> tuple[int, int]:
    """Returns size and time of a file, to detect changes; for a URL, a hash of what the server says instead of the time."""
    if not is_remote(shard):
        found = signature(os.fsencode(shard))
        if found[0] < 0:
            raise DataError(f"There is no file {os.path.abspath(shard)}: give the shards with --data.root.")
        return found
    system, path = url_to_fs(shard)
    said = system.info(path)
    changing = [
        str(said.get(key)) for key in ("ETag", "etag", "mtime", "LastModified", "last_modified", "created", "updated")
    ]
    return int(said.get("size") or 0), int(digest_of("\n".join(changing).encode())[:15], 16)


def index_of(shard: str) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Returns the index of a file: the position of each image, cached.

    Args:
        shard: the file.

    Returns:
        A row for each image: its ``name``; ``start`` and ``size``, the position in a tar in bytes, or row group and row in a
        Parquet file; the same of its ``mask``, whose size is -1 if there is none; and what the members ``cls``, ``json`` and
        ``txt`` say, missing if there is none. The columns of a Parquet file that are no bytes are its ``json``. Second, the
        features that Hugging Face's metadata describe, by column. The index is kept under ``$XDG_CACHE_HOME/fovea`` until the
        file's size or time changes.

    Raises:
        DataError: the file cannot be read to its end, or has two members of one kind for one picture.
    """
    with _told(shard):
        mark = [VERSION, *_mark(shard)]
        place = shard if is_remote(shard) else os.path.abspath(shard)
        cache = cache_folder() / f"shard-{digest_of(os.fsencode(place))}.parquet"
        with suppress(OSError, ValueError):
            known = pq.read_table(cache)
            said = json.loads((known.schema.metadata or {}).get(b"fovea", b"{}"))
            if said.get("mark") == mark:
                return known.to_pandas(), said["features"]
        with _opened(shard) as file:
            rows, features = (_parquet_index if shard.lower().endswith(".parquet") else _tar_index)(file, shard)
        table = pd.DataFrame(rows, columns=INDEX).astype(dict.fromkeys(SPANS, "int64") | {"name": "str"})
        table = table.astype(dict.fromkeys(("mask", *SAID), object))
        if is_remote(shard) or time.time_ns() - mark[2] > SETTLED:
            made = pa.Table.from_pandas(table, preserve_index=False)
            temporary = cache.with_suffix(f".{os.getpid()}")
            with suppress(OSError):
                cache.parent.mkdir(parents=True, exist_ok=True)
                notes = json.dumps({"mark": mark, "features": features}).encode()
                pq.write_table(
                    made.replace_schema_metadata({**(made.schema.metadata or {}), b"fovea": notes}), temporary
                )
                temporary.replace(cache)
        return table, features


def _tar_index(file: IO[bytes], shard: str) -> tuple[list[tuple[Any, ...]], dict[str, Any]]:
    """See `index_of`. Members of a sample share their name up to the first dot, as in WebDataset."""
    if file.read(8).startswith(MAGIC):
        raise DataError(f"{shard} is compressed, so that no picture can be read by itself: unpack it to a plain .tar.")
    file.seek(0)
    samples: dict[str, dict[str, Any]] = {}
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            path = PurePosixPath(member.name)
            stem, _, kind = path.name.partition(".")
            kind = kind.lower()
            what = "picture" if f".{kind}" in EXTENSIONS else kind
            if kind.startswith("mask.") and kind[4:] in EXTENSIONS:
                what = "mask"
            if not member.isfile() or stem == "" or what not in ("picture", "mask", *SAID):
                continue
            own = samples.setdefault(str(path.with_name(stem)), {})
            if what in own:
                raise DataError(
                    f"{shard} has {own[what][0]} and {member.name}, two members of one kind for one sample: give each sample a name of "
                    "its own."
                )
            own[what] = member.name, member.offset_data, member.size
            if what in SAID:
                content = cast("IO[bytes]", archive.extractfile(member)).read()
                own[what] = member.name, content.decode("utf-8", "replace")
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise ValueError("it goes on with what is no member")
        file.seek(0, os.SEEK_END)
        if file.tell() < archive.offset + tarfile.BLOCKSIZE:
            raise ValueError("it has no end, so that it was cut off")
    nothing = None, -1, -1
    rows = []
    for own in samples.values():
        if "picture" in own:
            (name, *span), (mask, *mask_span) = own["picture"], own.get("mask", nothing)
            rows.append((name, mask, *span, *mask_span, *(own[what][1] if what in own else None for what in SAID)))
    return rows, {}


def _parquet_index(file: IO[bytes], shard: str) -> tuple[list[tuple[Any, ...]], dict[str, Any]]:
    """See `index_of`. An image is a struct of ``bytes`` and ``path``, as in Hugging Face's data sets, or bytes."""
    content = pq.ParquetFile(file)
    schema = content.schema_arrow
    picture = _picture_column(schema, shard)
    wanted = [f"{picture}.path"] if pa.types.is_struct(schema.field(picture).type) else []
    others = [field.name for field in schema if not _holds_bytes(field.type)]
    rows: list[tuple[Any, ...]] = []
    for group in range(content.num_row_groups):
        table = content.read_row_group(group, columns=[*wanted, *others])
        count = content.metadata.row_group(group).num_rows
        paths = table[picture].to_pylist() if picture in table.schema.names else [None] * count
        said = table.select(others).to_pylist() if others else [{}] * count
        for row, (path, columns) in enumerate(zip(paths, said, strict=True)):
            name = (path or {}).get("path") or str(len(rows))
            rows.append((name, None, group, row, -1, -1, None, json.dumps(columns, default=str), None))
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    return rows, metadata.get("info", {}).get("features", {})


def _holds_bytes(kind: pa.DataType) -> bool:
    """Whether a column may hold pictures."""
    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def has_pictures(file: str) -> bool:
    """Whether a Parquet file has the bytes of pictures, and not their paths; also if it cannot be read."""
    try:
        schema = pq.read_schema(file)
    except (OSError, ValueError):  # it is told that it cannot be read
        return True
    return any(name in schema.names and _holds_bytes(schema.field(name).type) for name in PICTURES)


def _picture_column(schema: pa.Schema, shard: str) -> str:
    """Returns the name of the column of images."""
    able = [field.name for field in schema if _holds_bytes(field.type)]
    named = [name for name in PICTURES if name in able]
    if not named and len(able) != 1:
        raise DataError(
            f"{shard} has no column of pictures, but {listed(schema.names)}: one named image must have their bytes, or a struct of "
            "bytes and path, as Hugging Face's data sets have it. A table of files is read by --data Manifest."
        )
    return (named or able)[0]


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
        names: pa.LargeBinaryArray,
        spans: NDArray[np.int64],
        marks: Any,
    ) -> None:
        super().__init__(binary(os.fsencode(shard) + b"/" for shard in shards), places, names)
        self.shards, self.spans, self.marks = shards, spans, marks
        self._groups: Cache[tuple[Any, ...]] = Cache(GROUPS)

    @classmethod
    @override
    def joined(cls, parts: Sequence[Paths]) -> "Members":
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
            with _opened(self.shards[place]) as file:
                content = pq.ParquetFile(file)
                column = _picture_column(content.schema_arrow, self.shards[place])
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
        self._marks = np.array([_mark(shard) for shard in found], np.int64)

    @property
    def folder(self) -> Path:
        """Folder of the first file, on a disk."""
        return Path(self.shards[0]).parent

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
        return list(*said) or names_beside(self.shards)

    def table(self, path_column: str) -> pd.DataFrame:
        """Returns what the JSON says as a table of texts, as one in a CSV; with the names of the pictures, and the split where
        the files' names say it. Each value of a list is ended by `LIST`, with which objects, and lists of them, begin. The
        ``label`` may be that of .cls or .txt."""
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


def names_beside(shards: list[str]) -> list[str]:
    """Returns the names of the classes in ``classnames.txt`` next to the first file, one per line; none if there is none."""
    folder = shards[0].rpartition("/")[0] or "."
    with (
        suppress(Exception),
        _opened(f"{folder}/classnames.txt") as file,
    ):  # servers say in many ways that there is none
        return [line.strip() for line in file.read().decode("utf-8-sig").splitlines() if line.strip()]
    return []


def numbered(names: Iterable[str]) -> bool:
    """Whether all strings are whole numbers, such as class indices.

    >>> numbered(["0", "12"]), numbered(["0", "cat"])
    (True, False)
    """
    return all(name.isascii() and name.isdigit() for name in names)
