"""Boxes and outlines in YOLO's text files."""

import math
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from typing_extensions import override

from datamodules.annotated.boxes import BoxFiles
from datamodules.annotated.sample import Box, Record, Unknown, as_number, merged
from datamodules.errors import DataError, repeated
from datamodules.finding import Finder, child, found_in, parts_of, quoted
from datamodules.images import composed, folded, images_in, sub_folders
from datamodules.splits import SPELLINGS, SPLITS, by_split_name
from datamodules.tables import text_of


class YOLODetection(BoxFiles):
    """Annotations in YOLO text files, one line per object: class, centre x, centre y, width, height, relative to the
    image.

    ``root`` is a ``data.yaml`` with ``names`` and ``train``, ``val``, ``test`` (folders, lists of files), or the folder
    that has it; or a folder with ``classes.txt`` or ``obj.names`` and ``images/train``, ``train/images``, ``train.txt``
    or ``images``. Labels are in ``labels/`` if images are in ``images/``, or next to the images. A line with more
    numbers is a polygon. An image without labels is kept as one without objects.
    """

    noun = "line"
    remedy = "Write them as fractions of the image: divide x and width by its width, y and height by its height."
    box_format = "yolo"

    @override
    def read(self) -> tuple[dict[str, list[Record]], list[str]]:
        root = Path(self.root)
        file = root if root.is_file() else self._settings(root)
        folder = root if root.is_dir() else root.parent
        content: dict[str, Any] = {}
        if file is not None:
            content = self._pairs(file) if file.suffix == ".data" else self._yaml(file)
            base = folder / str(content.get("path", ""))
            folder = base if os.path.isdir(base) else folder
        names = self._names(folder, file, content)
        found: dict[str, list[Path]] = {}
        lower = {key.casefold(): value for key, value in content.items()}
        guessed = self._guessed(folder)
        for split in SPLITS:
            given = next((lower[name] for name in SPELLINGS[split] if lower.get(name)), None)
            images = self._images(folder, guessed[split]) if given is None and split in guessed else []
            for written in given if isinstance(given, list) else [given] if given else []:
                if (where := found_in(folder, str(written))) is not None:
                    images += self._images(folder, where)
                elif split == "test":
                    self.notes.add("The test split has no folder, and is left out", f"{file}: {written}")
                else:
                    raise DataError(f"There is no {folder.resolve()}/{written}, which {file} names.")
            found |= {split: images} if images else {}
        found = found or {"all": images_in(child(folder, "images") or folder)}
        if not found.get("train", found.get("all")):
            raise DataError(
                f"{folder.resolve()} has no images to train on: name their folder under 'train' in data.yaml."
            )
        points = re.fullmatch(r"\['(\d{1,4})', '(\d{1,4})'\]", str(content.get("kpt_shape")))
        keypoints = int(points[1]) * int(points[2]) if points else 0
        return self._records(found, names, keypoints), list(names.values())

    @staticmethod
    def _guessed(folder: Path) -> dict[str, Path]:
        """Image folder or list of each split when no settings file names them."""
        images = child(folder, "images")
        found = by_split_name(sub_folders(folder)) | by_split_name(sub_folders(images) if images else ())
        lists = (file for file in folder.glob("*.txt") if re.match(r".*\.\w{2,5}\s*(\n|$)", _head(file)))
        found = by_split_name(lists) | found
        return {split: child(place, "images") or place for split, place in found.items()}

    @staticmethod
    def _settings(root: Path) -> Path | None:
        """Settings file of a folder: ``data.yaml``, or the only one of its kind."""
        for ending in ("yaml", "yml", "data"):
            if (file := child(root, f"data.{ending}", f"dataset.{ending}", f"obj.{ending}")) is not None:
                return file
            files = [file for file in sorted(root.glob(f"*.{ending}")) if re.search(r"(?m)^\W*names\b", _head(file))]
            if len(files) > 1:
                raise DataError(
                    f"{root.resolve()} has {files[0].name} and {files[1].name}: say which with --data.root."
                )
            if files:
                return files[0]
        return None

    def _pairs(self, file: Path) -> dict[str, Any]:
        """Darknet's settings, one per line: ``names = obj.names``."""
        lines = [line.partition("=") for line in text_of(file, self.notes).splitlines()]
        return {key.strip(): value.strip() for key, _, value in lines if value.strip()}

    def _names(self, folder: Path, file: Path | None, content: dict[str, Any]) -> dict[int, str]:
        """Class names by index."""
        given = content.get("names")
        lists = [found_in(folder, given)] if isinstance(given, str) and given.endswith((".names", ".txt")) else []
        if given and not lists and file is not None and (names := _names_of(given, file)):
            return names
        places = [folder, *(folder / name for name in ("labels", "train", "train/labels", "labels/train"))]
        lists += [place / "classes.txt" for place in places] + sorted(folder.glob("*.names"))
        listed = next((place for place in lists if place is not None and os.path.isfile(place)), None)
        if listed is None:
            what = f"{file} does" if file is not None else f"{folder.resolve()} does"
            raise DataError(
                f"{what} not say what its classes are called: write a data.yaml with 'names', or a classes.txt with a name a "
                "line."
            )
        return _names_of(text_of(listed, self.notes).splitlines(), listed)

    def _images(self, folder: Path, place: Path) -> list[Path]:
        """Images of a folder or of a list in a text file."""
        if place.is_dir():
            return images_in(place)
        finder = Finder(folder, [place.parent, folder], self.notes)
        lines = [line.strip() for line in text_of(place, self.notes).splitlines() if line.strip()]
        return [finder.find(line, place) or place.parent / parts_of(line)[-1] for line in lines]

    def _yaml(self, file: Path) -> dict[str, Any]:
        """Settings of a YAML file with every scalar as text, so that ``no`` stays a word."""
        try:
            content = yaml.load(text_of(file, self.notes), yaml.BaseLoader)
        except (ValueError, yaml.YAMLError, RecursionError) as error:
            raise DataError(f"{file} cannot be read as YAML: {' '.join(str(error).split())[:300]}.") from None
        if content in (None, ""):
            return {}
        if not isinstance(content, dict):
            raise DataError(
                f"{file} holds no settings, but {quoted(content)}: write 'names:' with the classes, and 'train:' and 'val:' with "
                "the folders of images."
            )
        return {str(key): value for key, value in content.items() if value not in ("", "null", "~", "None", [], {})}

    def _records(self, splits: dict[str, list[Path]], names: dict[int, str], keypoints: int) -> dict[str, list[Record]]:
        """Images with their objects.

        A score at the end of a line and keypoints are dropped; polygons and rotated boxes get their bounding box.

        Args:
            splits: the images; the labels of ``…/images/a.jpg`` are ``…/labels/a.txt``, or next to it.
            names: class names by index in the labels.
            keypoints: number of values after the box in pose lines; 0 if unknown.
        """
        taken: dict[Path, Path] = {}
        listings: dict[Path, dict[str, Path]] = {}
        result: dict[str, list[Record]] = {}
        lines: list[tuple[Record, int, Any, list[float]]] = []
        for split, images in splits.items():
            records = [Record(str(image), str(_labels_of(image, listings))) for image in images]
            result[split] = records = merged(records, self.notes)
            for record in records:
                file = Path(record.file)
                if taken.get(file, Path(record.path)) != Path(record.path):  # an image may be in two splits
                    raise DataError(f"{record.path} and {taken[file]} share the label file {file}: rename one.")
                taken[file] = Path(record.path)
                for number, line in enumerate(
                    text_of(file, self.notes).splitlines() if os.path.isfile(file) else [], 1
                ):
                    if fields := _fields(line):
                        lines.append((record, number, *_line(fields, line, f"{file}, line {number}", names)))
        self._check_files(result, taken)
        keypoints = keypoints or _keypoints([values for *_, values in lines])
        for record, number, label, values in lines:
            place = f"{record.file}, line {number}"
            outline = None
            if keypoints and len(values) == 4 + keypoints:
                self.notes.add("A label is a pose; its box is used and its keypoints are dropped", place)
                values = values[:4]
            elif len(values) % 2 and len(values) > 4 and 0 <= values[-1] <= 1:
                self.notes.add("A label ends with a score, which is dropped", place)
                values = values[:-1]
            if not (len(values) == 4 or (len(values) >= 6 and len(values) % 2 == 0)):
                raise DataError(f"{place}: write a class and 4 numbers, or 6 or more, not {len(values)}.")
            if len(values) > 4:
                outline = np.array(values).reshape(-1, 2)  # relative, until the image's size is known
                if len(values) == 8 and _is_turned(outline):
                    self.notes.add("A label is a rotated box; the box around it is used", place)
                low, high = outline.min(0), outline.max(0)
                values = [*((low + high) / 2).tolist(), *(high - low).tolist()]
            record.boxes.append(Box(values, label, number, outline=outline))
        return result

    def _check_files(self, splits: dict[str, list[Record]], taken: dict[Path, Path]) -> None:
        """Refuses, or warns of, images and label files that do not belong together."""
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
                if file not in taken
                and file.stem.casefold().partition(".")[0] not in OTHER_TEXTS
                and file.name[0] != "."
            )
            lone = f", and {orphans[0].name} there belongs to no image" if orphans else ""
            first = f"{without[0].path} should have its labels in {without[0].file}, which is not there{lone}"
            if len(without) == len(records) and split in ("train", "all"):
                raise DataError(
                    f"None of the {len(records)} images to train on has labels: {first}. Give an image and its labels the same name, "
                    "and put them into folders images/ and labels/ that mirror each other, or side by side."
                )
            if len(without) == len(records):
                self.notes.add(f"No image of the split {split!r} has labels, so nothing can be measured on it", first)
            elif orphans and len(without) > len(records) / 2:
                raise DataError(
                    f"{len(without)} of {len(records)} images have no labels, while {len(orphans)} label files "
                    f"belong to no image: {first}. Give an image and its labels the same name."
                )
            for orphan in orphans:
                self.notes.add("A label file belongs to no image", orphan)


