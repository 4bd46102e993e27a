"""Answers for overlapping pieces of a picture as one answer for the picture."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modules.detection.masks import placed, union
from modules.detection.metrics import Array, overlaps

AGREE = 0.5  # share from which on two pieces show the same object
EDGE = 1 / 64  # of a piece's side: what comes nearer to its edge is thought to be cut off there
PER_OBJECT = ("boxes", "labels", "scores", "masks")  # what an answer has for each object
Place = tuple[int, int]


def joined(
    parts: Sequence[tuple[Place, dict[str, Any]]], height: int, width: int, side: int, across_classes: bool = False
) -> dict[str, Any]:
    """One answer for a picture from those for its pieces, which overlap.

    Two boxes of a class from different pieces are of one object where, of what both pieces show, both cover the same: half
    of their union; or half of a box that its piece cuts off, where the other is whole. Of an object that some
    piece shows whole, the most certain of the whole boxes is kept, however certain a part of it may be. Of one that all
    cut off, the parts are put together. Boxes of one piece are never taken for one object.

    Args:
        parts: left and top edge of each piece, and its answer: ``boxes``, ``labels``, ``scores``, perhaps ``masks``.
        height: of the picture, in pixels.
        width: of the picture.
        side: of the pieces.
        across_classes: boxes of different classes may be of one object too.

    Returns:
        The answer, the most certain objects first, with the best score that was given to any of their boxes.
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
    inner = np.concatenate((corners > 0, pieces[:, 2:] < (width, height)), 1)  # edges beyond which there is more
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
        for member in group:  # what is linked to it, and the parts that hang together with these
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
    """Which boxes of two pieces cover the same of what both show, N×M."""
    low, high = both[:2], both[2:]
    one, other = (np.concatenate((b[:, :2].clip(low, high), b[:, 2:].clip(low, high)), 1) for b in (ours, theirs))
    within = np.where(our_cut[:, None], overlaps(one, other, True), overlaps(other, one, True).T)
    return np.where(our_cut[:, None] != their_cut, within, overlaps(one, other)) >= AGREE


def _neighbours(corners: NDArray[np.int64], side: int) -> Iterator[tuple[int, int]]:
    """Pairs of pieces that overlap, each once; they lie on a grid."""
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
