"""Boxes and outlines as people write them down: COCO, Pascal VOC, YOLO and tables; read and checked."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np
import pandas as pd
from faster_coco_eval.core import mask as rle
from numpy.typing import NDArray

from datamodules.base import DataError
from datamodules.images import EXTENSIONS
from datamodules.tables import listed

BoxFormat = Literal["xyxy", "xywh", "voc", "yolo"]
DESCRIBED = {
    "xyxy": "xmin, ymin, xmax, ymax",
    "xywh": "x, y, width, height",
    "voc": "xmin, ymin, xmax, ymax",
    "yolo": "centre x, centre y, width, height as shares of the image",
}
SYNONYMS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


@dataclass
class Box:
    """One object as a file has it.

    Attributes:
        values: the four numbers as written.
        label: what the file calls its class.
        number: where it stands in the file.
        ignore: a crowd, or difficult.
        outline: polygons, each [x, y, x, y, …] in pixels, or a run-length code of COCO's.
    """

    values: Sequence[float]
    label: Any
    number: int
    ignore: bool = False
    outline: Any = None


@dataclass
class Record:
    """One image with its objects, as a file has them.

    Attributes:
        path: the image.
        file: where its boxes are written.
        size: height and width that the file says the image has.
        boxes: its objects.
    """

    path: str
    file: str
    size: tuple[int, int] | None = None
    boxes: list[Box] = field(default_factory=list)


@dataclass
class Annotations:
    """The boxes of a split in flat arrays: lists of Python objects would grow in every worker process.

    Attributes:
        paths: N images.
        sizes: int64 N×2, height and width.
        digests: N content digests of the images.
        starts: int64 N+1; the boxes of image i are those from starts[i] to starts[i + 1].
        boxes: float32 M×4, xyxy in pixels.
        labels: int64 M, from 0.
        ignore: bool M.
        outlines: M run-length codes of COCO's, or None where masks are not asked for.
    """

    paths: NDArray[np.str_]
    sizes: NDArray[np.int64]
    digests: NDArray[np.str_]
    starts: NDArray[np.int64]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    ignore: NDArray[np.bool_]
    outlines: NDArray[np.bytes_] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, indices: NDArray[np.intp]) -> "Annotations":
        """The images at these positions, with their boxes."""
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
        )

    def masks(self, index: int) -> NDArray[np.uint8]:
        """The masks of an image's objects, uint8 N×H×W of 0 and 1."""
        assert self.outlines is not None
        height, width = map(int, self.sizes[index])
        rows = range(self.starts[index], self.starts[index + 1])
        codes = [{"size": [height, width], "counts": self.outlines[row]} for row in rows]
        return (
            np.ascontiguousarray(rle.decode(codes).transpose(2, 0, 1))
            if codes
            else np.zeros((0, height, width), np.uint8)
        )