def _head(file: Path) -> str:
    """First part of a text file."""
    with file.open("rb") as opened:
        return opened.read(100_000).decode("utf-8", "replace")


def _names_of(given: object, file: Path) -> dict[int, str]:
    """Class names by the indices in the label files.

    They are given as a list, a dictionary by index, or comma-separated text; scalars are text.
    """
    if isinstance(given, str) and re.match(r"\s*[\[{]", given):  # a list in quotes
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
                f"{file}: in 'names', {quoted(number)}: {quoted(name)} is not a number and a name. Write a list of names, or "
                "0: first, 1: second, …"
            )
        if str(name).strip():  # an empty line is an unused index
            numbered[int(number)] = composed(str(name).strip())
    if twice := repeated(numbered.values()):
        those = ", ".join(str(number) for number, name in numbered.items() if name == twice[0])
        raise DataError(
            f"{file}: {twice[1]} classes have the name {twice[0]!r} (the numbers {those}); names must be unique."
        )
    return dict(sorted(numbered.items()))


def _is_whole(given: object) -> bool:
    return re.fullmatch(r"\s*\d{1,9}\s*", str(given)) is not None


def _labels_of(image: Path, listings: dict[Path, dict[str, Path]]) -> Path:
    """Path of an image's label file, whether or not it exists; folder listings are cached."""
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


