"""Writers of annotation formats, for data sets and for a model's detections."""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
import PIL.Image
import yaml
from faster_coco_eval.core import mask as rle
from numpy.typing import NDArray
from typing_extensions import override

from datamodules.annotated.sample import COLUMNS
from datamodules.errors import DataError
from datamodules.forms import AnswerFormat, FileFormat
from datamodules.loading import Sample, Source
from datamodules.paths import content_of
from datamodules.splits import SPLITS

ORIENTATION = 0x0112  # EXIF tag


class Writer:
    """Base class: writes samples with boxes in a format that other tools read.

    Images keep their files and names; those that are not files, or differ from their file (rotated by an EXIF tag,
    tiled), are written as PNG. Data that a format cannot store are dropped, and reported.

    Args:
        folder: output folder.
        label_names: class names.
    """

    place = "images/{split}"  # folder of the images
    digits = "{number:06d}"  # name of an image that is not a file

    def __init__(self, folder: Path, label_names: Sequence[str]) -> None:
        self.folder, self.label_names = folder, list(label_names)
        self.left_out: Counter[str] = Counter()
        self._taken: dict[str, Path] = {}

    def write(self, split: str, source: Source) -> None:
        """Writes a split.

        Args:
            split: name of the split.
            source: its samples; if it has ``paths``, they are `Paths` of image files.
        """
        place = self.place.format(split=split)
        (self.folder / place).mkdir(parents=True, exist_ok=True)
        paths, names = getattr(source, "paths", None), []
        for index in range(len(source)):
            sample = source[index]
            image = sample["image"]
            content = None if paths is None else content_of(paths.at(index))
            file = None if paths is None else Path(paths[index])
            stem = self.digits.format(split=split, number=index + 1) if file is None else self._free(place, file)
            as_it_is = content is not None and _is_upright(content, *image.shape[:2])
            names.append(f"{stem}{file.suffix if file and as_it_is else '.png'}")
            target = self.folder / place / names[-1]
            if content is not None and as_it_is:
                target.write_bytes(content)
            else:
                flat = cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if image.shape[2] == 3 else image
                cv2.imencode(".png", flat)[1].tofile(target)
            self._add(split, index + 1, names[-1], sample)
        self._end(split, names)

    def _add(self, split: str, number: int, name: str, sample: Sample) -> None:
        """Writes the objects of an image."""
        raise NotImplementedError

    def _end(self, split: str, names: Sequence[str]) -> None:
        """Writes the files of a split besides the images."""

    def _text(self, place: str, text: str) -> None:
        file = self.folder / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")

    def _free(self, place: str, file: Path) -> str:
        """A unique stem: the file's own, else with its folder's name in front, or, for a tile, with a number."""
        names: Iterable[str] = chain(
            (file.stem, f"{file.parent.name}_{file.stem}"), (f"{file.stem}_{k}" for k in count(2))
        )
        if self._taken.get(f"{place}/{file.stem}".casefold()) == file:
            names = (f"{file.stem}_{k}" for k in count(2))
        stem = next(name for name in names if f"{place}/{name}".casefold() not in self._taken)
        self._taken[f"{place}/{stem}".casefold()] = file
        return stem


class COCOWriter(Writer):
    """COCO JSON, one file per split; masks as RLE."""

    place = "{split}"

    def __init__(self, folder: Path, label_names: Sequence[str]) -> None:
        super().__init__(folder, label_names)
        self._images: list[dict[str, Any]] = []
        self._entries: list[dict[str, Any]] = []

    @override
    def _add(self, split: str, number: int, name: str, sample: Sample) -> None:
        height, width = sample["image"].shape[:2]
        self._images.append({"id": number, "file_name": name, "height": height, "width": width})
        for k, (x1, y1, x2, y2) in enumerate(sample["boxes"].tolist()):
            entry = {
                "image_id": number,
                "category_id": int(sample["labels"][k]) + 1,
                "bbox": [_plain(value) for value in (x1, y1, x2 - x1, y2 - y1)],
                "area": _plain(float(sample["area"][k]) if "area" in sample else (x2 - x1) * (y2 - y1)),
                "iscrowd": int(sample["ignore"][k]),
            }
            if "masks" in sample:
                mask = sample["masks"][k]
                code = rle.encode(np.asfortranarray(mask))
                entry |= {"area": int(mask.sum()), "segmentation": code | {"counts": code["counts"].decode()}}
            self._entries.append(entry | {"id": len(self._entries) + 1})

    @override
    def _end(self, split: str, names: Sequence[str]) -> None:
        categories = [{"id": k, "name": name, "supercategory": ""} for k, name in enumerate(self.label_names, 1)]
        lists = {"images": self._images, "annotations": self._entries, "categories": categories}
        self._text(f"{split}.json", json.dumps({"info": {}, "licenses": []} | lists))
        self._images, self._entries = [], []


