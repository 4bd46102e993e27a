"""Operations on masks as COCO run-length codes, without decoding them to full images."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as rle
from numpy.typing import NDArray


def runs(code: Mapping[str, Any]) -> NDArray[np.int64]:
    """Decodes a run-length code to run lengths, column by column, alternately outside and inside of the mask.

    Args:
        code: COCO's compressed format: ``size``, height and width; ``counts``, text or bytes.
    """
    text = code["counts"]
    chars = np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8).astype(np.int64) - 48
    # Numbers have five bits per character, the lowest first, and a flag if another character follows.
    last = np.flatnonzero((chars & 32) == 0)
    first = np.concatenate(([0], last[:-1] + 1)) if len(last) else last
    place = np.arange(len(chars)) - np.repeat(first, last - first + 1)
    numbers = np.add.reduceat((chars & 31) << (5 * place), first) if len(first) else np.zeros(0, np.int64)
    numbers -= ((chars[last] & 16) != 0) * (np.int64(1) << (5 * (last - first + 1)))
    for start in (1, 2):  # from the fourth on, numbers are differences from the number before the last
        numbers[start::2] = numbers[start::2].cumsum()
    return numbers


def pixels(code: Mapping[str, Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns rows and columns of a mask's pixels, column by column."""
    edges = runs(code).cumsum()
    starts, ends = edges[:-1:2], edges[1::2]
    lengths = ends - starts
    before = np.repeat(starts - np.concatenate(([0], lengths.cumsum()[:-1])), lengths)
    columns, rows = np.divmod(np.arange(int(lengths.sum())) + before, int(code["size"][0]))
    return rows, columns


def placed(code: Mapping[str, Any], left: int, top: int, height: int, width: int) -> dict[str, Any]:
    """Moves the mask of a tile to its position in a larger image.

    Args:
        code: run-length code of the tile's mask.
        left: position of the tile, in pixels.
        top: see ``left``.
        height: height of the image.
        width: width of the image.
    """
    rows, columns = pixels(code)
    flat = (columns + left) * height + rows + top
    breaks = np.flatnonzero(np.diff(flat) != 1)
    starts = flat[np.concatenate(([0], breaks + 1))] if len(flat) else flat
    ends = flat[np.concatenate((breaks, [-1]))] + 1 if len(flat) else flat
    edges = np.concatenate(([0], np.stack((starts, ends), 1).ravel(), [height * width]))
    found = rle.frPyObjects({"size": [height, width], "counts": np.diff(edges).tolist()}, height, width)
    return {"size": [height, width], "counts": found["counts"].decode()}


def union(codes: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the union of masks of the same size."""
    found = rle.merge([code | {"counts": code["counts"].encode()} for code in codes])
    return {"size": list(codes[0]["size"]), "counts": found["counts"].decode()}
