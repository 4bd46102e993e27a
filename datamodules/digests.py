"""Digests that identify content, equal on every machine."""

import hashlib
import itertools
from collections.abc import Iterable


def digest_of(content: bytes) -> str:
    """Returns a hexadecimal hash of content."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def digest_of_lines(lines: Iterable[bytes]) -> str:
    """Returns `digest_of` of lines joined by line breaks, without having all of them in memory."""
    found, rest = hashlib.blake2b(digest_size=16), iter(lines)
    mark = b""
    while part := list(itertools.islice(rest, 1 << 16)):
        found.update(mark + b"\n".join(part))
        mark = b"\n"
    return found.hexdigest()
