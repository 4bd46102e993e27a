"""Boxes and outlines in COCO JSON (Lin et al. 2014, arXiv:1405.0312; cocodataset.org/#format-data)."""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from datamodules.annotated.boxes import BoxFiles
from datamodules.annotated.sample import (
    Box,
    Record,
    Unknown,
    as_flag,
    as_number,
    as_size,
    four_numbers,
    merged,
)
from datamodules.errors import DataError, repeated
from datamodules.finding import Finder, quoted, words_of
from datamodules.images import composed, is_junk, sub_folders
from datamodules.splits import SPLITS, split_of
from datamodules.tables import text_of

Entry = tuple[str, dict[str, Any]]  # id and content


class COCODetection(BoxFiles):
    """Annotations in COCO JSON.

    ``root`` is a JSON file, whose images are divided into splits, or a folder with a single such file, or with one per
    split: ``train.json``, ``annotations/instances_train2017.json`` or ``train/_annotations.coco.json``, and likewise
    for ``val`` and ``test``. Boxes are x, y, width, height; ``iscrowd`` is respected; outlines are polygons or
    run-length codes.

    Images are searched next to their JSON file, in ``images/`` there, in the folder of COCO's naming scheme
    (``../train2017`` or ``../images/train2017`` for ``annotations/instances_train2017.json``), and by name anywhere
    below.
    """

    noun = "annotation"
    remedy = "Write 'bbox' as COCO does."
    box_format = "xywh"

    @override
    def read(self) -> tuple[dict[str, list[Record]], list[str]]:
        root = Path(self.root)
        found = {"all": root} if root.is_file() else self._files(root)
        splits: dict[str, list[Record]] = {}
        label_names: list[str] = []
        for split, file in found.items():
            splits[split], names = self._read_file(file, label_names)
            label_names = label_names or names
        return splits, label_names

    def _files(self, root: Path) -> dict[str, Path]:
        """Annotation file of each split, or of ``all``, in a folder."""
        files = [
            file
            for place in (root, *sub_folders(root))
            for file in sorted(place.glob("*.[jJ][sS][oO][nN]"))
            if not is_junk(file.name) and not words_of(file) & {"captions", "keypoints", "stuff", "panoptic"}
        ]
        own = [file for file in files if file.parent == root or file.parent.name.casefold() == "annotations"]
        own.sort(key=lambda file: (file.parent != root, "instances" not in words_of(file)))
        inner = [file for file in files if file not in own and "annotations" in words_of(file)]
        named = [(split_of(file.stem) or _hint(file), file) for file in own]
        named += [(split_of(file.parent.name), file) for file in inner]  # as Roboflow's
        found = {split: next(file for name, file in named if name == split) for split in SPLITS if split in dict(named)}
        if not found and len(own) == 1:
            return {"all": own[0]}
        if "train" not in found:
            if own and not found:
                self._content(own[0])  # reports files of another format
            several = f" Which of {own[0].name}, {own[1].name}, … is it?" if len(own) > 1 else ""
            raise DataError(
                f"{root.resolve()} has neither train.json nor annotations/instances_train*.json: give such a folder, or "
                f"a JSON file, with --data.root.{several}"
            )
        return found

    def _content(self, file: Path) -> dict[str, Any]:
        """Content of a file with its lists ``images`` and ``categories``; a file of another tool is named in the
        error."""
        text = text_of(file, self.notes)
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{file} cannot be read as JSON ({error}): give an annotation file in COCO's format."
            ) from None
        if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in ("images", "categories")):
            raise DataError(f"{file} has no lists 'images' and 'categories'. {_tool(content)}")
        return content

    def _read_file(self, file: Path, known: Sequence[str]) -> tuple[list[Record], list[str]]:
        """Images, and category names in the order of their ids; those of another split are given."""
        content = self._content(file)
        images, annotations, entries = (_by_id(file, content, key) for key in ("images", "annotations", "categories"))
        categories = self._categories(file, entries, annotations, known)
        records = self._images(file, images)
        for key, entry in annotations:
            record = records.get(_key(entry.get("image_id")) or "")
            if record is None:
                raise DataError(
                    f"{file}: annotation {key} is of image {quoted(entry.get('image_id'))}, which is not there."
                )
            category = _key(entry.get("category_id"))
            label = categories.get(category or "", Unknown(quoted(entry.get("category_id"))))
            outline = entry.get("segmentation") or None
            values = four_numbers(entry.get("bbox"))
            if not entry.get("bbox") and (around := _around(outline)):
                self.notes.add(
                    "An annotation has no box; the box around its outline is used", f"{file}, annotation {key}"
                )
                values = around
            ignore, area = as_flag(entry.get("iscrowd")), as_number(entry.get("area"))
            record.boxes.append(Box(values, label, key, ignore, outline, area))
        return merged(records.values(), self.notes), list(categories.values())

    def _images(self, file: Path, entries: Sequence[Entry]) -> dict[str, Record]:
        """Images by id."""
        root = Path(self.root)
        if root.is_file():
            root = file.parent.parent if file.parent.name.casefold() == "annotations" else file.parent
        split, above = file.stem.rpartition("_")[2], file.parent.parent
        folders = [file.parent, file.parent / "images", file.parent / file.stem, file.parent / split, above / split,
                   above / "images" / split, file.parent / "images" / split, above / "images"]  # fmt: skip
        finder = Finder(root, folders, self.notes)
        looked = ", ".join(map(str, folders))
        records: dict[str, Record] = {}
        for key, entry in entries:
            name = entry.get("file_name")
            if not isinstance(name, str) or not name.strip():
                raise DataError(
                    f"{file}: image {key} has no 'file_name', but {quoted(name)}: write the name of its file."
                )
            path = finder.find(name, f"{file}, image {key}")
            size = as_size(entry.get("height"), entry.get("width"))
            records[key] = Record(str(path or finder.folders[0] / name), str(file), size)
        if records and not any(os.path.isfile(record.path) for record in records.values()):
            raise DataError(
                f"{file} names the image {entries[0][1]['file_name']}, which is in none of {looked}, nor anywhere below "
                f"{finder.root.resolve()}: put the images into one of them."
            )
        return records

    def _categories(
        self, file: Path, entries: Sequence[Entry], annotations: Sequence[Entry], known: Sequence[str]
    ) -> dict[str, str]:
        """Category names by id, without supercategories and the background."""
        used = {_key(entry.get("category_id")) for _, entry in annotations}
        heads = {str(entry.get("supercategory")) for _, entry in entries}
        names = {key: _name(entry.get("name")) or key for key, entry in entries}
        counts = Counter(names.values())
        found: dict[str, str] = {}
        for key, entry in sorted(entries, key=lambda pair: _in_order(pair[0])):
            name = names[key]
            root = str(entry.get("supercategory")).lower() == "none" and name in heads and len(entries) > 1
            empty = key not in used and (name not in known or counts[name] > 1)
            if empty and (root or name in ("_background_", "__ignore__")):
                self.notes.add(
                    f"The category {name!r} has no objects and only groups the others or stands for none: it is not "
                    "a class",
                    file,
                )
                continue
            found[key] = name
        if twice := repeated(found.values()):
            raise DataError(f"{file}: {twice[1]} categories have the name {twice[0]!r}; names must be unique.")
        return found


