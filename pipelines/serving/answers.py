"""What a checkpoint answers for the pieces of a data set's pictures, told of the pictures."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from modules.detection.tiles import joined


def whole_pictures(
    rows: Sequence[tuple[int, dict[str, Any]]], source: Any, across_classes: bool = False
) -> list[dict[str, Any]]:
    """Answers with the path of their picture, where it is a file, and in its pixels.

    Args:
        rows: a sample's number and the answer for it, in the order of the numbers; samples may lack.
        source: the samples. One with ``windows`` (picture, left, top of each sample) and ``annotations`` is of boxes, which are
            joined; one with ``places`` (picture, top, left) is of class maps.
        across_classes: see `modules.detection.tiles.joined`.
    """
    paths = getattr(source, "paths", None)
    answers = [({} if paths is None else {"path": str(paths[k])}) | answer for k, answer in rows]
    if getattr(source, "tile", None):
        windows, sizes = source.windows.tolist(), source.annotations.sizes.tolist()
        pieces = [(*windows[k], answer) for (k, _), answer in zip(rows, answers, strict=True)]
        return [
            joined(
                [((x, y), answer) for _, x, y, answer in parts],
                sizes[picture][0],
                sizes[picture][1],
                source.tile,
                across_classes,
            )
            for picture, parts in ((key, list(group)) for key, group in groupby(pieces, key=lambda piece: piece[0]))
        ]
    if getattr(source, "window", None):
        for (k, _), answer in zip(rows, answers, strict=True):
            _, top, left = source.places[k].tolist()
            answer["window"] = [left, top, *answer["size"][::-1]]
    return answers
