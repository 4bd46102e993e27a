"""Boxes in Pascal VOC XML, including the variants of other tools."""

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from typing_extensions import override

from datamodules.annotated.boxes import BoxFiles
from datamodules.annotated.checks import in_shares
from datamodules.annotated.sample import (
    COLUMNS,
    Box,
    BoxFormat,
    Record,
    as_flag,
    as_number,
    as_size,
    four_numbers,
    occurring,
)
from datamodules.errors import DataError
from datamodules.finding import Finder, child, shared_parts
from datamodules.images import EXTENSIONS, composed, folded, sub_folders
from datamodules.splits import SPLITS, by_split_name
from datamodules.tables import text_of


class VOCDetection(BoxFiles):
    """Annotations in Pascal VOC XML, one file per image.

    ``root`` is a folder with ``Annotations/``, ``JPEGImages/`` and lists ``ImageSets/Main/train.txt``, ``val.txt``,
    ``test.txt``; or with XML files and images side by side; or with such folders ``train/``, ``val/``, ``test/``.
    ``difficult`` is respected. Images without an XML file are skipped; images without objects are kept. Coordinates are
    assumed to be zero-based if one of them is 0.

    Images are next to their XML files, in ``../JPEGImages`` or ``../images``, or anywhere below; found by
    ``<filename>``, or by the name of the XML file.
    """

    remedy = "Write <bndbox> as VOC does."
    box_format: BoxFormat = "voc"

    @override
    def read(self) -> tuple[dict[str, list[Record]], list[str]]:
        root = Path(self.root)
        folders = by_split_name(sub_folders(root))
        if "train" not in folders:
            folders = {"all": root}
        found = {}
        for split, folder in folders.items():
            place = child(folder, "Annotations") or folder
            found[split] = sorted(file for file in place.rglob("*.[xX][mM][lL]") if file.name[0] != ".")
            if not found[split]:
                raise DataError(f"{place.resolve()} has no XML files: give a folder of Pascal VOC's with --data.root.")
        if "all" in found and (listed := self._listed(root, found["all"])):
            found = listed
        splits = {split: self._read_files(files) for split, files in found.items()}
        self.box_format = self._counted(splits)
        return splits, occurring(splits)

    def _listed(self, root: Path, found: list[Path]) -> dict[str, list[Path]]:
        """Files of each split by the lists in ``ImageSets/Main``; empty if there is no list for training."""
        files: dict[str, list[Path]] = {}
        for annotation in found:
            files.setdefault(folded(annotation.stem), []).append(annotation)
        result: dict[str, list[Path]] = {}
        place = child(root, "ImageSets/Main")
        whole = by_split_name(place.glob("*.[tT][xX][tT]")) if place else {}
        for split in SPLITS:
            one = whole.get(split)
            by_class = sorted(place.glob(f"*_{split}.txt")) if place else []  # as VoTT writes them
            chosen: dict[Path, None] = {}
            for file in [one] if one else by_class:
                for line in text_of(file, self.notes).splitlines():
                    if not (line := line.strip().replace("\\", "/")):
                        continue
                    names = dict.fromkeys(
                        way for name in (line, line.split()[0]) for way in (name, str(Path(name).with_suffix("")))
                    )
                    fits = next((fit for name in names if (fit := _ending(files, name))), [])
                    if not fits:
                        stem = Path(line.split()[0]).stem
                        raise DataError(f"{file} lists {line!r}, but there is no {stem}.xml in Annotations.")
                    if len(fits) > 1:
                        raise DataError(
                            f"{file} lists {line!r}, which may be {fits[0]} or {fits[1]}: list it with its folder."
                        )
                    annotation = fits[0]
                    if annotation in chosen and one:
                        self.notes.add("An image is listed twice, and counted once", f"{file}: {line}")
                    chosen[annotation] = None
            result |= {split: list(chosen)} if chosen else {}
        return result if "train" in result else {}

    def _counted(self, splits: dict[str, list[Record]]) -> BoxFormat:
        """Whether pixels are counted from 1, as in VOC, or from 0, judged by boxes at the edge."""
        starts = [
            (record, box)
            for records in splits.values()
            for record in records
            for box in record.boxes
            if min(box.values[:2]) < 2
        ]
        zeros = [(record, box) for record, box in starts if 0 <= min(box.values[:2]) < 1]
        if in_shares([box.values for _, box in zeros]).all() or not zeros or 2 * len(zeros) < len(starts):
            return "voc"
        record, box = zeros[0]
        rank_zero_warn(
            f"The boxes of {Path(self.root).resolve()} are counted from 0, not from 1 as in Pascal VOC, and read as "
            f"such: {len(zeros)} begin "
            f"at 0, the first in {record.file}, object {box.number}."
        )
        return "xyxy"

    def _read_files(self, files: Iterable[Path]) -> list[Record]:
        """Images with their objects. A polygon or rotated box without a ``<bndbox>`` gets its bounding box."""
        records: dict[str, Record] = {}
        finders: dict[Path, Finder] = {}
        for file in files:
            content = self._parsed(file)
            if content.tag != "annotation":
                way = " It is CVAT's own format: export as COCO or Pascal VOC." if content.tag == "annotations" else ""
                raise DataError(
                    f"{file} is not in Pascal VOC's format: its root is <{content.tag}>, not <annotation>.{way}"
                )
            above = [parent for parent in file.parents if parent.is_relative_to(self.root)]
            around = dict.fromkeys([file.parent, file.parent.parent, *above])
            places = [file.parent, *(place / name for place in around for name in ("JPEGImages", "images")), *above]
            finder = finders.setdefault(file.parent, Finder(Path(self.root), places, self.notes))
            path = _image_of(file, content, finder)
            if str(path) in records:
                raise DataError(f"{file} and {records[str(path)].file} both describe the image {path}: keep one.")
            size = as_size(content.findtext("size/height"), content.findtext("size/width"))
            record = records[str(path)] = Record(str(path), str(file), size)
            for number, entry in enumerate(content.iter("object"), 1):
                values = four_numbers([entry.findtext(f"bndbox/{key}") for key in COLUMNS])
                corners = _corners(entry)
                outline = None if corners is None else [corners.ravel().tolist()]
                if corners is not None and entry.find("bndbox") is None:
                    kind = "rotated box" if entry.find("robndbox") is not None else "polygon"
                    self.notes.add(f"An object has a {kind}; the box around it is used", f"{file}, object {number}")
                    # Pixel indices in VOC start at 1, but a polygon's points are coordinates.
                    values = [*(corners.min(0) + 1).tolist(), *corners.max(0).tolist()]
                label = composed(entry.findtext("name") or "").strip() or None
                record.boxes.append(Box(values, label, number, as_flag(entry.findtext("difficult")), outline))
        return list(records.values())

    def _parsed(self, file: Path) -> ElementTree.Element:
        """Root of an XML file in any declared encoding, without namespaces."""
        try:
            said = re.search(rb"""^[^>]*encoding=["']([\w.-]+)""", file.read_bytes()[:200])
        except (OSError, ValueError) as error:
            raise DataError(f"{file} cannot be read as XML: {error}.") from None
        text = text_of(file, self.notes, said[1].decode("ascii", "replace") if said else None)
        try:
            root = ElementTree.fromstring(text.strip())  # for text, the declared encoding is ignored
        except (ElementTree.ParseError, ValueError, RecursionError) as error:
            raise DataError(f"{file} cannot be read as XML: {error}.") from None
        for element in root.iter():
            if isinstance(element.tag, str):
                element.tag = element.tag.rpartition("}")[2]
        return root