def corners(values: NDArray[np.float64], sizes: NDArray[np.int64], form: BoxFormat) -> NDArray[np.float64]:
    """Boxes as written to xyxy in pixels, where the picture's left edge is 0 and its right edge its width.

    Args:
        values: M×4 as written.
        sizes: M×2, height and width of each one's image.
        form: how they are written. VOC counts pixels from 1 and includes the last (Everingham et al. 2010, the
            development kit's section 3.1).
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


def faults(boxes: NDArray[np.float64], sizes: NDArray[np.int64]) -> NDArray[np.str_]:
    """What is wrong with boxes, M texts; empty for good ones, which may reach a pixel over the edge by rounding."""
    left, top, right, bottom = boxes.T
    height, width = sizes.T
    result = np.full(len(boxes), "", dtype="<U40")
    with np.errstate(invalid="ignore"):
        cases = {
            "reaches outside": (left < -1) | (top < -1) | (right > width + 1) | (bottom > height + 1),
            "is outside": (right <= 0) | (bottom <= 0) | (left >= width) | (top >= height),
            "is empty": (right == left) | (bottom == top),
            "is inverted": (right < left) | (bottom < top),
            "is no number": ~np.isfinite(boxes).all(1),
        }
    for name, those in cases.items():
        result[those] = name
    return result


def _mistaken(values: NDArray[np.float64], sizes: NDArray[np.int64], form: BoxFormat, bad: NDArray[np.bool_]) -> str:
    """Whether the boxes look as though written in another way than they are read, as a sentence."""
    if not bad.size or bad.mean() < 0.05 or not np.isfinite(values).all():
        return ""
    others: dict[str, tuple[NDArray[np.float64], BoxFormat]] = {
        DESCRIBED["xywh"]: (values, "xywh"),
        DESCRIBED["xyxy"]: (values, "xyxy"),
    }
    if form == "yolo":
        scale = np.tile(sizes[:, ::-1], 2)
        others = {
            "centre x, centre y, width, height in pixels": (values / scale, "yolo"),
            "corners as shares of the image": (values * scale, "xyxy"),
            "x, y, width, height as shares of the image": (values * scale, "xywh"),
            "corners in pixels": (values, "xyxy"),
            "x, y, width, height in pixels": (values, "xywh"),
        }
    for name, (given, other) in others.items():
        if name != DESCRIBED[form] and not (faults(corners(given, sizes, other), sizes) != "").any():
            return f"All would be right if they were {name}, but they are read as {DESCRIBED[form]}. "
    return ""


def compiled(
    records: Sequence[Record],
    label_names: Sequence[str],
    form: BoxFormat,
    on_bad_box: Literal["error", "drop"],
    sizes: NDArray[np.int64],
    digests: NDArray[np.str_],
    noun: str,
    masks: bool = False,
    remedy: str = "",
) -> tuple[Annotations, dict[str, str]]:
    """Checks boxes and puts them into arrays.

    Args:
        records: the images.
        label_names: the classes' names, in the order of their numbers.
        form: how the boxes are written.
        on_bad_box: stop and name them; or cut those off that reach outside and drop the others that cannot be used.
        sizes: N×2, height and width of the images.
        digests: N content digests of the images.
        noun: what a box is called in the file.
        masks: keep outlines; a box without one cannot be used.
        remedy: what to do where all boxes are written in another way.

    Returns:
        The arrays, and what was cut or dropped: by place, the reason.

    Raises:
        DataError: a box cannot be used; with ``drop``, more than one in ten, or they look mistaken for another format.
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
    wrong[labels < 0] = "is of an unknown class"
    if masks:
        wrong[np.array([box.outline is None for box in boxes], bool) & (wrong == "")] = "has no outline"
    bad = np.flatnonzero(wrong != "")

    def place(k: Any) -> str:
        record, box = records[owners[k]], boxes[k]
        height, width = areas[k]
        what = f"[{', '.join(f'{value:g}' for value in box.values)}] {wrong[k]}"
        if labels[k] < 0:
            what = f"{wrong[k]}, {box.label!r}"
        elif "outside" in wrong[k]:
            what += f" ({width}×{height} pixels)"
        return f"{record.file}, {noun} {box.number}, image {Path(record.path).name}: {what}"

    dropped = np.array([wrong[k] != "reaches outside" for k in bad], bool)
    if len(bad) and (on_bad_box == "error" or mistaken or dropped.sum() > max(1, 0.1 * len(boxes))):
        shown = "; ".join([*(place(k) for k in bad[:3]), *["…"] * (len(bad) > 3)])
        known = f" The classes are {listed(label_names)}." if (labels < 0).any() else ""
        way = (
            "More than one in ten is too many to drop: look at the file."
            if on_bad_box == "drop"
            else "Mend them, or let them be cut off at the image's edge or dropped: --data.on_bad_box drop."
        )
        raise DataError(
            f"{len(bad)} of {len(boxes)} boxes cannot be used: {shown}.{known} {mistaken}{remedy if mistaken else way}"
        )
    report = {}
    for k, gone in zip(bad, dropped, strict=True):
        report[place(k)] = "dropped" if gone else "cut off"
    kept = np.ones(len(boxes), bool)
    kept[bad[dropped]] = False
    limits = np.tile(areas[:, ::-1], 2)[kept]
    outlines = None
    if masks:
        codes = [_code(boxes[k].outline, *areas[k]) for k in np.flatnonzero(kept)]
        outlines = np.array(codes, object)
    counts = np.bincount(owners[kept], minlength=len(records))
    annotations = Annotations(
        np.array([record.path for record in records], np.str_),
        sizes,
        digests,
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        np.clip(found[kept], 0, limits).astype(np.float32),
        labels[kept],
        np.array([box.ignore for box in boxes], bool)[kept],
        outlines,
    )
    return annotations, report


