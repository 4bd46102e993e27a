"""Annotated objects: as read from files, and as compact arrays for training."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from faster_coco_eval.core import mask as rle
from numpy.typing import NDArray

from datamodules.paths import Paths
from datamodules.tables import Notes

IGNORE = 255  # label of ignored pixels
MOST = 255  # maximum number of classes, since labels are bytes
BoxFormat = Literal["xyxy", "xywh", "voc", "yolo"]
DESCRIBED = {
    "xyxy": "xmin, ymin, xmax, ymax",
    "xywh": "x, y, width, height",
    "voc": "xmin, ymin, xmax, ymax",
    "yolo": "centre x, centre y, width, height as fractions of the image",
}
COLUMNS = ("xmin", "ymin", "xmax", "ymax")


@dataclass
class Box:
    """One annotated object, as its file describes it.

    Attributes:
        values: the four numbers as written.
        label: class in the file; None if it has none.
        number: position in the file.
        ignore: a crowd, or difficult.
        outline: unchecked outline of the file: polygons, each [x, y, x, y, …] in pixels, or a COCO run-length code; an
            array N×2 relative to the image, for YOLO.
        area: area of the object in pixels, from the file; NaN if it has none.
    """

    values: Sequence[float]
    label: Any
    number: int | str
    ignore: bool = False
    outline: Any = None
    area: float = math.nan


@dataclass
class Record:
    """One image with its annotated objects.

    Attributes:
        path: the image.
        file: file of its annotations.
        size: height and width of the image according to the file.
        boxes: its objects.
        place: position of the image in tar or Parquet files.
    """

    path: str
    file: str
    size: tuple[int, int] | None = None
    boxes: list[Box] = field(default_factory=list)
    place: int | None = None


@dataclass
class Annotations:
    """Boxes of a split in flat arrays; lists of Python objects would use memory in every worker process.

    Attributes:
        paths: paths of N images.
        sizes: int64 N×2, height and width.
        digests: N content digests of the images.
        starts: int64 N+1; the boxes of image i are those from starts[i] to starts[i + 1].
        boxes: float32 M×4, xyxy in pixels.
        labels: int64 M, from 0.
        ignore: bool M.
        outlines: M COCO run-length codes, or None without masks.
        areas: float32 M, areas of the objects in pixels, if the files have them; they classify objects as small, medium
            or large.
    """

    paths: Paths
    sizes: NDArray[np.int64]
    digests: NDArray[np.str_]
    starts: NDArray[np.int64]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    ignore: NDArray[np.bool_]
    outlines: NDArray[np.bytes_] | None = None
    areas: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, indices: NDArray[np.intp]) -> "Annotations":
        """Returns the images at these indices, with their boxes."""
        kept = [np.arange(self.starts[i], self.starts[i + 1]) for i in indices]
        rows = np.concatenate([np.zeros(0, np.int64), *kept])
        return replace(
            self,
            paths=self.paths[indices],
            sizes=self.sizes[indices],
            digests=self.digests[indices],
            starts=np.cumsum([0, *map(len, kept)]),
            boxes=self.boxes[rows],
            labels=self.labels[rows],
            ignore=self.ignore[rows],
            outlines=None if self.outlines is None else self.outlines[rows],
            areas=None if self.areas is None else self.areas[rows],
        )

    def masks(self, index: int) -> NDArray[np.uint8]:
        """Decodes the masks of an image's objects, uint8 N×H×W of 0 and 1."""
        assert self.outlines is not None
        height, width = map(int, self.sizes[index])
        rows = range(self.starts[index], self.starts[index + 1])
        codes = [{"size": [height, width], "counts": self.outlines[row]} for row in rows]
        if not codes:
            return np.zeros((0, height, width), np.uint8)
        return np.ascontiguousarray(rle.decode(codes).transpose(2, 0, 1))


class Unknown:
    """A class without a name, which never equals the name of another one.

    Args:
        written: name in the file.
    """

    def __init__(self, written: str) -> None:
        self.written = written

    def __repr__(self) -> str:
        return self.written


def as_number(given: Any) -> float:
    """A finite number, also from text; otherwise NaN."""
    try:
        number = float(given)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return number if math.isfinite(number) else math.nan


class Unread(list[float]):
    """Four NaN in place of a box without four numbers.

    Args:
        written: what the file has instead.
    """

    def __init__(self, written: object) -> None:
        super().__init__([math.nan] * 4)
        self.written = written


def four_numbers(given: object) -> list[float]:
    """Four numbers, or `Unread` if there are not exactly four."""
    numbers = [as_number(value) for value in given] if isinstance(given, list) else []
    return numbers if len(numbers) == 4 and all(map(math.isfinite, numbers)) else Unread(given)


def as_size(height: object, width: object) -> tuple[int, int] | None:
    """Height and width from a file; None if one is missing."""
    sides = as_number(height), as_number(width)
    return (int(sides[0]), int(sides[1])) if all(1 <= side < 1e9 for side in sides) else None


def as_flag(given: object) -> bool:
    """Parses a yes/no value of a file."""
    return str(given).strip().lower() in ("1", "1.0", "true", "yes")


def merged(records: Iterable[Record], notes: Notes) -> list[Record]:
    """Merges the records of the same image."""
    known: dict[str, Record] = {}
    for record in records:
        same = known.setdefault(record.path, record)
        if same is not record:
            notes.add("An image is listed twice, and counted once", f"{record.file}: {record.path}")
            same.boxes += record.boxes
    return list(known.values())


def occurring(splits: dict[str, list[Record]]) -> list[str]:
    """Classes that occur in training, sorted."""
    records = splits.get("train", splits.get("all", []))
    return sorted({box.label for record in records for box in record.boxes if isinstance(box.label, str)})