def _ending(files: dict[str, list[Path]], name: str) -> list[Path]:
    """Files, given by their stems, whose paths share the longest ending with a name."""
    parts = Path(name).parts
    known = files.get(folded(parts[-1]), []) if parts else []
    ends = [shared_parts(file.with_suffix(""), parts) for file in known]
    return [file for file, end in zip(known, ends, strict=True) if end == max(ends)]


def _image_of(file: Path, content: ElementTree.Element, finder: Finder) -> Path:
    """Image of an XML file: by the name inside, by the file's own name, or by that name elsewhere below the root."""
    written = (content.findtext("filename") or "").strip()
    own = [file.stem + extension for extension in (*EXTENSIONS, *(e.upper() for e in EXTENSIONS))]
    names = [name for name in (written, PurePosixPath(written.replace("\\", "/")).name) if name and "\0" not in name]
    ways = [finder.at, lambda name: finder.find(name, file)]
    for way in ways:
        for name in (*names, *own):
            if (found := way(name)) is not None:
                return found
    return file.parent / (names[0] if names else own[0])


def _corners(entry: ElementTree.Element) -> NDArray[np.float64] | None:
    """Corners of an object's polygon or rotated box, N×2 in pixels; None if it has neither."""
    if (box := entry.find("robndbox")) is not None:
        x, y, width, height, angle = (as_number(box.findtext(key)) for key in ("cx", "cy", "w", "h", "angle"))
        across = np.array([np.cos(angle), np.sin(angle)]) * width / 2
        down = np.array([-np.sin(angle), np.cos(angle)]) * height / 2
        corners = np.array([x, y]) + np.array([-across - down, across - down, across + down, down - across])
        return corners if np.isfinite(corners).all() else None
    polygon = entry.find("polygon")
    if polygon is None:
        return None
    pairs = [(point.findtext("x"), point.findtext("y")) for point in polygon.iter("pt")]  # LabelMe's
    pairs = pairs or [(polygon.findtext(f"x{k}"), polygon.findtext(f"y{k}")) for k in range(1, 1 + len(polygon) // 2)]
    points = np.array([[as_number(x), as_number(y)] for x, y in pairs], float).reshape(-1, 2)
    return points if len(points) > 2 and np.isfinite(points).all() else None