class VOCWriter(Writer):
    """Pascal VOC XML, without outlines."""

    place, digits = "JPEGImages", "{split}_{number:06d}"

    @override
    def _add(self, split: str, number: int, name: str, sample: Sample) -> None:
        self.left_out["outlines"] += len(sample.get("masks", ()))
        root = ElementTree.Element("annotation")
        ElementTree.SubElement(root, "filename").text = name
        size = ElementTree.SubElement(root, "size")
        for key, axis in (("width", 1), ("height", 0), ("depth", 2)):
            ElementTree.SubElement(size, key).text = str(sample["image"].shape[axis])
        for box, label, ignore in zip(sample["boxes"].tolist(), sample["labels"], sample["ignore"], strict=True):
            entry = ElementTree.SubElement(root, "object")
            ElementTree.SubElement(entry, "name").text = self.label_names[label]
            ElementTree.SubElement(entry, "difficult").text = str(int(ignore))
            place = ElementTree.SubElement(entry, "bndbox")
            for key, value in zip(COLUMNS, (box[0] + 1, box[1] + 1, box[2], box[3]), strict=True):
                ElementTree.SubElement(place, key).text = f"{_plain(value)}"
        ElementTree.indent(root)
        self._text(f"Annotations/{Path(name).stem}.xml", ElementTree.tostring(root, "unicode"))

    @override
    def _end(self, split: str, names: Sequence[str]) -> None:
        self._text(f"ImageSets/Main/{split}.txt", "".join(f"{Path(name).stem}\n" for name in names))


class YOLOWriter(Writer):
    """YOLO text files, without crowds."""

    @override
    def _add(self, split: str, number: int, name: str, sample: Sample) -> None:
        self.left_out["crowds"] += int(sample["ignore"].sum())
        masks = sample.get("masks", [None] * len(sample["boxes"]))
        rows = zip(sample["labels"], sample["boxes"], masks, sample["ignore"], strict=True)
        size = sample["image"].shape[:2]
        lines = [yolo_line(int(label), box, size, mask) for label, box, mask, ignore in rows if not ignore]
        self._text(f"labels/{split}/{Path(name).stem}.txt", "".join(f"{line}\n" for line in lines))

    @override
    def _end(self, split: str, names: Sequence[str]) -> None:
        there = {name: f"images/{name}" for name in SPLITS if (self.folder / "images" / name).is_dir()}
        layout: dict[str, Any] = {"path": ".", **there, "names": dict(enumerate(self.label_names))}
        self._text("data.yaml", yaml.safe_dump(layout, sort_keys=False, allow_unicode=True))


class TableWriter(Writer):
    """A CSV table with one row per box, without outlines."""

    def __init__(self, folder: Path, label_names: Sequence[str]) -> None:
        super().__init__(folder, label_names)
        self._rows: list[list[Any]] = [["path", *COLUMNS, "label", "difficult", "split"]]

    @override
    def _add(self, split: str, number: int, name: str, sample: Sample) -> None:
        self.left_out["outlines"] += len(sample.get("masks", ()))
        boxes = zip(sample["boxes"].tolist(), sample["labels"], sample["ignore"], strict=True)
        path = f"images/{split}/{name}"
        found = [[path, *map(_plain, box), self.label_names[k], int(skip), split] for box, k, skip in boxes]
        self._rows += found or [[path, *[""] * 5, 0, split]]

    @override
    def _end(self, split: str, names: Sequence[str]) -> None:
        with (self.folder / "boxes.csv").open("w", newline="") as table:
            csv.writer(table).writerows(self._rows)


