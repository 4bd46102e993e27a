"""Readers of boxes and outlines as annotation tools write them: COCO, Pascal VOC, YOLO and tables.

A reader ends in records or in a `DataError`, whatever a file holds. What is read in another way than it is written is collected
in `Notes`, to be told once.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import yaml
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray

from datamodules.annotations import COLUMNS, Box, Record
from datamodules.base import DataError
from datamodules.images import EXTENSIONS, composed, folded, images_in
from datamodules.tables import decoded

NAN = float("nan")


class Notes:
    """What was read in another way than it is written, by kind."""

    def __init__(self) -> None:
        self._places: dict[str, list[str]] = {}

    def add(self, what: str, place: object) -> None:
        """Notes a place.

        Args:
            what: the kind, as a sentence without its full stop.
            place: file and, where there is one, entry.
        """
        self._places.setdefault(what, []).append(str(place))

    def tell(self) -> None:
        """Warns once for each kind, with how often and where first."""
        for what, places in self._places.items():
            rank_zero_warn(f"{what} ({len(places)} times; the first: {places[0]}).")
        self._places.clear()


class Unknown:
    """A class that no name stands for; it is no class's name, whatever its number looks like.

    Args:
        written: it, as the file has it.
    """

    def __init__(self, written: str) -> None:
        self.written = written

    def __repr__(self) -> str:
        return self.written


# Text, numbers and paths


def read_text(file: Path, notes: Notes, declared: str | None = None) -> str:
    """The text of a file, as `decoded` reads it.

    Args:
        file: the file.
        notes: where a guessed encoding is noted.
        declared: what the file itself says.

    Raises:
        DataError: it cannot be read.
    """
    try:
        data = file.read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}.") from None
    text, guessed = decoded(data, declared)
    if guessed:
        notes.add("A file is not in UTF-8 and was read as Windows-1252; look at the names in it", file)
    return text


def _number(given: Any) -> float:
    """A finite number, also one that is written as text; NaN where it is none."""
    try:
        number = float(given)
    except (TypeError, ValueError, OverflowError):
        return NAN
    return number if math.isfinite(number) else NAN


def _four(given: Any) -> list[float]:
    """Four numbers, or four NaN where there are not four."""
    return [_number(value) for value in given] if isinstance(given, list) and len(given) == 4 else [NAN] * 4


def _size(height: Any, width: Any) -> tuple[int, int] | None:
    """Height and width as said by a file; None where it does not say both."""
    sides = _number(height), _number(width)
    return (int(sides[0]), int(sides[1])) if all(1 <= side < 1e9 for side in sides) else None


def _flag(given: Any) -> bool:
    return str(given).strip().lower() in ("1", "1.0", "true", "yes")


def _shown(value: Any) -> str:
    return repr(value) if len(repr(value)) < 80 else f"{repr(value)[:80]}…"


def parts_of(written: str) -> list[str]:
    """A path as a file has it, in the ways in which it may be meant: with back-slashes, as a URL, as Label Studio writes it."""
    plain = written.strip().replace("\\", "/")
    found = [written, plain]
    if "://" in plain or plain.startswith("/data/"):
        try:
            address = urlsplit(plain)
        except ValueError:
            return [written]
        found = [written, unquote(address.path), *parse_qs(address.query).get("d", [])[::-1]]
    elif "%" in plain:
        found.append(unquote(plain))
    return list(dict.fromkeys(found))


def within(folder: Path, written: str) -> Path | None:
    """A file or folder below another one, given as another machine's or another folder's path: its longest end that is there."""
    for name in parts_of(written):
        if name and os.path.exists(folder / name):
            return folder / name
        parts = PurePosixPath(name).parts
        for start in range(len(parts)):
            place = Path(folder, *(part for part in parts[start:] if part not in ("/", "..", ".")))
            if place != folder and os.path.exists(place):
                return place
    return None


class Finder:
    """Finds images by the names that annotation files give them.

    Args:
        root: the folder below which an image is looked for that is in none of the folders.
        folders: where images are looked for first.
        notes: where it is noted that an image was found elsewhere.
    """

    def __init__(self, root: Path, folders: Iterable[Path], notes: Notes) -> None:
        self.root, self.notes = root, notes
        self.folders = list(dict.fromkeys(folders))
        self._least = 1  # last parts of a path that must agree

    @cached_property
    def _known(self) -> dict[str, list[Path]]:
        """The images below the root by their names."""
        known: dict[str, list[Path]] = {}
        for file in images_in(self.root):
            known.setdefault(folded(file.name), []).append(file)
        return known

    @cached_property
    def _stems(self) -> dict[str, list[Path]]:
        """The images below the root by their names without the extension."""
        stems: dict[str, list[Path]] = {}
        for files in self._known.values():
            for file in files:
                stems.setdefault(folded(file.stem), []).append(file)
        return stems

    def at(self, name: str) -> Path | None:
        """The image of this name in one of the folders."""
        for folder in self.folders:
            if os.path.isfile(folder / name):
                if folder != self.folders[0]:  # most probably the others are there too
                    self.folders.remove(folder)
                    self.folders.insert(0, folder)
                self._least = 1000  # paths are as they are written: what is not there is missing
                return folder / name
        return None

    def find(self, written: str, by: object) -> Path | None:
        """The image of this name: relative to one of the folders; or below the root, if its name is there but once.

        The latter holds for all images of a file or for none: one that alone is not where the others are is missing.

        Args:
            written: its name or path, as a file has it.
            by: the file and entry that names it, for messages.

        Raises:
            DataError: it may be one of several.
        """
        if not written or "\0" in written:
            raise DataError(
                f"{by} names the image {_shown(written)}, which is no file's name: write where the image is."
            )
        names = parts_of(written)
        if (found := next((path for name in names if (path := self.at(name)) is not None), None)) is not None:
            return found
        spelled = [[folded(part) for part in PurePosixPath(name).parts] for name in names]
        bare = [
            [*parts[:-1], parts[-1].rpartition(".")[0]] for parts in spelled if parts and parts[-1].endswith(EXTENSIONS)
        ]
        for parts in (*spelled, *bare):
            unhashed = re.sub(r"^[0-9a-f]{8}-", "", parts[-1]) if parts else ""  # Label Studio's uploads
            for last in dict.fromkeys((*parts[-1:], unhashed)):
                whole = last.endswith(EXTENSIONS) and parts not in bare
                files = (self._known if whole else self._stems).get(last, [])
                ends = [shared_parts(file, [*parts[:-1], last]) for file in files]
                best = [file for file, end in zip(files, ends, strict=True) if end == max(ends)]
                here = [
                    file
                    for file in best
                    if len(file.parts) > len(parts) and file.parents[len(parts) - 1] in self.folders
                ]
                if len(here) == 1 and max(ends) == len(parts):
                    if parts in bare:
                        self.notes.add("An image is of another kind than is said", f"{by}: {written} is {here[0].name}")
                    return here[0]  # only upper and lower case are different, or the extension
                if not best or max(ends) < self._least or (parts in bare and len(here) < 2):
                    continue
                if len(best) > 1:
                    raise DataError(
                        f"{by} names the image {written}, which may be {best[0]} or {best[1]}: write its path relative to "
                        f"{self.root.resolve()}."
                    )
                self._least = max(ends)
                if max(ends) < len(parts):
                    self.notes.add(
                        "An image is not where it is said to be, and was found by its name", f"{by}: {written}"
                    )
                return best[0]
        return None


def shared_parts(file: Path, parts: Sequence[str]) -> int:
    """How many last parts of a file's path are these, in upper or lower case; the last one with its extension or without."""
    own = [folded(part) for part in file.parts]
    if parts and own and folded(parts[-1]) == folded(file.stem):
        own[-1] = folded(file.stem)
    pairs = enumerate(zip(own[::-1], map(folded, parts[::-1]), strict=False))
    return next((k for k, (a, b) in pairs if a != b), min(len(own), len(parts)))