def _code(outline: Any, height: int, width: int) -> bytes:
    """Polygons (an array has them in shares of the image) or COCO's run-length code as its compressed form."""
    if isinstance(outline, np.ndarray):
        outline = [(outline * (width, height)).ravel().tolist()]
    if isinstance(outline, dict) and isinstance(outline.get("counts"), str | bytes):
        counts = outline["counts"]
    else:
        codes = rle.frPyObjects(outline, int(height), int(width))
        counts = (rle.merge(codes) if isinstance(codes, list) else codes)["counts"]
    return counts.encode() if isinstance(counts, str) else counts


def _numbers(given: Any) -> list[float]:
    """Four numbers, or four NaN where there are not four."""
    try:
        numbers = [float(value) for value in given]
    except (TypeError, ValueError):
        numbers = []
    return numbers if len(numbers) == 4 else [float("nan")] * 4


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as JSON ({error}): give an annotation file in COCO's format.") from None


def read_coco(file: Path) -> tuple[list[Record], list[str]]:
    """Reads COCO's instances (Lin et al. 2014, arXiv:1405.0312; cocodataset.org/#format-data).

    Args:
        file: the JSON. Images are looked for beside it, in ``images/`` there, and in the folder that COCO's naming gives
            (``../train2017`` for ``annotations/instances_train2017.json``).

    Returns:
        The images, and the names of the categories, in the order of their ids.

    Raises:
        DataError: it is not such a file, or ids are twice or nowhere.
    """
    content = _read_json(file)
    if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in ("images", "categories")):
        raise DataError(f"{file} has no lists 'images' and 'categories': it is not in COCO's format.")
    groups = {key: content.get(key) or [] for key in ("images", "annotations", "categories")}
    for key, entries in groups.items():
        for entry in entries:
            if not isinstance(entry, dict) or "id" not in entry:
                raise DataError(f"{file}: an entry of {key!r} has no id: {str(entry)[:100]}.")
        ((twice, count),) = Counter(entry["id"] for entry in entries).most_common(1) or [(0, 0)]
        if count > 1:
            raise DataError(f"{file}: the id {twice} is there {count} times among {key!r}; ids must be unique.")
    categories = {entry["id"]: str(entry.get("name", entry["id"])) for entry in sorted(groups["categories"], key=lambda c: c["id"])}  # fmt: skip
    names = list(categories.values())
    ((twice, count),) = Counter(names).most_common(1) or [("", 0)]
    if count > 1:
        raise DataError(f"{file}: {count} categories have the name {twice!r}; names must be unique.")
    folders = [file.parent, file.parent / "images", file.parent / file.stem,
               file.parent.parent / file.stem.rpartition("_")[2], file.parent.parent / "images"]  # fmt: skip
    first = next((str(entry.get("file_name")) for entry in groups["images"]), "")
    folder = next((place for place in folders if (place / first).is_file()), None)
    if folder is None:
        looked = ", ".join(map(str, folders))
        raise DataError(
            f"{file} names the image {first}, which is in none of {looked}: put the images into one of them."
        )
    records = {}
    for entry in groups["images"]:
        size = (entry["height"], entry["width"]) if entry.get("height") and entry.get("width") else None
        records[entry["id"]] = Record(str(folder / str(entry.get("file_name"))), str(file), size)
    for entry in groups["annotations"]:
        record = records.get(entry.get("image_id"))
        if record is None:
            raise DataError(
                f"{file}: annotation {entry['id']} is of image {entry.get('image_id')}, which is not there."
            )
        label = categories.get(entry.get("category_id"), entry.get("category_id"))
        outline = entry.get("segmentation") or None
        record.boxes.append(Box(_numbers(entry.get("bbox")), label, entry["id"], bool(entry.get("iscrowd")), outline))
    return list(records.values()), names


