"""Merging of the predictions for overlapping tiles of an image."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modules.answers import Answer
from modules.detection.masks import placed, union
from modules.detection.metrics import Array, overlaps

AGREE = 0.5  # overlap from which boxes of two tiles are the same object
EDGE = 1 / 64  # relative to a tile's side: boxes that come closer to its edge count as cut off
PER_OBJECT = ("boxes", "labels", "scores", "masks")  # keys of a prediction with one entry per object
Place = tuple[int, int]


def joined(
    parts: Sequence[tuple[Place, Answer]], height: int, width: int, side: int, across_classes: bool = False
) -> Answer:
    """Merges the predictions for overlapping tiles into one prediction for the image.

    Two boxes of a class from different tiles belong to the same object if their parts within the overlap of the tiles
    have an IoU of at least one half; or, if only one of them is cut off, if at least half of that one lies in the
    other. If a tile shows the object as a whole, the most confident uncut box is kept, whatever the confidence of the
    others. If all boxes are cut off, their bounding box is used. Boxes of the same tile are never merged.

    Args:
        parts: left and top edge of each tile, and its prediction: ``boxes``, ``labels``, ``scores``, optionally
            ``masks``.
        height: height of the image, in pixels.
        width: width of the image.
        side: side of the tiles.
        across_classes: merge boxes of different classes too.

    Returns:
        The merged prediction, the most confident objects first, each with the best score of its boxes.
    """
    if len(parts) == 1:
        return parts[0][1]
    corners = np.array([place for place, _ in parts], np.int64)
    counts = [len(answer["boxes"]) for _, answer in parts]
    owners = np.repeat(np.arange(len(parts)), counts)
    boxes = np.concatenate([np.asarray(answer["boxes"], np.float64).reshape(-1, 4) for _, answer in parts])
    boxes = boxes + np.tile(corners[owners], 2)
    scores = np.concatenate([np.asarray(answer["scores"], np.float64) for _, answer in parts])
    labels = [label for _, answer in parts for label in answer["labels"]]
    numbers = np.unique(["" if across_classes else label for label in labels], return_inverse=True)[1]
    pieces = np.concatenate((corners, np.minimum(corners + side, (width, height))), 1)
    inner = np.concatenate((corners > 0, pieces[:, 2:] < (width, height)), 1)  # edges inside the image
    cut = ((np.abs(boxes - pieces[owners]) <= max(1.0, EDGE * side)) & inner[owners]).any(1)
    links: dict[int, list[int]] = {}
    starts = np.concatenate(([0], np.cumsum(counts)))
    for one, other in _neighbours(corners, side):
        ours, theirs = (np.arange(starts[k], starts[k + 1]) for k in (one, other))
        if not len(ours) or not len(theirs):
            continue
        low, high = np.maximum(pieces[one, :2], pieces[other, :2]), np.minimum(pieces[one, 2:], pieces[other, 2:])
        both = np.concatenate((low, high))
        same = _agree(boxes[ours], boxes[theirs], cut[ours], cut[theirs], both)
        same &= numbers[ours][:, None] == numbers[theirs]
        for i, j in zip(*same.nonzero(), strict=True):
            links.setdefault(int(ours[i]), []).append(int(theirs[j]))
            links.setdefault(int(theirs[j]), []).append(int(ours[i]))
    free = np.ones(len(boxes), bool)
    masks = [(k, code) for k, (_, answer) in enumerate(parts) for code in answer.get("masks", ())]
    found: list[tuple[float, list[float], Any, Any]] = []
    for k in np.lexsort((-scores, cut)).tolist():
        if not free[k]:
            continue
        free[k] = False
        group = [k]
        for member in group:  # everything linked to it, and parts linked to these
            near = [other for other in links.get(member, ()) if free[other] and (member == k or cut[other])]
            free[near] = False
            group += near
        shown = group if cut[k] else [k]
        box = np.concatenate((boxes[shown, :2].min(0), boxes[shown, 2:].max(0)))
        mask = None
        if masks:
            codes = [
                placed(code, int(left), int(top), height, width)
                for code, (left, top) in ((masks[i][1], corners[owners[i]]) for i in shown)
            ]
            mask = codes[0] if len(codes) == 1 else union(codes)
        found.append((float(scores[group].max()), [round(value, 2) for value in box.tolist()], labels[k], mask))
    found.sort(key=lambda each: -each[0])
    columns = {
        "boxes": [box for _, box, _, _ in found],
        "labels": [label for _, _, label, _ in found],
        "scores": [score for score, *_ in found],
    }
    if any("masks" in answer for _, answer in parts):
        columns["masks"] = [mask for *_, mask in found]
    return {**parts[0][1], **columns, **({"size": [height, width]} if "size" in parts[0][1] else {})}


def _agree(ours: Array, theirs: Array, our_cut: NDArray[np.bool_], their_cut: NDArray[np.bool_], both: Array) -> Any:
    """Whether boxes of two tiles cover the same part of the tiles' overlap, N×M."""
    low, high = both[:2], both[2:]
    one, other = (np.concatenate((b[:, :2].clip(low, high), b[:, 2:].clip(low, high)), 1) for b in (ours, theirs))
    within = np.where(our_cut[:, None], overlaps(one, other, True), overlaps(other, one, True).T)
    return np.where(our_cut[:, None] != their_cut, within, overlaps(one, other)) >= AGREE


def _neighbours(corners: NDArray[np.int64], side: int) -> Iterator[tuple[int, int]]:
    """Yields each pair of overlapping tiles once; tiles lie on a grid."""
    columns, rows = (sorted(set(corners[:, axis].tolist())) for axis in (0, 1))
    numbers = {place: k for k, place in enumerate(map(tuple, corners.tolist()))}
    reach = [[[b for b in edges if a <= b < a + side] for a in edges] for edges in (columns, rows)]
    for i, x in enumerate(columns):
        for j, y in enumerate(rows):
            for right in reach[0][i]:
                for below in [b for b in rows if abs(b - y) < side] if right > x else reach[1][j]:
                    pair = numbers.get((x, y)), numbers.get((right, below))
                    if (right, below) != (x, y) and None not in pair:
                        yield pair  # type: ignore[misc]