def _merged(records: Iterable[Record], notes: Notes) -> list[Record]:
    """The records, those of one image as one."""
    known: dict[str, Record] = {}
    for record in records:
        same = known.setdefault(record.path, record)
        if same is not record:
            notes.add("An image is listed twice, and counted once", f"{record.file}: {record.path}")
            same.boxes += record.boxes
    return list(known.values())


# COCO


def _key(given: Any) -> str | None:
    """An id, whether written as a number or as text."""
    if isinstance(given, float) and math.isfinite(given) and given == int(given):
        given = int(given)
    return str(given).strip() if isinstance(given, int | str) and not isinstance(given, bool) and given != "" else None


def _in_order(key: str) -> tuple[bool, int, str]:
    """Ids in the order of numbers, and behind them those that are none."""
    return (False, int(key), "") if re.fullmatch(r"-?\d{1,18}", key) else (True, 0, key)


def _tool(content: Any) -> str:
    """What a JSON file is that is not COCO's, and the way out, as a sentence."""
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


def coco_content(file: Path, notes: Notes) -> dict[str, Any]:
    """What is in a file of COCO's, with its lists ``images`` and ``categories``.

    Args:
        file: the JSON.
        notes: where it is noted what was read in another way than written.

    Raises:
        DataError: it is not such a file; the message says which tool's it is, where that can be seen.
    """
    text = read_text(file, notes)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read as JSON ({error}): give an annotation file in COCO's format.") from None
    if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in ("images", "categories")):
        raise DataError(f"{file} has no lists 'images' and 'categories'. {_tool(content)}")
    return content


