"""Paths of millions of files in compact arrays, without a Python object for each."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self, overload

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

CHUNK = 1 << 16  # paths that are made at once
SHARDS = (".tar", ".parquet")  # files of many pictures
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")  # those that are told to be unpacked


@dataclass(frozen=True)
class Member(os.PathLike[str]):
    """A part of a larger file that is read like a file of its own.

    Args:
        name: name for messages.
        read: returns its content.
    """

    name: str
    read: Callable[[], bytes]

    def __fspath__(self) -> str:
        return self.name

    def __str__(self) -> str:
        return self.name


def is_remote(place: str) -> bool:
    """Whether a path is a URL of fsspec."""
    return "://" in place or "::" in place


def content_of(file: str | os.PathLike[str]) -> bytes:
    """Returns the content of a file or of a part of one. All image files are read here.

    Raises:
        OSError: it cannot be read.
    """
    if isinstance(file, Member):
        return file.read()
    with open(file, "rb", buffering=0) as opened:
        return opened.readall()


class Paths:
    """Paths of files as an array of strings, indexed by an integer or by an array.

    Each folder is stored once, and for each file the number of its folder and its name. Forked processes share the memory,
    since no reference counts are written in reading.

    Args:
        folders: folders with a trailing separator, in the encoding of the file system.
        places: number of each file's folder, int32 N.
        names: names of the files, N.
    """

    def __init__(self, folders: "pa.LargeBinaryArray", places: NDArray[np.int32], names: "pa.LargeBinaryArray") -> None:
        self.folders, self.places, self.names = folders, places, names

    @classmethod
    def of(cls, paths: Iterable[str]) -> "Paths":
        """Returns these paths in compact form."""
        if isinstance(paths, Paths):
            return paths
        known: dict[bytes, int] = {}
        places: list[int] = []
        names: list[bytes] = []
        separator = os.fsencode(os.sep)
        for path in paths:
            encoded = os.fsencode(path)
            cut = encoded.rfind(separator) + 1
            places.append(known.setdefault(encoded[:cut], len(known)))
            names.append(encoded[cut:])
        return cls(binary(known), np.array(places, np.int32), binary(names))

    @classmethod
    def below(cls, folder: str, names: "pd.Series[str]") -> "Paths":
        """Returns paths that are relative to a folder or absolute, without a Python object for each."""
        import pyarrow as pa
        import pyarrow.compute as pc

        column = pa.array(names, pa.large_string())
        column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        parts = pc.extract_regex(column, r"(?s)^(?P<place>.*/)?(?P<name>[^/]*)$")
        places = pc.fill_null(parts.field("place"), "").dictionary_encode()
        folders = binary(os.fsencode(os.path.join(folder, each)) for each in places.dictionary.to_pylist())
        return cls(folders, places.indices.to_numpy().astype(np.int32), parts.field("name").cast(pa.large_binary()))

    @classmethod
    def joined(cls, parts: Sequence["Paths"]) -> "Paths":
        """Concatenates paths."""
        import pyarrow as pa

        if not parts:
            return cls.of([])
        first = np.cumsum([0, *(len(part.folders) for part in parts)])
        places = [part.places + np.int32(start) for part, start in zip(parts, first, strict=False)]
        folders, names = (pa.concat_arrays([getattr(part, key) for part in parts]) for key in ("folders", "names"))
        return cls(folders, np.concatenate(places), names)

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: NDArray[Any]) -> Self: ...

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int | np.integer):
            return os.fsdecode(self.folders[int(self.places[index])].as_py() + self.names[int(index)].as_py())
        return self._taken(np.arange(len(self))[index])

    def _taken(self, chosen: NDArray[np.int64]) -> Self:
        import pyarrow as pa

        return type(self)(self.folders, self.places[chosen], self.names.take(pa.array(chosen)))

    def __iter__(self) -> Iterator[str]:
        return map(os.fsdecode, self.encoded())

    def at(self, index: int) -> str | Member:
        """Returns one of them for `content_of`."""
        return self[index]

    def tolist(self) -> list[str]:
        """Returns all paths."""
        return list(self)

    def encoded(self, absolute: bool = False) -> Iterator[bytes]:
        """Returns all paths in the encoding of the file system."""
        return self._in(self._absolute if absolute else self.folders.to_pylist())

    def _in(self, folders: Sequence[bytes]) -> Iterator[bytes]:
        """Joins the names to folders."""
        for start in range(0, len(self), CHUNK):
            part = slice(start, start + CHUNK)
            for place, name in zip(self.places[part].tolist(), self.names[part].to_pylist(), strict=True):
                yield folders[place] + name

    def relative(self) -> Iterator[bytes]:
        """Returns all paths relative to their common folder, so that they do not depend on where it is."""
        folders = [os.path.abspath(folder) for folder in self.folders.to_pylist()]
        root = os.path.commonpath(folders) if folders else b""
        below = [os.path.relpath(folder, root) for folder in folders]
        return self._in([os.path.join(folder, b"") for folder in below])

    @property
    def root(self) -> bytes:
        """The folder or address that all files are below."""
        shared: Any = os.path.commonprefix(self._absolute)  # noqa: RUF071  # of addresses, too; cut at a separator
        return bytes(shared or b"").rpartition(os.fsencode(os.sep))[0]

    @property
    def _absolute(self) -> list[bytes]:
        """The folders, as absolute paths or addresses."""
        folders = self.folders.to_pylist()
        return [each if b"://" in each else os.path.join(os.path.abspath(each), b"") for each in folders]

    @cached_property
    def signatures(self) -> NDArray[np.int64]:
        """Size and time of each file, int64 N×2, to detect changes; -1 for a missing file. Files are queried once."""
        return np.fromiter(map(signature, self.encoded()), np.dtype((np.int64, 2)), len(self))


def binary(values: Iterable[bytes]) -> "pa.LargeBinaryArray":
    """Returns byte strings as a compact array."""
    import pyarrow as pa

    return pa.array(list(values), pa.large_binary())


def signature(path: bytes) -> tuple[int, int]:
    """Returns size and time of a file; see `Paths.signatures`."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # a name with a zero in it
        return -1, -1
    return found.st_size, max(found.st_mtime_ns, found.st_ctime_ns)  # copies keep the former
