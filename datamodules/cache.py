"""What was read lately, in bounded memory."""

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

V = TypeVar("V", bound="Mapping[str, Any] | tuple[Any, ...]")


class Cache(Generic[V]):
    """Keeps values of numbered things until they have too many bytes together; then the oldest goes. Each process has its own.

    Args:
        most: bytes of the arrays in them.
    """

    def __init__(self, most: int) -> None:
        self.most, self._bytes = most, 0
        self._kept: dict[int, V] = {}

    def get(self, number: int, make: Callable[[int], V]) -> V:
        """The value of this number, made where it is not kept."""
        if number not in self._kept:
            value = make(number)
            while self._kept and self._bytes + _bytes(value) > self.most:
                self._bytes -= _bytes(self._kept.pop(next(iter(self._kept))))
            self._kept[number] = value
            self._bytes += _bytes(value)
        return self._kept[number]


def _bytes(value: Any) -> int:
    return sum(array.nbytes for array in (value.values() if isinstance(value, Mapping) else value))