def read_coco(
    file: Path, root: Path | None = None, known: Sequence[str] = (), *, notes: Notes
) -> tuple[list[Record], list[str]]:
    """Reads COCO's instances (Lin et al. 2014, arXiv:1405.0312; cocodataset.org/#format-data).

    Args:
        file: the JSON. Images are looked for beside it, in ``images/`` there, in the folder that COCO's naming gives
            (``../train2017`` or ``../images/train2017`` for ``annotations/instances_train2017.json``), and by their names
            below ``root``.
        root: the folder of the data; None takes that of the file, or the one above ``annotations/``.
        known: the categories of another split.
        notes: where it is noted what was read in another way than written.

    Returns:
        The images, and the names of the categories, in the order of their ids.

    Raises:
        DataError: it is not such a file, or ids are twice or nowhere.
    """
    content = coco_content(file, notes)
    groups = {key: content.get(key) or [] for key in ("images", "annotations", "categories")}
    keyed: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for group, entries in groups.items():
        if not isinstance(entries, list):
            raise DataError(f"{file}: {group!r} is no list, but {_shown(entries)}.")
        keyed[group] = []
        for place, entry in enumerate(entries, 1):
            key = _key(entry.get("id")) if isinstance(entry, dict) else None
            if key is None and isinstance(entry, dict) and group == "annotations" and entry.get("id") is None:
                key = f"(the {place}th, without an id)"  # nothing refers to it
            if key is None:
                raise DataError(f"{file}: an entry of {group!r} has no id: {_shown(entry)}.")
            keyed[group].append((key, entry))
        ((twice, count),) = Counter(key for key, _ in keyed[group]).most_common(1) or [("", 0)]
        if count > 1:
            raise DataError(f"{file}: the id {twice} is there {count} times among {group!r}; ids must be unique.")
    categories = _categories(file, keyed["categories"], keyed["annotations"], known, notes)
    parent = file.parent.parent if file.parent.name.casefold() == "annotations" else file.parent
    split = file.stem.rpartition("_")[2]
    folders = [file.parent, file.parent / "images", file.parent / file.stem, file.parent / split,
               file.parent.parent / split, file.parent.parent / "images" / split, file.parent / "images" / split,
               file.parent.parent / "images"]  # fmt: skip
    finder = Finder(root or parent, folders, notes)
    looked = ", ".join(map(str, folders))
    records: dict[str, Record] = {}
    for key, entry in keyed["images"]:
        name = entry.get("file_name")
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"{file}: image {key} has no 'file_name', but {_shown(name)}: write the name of its file.")
        path = finder.find(name, f"{file}, image {key}")
        size = _size(entry.get("height"), entry.get("width"))
        records[key] = Record(str(path or finder.folders[0] / name), str(file), size)
    if records and not any(os.path.isfile(record.path) for record in records.values()):
        first = next(iter(keyed["images"]))[1]["file_name"]
        raise DataError(
            f"{file} names the image {first}, which is in none of {looked}, nor anywhere below "
            f"{finder.root.resolve()}: put the images into one of them."
        )
    for key, entry in keyed["annotations"]:
        owner = _key(entry.get("image_id"))
        record = records.get(owner) if owner is not None else None
        if record is None:
            raise DataError(
                f"{file}: annotation {key} is of image {_shown(entry.get('image_id'))}, which is not there."
            )
        category = _key(entry.get("category_id"))
        label = categories.get(category or "", Unknown(_shown(entry.get("category_id"))))
        outline = entry.get("segmentation") or None
        values = _four(entry.get("bbox"))
        if not entry.get("bbox") and (around := _around(outline)):
            notes.add("An annotation has no box, and was given the one around its outline", f"{file}, annotation {key}")
            values = around
        record.boxes.append(Box(values, label, key, _flag(entry.get("iscrowd")), outline, _number(entry.get("area"))))
    return _merged(records.values(), notes), list(categories.values())


