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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from numpy.typing import NDArray
from typing_extensions import override

from datamodules.cache import Cache, cache_folder
from datamodules.digests import digest_of
from datamodules.errors import DataError, listed
from datamodules.images import EXTENSIONS
from datamodules.paths import Member, Paths, binary, signature

KINDS = (".tar", ".parquet")
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
PICTURES = ("image", "img", "picture", "jpg", "png")  # columns of Parquet
GROUPS = 256 << 20  # bytes of the row groups that a process keeps
INDEX = ["name", "start", "size", "label"]


def is_remote(place: str) -> bool:
    """Whether a path is a URL of fsspec."""
    return "://" in place or "::" in place


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
            f"{root} has no file of the kinds {', '.join(KINDS)}: give their folder, a pattern such as 'FOLDER/train-*.tar', or their "
            "address with --data.root."
        )
    if packed := next((place for place in found if place.lower().endswith(PACKED)), None):
        raise DataError(f"{packed} is compressed, so that no picture can be read by itself: unpack it to a .tar.")
    if other := next((place for place in found if not place.partition("?")[0].lower().endswith(KINDS)), None):
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
            if file.name.lower().endswith((*KINDS, *PACKED)) and file.is_file()
        ]
    return glob.glob(place) if glob.has_magic(place) and not os.path.exists(place) else [place]


def _remote_files(place: str) -> list[str]:
    system, path = url_to_fs(place)
    if glob.has_magic(path):
        found = system.glob(path)
    elif path.endswith((*KINDS, *PACKED)):
        found = [path]
    else:
        found = [each for each in system.find(path) if each.endswith((*KINDS, *PACKED))]
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
        raise DataError(
            f"{place} cannot be read ({why.rstrip('.')}): repair it, or give other files with --data.root."
        ) from None


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


def index_of(shard: str, label_column: str) -> tuple[pd.DataFrame, list[str]]:
    """Returns the index of a file: the position of each image, cached.

    Args:
        shard: the file.
        label_column: key of the label in JSON, or its column in Parquet.

    Returns:
        A row for each image with its ``name``; ``start`` and ``size``, the position in a tar in bytes, or row group and row in a
        Parquet file; and ``label`` as a string, missing if there is none. Second, the names of the classes if the file has them. The
        index is kept under ``$XDG_CACHE_HOME/fovea`` until the file's size or time changes.

    Raises:
        DataError: the file cannot be read to its end.
    """
    with _told(shard):
        mark = list(_mark(shard))
        place = shard if is_remote(shard) else os.path.abspath(shard)
        cache = cache_folder() / f"shard-{digest_of(os.fsencode(place + chr(0) + label_column))}.parquet"
        with suppress(OSError, ValueError):
            known = pq.read_table(cache)
            said = json.loads((known.schema.metadata or {}).get(b"fovea", b"{}"))
            if said.get("mark") == mark:
                return known.to_pandas(), said["classes"]
        with _opened(shard) as file:
            read = _parquet_index if shard.lower().endswith(".parquet") else _tar_index
            table, classes = read(file, shard, label_column)
        made = pa.Table.from_pandas(table, preserve_index=False)
        temporary = cache.with_suffix(f".{os.getpid()}")
        with suppress(OSError):
            cache.parent.mkdir(parents=True, exist_ok=True)
            notes = json.dumps({"mark": mark, "classes": classes})
            pq.write_table(
                made.replace_schema_metadata({**(made.schema.metadata or {}), b"fovea": notes.encode()}), temporary
            )
            temporary.replace(cache)
        return table, classes