def read_voc(files: Iterable[Path]) -> list[Record]:
    """Reads annotations of Pascal VOC, a file for each image.

    Args:
        files: the XML files. Their images are beside them, or in ``../JPEGImages`` or ``../images``.

    Raises:
        DataError: a file is not such a one, has no image, or shares it with another.
    """
    records: dict[str, Record] = {}
    for file in files:
        try:
            root = ElementTree.parse(file).getroot()
        except (OSError, ElementTree.ParseError) as error:
            raise DataError(f"{file} cannot be read as XML: {error}.") from None
        if root.tag != "annotation":
            raise DataError(f"{file} is not in Pascal VOC's format: its root is <{root.tag}>, not <annotation>.")
        name = root.findtext("filename") or file.stem
        folders = [file.parent, file.parent.parent / "JPEGImages", file.parent.parent / "images"]
        names = [name, *(file.stem + extension for extension in (*EXTENSIONS, ".JPG", ".PNG"))]
        path = next((str(f / n) for n in names for f in folders if (f / n).is_file()), str(folders[0] / name))
        if path in records:
            raise DataError(f"{file} and {records[path].file} are both of the image {path}: keep one.")
        sides = [root.findtext(f"size/{side}") or "0" for side in ("height", "width")]
        height, width = (int(float(side)) for side in sides)
        record = records[path] = Record(path, str(file), (height, width) if height and width else None)
        for number, entry in enumerate(root.iter("object"), 1):
            values = _numbers([entry.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")])
            difficult = (entry.findtext("difficult") or "0").strip() == "1"
            record.boxes.append(Box(values, (entry.findtext("name") or "").strip(), number, difficult))
    return list(records.values())


def read_yolo(images: Sequence[Path], names: Sequence[str]) -> list[Record]:
    """Reads YOLO's labels: ``class x y width height`` or ``class x y x y …`` (a polygon) a line, as shares of the image.

    Args:
        images: the images; the labels of ``…/images/a.jpg`` are ``…/labels/a.txt``, or beside it. Without a file it has
            no objects.
        names: the classes' names.

    Raises:
        DataError: a line is no such one, or two images share their labels.
    """
    records: list[Record] = []
    taken: dict[Path, Path] = {}
    for image in images:
        parts = list(image.parent.parts)
        if "images" in parts:
            parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
        file = Path(*parts, f"{image.stem}.txt")
        if file in taken:
            raise DataError(f"{image} and {taken[file]} share the labels {file}: rename one.")
        taken[file] = image
        record = Record(str(image), str(file))
        for number, line in enumerate(file.read_text().splitlines() if file.is_file() else [], 1):
            try:
                label, *values = map(float, line.split())
            except ValueError:
                if not line.strip():
                    continue
                raise DataError(f"{file}, line {number}: {line[:80]!r} is not a class and numbers.") from None
            if not (len(values) == 4 or (len(values) >= 6 and len(values) % 2 == 0)):
                raise DataError(f"{file}, line {number}: a class and 4 numbers, or 6 or more, not {len(values)}.")
            outline = None
            if len(values) > 4:
                points = np.array(values).reshape(-1, 2)
                outline = points  # in shares, until the image's size is known
                low, high = points.min(0), points.max(0)
                values = [*((low + high) / 2), *(high - low)]
            index = int(label) if label == int(label) else -1
            name = names[index] if 0 <= index < len(names) else f"{label:g}"
            record.boxes.append(Box(values, name, number, outline=outline))
        records.append(record)
    return records


COLUMNS = ("xmin", "ymin", "xmax", "ymax")


def read_rows(table: pd.DataFrame, file: Path, path_column: str, label_column: str, box_columns: Sequence[str]) -> list[Record]:  # fmt: skip
    """Reads a table with a row for each box; an image without objects has one row with empty cells.

    Args:
        table: its cells as text.
        file: where it comes from; images are relative to it.
        path_column: column with the images' paths.
        label_column: column with the classes.
        box_columns: four columns. ``difficult``, where there is one, marks what is ignored.
    """
    records: dict[str, Record] = {}
    numbers = table[list(box_columns)].apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
    empty = table[[*box_columns, label_column]].isna().all(axis=1).to_numpy()
    difficult = table["difficult"].isin(("1", "True", "true")) if "difficult" in table else np.zeros(len(table), bool)
    rows = zip(table[path_column], table[label_column], numbers, empty, difficult, strict=True)
    for row, (path, label, values, without, hard) in zip(table.index, rows, strict=True):
        record = records.setdefault(path, Record(str(file.parent / path), str(file)))
        if not without:
            record.boxes.append(Box(values.tolist(), label, int(row) + 1, bool(hard)))
    return list(records.values())
