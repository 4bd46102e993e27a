"""The tar and Parquet files of a data set, on a disk or at any URL of fsspec, and an index of each, built once and cached, with the
position of every image."""

import glob
import json
import os
import re
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, cast

import fsspec
from fsspec.core import url_to_fs

from datamodules.cache import cache_folder
from datamodules.digests import digest_of
from datamodules.errors import DataError, listed
from datamodules.images import EXTENSIONS
from datamodules.paths import PACKED, SHARDS, Member, is_remote, signature

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # of gzip, bzip2, xz and zstd
PICTURES = ("image", "img", "picture", "jpg", "png")  # columns of Parquet
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


def opened(shard: str) -> IO[bytes]:
    """Opens a file, on a disk or at a URL, for reading."""
    return cast("IO[bytes]", fsspec.open(shard, "rb").open()) if is_remote(shard) else Path(shard).open("rb")


def mark_of(shard: str) -> tuple[int, int]:
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


def index_of(shard: str) -> "tuple[pd.DataFrame, dict[str, Any]]":
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
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _told(shard):
        mark = [VERSION, *mark_of(shard)]
        place = shard if is_remote(shard) else os.path.abspath(shard)
        cache = cache_folder() / f"shard-{digest_of(os.fsencode(place))}.parquet"
        with suppress(OSError, ValueError):
            known = pq.read_table(cache)
            said = json.loads((known.schema.metadata or {}).get(b"fovea", b"{}"))
            if said.get("mark") == mark:
                return known.to_pandas(), said["features"]
        with opened(shard) as file:
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
            raise ValueError("something other than a file follows its last one")
        file.seek(0, os.SEEK_END)
        if file.tell() < archive.offset + tarfile.BLOCKSIZE:
            raise ValueError("its end is missing: it was cut off")
    nothing = None, -1, -1
    rows = []
    for own in samples.values():
        if "picture" in own:
            (name, *span), (mask, *mask_span) = own["picture"], own.get("mask", nothing)
            rows.append((name, mask, *span, *mask_span, *(own[what][1] if what in own else None for what in SAID)))
    return rows, {}


def _parquet_index(file: IO[bytes], shard: str) -> tuple[list[tuple[Any, ...]], dict[str, Any]]:
    """See `index_of`. An image is a struct of ``bytes`` and ``path``, as in Hugging Face's data sets, or bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = pq.ParquetFile(file)
    schema = content.schema_arrow
    picture = picture_column(schema, shard)
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


def _holds_bytes(kind: "pa.DataType") -> bool:
    """Whether a column may hold pictures."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def has_pictures(file: str, otherwise: bool) -> bool:
    """Whether a Parquet file has the bytes of pictures, and not their paths; ``otherwise`` if it cannot be read."""
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(file)
    except (OSError, ValueError):  # told by who reads it
        return otherwise
    return any(name in schema.names and _holds_bytes(schema.field(name).type) for name in PICTURES)


def picture_column(schema: "pa.Schema", shard: str) -> str:
    """Returns the name of the column of images."""
    able = [field.name for field in schema if _holds_bytes(field.type)]
    named = [name for name in PICTURES if name in able]
    if not named and len(able) != 1:
        raise DataError(
            f"{shard} has no column of pictures, but {listed(schema.names)}: one named image must have their bytes, or a struct of "
            "bytes and path, as Hugging Face's data sets have it. A table of files is read by --data Manifest."
        )
    return (named or able)[0]


def file_beside(shards: list[str], *names: str) -> Member | None:
    """Returns the first of some files that is next to the first of the shards; None if there is none."""
    folder = shards[0].rpartition("/")[0] or "."
    for name in names:
        with suppress(Exception), opened(f"{folder}/{name}") as file:  # servers say in many ways that there is none
            return Member(f"{folder}/{name}", partial(bytes, file.read()))
    return None