def _tar_index(file: IO[bytes], shard: str, label_column: str) -> tuple[pd.DataFrame, list[str]]:
    """See `index_of`. Members of a sample share their name up to the first dot, as in WebDataset."""
    pictures: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, dict[str, str]] = {}
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            path = PurePosixPath(member.name)
            stem, _, kind = path.name.partition(".")
            if not member.isfile() or stem == "":
                continue
            key, kind = str(path.with_name(stem)), kind.lower()
            if f".{kind}" in EXTENSIONS:
                pictures.setdefault(key, (member.name, member.offset_data, member.size))
            elif kind in ("cls", "json", "txt"):
                content = cast("IO[bytes]", archive.extractfile(member)).read()
                labels.setdefault(key, {})[kind] = content.decode("utf-8", "replace")
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise ValueError("it goes on with what is no member")
        file.seek(0, os.SEEK_END)
        if file.tell() < archive.offset + tarfile.BLOCKSIZE:
            raise ValueError("it has no end, so that it was cut off")
    rows = []
    for key, place in pictures.items():
        try:
            rows.append((*place, _label(labels.get(key, {}), label_column)))
        except ValueError as error:
            raise ValueError(f"{key}.json: {error}") from None
    return pd.DataFrame(rows, columns=INDEX).astype(
        {"name": "str", "start": "int64", "size": "int64", "label": "str"}
    ), []


def _label(beside: dict[str, str], label_column: str) -> str | None:
    """Returns the label of a sample, from its .cls, from a key of its .json, or from its .txt."""
    if "cls" in beside:
        return beside["cls"].strip() or None
    if "json" in beside:
        said = json.loads(beside["json"])
        if isinstance(said, dict) and said.get(label_column) is not None:
            return str(said[label_column])
    return beside.get("txt", "").strip() or None


def _parquet_index(file: IO[bytes], shard: str, label_column: str) -> tuple[pd.DataFrame, list[str]]:
    """See `index_of`. An image is a struct of ``bytes`` and ``path``, as in Hugging Face's data sets, or bytes."""
    content = pq.ParquetFile(file)
    schema = content.schema_arrow
    picture = _picture_column(schema, shard)
    wanted = [f"{picture}.path"] if pa.types.is_struct(schema.field(picture).type) else []
    labelled = label_column in schema.names
    table = content.read(columns=[*wanted, *([label_column] if labelled else [])])
    counts = [content.metadata.row_group(k).num_rows for k in range(content.num_row_groups)]
    groups = np.repeat(np.arange(len(counts)), counts)
    rows = np.concatenate([np.arange(0), *(np.arange(count) for count in counts)])
    paths: list[str | None] = [None] * len(rows)
    if picture in table.schema.names:
        paths = [(each or {}).get("path") for each in table[picture].to_pylist()]
    names = [path or str(number) for number, path in enumerate(paths)]
    if labelled and pa.types.is_nested(schema.field(label_column).type):
        raise DataError(
            f"{shard} has lists or structs in its column {label_column!r}, and an image has one class here: name another with "
            "--data.label_column. Several labels are read from tables of files, by --data MultiLabelTable."
        )
    labels = [None if each is None else str(each) for each in table[label_column].to_pylist()] if labelled else None
    said = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    classes = said.get("info", {}).get("features", {}).get(label_column, {}).get("names") or []
    found = pd.DataFrame(
        {"name": names, "start": groups, "size": rows, "label": pd.Series(labels, range(len(rows)), "str")}
    )
    return found.astype({"name": "str", "start": "int64", "size": "int64"}), [str(name) for name in classes]


def _picture_column(schema: pa.Schema, shard: str) -> str:
    """Returns the name of the column of images."""

    def holds(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    able = [field.name for field in schema if holds(field.type)]
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
    def in_shards(cls, indices: dict[str, pd.DataFrame]) -> "Members":
        """Returns all images of files, given the index of each; see `index_of`."""
        counts = [len(table) for table in indices.values()]
        names = [binary(map(os.fsencode, table["name"])) for table in indices.values()]
        spans = np.concatenate([table[["start", "size"]].to_numpy(np.int64) for table in indices.values()])
        places = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        marks = np.array([_mark(shard) for shard in indices], np.int64)
        return cls([*indices], places, pa.concat_arrays(names), spans, marks)

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