def _categories(
    file: Path,
    entries: list[tuple[str, dict[str, Any]]],
    annotations: list[tuple[str, dict[str, Any]]],
    known: Sequence[str],
    notes: Notes,
) -> dict[str, str]:
    """The categories' names by their ids; without those that only head others or stand for the background."""
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
            notes.add(
                f"The category {name!r} has no objects and only heads the others or stands for none: it is no class",
                file,
            )
            continue
        found[key] = name
    ((twice, count),) = Counter(found.values()).most_common(1) or [("", 0)]
    if count > 1:
        raise DataError(f"{file}: {count} categories have the name {twice!r}; names must be unique.")
    return found


def _name(given: Any) -> str:
    return composed(str(given).strip()) if isinstance(given, str | int | float) else ""


def _around(outline: Any) -> list[float] | None:
    """The box around polygons, x, y, width, height; None where there are none."""
    try:
        points = np.concatenate([np.asarray(part, float).reshape(-1, 2) for part in outline])
    except (TypeError, ValueError, OverflowError):
        return None
    low, high = points.min(0), points.max(0)
    return [*low.tolist(), *(high - low).tolist()]


# Pascal VOC


def _parsed(file: Path, notes: Notes) -> ElementTree.Element:
    """The root of an XML file, whatever encoding it says to have; names without namespaces."""
    try:
        said = re.search(rb"""^[^>]*encoding=["']([\w.-]+)""", file.read_bytes()[:200])
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as XML: {error}.") from None
    text = read_text(file, notes, said[1].decode("ascii", "replace") if said else None)
    try:
        root = ElementTree.fromstring(text.strip())  # of a text, the declared encoding does not count
    except (ElementTree.ParseError, ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read as XML: {error}.") from None
    for element in root.iter():
        if isinstance(element.tag, str):
            element.tag = element.tag.rpartition("}")[2]
    return root


def read_voc(files: Iterable[Path], root: Path, notes: Notes) -> list[Record]:
    """Reads annotations of Pascal VOC, a file for each image.

    Args:
        files: the XML files. Their images are beside them, in ``../JPEGImages`` or ``../images``, or below ``root``; by the
            name in ``<filename>``, or by the XML file's own.
        root: the folder of the data.
        notes: where it is noted what was read in another way than written.

    Returns:
        The images. What has a polygon or a rotated box instead of a ``<bndbox>`` has the box around it.

    Raises:
        DataError: a file is not such a one, or shares its image with another.
    """
    records: dict[str, Record] = {}
    finders: dict[Path, Finder] = {}
    for file in files:
        content = _parsed(file, notes)
        if content.tag != "annotation":
            way = " It is CVAT's own format: export as COCO or Pascal VOC." if content.tag == "annotations" else ""
            raise DataError(
                f"{file} is not in Pascal VOC's format: its root is <{content.tag}>, not <annotation>.{way}"
            )
        above = [parent for parent in file.parents if parent.is_relative_to(root)]
        around = dict.fromkeys([file.parent, file.parent.parent, *above])
        places = [file.parent, *(place / name for place in around for name in ("JPEGImages", "images")), *above]
        finder = finders.setdefault(file.parent, Finder(root, places, notes))
        path = _image_of(file, content, finder)
        if str(path) in records:
            raise DataError(f"{file} and {records[str(path)].file} are both of the image {path}: keep one.")
        size = _size(content.findtext("size/height"), content.findtext("size/width"))
        record = records[str(path)] = Record(str(path), str(file), size)
        for number, entry in enumerate(content.iter("object"), 1):
            values = [_number(entry.findtext(f"bndbox/{key}")) for key in COLUMNS]
            corners = _corners(entry)
            outline = None
            if corners is not None:
                outline = [corners.ravel().tolist()]
            if corners is not None and entry.find("bndbox") is None:
                kind = "rotated box" if entry.find("robndbox") is not None else "polygon"
                notes.add(f"An object has a {kind}, of which the box around it is used", f"{file}, object {number}")
                # Pixels are counted from 1 in VOC, but a polygon's points are places.
                values = [*(corners.min(0) + 1).tolist(), *corners.max(0).tolist()]
            label = composed(entry.findtext("name") or "").strip() or None
            record.boxes.append(Box(values, label, number, _flag(entry.findtext("difficult")), outline))
    return list(records.values())


def _image_of(file: Path, content: ElementTree.Element, finder: Finder) -> Path:
    """The image of an XML file: by the name in it, by its own name, or last by that name elsewhere below the root."""
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
    """The corners of an object's polygon or rotated box, N×2 in pixels; None where it has neither."""
    if (box := entry.find("robndbox")) is not None:
        x, y, width, height, angle = (_number(box.findtext(key)) for key in ("cx", "cy", "w", "h", "angle"))
        across = np.array([np.cos(angle), np.sin(angle)]) * width / 2
        down = np.array([-np.sin(angle), np.cos(angle)]) * height / 2
        corners = np.array([x, y]) + np.array([-across - down, across - down, across + down, down - across])
        return corners if np.isfinite(corners).all() else None
    polygon = entry.find("polygon")
    if polygon is None:
        return None
    pairs = [(point.findtext("x"), point.findtext("y")) for point in polygon.iter("pt")]  # LabelMe's
    pairs = pairs or [(polygon.findtext(f"x{k}"), polygon.findtext(f"y{k}")) for k in range(1, 1 + len(polygon) // 2)]
    points = np.array([[_number(x), _number(y)] for x, y in pairs], float).reshape(-1, 2)
    return points if len(points) > 2 and np.isfinite(points).all() else None


# YOLO


def read_names(given: Any, file: Path) -> dict[int, str]:
    """The names of YOLO's classes by the numbers that labels have.

    Args:
        given: a list, a dictionary by numbers, or a text with commas; the scalars as text.
        file: where it comes from.

    Raises:
        DataError: it is none of these, or two classes have one name.
    """
    if isinstance(given, str) and re.match(r"\s*[\[{]", given):  # a list that was quoted as a whole
        with suppress(yaml.YAMLError):
            given = yaml.load(given, yaml.BaseLoader)
    if isinstance(given, str):
        given = given.split(",")
    if isinstance(given, list):
        given = dict(enumerate(given))
    numbered: dict[int, str] = {}
    if isinstance(given, dict) and not any(map(_is_whole, given)) and all(map(_is_whole, given.values())):
        given = {number: name for name, number in given.items()}
    for number, name in given.items() if isinstance(given, dict) else ():
        if isinstance(name, list | dict) or not _is_whole(number):
            raise DataError(
                f"{file}: in 'names', {_shown(number)}: {_shown(name)} is not a number and a name. Write a list of names, or "
                "0: first, 1: second, …"
            )
        if str(name).strip():  # a line without a name is a number that no label has
            numbered[int(number)] = composed(str(name).strip())
    ((twice, count),) = Counter(numbered.values()).most_common(1) or [("", 0)]
    if count > 1:
        those = ", ".join(str(number) for number, name in numbered.items() if name == twice)
        raise DataError(f"{file}: {count} classes have the name {twice!r} (the numbers {those}); names must be unique.")
    return dict(sorted(numbered.items()))


def _is_whole(given: Any) -> bool:
    return re.fullmatch(r"\s*\d{1,9}\s*", str(given)) is not None


def read_yaml(file: Path, notes: Notes) -> dict[str, Any]:
    """A YAML file's settings, every scalar as the text that is written: ``no`` is a word to people.

    Raises:
        DataError: it cannot be read, or does not hold settings.
    """
    try:
        content = yaml.load(read_text(file, notes), yaml.BaseLoader)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise DataError(f"{file} cannot be read as YAML: {' '.join(str(error).split())[:300]}.") from None
    if content in (None, ""):
        return {}
    if not isinstance(content, dict):
        raise DataError(
            f"{file} holds no settings, but {_shown(content)}: write 'names:' with the classes, and 'train:' and 'val:' with "
            "the folders of images."
        )
    return {str(key): value for key, value in content.items() if value not in ("", "null", "~", "None", [], {})}


def read_yolo(
    splits: dict[str, list[Path]], names: dict[int, str], keypoints: int, notes: Notes
) -> dict[str, list[Record]]:
    """Reads YOLO's labels: ``class x y width height`` or ``class x y x y …`` (a polygon) a line, as shares of the image.

    A score at a line's end and the keypoints of poses are left out; polygons and rotated boxes have the box around them.

    Args:
        splits: the images; the labels of ``…/images/a.jpg`` are ``…/labels/a.txt``, or beside it. Without a file it has no
            objects.
        names: the classes' names by their numbers in the labels.
        keypoints: numbers that a line of a pose has after its box; 0 where the data do not say.
        notes: where it is noted what was read in another way than written.

    Raises:
        DataError: a line is no such one, two images share their labels, or no image to train on has any.
    """
    taken: dict[Path, Path] = {}
    listings: dict[Path, dict[str, Path]] = {}
    result: dict[str, list[Record]] = {}
    lines: list[tuple[Record, int, Any, list[float]]] = []
    for split, images in splits.items():
        records = [Record(str(image), str(_labels_of(image, listings))) for image in images]
        result[split] = records = _merged(records, notes)
        for record in records:
            file = Path(record.file)
            if taken.get(file, Path(record.path)) != Path(record.path):  # an image may be in two splits
                raise DataError(f"{record.path} and {taken[file]} share the labels {file}: rename one.")
            taken[file] = Path(record.path)
            for number, line in enumerate(read_text(file, notes).splitlines() if os.path.isfile(file) else [], 1):
                if fields := _fields(line):
                    lines.append((record, number, *_line(fields, line, f"{file}, line {number}", names)))
    _check_files(result, taken, notes)
    keypoints = keypoints or _keypoints([values for *_, values in lines])
    for record, number, label, values in lines:
        place = f"{record.file}, line {number}"
        outline = None
        if keypoints and len(values) == 4 + keypoints:
            notes.add("A label is a pose, of which the box is used and the keypoints are left out", place)
            values = values[:4]
        elif len(values) % 2 and len(values) > 4 and 0 <= values[-1] <= 1:
            notes.add("A label ends in a score, which is left out", place)
            values = values[:-1]
        if not (len(values) == 4 or (len(values) >= 6 and len(values) % 2 == 0)):
            raise DataError(f"{place}: a class and 4 numbers, or 6 or more, not {len(values)}.")
        if len(values) > 4:
            outline = np.array(values).reshape(-1, 2)  # in shares, until the image's size is known
            if len(values) == 8 and _is_turned(outline):
                notes.add("A label is a rotated box, of which the box around it is used", place)
            low, high = outline.min(0), outline.max(0)
            values = [*((low + high) / 2).tolist(), *(high - low).tolist()]
        record.boxes.append(Box(values, label, number, outline=outline))
    return result


def _labels_of(image: Path, listings: dict[Path, dict[str, Path]]) -> Path:
    """The file with an image's labels, whether or not it is there; what folders hold is kept in the listings."""
    parts = list(image.parent.parts)
    lower = [part.casefold() for part in parts]
    beside = image.with_suffix(".txt")
    files = [beside]
    if "images" in lower:
        place = len(parts) - 1 - lower[::-1].index("images")
        files[:0] = [Path(*parts[:place], name, *parts[place + 1 :], beside.name) for name in ("labels", "Labels")]
    if (found := next((file for file in files if os.path.isfile(file)), None)) is not None:
        return found
    for file in files:
        if file.parent not in listings:
            there = sorted(file.parent.iterdir()) if file.parent.is_dir() else ()
            listings[file.parent] = {folded(entry.name): entry for entry in there}
        if (found := listings[file.parent].get(folded(file.name))) is not None:
            return found
    return files[0]


OTHER_TEXTS = {"classes", "predefined_classes", "notes", "readme", "train", "val", "valid", "test"}


def _check_files(splits: dict[str, list[Record]], taken: dict[Path, Path], notes: Notes) -> None:
    """Refuses, or tells, that images and files of labels do not belong together."""
    for split, records in splits.items():
        without = [record for record in records if not os.path.isfile(record.file)]
        if not without:
            continue
        folders = {Path(record.file).parent for record in records}
        orphans = sorted(
            file
            for folder in folders
            if folder.is_dir()
            for file in folder.glob("*.txt")
            if file not in taken and file.stem.casefold().partition(".")[0] not in OTHER_TEXTS and file.name[0] != "."
        )
        lone = f", and {orphans[0].name} there is of no image" if orphans else ""
        first = f"{without[0].path} would have its labels in {without[0].file}, which is not there{lone}"
        if len(without) == len(records) and split in ("train", "all"):
            raise DataError(
                f"None of the {len(records)} images to train on has labels: {first}. Give an image and its labels the same name, "
                "and put them into folders images/ and labels/ that mirror each other, or side by side."
            )
        if len(without) == len(records):
            notes.add(f"No image of the split {split!r} has labels, so that nothing can be measured on it", first)
        elif orphans and len(without) > len(records) / 2:
            raise DataError(
                f"{len(without)} of {len(records)} images have no labels, while {len(orphans)} files of labels are of no image: "
                f"{first}. Give an image and its labels the same name."
            )
        for orphan in orphans:
            notes.add("A file of labels is of no image", orphan)


def _fields(line: str) -> list[str]:
    """The fields of a line, between which are blanks, commas or semicolons; a comma in a number is its point."""
    fields = line.replace(";", " ").split()
    if len(fields) > 4 and any(re.fullmatch(r"-?\d+,\d+", field) for field in fields[1:]):
        return [field.replace(",", ".") for field in fields]
    return [field for field in re.split(r"[\s,]+", line.replace(";", " ")) if field]


def _line(fields: list[str], line: str, place: str, names: dict[int, str]) -> tuple[Any, list[float]]:
    """The class and the numbers of a line."""
    label, values = composed(fields[0]), [_number(field) for field in fields[1:]]
    number = _number(label)
    if any(map(math.isnan, values)) or (math.isnan(number) and label not in names.values()):
        raise DataError(f"{place}: {line[:80]!r} is not a class and numbers.")
    if not math.isnan(number):
        whole = abs(number) < 1e9 and number == int(number)
        label = names.get(int(number), f"{number:g}") if whole else f"{number:g}"
        if not whole or int(number) not in names:
            return Unknown(repr(label)), values
    return label, values


def _is_turned(corners: NDArray[np.float64]) -> bool:
    """Whether four corners are those of a rectangle that does not lie along the axes."""
    sides = corners - np.roll(corners, 1, 0)
    return bool(np.allclose(sides[0], -sides[2], atol=0.005) and (np.abs(sides).min(1) > 0.005).any())


def _keypoints(lines: list[list[float]]) -> int:
    """How many numbers lines of a pose have after the box; 0 where they are no poses, as far as can be seen.

    In a pose all lines are equally long and its points lie in the box that the first four numbers say. So may those of small
    polygons that are all equally long; but there the third and fourth number are a point too, and that lies in the box.
    """
    longer = [line for line in lines if len(line) > 5]
    if len(longer) < 3 or len({len(line) for line in longer}) > 1:
        return 0
    values = np.array(longer)
    middle, size, rest = values[:, None, :2], values[:, None, 2:4], values[:, 4:]

    def inside(points: NDArray[np.float64]) -> NDArray[np.bool_]:
        return (np.abs(points - middle) <= size / 2 + 0.01).all(2)

    for each in (3, 2):
        if rest.shape[1] % each:
            continue
        points = rest.reshape(len(rest), -1, each)
        seen = ~(points[..., :2] == 0).all(2)
        marks = each == 2 or np.isin(points[..., -1], (0, 1, 2)).all()
        if marks and inside(points[..., :2])[seen].all() and not inside(size).all():
            return rest.shape[1]
    return 0


# Tables


def paths_in(column: "pd.Series[Any]", file: Path) -> list[str]:
    """The images that a column of a table names, relative to the table; see `Finder`."""
    notes = Notes()
    finder = Finder(file.parent, [file.parent, file.parent / "images"], notes)
    rows = zip(column.index, column.astype(str), strict=True)
    paths = [os.fspath(finder.find(path, f"{file}, row {row + 1}") or file.parent / path) for row, path in rows]
    notes.tell()
    return paths


def read_rows(
    table: pd.DataFrame,
    file: Path,
    path_column: str,
    label_column: str,
    box_columns: Sequence[str],
    notes: Notes,
) -> list[Record]:
    """Reads a table with a row for each box; an image without objects has one row with empty cells.

    Args:
        table: its cells as text, labels as of `labels_of`.
        file: where it comes from; images are relative to it.
        path_column: column with the images' paths.
        label_column: column with the classes.
        box_columns: four columns. ``difficult``, where there is one, marks what is ignored.
        notes: where it is noted what was read in another way than written.

    Raises:
        DataError: a path may be that of one of several images, or is none.
    """
    records: dict[str, Record] = {}
    finder = Finder(file.parent, [file.parent, file.parent / "images"], notes)
    cells = table[list(box_columns)].astype(object)
    numbers = [[_number(str(v).replace(",", ".")) for v in row] for row in cells.itertuples(index=False)]
    empty = table[[*box_columns, label_column]].isna().all(axis=1).to_numpy()
    difficult = table["difficult"].map(_flag).to_numpy() if "difficult" in table else np.zeros(len(table), bool)
    rows = zip(table[path_column].astype(str), table[label_column], numbers, empty, difficult, strict=True)
    for row, (path, label, values, without, hard) in zip(table.index, rows, strict=True):
        if path not in records:
            found = finder.find(path, f"{file}, row {int(row) + 1}")
            records[path] = Record(str(found or file.parent / path), str(file))
        if not without:
            records[path].boxes.append(Box(values, None if pd.isna(label) else label, int(row) + 1, bool(hard)))
    return _merged(records.values(), notes)


def labels_of(column: "pd.Series[Any]") -> list[str | None]:
    """A table's classes as text: a column of whole numbers with an empty cell is one of whole numbers all the same.

    Args:
        column: the cells.

    Returns:
        The labels; None for an empty cell.
    """
    labels = [None if pd.isna(cell) else composed(str(cell).strip()) for cell in column]
    if None in labels and all(label is None or re.fullmatch(r"-?\d+\.0", label) for label in labels):
        return [label and label[:-2] for label in labels]
    return [label or None for label in labels]
