"""Caches: one with bounded memory, and the folder of those on the disk."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

V = TypeVar("V", bound="Mapping[str, Any] | tuple[Any, ...]")


class Cache(Generic[V]):
    """Caches values by number up to a total size in bytes; the oldest is dropped first. Each process has its own.

    Args:
        most: maximum number of bytes of the arrays.
    """

    def __init__(self, most: int) -> None:
        self.most, self._bytes = most, 0
        self._kept: dict[int, V] = {}

    def get(self, number: int, make: Callable[[int], V]) -> V:
        """Returns the value of a number; computes it if it is not in the cache."""
        if number not in self._kept:
            value = make(number)
            while self._kept and self._bytes + _bytes(value) > self.most:
                self._bytes -= _bytes(self._kept.pop(next(iter(self._kept))))
            self._kept[number] = value
            self._bytes += _bytes(value)
        return self._kept[number]


def _bytes(value: Any) -> int:
    return sum(array.nbytes for array in (value.values() if isinstance(value, Mapping) else value))


def cache_folder() -> Path:
    """Returns the folder for files that can be recreated: ``$XDG_CACHE_HOME/fovea``, or ``~/.cache/fovea`` if that is
    not an absolute path, as in the XDG Base Directory Specification."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "fovea"