def _fields(line: str) -> list[str]:
    """Fields of a line, separated by blanks, commas or semicolons; a comma within a number is a decimal point."""
    fields = line.replace(";", " ").split()
    if len(fields) > 4 and any(re.fullmatch(r"-?\d+,\d+", field) for field in fields[1:]):
        return [field.replace(",", ".") for field in fields]
    return [field for field in re.split(r"[\s,]+", line.replace(";", " ")) if field]


def _line(fields: list[str], line: str, place: str, names: dict[int, str]) -> tuple[Any, list[float]]:
    """Class and numbers of a line."""
    label, values = composed(fields[0]), [as_number(field) for field in fields[1:]]
    number = as_number(label)
    if any(map(math.isnan, values)) or (math.isnan(number) and label not in names.values()):
        raise DataError(f"{place}: {line[:80]!r} is not a class and numbers.")
    if not math.isnan(number):
        whole = abs(number) < 1e9 and number == int(number)
        label = names.get(int(number), f"{number:g}") if whole else f"{number:g}"
        if not whole or int(number) not in names:
            return Unknown(repr(label)), values
    return label, values


def _is_turned(corners: NDArray[np.float64]) -> bool:
    """Whether four corners form a rectangle that is not axis-aligned."""
    sides = corners - np.roll(corners, 1, 0)
    return bool(np.allclose(sides[0], -sides[2], atol=0.005) and (np.abs(sides).min(1) > 0.005).any())


def _keypoints(lines: list[list[float]]) -> int:
    """Number of values after the box in pose lines; 0 if the lines do not seem to be poses.

    In poses, all lines have the same length, and their points lie in the box of the first four numbers. The same may be
    true for small polygons of equal length; but there the third and fourth numbers are a point too, which lies in that
    box.
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