WRITERS: dict[FileFormat, type[Writer]] = {
    "coco": COCOWriter,
    "voc": VOCWriter,
    "yolo": YOLOWriter,
    "csv": TableWriter,
}


def _plain(value: float) -> float | int:
    return int(value) if value == int(value) else round(value, 4)


def _is_upright(file: bytes, height: int, width: int) -> bool:
    """Whether an image file has the given size and no EXIF rotation, so that every tool sees it as the boxes
    require."""
    with PIL.Image.open(io.BytesIO(file)) as image:
        return image.size == (width, height) and image.getexif().get(ORIENTATION, 1) == 1


def yolo_line(
    label: int,
    box: Sequence[float] | NDArray[np.float32],
    size: Sequence[int],
    mask: NDArray[np.uint8] | None = None,
    score: float | None = None,
) -> str:
    """A YOLO line, relative to the image: the object's box, or its mask's outline.

    Args:
        label: class index, from 0.
        box: xyxy in pixels.
        size: height and width of the image.
        mask: uint8 H×W of 0 and 1; an empty mask is written as its box.
        score: score of a detection, written last.
    """
    height, width = size
    if mask is not None and mask.any():
        values = (outline(mask) / (width, height)).ravel().tolist()
    else:
        x1, y1, x2, y2 = map(float, box)
        values = [(x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height]
    return " ".join([str(label), *(f"{value:.8g}" for value in [*values, *([] if score is None else [score])])])


def outline(mask: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Outline of a mask along the pixel edges, as one polygon that reproduces the mask under the even-odd rule.

    Parts and holes are joined by a line back and forth, since YOLO has a single polygon per object.

    Args:
        mask: uint8 H×W of 0 and 1, not empty.

    Returns:
        float64 N×2, x and y in pixels.
    """
    # At twice the size, even coordinates of a contour are left or upper edges of pixels, odd ones right or lower edges.
    contours = cv2.findContours(mask.repeat(2, 0).repeat(2, 1), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)[0]
    start = contours[0][:1]
    joined = [part for contour in contours for part in (contour, contour[:1], start)]
    points = (np.concatenate(joined if len(contours) > 1 else contours)[:, 0] + 1) // 2
    moved = (points != np.roll(points, 1, 0)).any(1)
    return points[moved].astype(np.float64)


class AnswerWriter:
    """Writes detections in the formats of other tools, image by image.

    ========  ==============================================================================================
    ``coco``  ``results.json``, COCO's results (cocodataset.org/#format-results): for each object ``image_id``,
              ``category_id``, ``bbox``, ``score`` and, where there are masks, ``segmentation``. Ids are those of ``truth``; without
              it images have 1, 2, … in the order in which they come, categories 1, 2, … in that of the classes.
    ``yolo``  ``labels/NAME.txt`` for each image, ``labels/NAME_FRAME.txt`` for each frame of a video: class, the box or the
              outline in shares of the image, score.
    ``mot``   ``NAME.txt`` for each video or folder of images, as the MOTChallenge has it (arXiv:1603.00831): frame from 1, the
              object's number or -1, left, top, width, height, score, -1, -1, -1.
    ========  ==============================================================================================

    It is a context manager, at whose end files are whole; after an error there is no ``results.json``.

    Args:
        folder: output folder, which is created.
        form: the format.
        label_names: class names, by index.
        truth: annotation file in COCO format that the results are to be evaluated against.

    Raises:
        DataError: ``truth`` cannot be read, or does not have one of the classes.
    """

    def __init__(
        self, folder: str | Path, form: AnswerFormat, label_names: Sequence[str], truth: str | Path | None = None
    ) -> None:
        self.folder, self.form, self.label_names, self.truth = Path(folder), form, list(label_names), truth
        self._images: dict[str, Any] = {}
        self._categories: dict[str, Any] = {name: k for k, name in enumerate(self.label_names, 1)}
        if truth is not None:
            self._images, self._categories = _ids(Path(truth))
            if lacking := [name for name in self.label_names if name not in self._categories]:
                raise DataError(
                    f"{truth} has no category {lacking[0]!r}, which the model has: it belongs to other data."
                )
        self._entries: list[dict[str, Any]] = []
        self._frames: Counter[str] = Counter()  # of folders of images
        self._stems: dict[str, str] = {}

    def __enter__(self) -> "AnswerWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if kind is None and self.form == "coco":
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "results.json").write_text(json.dumps(self._entries))

    def add(self, file: str, answer: dict[str, Any], frame: int | None = None) -> None:
        """Adds the detections in an image or a video frame.

        Args:
            file: the image or video, relative to the common folder.
            answer: ``size`` (height, width), ``boxes`` (xyxy, in pixels), ``labels``, ``scores``; with ``masks``, COCO
                run-length codes; with ``ids``, the objects' ids, None for objects without one.
            frame: index of the frame, from 0.

        Raises:
            DataError: the prediction has no boxes, the image is not in ``truth``, or it is a video and the format is
                COCO's.
        """
        if "boxes" not in answer:
            raise DataError(f"The answers have no boxes, and {self.form} is a format for boxes.")
        {"coco": self._add_coco, "yolo": self._add_yolo, "mot": self._add_mot}[self.form](file, answer, frame)

    def _add_coco(self, file: str, answer: dict[str, Any], frame: int | None) -> None:
        if frame is not None:
            raise DataError(f"{file} is a video, and COCO's results are for images: write mot or yolo.")
        if self.truth is None:
            self._images.setdefault(file, len(self._images) + 1)
        image = self._images.get(file, self._images.get(Path(file).name))
        if image is None:
            raise DataError(f"{self.truth} has no image {file}: predict the images that it lists.")
        columns = [answer[key] for key in ("boxes", "labels", "scores")]
        masks = answer.get("masks") or [None] * len(answer["boxes"])
        for (x1, y1, x2, y2), label, score, mask in zip(*columns, masks, strict=True):
            entry = {"image_id": image, "category_id": self._categories[label], "score": score}
            entry["bbox"] = [_plain(value) for value in (x1, y1, x2 - x1, y2 - y1)]
            self._entries.append(entry | ({"segmentation": mask} if mask else {}))

    def _stem(self, file: str) -> str:
        """A file's name without its extension, or with it if another file shares the stem: a.png and a.jpg."""
        if file not in self._stems:
            stem = Path(file).with_suffix("").as_posix()
            taken = {name.casefold() for name in self._stems.values()}
            self._stems[file] = file if stem.casefold() in taken else stem
        return self._stems[file]

    def _add_yolo(self, file: str, answer: dict[str, Any], frame: int | None) -> None:
        masks = [rle.decode(code) for code in answer.get("masks") or []] or [None] * len(answer["boxes"])
        rows = zip(answer["boxes"], answer["labels"], answer["scores"], masks, strict=True)
        lines = [
            yolo_line(self.label_names.index(label), box, answer["size"], mask, score)
            for box, label, score, mask in rows
        ]
        place = self.folder / "labels" / f"{self._stem(file)}{'' if frame is None else f'_{frame + 1}'}.txt"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("".join(f"{line}\n" for line in lines))

    def _add_mot(self, file: str, answer: dict[str, Any], frame: int | None) -> None:
        if frame is None:
            folder = Path(file).parent.as_posix()
            frame, self._frames[folder] = self._frames[folder], self._frames[folder] + 1
            place = self.folder / ("images.txt" if folder == "." else f"{folder}.txt")
        else:
            place = self.folder / f"{self._stem(file)}.txt"
        ids = answer.get("ids") or [None] * len(answer["boxes"])
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("a" if frame else "w") as lines:
            for (x1, y1, x2, y2), score, number in zip(answer["boxes"], answer["scores"], ids, strict=True):
                box = ",".join(f"{_plain(value)}" for value in (x1, y1, x2 - x1, y2 - y1))
                lines.write(f"{frame + 1},{-1 if number is None else number},{box},{score:.6g},-1,-1,-1\n")


def _ids(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ids of a COCO file's images by name, with and without folders, and of its categories."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
        images = {str(entry["file_name"]): entry["id"] for entry in content["images"]}
        categories = {str(entry["name"]): entry["id"] for entry in content["categories"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} cannot be read as annotations in COCO's format ({error!r}).") from None
    bases = Counter(Path(name).name for name in images)
    return {Path(name).name: k for name, k in images.items() if bases[Path(name).name] == 1} | images, categories
