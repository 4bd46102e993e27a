"""The error for unusable data, and what its messages are made of."""

from collections import Counter
from collections.abc import Hashable, Iterable
from typing import TypeVar

T = TypeVar("T", bound=Hashable)


class DataError(ValueError):
    """Error for unusable data; the message names the file or the value, and the way out."""


def listed(given: Iterable[str]) -> str:
    """Joins names for a message; of many, the first eight."""
    names = list(given)
    shown = ", ".join(map(str, names[:8]))
    return f"{shown}, … ({len(names)} in all)" if len(names) > 8 else shown


def repeated(values: Iterable[T]) -> tuple[T, int] | None:
    """Returns the most frequent value and its count; None if all values are unique."""
    found = Counter(values).most_common(1)
    return found[0] if found and found[0][1] > 1 else None