def _hint(file: Path) -> str | None:
    """Returns the split that a longer name mentions, as in ``train_v2``."""
    meant = {split_of(word) for word in words_of(file) & {"train", "val", "valid", "validation", "test"}}
    return meant.pop() if len(meant) == 1 else None


def _tool(content: object) -> str:
    """Recognises JSON files of other tools and says what to do, as a sentence."""
    first = content[0] if isinstance(content, list) and content and isinstance(content[0], dict) else {}
    keys = set(content) if isinstance(content, dict) else set()
    if {"shapes", "imagePath"} <= keys:
        return "It is LabelMe's own format: turn its files into one with LabelMe's script labelme2coco.py."
    if keys & {"_via_img_metadata", "_via_settings"} or any("regions" in v for v in _values(content)[:1]):
        return "It is a project of VIA's: export it with Annotation → Export Annotations (COCO format)."
    if "vottVersion" in keys or {"assets", "tags"} <= keys or {"asset", "regions"} <= keys:
        return "It is a project of VoTT's: export it as Pascal VOC or as CSV."
    if {"data", "annotations"} <= set(first) or "completions" in first:
        return "It is Label Studio's own format: export as COCO."
    if {"image_id", "score"} <= set(first):
        return "It holds what a model found, not annotations."
    return "It is not in COCO's format."


def _values(content: Any) -> list[dict[str, Any]]:
    return [value for value in content.values() if isinstance(value, dict)] if isinstance(content, dict) else []


def _by_id(file: Path, content: dict[str, Any], group: str) -> list[Entry]:
    """Entries of one of the lists by id."""
    entries, keyed = content.get(group) or [], []
    if not isinstance(entries, list):
        raise DataError(f"{file}: {group!r} is not a list, but {quoted(entries)}.")
    for place, entry in enumerate(entries, 1):
        key = _key(entry.get("id")) if isinstance(entry, dict) else None
        if key is None and isinstance(entry, dict) and group == "annotations" and entry.get("id") is None:
            key = f"(the {place}th, without an id)"  # nothing refers to it
        if key is None:
            raise DataError(f"{file}: an entry of {group!r} has no id: {quoted(entry)}.")
        keyed.append((key, entry))
    if twice := repeated(key for key, _ in keyed):
        raise DataError(f"{file}: the id {twice[0]} is there {twice[1]} times among {group!r}; ids must be unique.")
    return keyed


def _key(given: object) -> str | None:
    """An id, written as a number or as text."""
    if isinstance(given, float) and math.isfinite(given) and given == int(given):
        given = int(given)
    return str(given).strip() if isinstance(given, int | str) and not isinstance(given, bool) and given != "" else None


def _in_order(key: str) -> tuple[bool, int, str]:
    """Ids in numeric order, followed by non-numeric ones."""
    return (False, int(key), "") if re.fullmatch(r"-?\d{1,18}", key) else (True, 0, key)


def _name(given: object) -> str:
    return composed(str(given).strip()) if isinstance(given, str | int | float) else ""


def _around(outline: Any) -> list[float] | None:
    """Bounding box of polygons, x, y, width, height; None if there are none."""
    try:
        points = np.concatenate([np.asarray(part, float).reshape(-1, 2) for part in outline])
    except (TypeError, ValueError, OverflowError):
        return None
    low, high = points.min(0), points.max(0)
    return [*low.tolist(), *(high - low).tolist()]
