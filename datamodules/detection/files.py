"""Image files with boxes, in the formats in which people keep them."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import PIL.Image
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray

from datamodules.annotations import COLUMNS, Annotations, BoxFormat, Record, compiled, in_shares
from datamodules.base import DataError, Source
from datamodules.detection.base import DetectionDataModule
from datamodules.images import check_images, folded, images_in, is_junk, pieces, read_image, sub_folders, warn_of_shared
from datamodules.mixing import VISIBLE, Sample, selected
from datamodules.options import OWN, Files, Own, PositiveInt, Preprocessing
from datamodules.readers import (
    Finder,
    Notes,
    coco_content,
    labels_of,
    parts_of,
    read_coco,
    read_names,
    read_rows,
    read_text,
    read_voc,
    read_yaml,
    read_yolo,
    shared_parts,
    within,
)
from datamodules.splits import SPELLINGS, SPLITS, by_split_name, split_of
from datamodules.tables import by_split, check_table, read_table, spelled

KEPT = 256 << 20  # bytes of images that are kept while they are cut into pieces


class BoxSource:
    """Image files with boxes, or pieces of them.

    Args:
        annotations: images, boxes and, where there are to be masks, outlines.
        channels: 3 to read RGB, 1 to read grey.
        tile: side of the square pieces that larger images are cut into, in pixels; None leaves them whole.
    """

    def __init__(self, annotations: Annotations, channels: int = 3, tile: int | None = None) -> None:
        self.annotations, self.channels, self.tile = annotations, channels, tile
        windows = [
            (i, x, y)
            for i, (height, width) in enumerate(annotations.sizes.tolist())
            for x, y in pieces(height, width, tile or max(height, width))
        ]
        self.windows = np.array(windows, np.int64).reshape(-1, 3)
        self._kept: dict[int, Sample] = {}  # images of which further pieces will be asked for

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def paths(self) -> NDArray[np.str_]:
        """The image of each sample."""
        return self.annotations.paths[self.windows[:, 0]]

    @property
    def labels(self) -> NDArray[np.int64]:
        """The class of each box."""
        return self.annotations.labels

    @cached_property
    def digest(self) -> str:
        """See `Source.digest`."""
        a = self.annotations
        digest = hashlib.blake2b("\n".join(a.digests).encode(), digest_size=16)
        for values in (a.starts, a.boxes, a.labels, a.ignore, self.windows):
            digest.update(np.ascontiguousarray(values).tobytes())
        for outline in () if a.outlines is None else a.outlines:
            digest.update(outline)
        return digest.hexdigest()

    def _read(self, index: int) -> Sample:
        """A whole image."""
        if index in self._kept:
            return self._kept[index]
        a, rows = self.annotations, slice(self.annotations.starts[index], self.annotations.starts[index + 1])
        image = read_image(str(a.paths[index]), self.channels)
        if image.shape[:2] != tuple(a.sizes[index]):
            raise DataError(f"{a.paths[index]} changed its size since it was checked: start again.")
        sample: Sample = {"image": image, "boxes": a.boxes[rows], "labels": a.labels[rows], "ignore": a.ignore[rows]}
        if a.areas is not None:
            sample["area"] = a.areas[rows]
        if a.outlines is not None:
            sample["masks"] = masks = a.masks(index)
            classes = np.zeros(image.shape[:2], np.uint8)
            for mask, label, ignore in zip(masks, sample["labels"], sample["ignore"], strict=True):
                classes[mask.view(bool) & (classes == 0)] = 255 if ignore else label + 1
            sample["mask"] = classes
        if self.tile:
            self._kept[index] = sample
            while len(self._kept) > 1 and sum(kept["image"].nbytes for kept in self._kept.values()) > KEPT:
                del self._kept[next(iter(self._kept))]
        return sample

    def __getitem__(self, index: int) -> Sample:
        which, x, y = self.windows[index].tolist()
        sample = self._read(which)
        if self.tile:
            part = slice(y, y + self.tile), slice(x, x + self.tile)
            sample = sample | {"image": np.ascontiguousarray(sample["image"][part])}
            height, width = sample["image"].shape[:2]
            boxes = np.clip(
                sample["boxes"] - np.array([x, y] * 2, np.float32), 0, np.array([width, height] * 2, np.float32)
            )
            before, after = ((b[:, 2:] - b[:, :2]).prod(1) for b in (sample["boxes"], boxes))
            kept = (after >= VISIBLE * before) & (after > 0)
            if "area" in sample:
                sample["area"] = sample["area"] * (after / before)
            if "masks" in sample:
                masks = np.ascontiguousarray(sample["masks"][:, *part])
                kept &= masks.any((1, 2))
                sample |= {"masks": masks, "mask": sample["mask"][part]}
            sample = selected(sample | {"boxes": boxes}, kept)
        return sample | {"size": np.array(sample["image"].shape[:2], np.int64)}


@dataclass(eq=False, repr=False)
class BoxFiles(Files, DetectionDataModule):
    """Base of the formats: images and boxes are checked once, before training.

    Splits that are not there are drawn, always the same ones: 15 % of the images for the test and 15 % of the rest for
    validation where nothing is split, 15 % for validation where only that lacks. The images of a class are not all drawn.

    Args:
        root: the folder or file.
        masks: give masks too; every object needs an outline.
        tile: cut larger images into squares of this side, in pixels, which overlap by a fifth; for photographs from the
            air, whose objects are small. None leaves images whole.
        on_bad_box: what a box that cannot be used means: stop and name it, or cut it off where it reaches outside and
            drop it else, counted and listed.
        image_size: side of the square images that the network sees, in pixels; None takes ``tile``, or 640.
    """

    noun: ClassVar[str] = "object"
    remedy: ClassVar[str] = ""
    box_format: BoxFormat = field(default="xyxy", init=False)

    root: str
    _: KW_ONLY
    masks: bool = False
    tile: PositiveInt | None = None
    on_bad_box: Literal["error", "drop"] = "error"
    image_size: Own[PositiveInt] = OWN

    def __post_init__(self) -> None:
        super().__post_init__()
        self.image_size = self.image_size or self.tile or 640
        if self.mixing.copy_paste and not self.masks:
            raise DataError("--data.mixing.copy_paste takes masks: --data.masks true, with outlines in the files.")
        self.notes = Notes()

    @property
    def title(self) -> str:
        """The folder's or file's name."""
        return Path(self.root).resolve().stem

    @property
    def preprocessing(self) -> Preprocessing:
        """See `VisionDataModule.preprocessing`; a model that learned from pieces is shown pieces."""
        return replace(super().preprocessing, tile=self.tile)

    def read(self) -> tuple[dict[str, list[Record]], list[str]]:
        """The images of each split (``all`` where nothing is split) and the names of the classes."""
        raise NotImplementedError

    @cached_property
    def _read(self) -> tuple[dict[str, list[Record]], list[str]]:
        if not Path(self.root).exists():
            raise DataError(f"There is no {Path(self.root).resolve()}: say where your images are with --data.root.")
        splits, names = self.read()
        self.notes.tell()
        for what, groups in (("", [*splits.values()]), (" to train on", [splits.get("train", splits.get("all", []))])):
            if not any(box for records in groups for record in records for box in record.boxes):
                raise DataError(f"{Path(self.root).resolve()} has no boxes{what}, in {sum(map(len, groups))} images.")
        return splits, names

    @cached_property
    def label_names(self) -> list[str]:
        """The classes' names, in the order of their numbers."""
        return self._read[1]

    def load(self) -> dict[str, Source]:
        """See `VisionDataModule.load`."""
        splits, names = self._read
        records = [record for group in splits.values() for record in group]
        paths = np.array([record.path for record in records], np.str_)
        if not any(map(os.path.isfile, paths)):
            raise DataError(
                f"None of the {len(paths)} images is there; the first is {paths[0]}, named by {records[0].file}."
            )
        table, self.bad_files = check_images(paths, self.on_bad_file)
        sizes = table[["height", "width"]].to_numpy(np.int64)
        digests, good = table["digest"].to_numpy(dtype=np.str_), (table["error"] == "").to_numpy()
        for k in np.flatnonzero(good):
            said, seen = records[k].size, (int(sizes[k][0]), int(sizes[k][1]))
            if said is not None and said != seen:
                turned = ""
                if said[::-1] == seen:
                    turned = (
                        " It is turned by its EXIF tag, which the boxes leave out."
                        if _is_turned(records[k].path)
                        else " Width and height look interchanged."
                    )
                raise DataError(
                    f"{records[k].file} says that {records[k].path} has {said[1]}×{said[0]} pixels, but it has "
                    f"{seen[1]}×{seen[0]}.{turned} Its boxes are of another picture: bring the two together."
                )
        self._scale(records, sizes)
        parts: dict[str, Annotations] = {}
        reports: dict[str, str] = {}
        outlined = any(box.outline is not None for record in records for box in record.boxes)
        start = 0
        for name, group in splits.items():
            rows = np.flatnonzero(good[start : start + len(group)]) + start
            start += len(group)
            kept = [records[k] for k in rows]
            parts[name], report = compiled(kept, names, self.box_format, self.on_bad_box, sizes[rows], digests[rows],
                                           self.noun, self.masks, outlined, self.remedy)  # fmt: skip
            reports |= report
        self._tell(reports)
        self.bad_files |= reports
        if "all" in parts and self.undivided:
            return {"test": BoxSource(parts["all"], self.in_chans, self.tile)}
        self.drawn = "all" in parts
        if "all" in parts:
            parts["train"] = parts.pop("all")
            if len(parts["train"]) > 2:
                parts["train"], parts["test"] = _drawn(parts["train"])
        if "val" not in parts:
            parts["train"], parts["val"] = _drawn(parts["train"])
        files = {name: parts[name] for name in SPLITS if name in parts}
        warn_of_shared({name: (part.paths, part.digests) for name, part in files.items()})
        self._warn_of_rare(files["train"])
        return {name: BoxSource(part, self.in_chans, self.tile) for name, part in files.items()}

    def _scale(self, records: Sequence[Record], sizes: NDArray[np.int64]) -> None:
        """Boxes that are to be in pixels, but all are shares of their images, to pixels."""
        if self.box_format == "yolo" or not in_shares([box.values for record in records for box in record.boxes]).all():
            return
        first = next(record for record in records if record.boxes)
        rank_zero_warn(
            f"All boxes of {Path(self.root).resolve()} lie in the first pixel, so that they are shares of the images, and read so; the "
            f"first is [{', '.join(f'{value:g}' for value in first.boxes[0].values)}] in {first.file}."
        )
        self.box_format = "xyxy" if self.box_format == "voc" else self.box_format
        for record, (height, width) in zip(records, sizes.tolist(), strict=True):
            for box in record.boxes:
                box.values = (np.array(box.values) * (width, height, width, height)).tolist()

    def _tell(self, report: dict[str, str]) -> None:
        """Warns of boxes that were not taken as they are written."""
        first = {what: place for place, what in reversed(report.items())}
        counts = Counter(report.values())
        if gone := counts["dropped"] + counts["cut off"]:
            place = next(place for place, what in report.items() if what in ("dropped", "cut off"))
            rank_zero_warn(
                f"{counts['dropped']} boxes that cannot be used were dropped, {gone - counts['dropped']} were cut off at the "
                f"edge; the first: {place}."
            )
        if copies := counts["a copy"]:
            rank_zero_warn(f"{copies} boxes are there twice, and count once; the first: {first['a copy']}.")
        if apart := counts["an outline apart"]:
            rank_zero_warn(
                f"{apart} objects have an outline that agrees with less than half of their box, as one for another size of the "
                f"image would; the first: {first['an outline apart']}."
            )
        if shares := counts["in the first pixel"]:
            rank_zero_warn(
                f"{shares} boxes lie in the first pixel of their images: are they shares of the image? They are read as pixels; the "
                f"first: {first['in the first pixel']}."
            )
        if boxed := counts["its own mask"]:
            rank_zero_warn(
                f"{boxed} objects have a box but no outline, while others have: the box is taken as their mask; the first: "
                f"{first['its own mask']}."
            )

    def _warn_of_rare(self, train: Annotations) -> None:
        counts = np.bincount(train.labels[~train.ignore], minlength=len(self.label_names))
        empty = [name for name, count in zip(self.label_names, counts, strict=True) if not count]
        if empty:
            rank_zero_warn(
                f"No box to train on in class {empty[0]!r} ({len(empty)} of {len(counts)} classes are empty)."
            )


def _is_turned(file: str) -> bool:
    """Whether an image lies on its side by its EXIF tag."""
    with PIL.Image.open(file) as image:
        return image.getexif().get(0x0112, 1) > 4


def _drawn(annotations: Annotations) -> tuple[Annotations, Annotations]:
    """The rest and 15 % of the images, drawn with a fixed seed; the rest keeps every class.

    Raises:
        DataError: there is but one image.
    """
    size = len(annotations)
    if size < 2:
        raise DataError("One image is too few to keep some for validation: add images, or bring splits of your own.")
    counts = np.bincount(annotations.labels, minlength=1)
    starts = annotations.starts
    part: list[int] = []
    order = np.random.default_rng(0).permutation(size)
    for i in order:
        own = np.bincount(annotations.labels[starts[i] : starts[i + 1]], minlength=len(counts))
        if ((own == 0) | (counts > own)).all():
            counts, part = counts - own, [*part, int(i)]
        if len(part) >= max(1, round(0.15 * size)):
            break
    chosen = np.sort(np.array(part or order[:1], np.intp))
    return annotations.subset(np.setdiff1d(np.arange(size), chosen)), annotations.subset(chosen)


class COCODetection(BoxFiles):
    """Annotations in COCO's JSON.

    ``root`` is a JSON file, whose images are split, or a folder with such a file alone, or with one for each split:
    ``train.json``, ``annotations/instances_train2017.json`` or ``train/_annotations.coco.json``, and so for ``val`` and
    ``test``. Boxes are x, y, width, height; ``iscrowd`` is respected; outlines are polygons or run-length codes.
    """

    noun = "annotation"
    remedy = "Write 'bbox' as COCO does."
    box_format = "xywh"

    def read(self) -> tuple[dict[str, list[Record]], list[str]]:
        """See `BoxFiles.read`."""
        root = Path(self.root)
        found = {"all": root} if root.is_file() else self._files(root)
        splits: dict[str, list[Record]] = {}
        label_names: list[str] = []
        for split, file in found.items():
            splits[split], names = read_coco(file, None if root.is_file() else root, label_names, notes=self.notes)
            label_names = label_names or names
        return splits, label_names

    def _files(self, root: Path) -> dict[str, Path]:
        """The file of each split, or of ``all``, in a folder."""
        files = [
            file
            for place in (root, *sub_folders(root))
            for file in sorted(place.glob("*.[jJ][sS][oO][nN]"))
            if not is_junk(file.name) and not _words(file) & {"captions", "keypoints", "stuff", "panoptic"}
        ]
        own = [file for file in files if file.parent == root or file.parent.name.casefold() == "annotations"]
        own.sort(key=lambda file: (file.parent != root, "instances" not in _words(file)))
        inner = [file for file in files if file not in own and "annotations" in _words(file)]
        named = [(split_of(file.stem) or _hint(file), file) for file in own]
        named += [(split_of(file.parent.name), file) for file in inner]  # as Roboflow's
        found = {split: next(file for name, file in named if name == split) for split in SPLITS if split in dict(named)}
        if not found and len(own) == 1:
            return {"all": own[0]}
        if "train" not in found:
            if own and not found:
                coco_content(own[0], self.notes)  # a folder of another format says so
            several = f" Which of {own[0].name}, {own[1].name}, … is it?" if len(own) > 1 else ""
            raise DataError(
                f"{root.resolve()} has neither train.json nor annotations/instances_train*.json: give such a folder, or "
                f"a JSON file, with --data.root.{several}"
            )
        return found


def _words(file: Path) -> set[str]:
    """What a file's name is made of, in lower case, without numbers."""
    return set(re.findall("[a-z]+", file.stem.casefold()))


def _head(file: Path) -> str:
    """The beginning of a text file."""
    with file.open("rb") as opened:
        return opened.read(100_000).decode("utf-8", "replace")


def _hint(file: Path) -> str | None:
    """The split in a longer name, as in ``train_v2``."""
    meant = {split_of(word) for word in _words(file) & {"train", "val", "valid", "validation", "test"}}
    return meant.pop() if len(meant) == 1 else None


def _inside(folder: Path, *names: str) -> Path | None:
    """The first of these that a folder has, in upper or lower case."""
    for name in names:
        place: Path | None = folder
        for part in Path(name).parts:
            if place is not None and not (place / part).exists():
                known = place.iterdir() if place.is_dir() else ()
                place = next((child for child in known if folded(child.name) == folded(part)), None)
            elif place is not None:
                place = place / part
        if place is not None:
            return place
    return None


def _ending(files: dict[str, list[Path]], name: str) -> list[Path]:
    """The files, which are given by their stems, whose paths have the most last parts of a name."""
    parts = Path(name).parts
    known = files.get(folded(parts[-1]), []) if parts else []
    ends = [shared_parts(file.with_suffix(""), parts) for file in known]
    return [file for file, end in zip(known, ends, strict=True) if end == max(ends)]


class VOCDetection(BoxFiles):
    """Annotations in Pascal VOC's XML, a file for each image.

    ``root`` is a folder with ``Annotations/``, ``JPEGImages/`` and lists ``ImageSets/Main/train.txt``, ``val.txt``,
    ``test.txt``; or with XML files and images side by side; or with such folders ``train/``, ``val/``, ``test/``.
    ``difficult`` is respected. An image without XML file is left out; one without objects is kept. Files in which a coordinate
    is 0 are taken as counted from 0.
    """

    remedy = "Write <bndbox> as VOC does."
    box_format: BoxFormat = "voc"

    def read(self) -> tuple[dict[str, list[Record]], list[str]]:
        """See `BoxFiles.read`."""
        root = Path(self.root)
        folders = by_split_name(sub_folders(root))
        if "train" not in folders:
            folders = {"all": root}
        found = {}
        for split, folder in folders.items():
            place = _inside(folder, "Annotations") or folder
            found[split] = sorted(file for file in place.rglob("*.[xX][mM][lL]") if file.name[0] != ".")
            if not found[split]:
                raise DataError(f"{place.resolve()} has no XML files: give a folder of Pascal VOC's with --data.root.")
        if "all" in found and (listed := self._listed(root, found["all"])):
            found = listed
        splits = {split: read_voc(files, root, self.notes) for split, files in found.items()}
        self.box_format = self._counted(splits)
        return splits, _names(splits)

    def _listed(self, root: Path, found: list[Path]) -> dict[str, list[Path]]:
        """The files of each split by the lists in ``ImageSets/Main``; none where there are no lists to train on."""
        files: dict[str, list[Path]] = {}
        for annotation in found:
            files.setdefault(folded(annotation.stem), []).append(annotation)
        result: dict[str, list[Path]] = {}
        place = _inside(root, "ImageSets/Main")
        whole = by_split_name(place.glob("*.[tT][xX][tT]")) if place else {}
        for split in SPLITS:
            one = whole.get(split)
            by_class = sorted(place.glob(f"*_{split}.txt")) if place else []  # as VoTT writes them
            chosen: dict[Path, None] = {}
            for file in [one] if one else by_class:
                for line in read_text(file, self.notes).splitlines():
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
        """Whether pixels are counted from 1, as VOC does, or from 0: then boxes at the edge begin at 0, and hardly at 1."""
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
            f"The boxes of {Path(self.root).resolve()} are counted from 0, not from 1 as in Pascal VOC, and read so: {len(zeros)} begin "
            f"at 0, the first in {record.file}, object {box.number}."
        )
        return "xyxy"


class YOLODetection(BoxFiles):
    """Annotations in YOLO's text files, a line for each object: class, centre x, centre y, width, height as shares.

    ``root`` is a ``data.yaml`` with ``names`` and ``train``, ``val``, ``test`` (folders, lists of files), or the folder that
    has it; or a folder with ``classes.txt`` or ``obj.names`` and ``images/train``, ``train/images``, ``train.txt`` or
    ``images``. Labels are in ``labels/`` where images are in ``images/``, or beside them. A line with more numbers is a
    polygon. An image without labels has no objects, and is kept.
    """

    noun = "line"
    remedy = "Write them as shares of the image: divide x and width by its width, y and height by its height."
    box_format = "yolo"

    def read(self) -> tuple[dict[str, list[Record]], list[str]]:
        """See `BoxFiles.read`."""
        root = Path(self.root)
        file = root if root.is_file() else self._settings(root)
        folder = root if root.is_dir() else root.parent
        content: dict[str, Any] = {}
        if file is not None:
            content = self._pairs(file) if file.suffix == ".data" else read_yaml(file, self.notes)
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
                if (where := within(folder, str(written))) is not None:
                    images += self._images(folder, where)
                elif split == "test":
                    self.notes.add("The test split has no folder, and is left out", f"{file}: {written}")
                else:
                    raise DataError(f"There is no {folder.resolve()}/{written}, which {file} names.")
            found |= {split: images} if images else {}
        found = found or {"all": images_in(_inside(folder, "images") or folder)}
        if not found.get("train", found.get("all")):
            raise DataError(
                f"{folder.resolve()} has no images to train on: name their folder under 'train' in data.yaml."
            )
        points = content.get("kpt_shape")
        keypoints = 0
        if (
            isinstance(points, list)
            and len(points) == 2
            and all(re.fullmatch(r"\d{1,4}", str(side)) for side in points)
        ):
            keypoints = int(points[0]) * int(points[1])
        return read_yolo(found, names, keypoints, self.notes), list(names.values())

    @staticmethod
    def _guessed(folder: Path) -> dict[str, Path]:
        """Where the images of each split are, or a list of them, where nobody says."""
        images = _inside(folder, "images")
        found = by_split_name(sub_folders(folder)) | by_split_name(sub_folders(images) if images else ())
        lists = (file for file in folder.glob("*.txt") if re.match(r".*\.\w{2,5}\s*(\n|$)", _head(file)))
        found = by_split_name(lists) | found
        return {split: _inside(place, "images") or place for split, place in found.items()}

    @staticmethod
    def _settings(root: Path) -> Path | None:
        """The file in a folder that says what is where: ``data.yaml``, or the only one of its kind."""
        for ending in ("yaml", "yml", "data"):
            if (file := _inside(root, f"data.{ending}", f"dataset.{ending}", f"obj.{ending}")) is not None:
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
        """Darknet's settings, a line for each: ``names = obj.names``."""
        lines = [line.partition("=") for line in read_text(file, self.notes).splitlines()]
        return {key.strip(): value.strip() for key, _, value in lines if value.strip()}

    def _names(self, folder: Path, file: Path | None, content: dict[str, Any]) -> dict[int, str]:
        """The classes' names by their numbers."""
        given = content.get("names")
        lists = [within(folder, given)] if isinstance(given, str) and given.endswith((".names", ".txt")) else []
        if given and not lists and file is not None and (names := read_names(given, file)):
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
        return read_names(read_text(listed, self.notes).splitlines(), listed)

    def _images(self, folder: Path, place: Path) -> list[Path]:
        """The images in a folder, or named in a text file."""
        if place.is_dir():
            return images_in(place)
        finder = Finder(folder, [place.parent, folder], self.notes)
        lines = [line.strip() for line in read_text(place, self.notes).splitlines() if line.strip()]
        return [finder.find(line, place) or place.parent / parts_of(line)[-1] for line in lines]


@dataclass(kw_only=True, eq=False, repr=False)
class CSVDetection(BoxFiles):
    """A CSV or Parquet table with a row for each box.

    Args:
        root: the table. A column ``split`` with train, val and test, where there is one, says which is which; a column
            ``difficult`` marks boxes that are ignored. An image without objects has one row with empty cells.
        path_column: column with the images' paths, relative to the table or absolute; ``image_path``, ``filename``,
            ``image`` and ``ImageID`` are found too.
        label_column: column with the classes; ``class`` and ``LabelName`` are found too.
        box_columns: four columns; ``x_min`` or ``x1`` and so on are found too.
        box_format: ``xyxy`` for corners in pixels; ``xywh`` for x, y, width, height.
    """

    noun = "row"
    remedy = "Say so: --data.box_format xywh, or xyxy."

    path_column: str = "path"
    label_column: str = "label"
    box_columns: tuple[str, str, str, str] = COLUMNS
    box_format: Literal["xyxy", "xywh"] = "xyxy"
    masks: bool = field(default=False, init=False)  # a table has no outlines

    def read(self) -> tuple[dict[str, list[Record]], list[str]]:
        """See `BoxFiles.read`."""
        file = Path(self.root)
        table = read_table(file, "--data.root")
        names = [self.path_column, self.label_column, *self.box_columns]
        table = table.rename(columns=spelled(table, [*names, "split", "difficult"]))
        path_column, label_column, *box_columns = names
        columns = {path_column: "--data.path_column", label_column: "--data.label_column"}
        columns |= dict.fromkeys(box_columns, "--data.box_columns")
        check_table(table, file, columns, [path_column])
        table[label_column] = labels_of(table[label_column])
        splits = {
            name: read_rows(part, file, path_column, label_column, box_columns, self.notes)
            for name, part in by_split(table).items()
        }
        return splits, _names(splits)


def _names(splits: dict[str, list[Record]]) -> list[str]:
    """The classes that occur in training, sorted."""
    records = splits.get("train", splits.get("all", []))
    return sorted({box.label for record in records for box in record.boxes if box.label is not None})
