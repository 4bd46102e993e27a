"""Class maps in the formats in which people keep them: folders of masks, Pascal VOC, COCO."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import PIL.Image
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray

from datamodules.annotations import SYNONYMS
from datamodules.augmentations import Strength
from datamodules.base import DataError
from datamodules.detection import COCODetection
from datamodules.images import EXTENSIONS, check_images, read_image, warn_of_shared
from datamodules.segmentation.base import IGNORE, MOST, Pictures, SegmentationDataModule, Weighting, drawn

BLURRED = 64  # different unknown values in a mask that speak of a lossy file
NAMED = 300  # values of a mask that are remembered


@dataclass
class Classes:
    """What the values of a mask mean.

    Attributes:
        names: the classes'.
        numbers: of the values that pixels have the class, 255 for those that do not count. A colour has the value
            65536·red + 256·green + blue.
        coloured: whether masks are in colours.
        binary: all values but 0 are class 1.
    """

    names: list[str]
    numbers: dict[int, int] = field(default_factory=dict)
    coloured: bool = False
    binary: bool = False

    @cached_property
    def table(self) -> NDArray[np.uint8]:
        """The class of each value."""
        table = np.full(1 << (24 if self.coloured else 16), IGNORE, np.uint8)
        table[list(self.numbers)] = list(self.numbers.values())
        return table

    def apply(self, values: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Values to classes, uint8 of the same shape."""
        return (values > 0).astype(np.uint8) if self.binary else self.table[values]

    def shown(self, value: int) -> str:
        """A value as a person writes it."""
        return f"({value >> 16}, {value >> 8 & 255}, {value & 255})" if self.coloured else str(value)


def read_values(file: str, coloured: bool = False) -> NDArray[np.int64]:
    """The values of a mask's pixels: the numbers of an indexed or grey picture of any depth, or its colours.

    Args:
        file: the mask.
        coloured: read colours, as 65536·red + 256·green + blue.

    Returns:
        int64 H×W.

    Raises:
        DataError: it cannot be read, has numbers that are none of classes, or colours where numbers are wanted.
    """
    try:
        with PIL.Image.open(file) as image:
            if coloured:
                red, green, blue = np.moveaxis(np.asarray(image.convert("RGB"), np.int64), 2, 0)
                return (red << 16) + (green << 8) + blue
            values = np.asarray(image)
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise DataError(f"{file} cannot be read as a mask: {error}.") from None
    if values.ndim == 3:
        if values.shape[2] > 2 and (values[..., :1] != values[..., 1:3]).any():
            raise DataError(
                f"{file} is in colours, but nothing says which class a colour is: write classes.csv with the columns "
                "name, r, g, b."
            )
        values = values[..., 0]
    whole = values.astype(np.int64)
    if (whole != values).any() or whole.min() < 0 or whole.max() > 65535:
        raise DataError(f"{file} has values that are no numbers of classes, such as {values.max()}.")
    return whole


@dataclass
class _Mask:
    """What a look at a mask tells."""

    error: str = ""
    size: tuple[int, int] = (0, 0)
    values: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    digest: str = ""


def _inspect(file: str, coloured: bool) -> _Mask:
    try:
        values = read_values(file, coloured)
    except DataError as error:
        return _Mask(str(error))
    digest = hashlib.blake2b(Path(file).read_bytes(), digest_size=16).hexdigest()
    return _Mask("", values.shape, *np.unique(values, return_counts=True), digest)


class MaskPictures:
    """Image files with a mask file each.

    Args:
        paths: the images.
        masks: their masks.
        sizes: int64 N×2, height and width.
        classes: what the masks' values mean.
        channels: 3 to read RGB, 1 to read grey.
        digest: of the content.
        counts: pixels of each class, int64 256.
    """

    def __init__(
        self,
        paths: NDArray[np.str_],
        masks: NDArray[np.str_],
        sizes: NDArray[np.int64],
        classes: Classes,
        channels: int,
        digest: str,
        counts: NDArray[np.int64],
    ) -> None:
        self.paths, self.masks, self.sizes, self.classes, self.channels = paths, masks, sizes, classes, channels
        self.digest, self.counts = digest, counts

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = read_image(str(self.paths[index]), self.channels)
        mask = self.classes.apply(read_values(str(self.masks[index]), self.classes.coloured))
        if image.shape[:2] != mask.shape:
            raise DataError(f"{self.paths[index]} or its mask changed since they were checked: start again.")
        return {"image": image, "mask": mask}


class _MaskFiles(SegmentationDataModule):
    """Shared by the modules that read masks from files: they are looked at once, before training."""

    on_bad_file: Literal["error", "skip"] = "error"
    binary: bool = False
    wanted = "{mask}"  # where a mask is looked for

    def pairs(self) -> dict[str, list[tuple[Path, Path | None]]]:
        """Images with their masks by split, or ``all``."""
        raise NotImplementedError

    def given(self) -> Classes | None:
        """The classes as far as they are known without looking at masks."""
        raise NotImplementedError

    @cached_property
    def _found(self) -> tuple[dict[str, Pictures], list[str]]:
        pairs = self.pairs()
        everything = [(split, image, mask) for split, part in pairs.items() for image, mask in part]
        without = [str(image) for _, image, mask in everything if mask is None]
        if without:
            shown = "; ".join([*without[:3], *["…"] * (len(without) > 3)])
            raise DataError(
                f"{len(without)} of {len(everything)} images have no mask {self.wanted}: {shown}. An image with nothing in it "
                "needs a mask too, all background; move those without aside."
            )
        paths = np.array([str(image) for _, image, _ in everything], np.str_)
        table, self.bad_files = check_images(paths, self.on_bad_file)
        good = np.flatnonzero((table["error"] == "").to_numpy())
        groups = np.array([split for split, *_ in everything], np.str_)[good]
        paths, masks = paths[good], np.array([str(mask) for *_, mask in everything], np.str_)[good]
        sizes = table[["height", "width"]].to_numpy(np.int64)[good]
        digests = table["digest"].to_numpy(np.str_)[good]
        given = self.given()
        coloured = given is not None and given.coloured
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            looks = list(pool.map(lambda file: _inspect(file, coloured), masks.tolist()))
        classes = given or self._guessed(masks, looks)
        self._check(paths, masks, sizes, looks, classes)
        parts: dict[str, Sequence[int]] = {
            split: np.flatnonzero(groups == split).tolist() for split in pairs if split != "all"
        }
        if "all" in pairs:
            parts = drawn(len(paths))
        elif "val" not in parts:
            parts["train"], parts["val"] = _spared(parts["train"])
        warn_of_shared({name: (paths[list(rows)], digests[list(rows)]) for name, rows in parts.items()})
        result: dict[str, Pictures] = {}
        for name in (split for split in SYNONYMS if split in parts):
            rows = list(parts[name])
            counts = np.zeros(256, np.int64)
            for i in rows:
                np.add.at(counts, classes.apply(looks[i].values), looks[i].counts)
            content = " ".join(
                [*digests[rows], *(looks[i].digest for i in rows), repr(sorted(classes.numbers.items()))]
            )
            digest = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
            result[name] = MaskPictures(paths[rows], masks[rows], sizes[rows], classes, self.in_chans, digest, counts)
        empty = [name for name, n in zip(classes.names, result["train"].counts, strict=False) if not n]  # type: ignore[attr-defined]
        if empty:
            rank_zero_warn(
                f"No pixel to train on in class {empty[0]!r} ({len(empty)} of {len(classes.names)} are empty)."
            )
        return result, classes.names

    def _guessed(self, masks: NDArray[np.str_], looks: Sequence[_Mask]) -> Classes:
        """Classes named after the values that are there."""
        if self.binary:
            return Classes(["background", "foreground"], binary=True)
        for file, look in zip(masks, looks, strict=True):
            if len(look.values) > BLURRED:
                raise DataError(self._blurred(str(file), look))
        values = sorted({int(value) for look in looks for value in look.values})
        if values == [0, 255]:
            raise DataError(
                f"The masks of {self.name} have the values 0 and 255 only, and 255 stands for pixels that do not count. If it "
                "is your foreground: --data.binary true."
            )
        known = [value for value in values if value != IGNORE]
        if known and known[-1] >= MOST:
            raise DataError(
                f"The masks of {self.name} have values up to {known[-1]}, more than {MOST} classes: {self._remedy}"
            )
        count = (known[-1] if known else 0) + 1
        return Classes([str(k) for k in range(count)], {k: k for k in range(count)})

    _remedy = (
        "write classes.csv with the columns name and value; or, if each object has a number of its own, make all of them one "
        "class: --data.binary true."
    )

    def _blurred(self, file: str, look: _Mask) -> str:
        lossy = Path(file).suffix.lower() in (".jpg", ".jpeg")
        why = (
            "it is a JPEG, which changes the values of pixels. Save masks as PNG or TIFF"
            if lossy
            else "was it saved as JPEG, or smoothed in resizing? Both change the values of pixels"
        )
        return (
            f"{file} has {len(look.values)} different values, too many for classes: {why}. If each object has a number of its "
            "own, make all of them one class: --data.binary true."
        )

    def _check(
        self, paths: NDArray[np.str_], masks: NDArray[np.str_], sizes: NDArray[np.int64], looks: Sequence[_Mask],
        classes: Classes,
    ) -> None:  # fmt: skip
        """Refuses masks that cannot be used."""
        faults = []
        for path, file, (height, width), look in zip(paths, masks, sizes, looks, strict=True):
            unknown = (
                [] if classes.binary else [v for v in look.values.tolist() if v not in classes.numbers and v != IGNORE]
            )
            if classes.coloured:
                unknown = [v for v in look.values.tolist() if v not in classes.numbers]
            if look.error:
                faults.append(look.error)
            elif look.size != (height, width):
                turned = (
                    " The image is turned by its EXIF tag, the mask is not." if look.size == (width, height) else ""
                )
                faults.append(
                    f"{file} has {look.size[1]}×{look.size[0]} pixels, its image {path} has {width}×{height}.{turned}"
                )
            elif len(unknown) > BLURRED:
                faults.append(self._blurred(file, look))
            elif unknown:
                shown = ", ".join([*map(classes.shown, unknown[:5]), *["…"] * (len(unknown) > 5)])
                kind = "colours" if classes.coloured else "values"
                known = [f"{classes.shown(v)} {classes.names[k]}" for v, k in classes.numbers.items() if k != IGNORE][
                    :6
                ]
                share = look.counts[np.isin(look.values, unknown)].sum() / look.counts.sum()
                faults.append(
                    f"{file} has {kind} that stand for no class: {shown} ({share:.1%} of its pixels). Known are "
                    f"{', '.join(known)}, …; add the others to classes.csv, or give them 255, which does not count."
                )
        if faults:
            more = f" So have {len(faults) - 1} more masks." if len(faults) > 1 else ""
            raise DataError(f"{faults[0]}{more}")

    @property
    def name(self) -> str:  # type: ignore[override]
        """The folder's name."""
        return Path(self.root).resolve().name  # type: ignore[attr-defined]

    @property
    def label_names(self) -> list[str]:
        """See `SegmentationDataModule.label_names`."""
        return self._found[1]

    def pictures(self) -> dict[str, Pictures]:
        """See `SegmentationDataModule.pictures`."""
        return self._found[0]


def _spared(rows: Sequence[int]) -> tuple[list[int], list[int]]:
    """The rest and 15 % for validation, always the same."""
    if len(rows) < 2:
        raise DataError("One picture is too few to train on and to validate with: add more, or a folder val.")
    order = np.random.default_rng(0).permutation(rows)
    share = max(1, round(0.15 * len(rows)))
    return sorted(order[share:].tolist()), sorted(order[:share].tolist())


class MaskFolder(_MaskFiles):
    """A folder of images and a folder of masks of the same names.

    ``root`` has ``images/`` and ``masks/``; or ``train/``, ``val/``, ``test/`` with such two folders each; or ``images/``
    and ``masks/`` with ``train/``, ``val/``, ``test/`` each. What is missing of validation and test is drawn from the rest.

    Masks are PNG (grey or indexed), TIFF (8 or 16 bits) or anything lossless, whose pixels are numbers of classes; 255 does
    not count. ``root/classes.csv`` names the classes, a row each in their order: ``name`` alone, or with ``value``, or with
    ``r``, ``g``, ``b`` for masks in colours; a class called ``ignore`` or ``void`` does not count. Without it classes are
    called by their numbers.

    Args:
        root: the folder.
        images: name of the folders of images.
        masks: name of the folders of masks.
        mask_suffix: what a mask's name has after that of its image, such as ``_mask``.
        binary: all values but 0 are one class, foreground.
        in_chans: 3 to read the images as RGB, 1 as grey.
        on_bad_file: what an unreadable image means: stop and name it, or go on without it, counted and listed.
        augmentation: strength of the changes made to training images.
        class_weighting: what the classes' pixels weigh in the loss; see `SegmentationDataModule`.
        image_size: side of the square windows that the network sees, in pixels.
        flip: mirror training images.
        turn: turn training images by quarters too, where pictures have no upper side.
        batch_size: samples in a batch, for each process.
        num_workers: processes that read and augment; None chooses by the cores at hand.
        seed: seed of order and augmentation.
    """

    def __init__(
        self,
        root: str,
        images: str = "images",
        masks: str = "masks",
        mask_suffix: str = "",
        binary: bool = False,
        in_chans: Literal[1, 3] = 3,
        on_bad_file: Literal["error", "skip"] = "error",
        augmentation: Strength = "standard",
        class_weighting: Weighting = "none",
        image_size: int = 256,
        flip: bool | None = None,
        turn: bool = False,
        batch_size: int = 16,
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(augmentation, class_weighting, image_size, flip, turn, batch_size, num_workers, seed)
        self.root, self.images, self.masks, self.mask_suffix = root, images, masks, mask_suffix
        self.binary, self.in_chans, self.on_bad_file = binary, in_chans, on_bad_file
        self.wanted = f"of the same name{f' and {mask_suffix}' * bool(mask_suffix)} in {masks}/"

    def given(self) -> Classes | None:
        """See `_MaskFiles.given`; from ``classes.csv``."""
        file = Path(self.root, "classes.csv")
        if not file.is_file() or self.binary:
            return None
        try:
            table = pd.read_csv(file, skipinitialspace=True, comment="#").rename(
                columns=lambda c: str(c).strip().lower()
            )
            colours = {"r", "g", "b"} <= set(table)
            names = table["name"].astype(str).str.strip().tolist()
            if colours:
                red, green, blue = (table[channel].astype(int) for channel in "rgb")
                values = ((red * 256 + green) * 256 + blue).tolist()
            else:
                values = table["value"].astype(int).tolist() if "value" in table else list(range(len(names)))
        except (KeyError, ValueError, OSError, pd.errors.ParserError) as error:
            raise DataError(
                f"{file} is not a table of classes ({error}): its columns are name, or name and value, or name, r, g, b."
            ) from None
        if len(set(values)) < len(values):
            raise DataError(f"{file} gives two classes the same value.")
        if any(not 0 <= value < 1 << (24 if colours else 16) for value in values):
            raise DataError(f"{file}: values of classes are from 0 to 65535, channels of colours from 0 to 255.")
        counted = [name for name in names if name.lower() not in ("ignore", "void")]
        numbers = {v: counted.index(n) if n in counted else IGNORE for v, n in zip(values, names, strict=True)}
        return Classes(counted, numbers, colours)

    def pairs(self) -> dict[str, list[tuple[Path, Path | None]]]:
        """See `_MaskFiles.pairs`."""
        root = Path(self.root)
        if not root.is_dir():
            raise DataError(f"There is no folder {root.resolve()}: give the folder of your images with --data.root.")
        places = {"all": (root / self.images, root / self.masks)}
        for split, synonyms in SYNONYMS.items():
            for name in synonyms:
                for pair in ((root / name / self.images, root / name / self.masks),
                             (root / self.images / name, root / self.masks / name)):  # fmt: skip
                    if pair[0].is_dir():
                        places[split] = pair
        if "train" in places:
            del places["all"]
        elif not places["all"][0].is_dir():
            raise DataError(
                f"{root.resolve()} has neither {self.images}/ nor train/{self.images}/: name the folders of images and masks "
                "with --data.images and --data.masks."
            )
        found: dict[str, list[tuple[Path, Path | None]]] = {}
        for split, (images, masks) in places.items():
            if not masks.is_dir():
                raise DataError(f"There is no folder {masks.resolve()} of masks: name it with --data.masks.")
            known = {file.stem: file for file in sorted(masks.iterdir()) if file.suffix.lower() in EXTENSIONS}
            files = sorted(
                file for file in images.iterdir() if file.suffix.lower() in EXTENSIONS and file.name[0] != "."
            )
            if not files:
                raise DataError(f"{images.resolve()} has no images; those read are {', '.join(EXTENSIONS)}.")
            found[split] = [(file, known.get(file.stem + self.mask_suffix)) for file in files]
        return found


class VOCSegmentation(_MaskFiles):
    """Pascal VOC's segmentation (Everingham et al. 2010): ``JPEGImages/``, indexed PNG files in ``SegmentationClass/``,
    and lists ``ImageSets/Segmentation/train.txt``, ``val.txt`` and, where there is one, ``test.txt``.

    Args:
        root: the folder, as ``VOCdevkit/VOC2012``.
        on_bad_file: what an unreadable image means: stop and name it, or go on without it, counted and listed.
        augmentation: strength of the changes made to training images.
        class_weighting: what the classes' pixels weigh in the loss; see `SegmentationDataModule`.
        image_size: side of the square windows that the network sees, in pixels.
        flip: mirror training images.
        batch_size: samples in a batch, for each process.
        num_workers: processes that read and augment; None chooses by the cores at hand.
        seed: seed of order and augmentation.
    """

    names: ClassVar[list[str]] = [
        "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
        "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
    ]  # fmt: skip
    wanted = "in SegmentationClass/"

    def __init__(
        self,
        root: str,
        on_bad_file: Literal["error", "skip"] = "error",
        augmentation: Strength = "standard",
        class_weighting: Weighting = "none",
        image_size: int = 384,
        flip: bool | None = None,
        batch_size: int = 16,
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(augmentation, class_weighting, image_size, flip, False, batch_size, num_workers, seed)
        self.root, self.on_bad_file = root, on_bad_file

    def given(self) -> Classes:
        """See `_MaskFiles.given`; the 20 classes, with the background first."""
        return Classes(self.names, {k: k for k in range(len(self.names))})

    def pairs(self) -> dict[str, list[tuple[Path, Path | None]]]:
        """See `_MaskFiles.pairs`."""
        root, found = Path(self.root), {}
        for split in SYNONYMS:
            listed = root / "ImageSets" / "Segmentation" / f"{split}.txt"
            if not listed.is_file():
                continue
            stems = [line.strip() for line in listed.read_text().splitlines() if line.strip()]
            masks = [root / "SegmentationClass" / f"{stem}.png" for stem in stems]
            found[split] = [
                (root / "JPEGImages" / f"{stem}.jpg", mask if mask.is_file() else None)
                for stem, mask in zip(stems, masks, strict=True)
            ]
        if "train" not in found:
            raise DataError(
                f"{root.resolve()} has no ImageSets/Segmentation/train.txt: give Pascal VOC's folder, such as "
                "VOCdevkit/VOC2012, with --data.root."
            )
        return found


class _BoxPictures:
    """Pictures of a source with boxes and masks.

    Args:
        source: a `datamodules.detection.files.BoxSource` with masks.
    """

    def __init__(self, source: Any) -> None:
        self.source, self.sizes, self.paths = source, source.annotations.sizes, source.paths

    @property
    def digest(self) -> str:
        """See `Source.digest`."""
        return self.source.digest

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[index]


class COCOSegmentation(SegmentationDataModule):
    """Objects with outlines in COCO's JSON, polygons or run-length codes, as a class map; class 0 is the background.

    Where objects overlap, the pixel is of the one that comes first in the file; crowds do not count. ``root`` is as for
    `COCODetection`.

    Args:
        root: a JSON file, whose images are split, or a folder with one for each split.
        in_chans: 3 to read the images as RGB, 1 as grey.
        on_bad_file: what an unreadable image means: stop and name it, or go on without it, counted and listed.
        on_bad_box: what an object that cannot be used means: stop and name it, or drop it, counted and listed.
        augmentation: strength of the changes made to training images.
        class_weighting: what the classes' pixels weigh in the loss; see `SegmentationDataModule`.
        image_size: side of the square windows that the network sees, in pixels.
        flip: mirror training images.
        turn: turn training images by quarters too, where pictures have no upper side.
        batch_size: samples in a batch, for each process.
        num_workers: processes that read and augment; None chooses by the cores at hand.
        seed: seed of order and augmentation.
    """

    def __init__(
        self,
        root: str,
        in_chans: Literal[1, 3] = 3,
        on_bad_file: Literal["error", "skip"] = "error",
        on_bad_box: Literal["error", "drop"] = "error",
        augmentation: Strength = "standard",
        class_weighting: Weighting = "none",
        image_size: int = 384,
        flip: bool | None = None,
        turn: bool = False,
        batch_size: int = 16,
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(augmentation, class_weighting, image_size, flip, turn, batch_size, num_workers, seed)
        self.root, self.in_chans = root, in_chans
        self._boxes = COCODetection(root, in_chans, True, on_bad_file=on_bad_file, on_bad_box=on_bad_box)

    @property
    def name(self) -> str:  # type: ignore[override]
        """See `COCODetection.name`."""
        return self._boxes.name

    @property
    def label_names(self) -> list[str]:
        """The background, and the names of the categories."""
        return ["background", *self._boxes.label_names]

    def pictures(self) -> dict[str, Pictures]:
        """See `SegmentationDataModule.pictures`."""
        sources = self._boxes.sources
        self.bad_files = self._boxes.bad_files
        return {name: _BoxPictures(source) for name, source in sources.items()}
