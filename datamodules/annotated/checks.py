"""Validation and correction of boxes and outlines."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from faster_coco_eval.core import mask as rle
from numpy.typing import NDArray

from datamodules.annotated.sample import DESCRIBED, Annotations, BoxFormat, Record, Unread
from datamodules.errors import DataError, listed
from datamodules.finding import quoted
from datamodules.paths import Paths


def corners(values: NDArray[np.float64], sizes: NDArray[np.int64], form: BoxFormat) -> NDArray[np.float64]:
    """Converts boxes to xyxy in pixels; the picture's left edge is 0, its right edge its width.

    Args:
        values: M×4 in the format of the file.
        sizes: M×2, height and width of each box's image.
        form: format of the boxes. VOC counts pixels from 1 and includes the last one (Everingham et al. 2010, section
            3.1 of the development kit).
    """
    boxes = values.copy()
    if form == "yolo":
        boxes[:, :2] -= boxes[:, 2:] / 2
        boxes[:, 2:] += boxes[:, :2]
        boxes *= np.tile(sizes[:, ::-1], 2)
    elif form == "xywh":
        boxes[:, 2:] += boxes[:, :2]
    elif form == "voc":
        boxes[:, :2] -= 1
    return boxes


def in_shares(values: Any) -> NDArray[np.bool_]:
    """Whether boxes, M×4, lie within the first pixel, as boxes relative to the image do."""
    boxes = np.array(values, np.float64).reshape(-1, 4)
    with np.errstate(invalid="ignore"):
        return np.asarray(((boxes >= 0) & (boxes <= 1)).all(1) & (boxes % 1 > 0).any(1))


def faults(boxes: NDArray[np.float64], sizes: NDArray[np.int64]) -> NDArray[np.object_]:
    """Describes the fault of each box, M texts; empty for valid ones, which may exceed the edge by a pixel of
    rounding."""
    left, top, right, bottom = boxes.T
    height, width = sizes.T
    rounded = np.clip(boxes, -1e9, 1e9).astype(np.float32)  # as they will be stored
    result = np.full(len(boxes), "", object)
    with np.errstate(invalid="ignore"):
        cases = {
            "is empty": (rounded[:, :2] == rounded[:, 2:]).any(1),
            "reaches outside": (left < -1) | (top < -1) | (right > width + 1) | (bottom > height + 1),
            "is outside": (right <= 0) | (bottom <= 0) | (left >= width) | (top >= height),
            "is inverted": (right < left) | (bottom < top),
            "is not four numbers": ~np.isfinite(boxes).all(1),
        }
    for name, those in cases.items():
        result[those] = name
    return result


def _mistaken(values: NDArray[np.float64], sizes: NDArray[np.int64], form: BoxFormat, bad: NDArray[np.bool_]) -> str:
    """Suggests, as a sentence, another format that the boxes may be in."""
    known = np.isfinite(values).all(1)
    pixels = form == "yolo" and bool((np.abs(values[bad & known]) > 2).any())
    if pixels:  # only pixels can be distinguished box by box
        known &= (np.abs(values) > 2).any(1)
    values, sizes, bad = values[known], sizes[known], bad[known]
    if not bad.size or bad.mean() < 0.05:
        return ""
    scale = np.tile(sizes[:, ::-1], 2)
    others: dict[str, tuple[NDArray[np.float64], BoxFormat]] = {
        DESCRIBED["xywh"]: (values, "xywh"),
        DESCRIBED["xyxy"]: (values, "xyxy"),
    }
    if pixels:
        others = {
            "centre x, centre y, width, height in pixels": (values / scale, "yolo"),
            "corners in pixels": (values, "xyxy"),
            "x, y, width, height in pixels": (values, "xywh"),
        }
    elif form == "yolo":
        others = {
            "corners as fractions of the image": (values * scale, "xyxy"),
            "x, y, width, height as fractions of the image": (values * scale, "xywh"),
        }
    for name, (given, other) in others.items():
        if name != DESCRIBED[form] and not (faults(corners(given, sizes, other), sizes) != "").any():
            which = "All" if known.all() else f"{len(values)} of them"
            return f"{which} would be right if they were {name}, but they are read as {DESCRIBED[form]}. "
    return ""


def compiled(
    records: Sequence[Record],
    paths: Paths,
    label_names: Sequence[str],
    form: BoxFormat,
    on_bad_box: Literal["error", "drop"],
    sizes: NDArray[np.int64],
    digests: NDArray[np.str_],
    noun: str,
    masks: bool = False,
    boxes_as_masks: bool = False,
    remedy: str = "",
) -> tuple[Annotations, dict[str, str]]:
    """Validates boxes and collects them in arrays.

    Args:
        records: the images.
        paths: their files.
        label_names: class names, by index.
        form: format of the boxes.
        on_bad_box: raise an error; or clip boxes that extend beyond the image and drop other unusable ones. Duplicates
            always count once.
        sizes: N×2, height and width of the images.
        digests: N content digests of the images.
        noun: name of a box in the file, for messages.
        masks: keep outlines, which are checked so that they can be decoded; boxes without one are unusable.
        boxes_as_masks: unless the box is used as its mask.
        remedy: advice if all boxes are in another format.

    Returns:
        The arrays, and the changes: by place, ``dropped``, ``cut off``, ``a copy`` (dropped), ``its own mask`` (the
        box), ``an outline apart`` (from its box), ``in the first pixel`` (possibly relative to the image).

    Raises:
        DataError: a box or an outline is unusable; with ``drop``, more than one in ten, or they seem to be in another
            format.
    """
    numbers = {name: k for k, name in enumerate(label_names)}
    boxes = [box for record in records for box in record.boxes]
    owners = np.repeat(np.arange(len(records)), [len(record.boxes) for record in records])
    values = np.array([box.values for box in boxes], np.float64).reshape(-1, 4)
    areas = sizes[owners]
    found = corners(values, areas, form)
    labels = np.array([numbers.get(box.label, -1) for box in boxes], np.int64)
    wrong = faults(found, areas)
    mistaken = _mistaken(values, areas, form, wrong != "")
    corner = in_shares(values) & (form != "yolo") & (areas > 1).any(1)
    wrong[labels < 0] = [
        "has no class" if boxes[k].label is None else "is of an unknown class" for k in np.flatnonzero(labels < 0)
    ]
    outlines = np.full(len(boxes), None, object)
    boxed = np.zeros(len(boxes), bool)
    apart = np.zeros(len(boxes), bool)
    if masks:
        boxed = np.array([box.outline is None for box in boxes], bool)
        wrong[boxed & (wrong == "") & (not boxes_as_masks)] = "has no outline"
        for k in np.flatnonzero((wrong == "") | (wrong == "reaches outside")):
            x1, y1, x2, y2 = np.clip(found[k], 0, np.tile(areas[k][::-1], 2)).tolist()
            outline = [[x1, y1, x2, y1, x2, y2, x1, y2]] if boxed[k] else boxes[k].outline
            try:
                outlines[k] = encoded(outline, *map(int, areas[k]))
                apart[k] = not boxed[k] and _is_apart(outlines[k], found[k], *map(int, areas[k]))
            except ValueError as error:
                wrong[k] = str(error)
    bad = np.flatnonzero(wrong != "")

    def place(k: Any) -> str:
        record, box = records[owners[k]], boxes[k]
        height, width = areas[k]
        numbers = f"[{', '.join(f'{value:g}' for value in box.values)}]"
        what = f"{quoted(box.values.written) if isinstance(box.values, Unread) else numbers} {wrong[k]}"
        if labels[k] < 0:
            what = wrong[k] if box.label is None else f"{wrong[k]}, {box.label!r}"
        elif "outside" in wrong[k]:
            what += f" ({width}×{height} pixels)"
        return f"{record.file}, {noun} {box.number}, image {Path(record.path).name}: {what}"

    dropped = np.array([wrong[k] != "reaches outside" for k in bad], bool)
    if len(bad) and (on_bad_box == "error" or mistaken or dropped.sum() > max(1, 0.1 * len(boxes))):
        shown = "; ".join([*(place(k) for k in bad[:3]), *["…"] * (len(bad) > 3)])
        names = ""
        if (labels < 0).any():
            names = f" The classes are {listed(label_names)}." if label_names else " The file names no classes."
        way = (
            "More than one in ten is too many to drop: look at the file."
            if on_bad_box == "drop"
            else "Correct them, or have them clipped at the image's edge or dropped: --data.on_bad_box drop."
        )
        raise DataError(
            f"{len(bad)} of {len(boxes)} boxes cannot be used: {shown}.{names} {mistaken}{remedy if mistaken else way}"
        )
    report = {}
    for k, gone in zip(bad, dropped, strict=True):
        report[place(k)] = "dropped" if gone else "cut off"
    kept = np.ones(len(boxes), bool)
    kept[bad[dropped]] = False
    seen: set[tuple[Any, ...]] = set()
    ignored = [box.ignore for box in boxes]
    keys = zip(owners.tolist(), labels.tolist(), ignored, *found.astype(np.float32).T.tolist(), outlines, strict=True)
    for row, own in enumerate(keys):
        if not kept[row]:
            continue
        if own in seen:
            kept[row] = False
            report[place(row).strip()] = "a copy"
        elif boxed[row]:
            report[place(row).strip()] = "its own mask"
        elif corner[row]:
            report[place(row).strip()] = "in the first pixel"
        elif apart[row]:
            report[place(row).strip()] = "an outline apart"
        seen.add(own)
    limits = np.tile(areas[:, ::-1], 2)[kept]
    counts = np.bincount(owners[kept], minlength=len(records))
    clipped = np.clip(found[kept], 0, limits)
    given, plain = np.array([box.area for box in boxes], np.float64)[kept], (clipped[:, 2:] - clipped[:, :2]).prod(1)
    known = (given > 0) & (given <= sizes[owners[kept]].prod(1))
    annotations = Annotations(
        paths,
        sizes,
        digests,
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        clipped.astype(np.float32),
        labels[kept],
        np.array(ignored, bool)[kept],
        outlines[kept] if masks else None,
        np.where(known, given, plain).astype(np.float32) if (given > 0).any() else None,
    )
    return annotations, report


def encoded(outline: object, height: int, width: int) -> bytes:
    """Encodes an outline as a valid compressed COCO RLE.

    Args:
        outline: polygons in pixels, one polygon, or a list of points; an array N×2 relative to the image; or a COCO
            run-length code, compressed or not.
        height: height of the image, in pixels.
        width: width of the image.

    Raises:
        ValueError: it is none of these, of another size than the image, far outside of it, or covers no pixel; the
            message completes "this box".
    """
    if isinstance(outline, dict):
        code = {"size": [height, width], "counts": _runs(outline, height, width)}
    else:
        polygons = _polygons(outline, height, width)
        code = rle.merge(rle.frPyObjects(polygons, height, width))
    if not rle.area(code):
        raise ValueError("has an outline that covers no pixel")
    return bytes(code["counts"])


def _is_apart(code: bytes, box: NDArray[np.float64], height: int, width: int) -> bool:
    """Whether an outline and a box that is not small have an IoU below one half.

    Raises:
        ValueError: they do not intersect; the message completes "this box".
    """
    box = np.clip(box, 0, (width, height, width, height))
    left, top, across, down = np.ravel(rle.toBbox({"size": [height, width], "counts": code})).tolist()
    shared = np.minimum(box[2:], (left + across, top + down)) - np.maximum(box[:2], (left, top))
    if (shared < -1).any():
        raise ValueError("has an outline that lies outside it")
    both = np.clip(shared, 0, None).prod()
    sides = box[2:] - box[:2]
    return bool(sides.min() >= 8 and both < 0.5 * (sides.prod() + across * down - both))


def _polygons(outline: object, height: int, width: int) -> list[list[float]]:
    """Polygons in pixels, from flat lists or lists of points."""
    if isinstance(outline, np.ndarray):
        outline = [outline * (width, height)]
    if isinstance(outline, list) and outline and not isinstance(outline[0], list | dict | np.ndarray):
        outline = [outline]  # a single polygon, as VIA writes it
    if isinstance(outline, list) and len(outline) > 2 and all(isinstance(p, list) and len(p) == 2 for p in outline):
        outline = [outline]  # a single polygon as points
    if not isinstance(outline, list):
        raise ValueError("has an outline that is neither polygons nor a run-length code")
    polygons = []
    for part in outline:
        try:
            numbers = np.asarray(part, np.float64).ravel()
        except (TypeError, ValueError, OverflowError):
            raise ValueError("has an outline that is neither polygons nor a run-length code") from None
        if not numbers.size:
            continue
        if not np.isfinite(numbers).all() or numbers.size % 2:
            raise ValueError("has an outline that is not a list of x and y")
        if numbers.size < 6:
            raise ValueError("has an outline of fewer than three points")
        points = numbers.reshape(-1, 2)
        if in_shares(np.hstack([points, points])).all():
            raise ValueError("has an outline that lies within the first pixel, as fractions of the image would")
        if (points < (-width, -height)).any() or (points > (2 * width, 2 * height)).any():
            raise ValueError("has an outline that is far outside")
        polygons.append(numbers.tolist())
    if not polygons:
        raise ValueError("has an empty outline")
    return polygons


def _runs(code: dict[str, Any], height: int, width: int) -> bytes:
    """Compressed counts of a validated RLE."""
    size, counts = cast(Any, code.get("size")), code.get("counts")
    try:
        sides = [int(side) for side in size]
    except (TypeError, ValueError, OverflowError):
        raise ValueError("has a run-length code without a size") from None
    if sides != [height, width]:
        raise ValueError(f"has a run-length code of another size, {sides[::-1]}"[:200])
    if isinstance(counts, str | bytes):
        data = counts.encode("utf-8", "replace") if isinstance(counts, str) else counts
        runs = _decoded(data)
    else:
        data, runs = b"", None
        with suppress(TypeError, ValueError, OverflowError):
            runs = np.array(counts, np.int64).reshape(-1)
    pixels = height * width
    if runs is None or not runs.size or (runs < 0).any() or (runs > pixels).any() or runs.sum() != pixels:
        raise ValueError("has a run-length code that is incomplete")
    return data or rle.frPyObjects({"size": sides, "counts": runs.tolist()}, height, width)["counts"]


def _decoded(data: bytes) -> NDArray[np.int64] | None:
    """Run lengths of COCO's compressed code: groups of five bits, differences from the third run on."""
    digits = np.frombuffer(data, np.uint8).astype(np.int64) - 48
    if not digits.size or (digits < 0).any() or (digits > 63).any() or digits[-1] & 32:
        return None
    ends = np.flatnonzero((digits & 32) == 0)
    begins = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - begins + 1
    if lengths.max() > 6:
        return None
    shifts = 5 * (np.arange(digits.size) - np.repeat(begins, lengths))
    runs = np.add.reduceat((digits & 31) << shifts, begins)
    runs -= np.where(digits[ends] & 16, 1 << (5 * lengths), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs
