"""Image files with boxes, in the formats in which people keep them."""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import yaml
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray

from datamodules.annotations import (
    COLUMNS,
    SYNONYMS,
    Annotations,
    BoxFormat,
    Record,
    compiled,
    read_coco,
    read_rows,
    read_voc,
    read_yolo,
)
from datamodules.augmentations import Strength
from datamodules.base import DataError, Source
from datamodules.detection.base import DetectionDataModule, Mixing
from datamodules.images import EXTENSIONS, check_images, pieces, read_image, warn_of_shared
from datamodules.mixing import VISIBLE, Sample, selected
from datamodules.tables import by_split, check_table, read_table

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
            if "masks" in sample:
                masks = np.ascontiguousarray(sample["masks"][:, *part])
                kept &= masks.any((1, 2))
                sample |= {"masks": masks, "mask": sample["mask"][part]}
            sample = selected(sample | {"boxes": boxes}, kept)
        return sample | {"size": np.array(sample["image"].shape[:2], np.int64)}


class BoxFiles(DetectionDataModule):
    """Base of the formats: images and boxes are checked once, before training.

    Splits that are not there are drawn, always the same ones: 15 % of the images for the test and 15 % of the rest for
    validation where nothing is split, 15 % for validation where only that lacks. The images of a class are not all drawn.

    Args:
        root: the folder or file.
        in_chans: 3 to read the images as RGB, 1 as grey.
        masks: give masks too; every object needs an outline.
        tile: cut larger images into squares of this side, in pixels, which overlap by a fifth; for photographs from the
            air, whose objects are small. None leaves images whole.
        on_bad_file: what an unreadable image means: stop and name it, or go on without it, counted and listed.
        on_bad_box: what a box that cannot be used means: stop and name it, or cut it off where it reaches outside and
            drop it else, counted and listed.
        augmentation: strength of the changes made to training images.
        mixing: how often training samples are made of several pictures.
        image_size: side of the square images that the network sees, in pixels; None takes ``tile``, or 640.
        flip: mirror training images.
        batch_size: samples in a batch, for each process.
        num_workers: processes that read and augment; None chooses by the cores at hand.
        seed: seed of order and augmentation.
    """

    noun: ClassVar[str] = "object"
    remedy: ClassVar[str] = ""
    box_format: BoxFormat = "xyxy"

    def __init__(
        self,
        root: str,
        in_chans: Literal[1, 3] = 3,
        masks: bool = False,
        tile: int | None = None,
        on_bad_file: Literal["error", "skip"] = "error",
        on_bad_box: Literal["error", "drop"] = "error",
        augmentation: Strength = "standard",
        mixing: Mixing | None = None,
        image_size: int | None = None,
        flip: bool | None = None,
        batch_size: int = 16,
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        self.in_chans, self.masks = in_chans, masks
        super().__init__(augmentation, mixing, image_size or tile, flip, batch_size, num_workers, seed)
        if self.mixing.copy_paste and not masks:
            raise DataError("--data.mixing.copy_paste takes masks: --data.masks true, with outlines in the files.")
        self.root, self.tile, self.on_bad_file, self.on_bad_box = root, tile, on_bad_file, on_bad_box

    @property
    def name(self) -> str:  # type: ignore[override]
        """The folder's or file's name."""
        return Path(self.root).resolve().stem

    @property
    def preprocessing(self) -> dict[str, Any]:
        """See `VisionDataModule.preprocessing`; a model that learned from pieces is shown pieces."""
        return super().preprocessing | ({"tile": self.tile} if self.tile else {})

    def read(self) -> tuple[dict[str, list[Record]], list[str]]:
        """The images of each split (``all`` where nothing is split) and the names of the classes."""
        raise NotImplementedError

    @cached_property
    def _read(self) -> tuple[dict[str, list[Record]], list[str]]:
        if not Path(self.root).exists():
            raise DataError(f"There is no {Path(self.root).resolve()}: say where your images are with --data.root.")
        splits, names = self.read()
        if not any(box for records in splits.values() for record in records for box in record.boxes):
            raise DataError(f"{Path(self.root).resolve()} has no boxes, in {sum(map(len, splits.values()))} images.")
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
        if not any(Path(path).is_file() for path in paths):
            raise DataError(
                f"None of the {len(paths)} images is there; the first is {paths[0]}, named by {records[0].file}."
            )
        table, self.bad_files = check_images(paths, self.on_bad_file)
        sizes = table[["height", "width"]].to_numpy(np.int64)
        digests, good = table["digest"].to_numpy(dtype=np.str_), (table["error"] == "").to_numpy()
        for k in np.flatnonzero(good):
            said, seen = records[k].size, (int(sizes[k][0]), int(sizes[k][1]))
            if said is not None and said != seen:
                turned = " It is turned by its EXIF tag, which the boxes leave out." if said[::-1] == seen else ""
                raise DataError(
                    f"{records[k].file} says that {records[k].path} has {said[1]}×{said[0]} pixels, but it has "
                    f"{seen[1]}×{seen[0]}.{turned} Its boxes are of another picture: bring the two together."
                )
        parts: dict[str, Annotations] = {}
        start = 0
        for name, group in splits.items():
            rows = np.flatnonzero(good[start : start + len(group)]) + start
            start += len(group)
            kept = [records[k] for k in rows]
            parts[name], report = compiled(kept, names, self.box_format, self.on_bad_box, sizes[rows], digests[rows],
                                           self.noun, self.masks, self.remedy)  # fmt: skip
            if report:
                gone = sum(what == "dropped" for what in report.values())
                rank_zero_warn(
                    f"{gone} boxes that cannot be used were dropped, {len(report) - gone} were cut off at the edge; the "
                    f"first: {next(iter(report))}."
                )
                self.bad_files |= report
        if "all" in parts and self.undivided:
            return {"test": BoxSource(parts["all"], self.in_chans, self.tile)}
        self.drawn = "all" in parts
        if "all" in parts:
            parts["train"] = parts.pop("all")
            if len(parts["train"]) > 2:
                parts["train"], parts["test"] = _drawn(parts["train"])
        if "val" not in parts:
            parts["train"], parts["val"] = _drawn(parts["train"])
        files = {name: parts[name] for name in SYNONYMS if name in parts}
        warn_of_shared({name: (part.paths, part.digests) for name, part in files.items()})
        self._warn_of_rare(files["train"])
        return {name: BoxSource(part, self.in_chans, self.tile) for name, part in files.items()}

    def _warn_of_rare(self, train: Annotations) -> None:
        counts = np.bincount(train.labels[~train.ignore], minlength=len(self.label_names))
        empty = [name for name, count in zip(self.label_names, counts, strict=True) if not count]
        if empty:
            rank_zero_warn(
                f"No box to train on in class {empty[0]!r} ({len(empty)} of {len(counts)} classes are empty)."
            )


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

    ``root`` is a JSON file, whose images are split, or a folder with a file for each split: ``train.json``,
    ``annotations/instances_train2017.json`` or ``train/_annotations.coco.json``, and so for ``val`` and ``test``. Boxes are
    x, y, width, height; ``iscrowd`` is respected; outlines are polygons or run-length codes.
    """

    noun = "annotation"
    remedy = "Write 'bbox' as COCO does."
    box_format: BoxFormat = "xywh"

    def read(self) -> tuple[dict[str, list[Record]], list[str]]:
        """See `BoxFiles.read`."""
        root = Path(self.root)
        found: dict[str, Path] = {"all": root} if root.is_file() else {}
        if root.is_dir():
            for split, synonyms in SYNONYMS.items():
                shapes = (
                    "{}.json",
                    "annotations/instances_{}*.json",
                    "annotations/{}*.json",
                    "{}/_annotations.coco.json",
                )
                files = [
                    file for name in synonyms for shape in shapes for file in sorted(root.glob(shape.format(name)))
                ]
                found |= {split: files[0]} if files else {}
            if "train" not in found:
                raise DataError(
                    f"{root.resolve()} has neither train.json nor annotations/instances_train*.json: give such a folder, or "
                    "a JSON file, with --data.root."
                )
        splits: dict[str, list[Record]] = {}
        label_names: list[str] = []
        for split, file in found.items():
            splits[split], names = read_coco(file)
            label_names = label_names or names
        return splits, label_names


class VOCDetection(BoxFiles):
    """Annotations in Pascal VOC's XML, a file for each image.

    ``root`` is a folder with ``Annotations/``, ``JPEGImages/`` and lists ``ImageSets/Main/train.txt``, ``val.txt``,
    ``test.txt``; or with XML files and images side by side; or with such folders ``train/``, ``val/``, ``test/``.
    ``difficult`` is respected. An image without XML file is left out; one without objects is kept.
    """

    remedy = "Write <bndbox> as VOC does."
    box_format: BoxFormat = "voc"

    def read(self) -> tuple[dict[str, list[Record]], list[str]]:
        """See `BoxFiles.read`."""
        root = Path(self.root)
        folders = {s: root / n for s, names in SYNONYMS.items() for n in names if (root / n).is_dir()} or {"all": root}
        found = {}
        for split, folder in folders.items():
            place = folder / "Annotations" if (folder / "Annotations").is_dir() else folder
            found[split] = sorted(place.glob("*.xml"))
            if not found[split]:
                raise DataError(f"{place.resolve()} has no XML files: give a folder of Pascal VOC's with --data.root.")
        lists = {split: root / "ImageSets" / "Main" / f"{split}.txt" for split in SYNONYMS}
        if "all" in found and lists["train"].is_file():
            files = {file.stem: file for file in found.pop("all")}
            for split, listed in lists.items():
                stems = (
                    [
                        line.strip() if line.strip() in files else line.split()[0]
                        for line in listed.read_text().splitlines()
                        if line.strip()
                    ]
                    if listed.is_file()
                    else []
                )
                if missing := [stem for stem in stems if stem not in files]:
                    raise DataError(f"{listed} lists {missing[0]!r}, but there is no {missing[0]}.xml in Annotations.")
                found |= {split: [files[stem] for stem in stems]} if stems else {}
        splits = {split: read_voc(files) for split, files in found.items()}
        return splits, _names(splits)


class YOLODetection(BoxFiles):
    """Annotations in YOLO's text files, a line for each object: class, centre x, centre y, width, height as shares.

    ``root`` is a ``data.yaml`` with ``names`` and ``train``, ``val``, ``test`` (folders, lists of files), or the folder that
    has it; or a folder with ``classes.txt`` and ``images/train``, ``train/images`` or ``images``. Labels are in ``labels/``
    where images are in ``images/``, or beside them. A line with more numbers is a polygon. An image without labels has no
    objects, and is kept.
    """

    noun = "line"
    remedy = "Write them as YOLO does."
    box_format: BoxFormat = "yolo"

    def read(self) -> tuple[dict[str, list[Record]], list[str]]:
        """See `BoxFiles.read`."""
        root = Path(self.root)
        file = (
            root
            if root.is_file()
            else next((f for f in (root / "data.yaml", root / "dataset.yaml") if f.is_file()), None)
        )
        folder = root if root.is_dir() else root.parent
        content: Any = {}
        if file is not None:
            try:
                content = yaml.safe_load(file.read_text())
            except (OSError, ValueError, yaml.YAMLError) as error:
                raise DataError(f"{file} cannot be read as YAML: {error}.") from None
            folder = (
                folder / str(content.get("path", "")) if (folder / str(content.get("path", ""))).is_dir() else folder
            )
        names = content.get("names") or []
        if not names:
            listed = next((f for f in (folder / "classes.txt", folder / "labels" / "classes.txt") if f.is_file()), None)
            if listed is None:
                raise DataError(
                    f"{folder.resolve()} does not say what its classes are called: write a data.yaml with 'names', or a "
                    "classes.txt with a name a line."
                )
            names = listed.read_text().split("\n")
        names = (
            [names[key] for key in sorted(names)]
            if isinstance(names, dict)
            else [n.strip() for n in names if str(n).strip()]
        )
        found: dict[str, list[Path]] = {}
        for split, synonyms in SYNONYMS.items():
            given = next((content[name] for name in synonyms if content.get(name)), None)
            guesses = [guess for name in synonyms for guess in (f"images/{name}", f"{name}/images", f"{name}")]
            places = given if isinstance(given, list) else [given] if given else guesses
            images = [image for place in places for image in _images(folder, Path(place), must=given is not None)]
            found |= {split: images} if images else {}
        found = found or {"all": _images(folder, Path("images" if (folder / "images").is_dir() else "."), must=True)}
        if "train" not in found and "all" not in found:
            raise DataError(
                f"{folder.resolve()} has no images to train on: name their folder under 'train' in data.yaml."
            )
        return {split: read_yolo(images, names) for split, images in found.items()}, list(map(str, names))


def _images(folder: Path, place: Path, must: bool) -> list[Path]:
    """The images in a folder, or named in a text file; as Roboflow writes it, ``../train`` may mean ``train``."""
    where = next((p for p in (folder / place, folder / str(place).removeprefix("../")) if p.exists()), None)
    if where is None:
        if must:
            raise DataError(f"There is no {(folder / place).resolve()}, which the data's YAML file names.")
        return []
    if where.is_file():
        return [where.parent / line.strip() for line in where.read_text().splitlines() if line.strip()]
    return sorted(file for file in where.rglob("*") if file.suffix.lower() in EXTENSIONS and file.name[0] != ".")


class CSVDetection(BoxFiles):
    """A CSV or Parquet table with a row for each box.

    Args:
        root: the table. A column ``split`` with train, val and test, where there is one, says which is which; a column
            ``difficult`` marks boxes that are ignored. An image without objects has one row with empty cells.
        path_column: column with the images' paths, relative to the table or absolute; ``image_path`` is found too.
        label_column: column with the classes.
        box_columns: four columns.
        box_format: ``xyxy`` for corners in pixels; ``xywh`` for x, y, width, height.
        in_chans: 3 to read the images as RGB, 1 as grey.
        tile: cut larger images into squares of this side, in pixels, which overlap by a fifth. None leaves them whole.
        on_bad_file: what an unreadable image means: stop and name it, or go on without it, counted and listed.
        on_bad_box: what a box that cannot be used means: stop and name it, or cut it off where it reaches outside and
            drop it else, counted and listed.
        augmentation: strength of the changes made to training images.
        mixing: how often training samples are made of several pictures.
        image_size: side of the square images that the network sees, in pixels; None takes ``tile``, or 640.
        flip: mirror training images.
        batch_size: samples in a batch, for each process.
        num_workers: processes that read and augment; None chooses by the cores at hand.
        seed: seed of order and augmentation.
    """

    noun = "row"
    remedy = "Say so: --data.box_format xywh, or xyxy."

    def __init__(
        self,
        root: str,
        path_column: str = "path",
        label_column: str = "label",
        box_columns: tuple[str, str, str, str] = COLUMNS,
        box_format: Literal["xyxy", "xywh"] = "xyxy",
        in_chans: Literal[1, 3] = 3,
        tile: int | None = None,
        on_bad_file: Literal["error", "skip"] = "error",
        on_bad_box: Literal["error", "drop"] = "error",
        augmentation: Strength = "standard",
        mixing: Mixing | None = None,
        image_size: int | None = None,
        flip: bool | None = None,
        batch_size: int = 16,
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(root, in_chans, False, tile, on_bad_file, on_bad_box, augmentation, mixing, image_size, flip,
                         batch_size, num_workers, seed)  # fmt: skip
        self.path_column, self.label_column = path_column, label_column
        self.box_columns, self.box_format = box_columns, box_format

    def read(self) -> tuple[dict[str, list[Record]], list[str]]:
        """See `BoxFiles.read`."""
        file = Path(self.root)
        table = read_table(file, "--data.root")
        path_column = self.path_column
        if path_column not in table and "image_path" in table:
            path_column = "image_path"
        columns = {path_column: "--data.path_column", self.label_column: "--data.label_column"}
        columns |= dict.fromkeys(self.box_columns, "--data.box_columns")
        check_table(table, file, columns, [path_column])
        rows = by_split(table).items()
        splits = {name: read_rows(part, file, path_column, self.label_column, self.box_columns) for name, part in rows}
        return splits, _names(splits)


def _names(splits: dict[str, list[Record]]) -> list[str]:
    """The classes that occur in training, sorted."""
    return sorted({box.label for record in splits.get("train", splits.get("all", [])) for box in record.boxes})
