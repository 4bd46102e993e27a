"""Semantic-segmentation data sets: folders of masks, Pascal VOC, COCO."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from typing_extensions import override

from datamodules.annotated.boxes import BoxSource
from datamodules.annotated.readers.coco import COCODetection
from datamodules.annotated.readers.masks import (
    BLURRED,
    TABLES,
    Classes,
    Look,
    are_numbers,
    blurred,
    by_order,
    guessed,
    looks,
    read_classes,
    read_values,
    voc_classes,
)
from datamodules.annotated.readers.pairing import by_stem, files_below, matched
from datamodules.annotated.sample import IGNORE
from datamodules.annotated.segmentation import SegmentationDataModule, WindowSize
from datamodules.checking import warn_of_shared
from datamodules.decoded import ImageFiles
from datamodules.digests import digest_of
from datamodules.errors import DataError, listed
from datamodules.files import Folder, shards_at
from datamodules.finding import child
from datamodules.images import EXTENSIONS, Reduction, folded, images_in, sub_folders, turned
from datamodules.loading import Sample
from datamodules.options import Own, Reading
from datamodules.paths import Member, Paths
from datamodules.shard_index import file_beside
from datamodules.splits import by_split_name
from datamodules.tables import text_of

if TYPE_CHECKING:
    from datamodules.shards import ShardSet

TOGETHER = "_mask"  # suffix of masks in the folder of the images, as Roboflow writes them
MASKED = ("masks", "mask", "annot", "labels")  # names of a folder of masks next to one of images


@dataclass(eq=False)
class MaskPictures:
    """Image files with a mask file each.

    Args:
        images: image files.
        masks: their mask files.
        classes: meaning of the masks' values.
        digest: digest of the content.
        counts: number of pixels of each class, int64 256.
    """

    images: ImageFiles
    masks: Paths
    classes: Classes
    digest: str
    counts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def paths(self) -> Paths:
        """Paths of the images."""
        return self.images.paths

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Height and width, int64 N×2."""
        return self.images.sizes

    def reduced(self, reduction: Reduction) -> "MaskPictures":
        """Returns the same images, cached if requested; see `ImageFiles`."""
        return replace(self, images=self.images.reduced(reduction))

    def __getitem__(self, index: int) -> Sample:
        image = np.require(self.images[index], requirements="W")
        mask = self.classes.apply(read_values(self.masks.at(index), self.classes.kind))
        if image.shape[:2] != mask.shape:
            raise DataError(f"{self.paths[index]} or its mask changed since they were checked: start again.")
        return {"image": image, "mask": mask}


@dataclass(kw_only=True, eq=False, repr=False)
class _MaskFiles(Folder, SegmentationDataModule):
    """Base class of the modules that read mask files, which are checked before training.

    Args:
        root: the folder; or tar files of pictures, each with a mask beside it, as for `Shards`.
    """

    binary = False
    wanted = "{mask}"  # where masks are searched, for messages

    def pairs(self) -> dict[str, list[tuple[Path, Path | None]]]:
        """Returns pairs of image and mask by split, or ``all``."""
        raise NotImplementedError

    def given(self) -> Classes | None:
        """Returns the classes if they are known without reading masks."""
        raise NotImplementedError

    @cached_property
    def _shards(self) -> "ShardSet | None":
        return shards_at(self.root)

    def _files(self) -> tuple[NDArray[np.str_], Paths, Paths]:
        """Split of each image, or ``all``; the images; and their masks."""
        if self._shards is not None:
            return self._shards.splits.astype(np.str_), self._shards.members, self._shards.masks
        everything = [(split, image, mask) for split, part in self.pairs().items() for image, mask in part]
        without = [str(image) for _, image, mask in everything if mask is None]
        if without:
            shown = "; ".join([*without[:3], *["…"] * (len(without) > 3)])
            raise DataError(
                f"{len(without)} of {len(everything)} images have no mask {self.wanted}: {shown}. An image with "
                "nothing in it needs a mask too, all background. Move images without a mask elsewhere."
            )
        splits, images, masks = zip(*everything, strict=True)
        return np.array(splits, np.str_), Paths.of(map(str, images)), Paths.of(map(str, masks))

    def _classes(self) -> Classes | None:
        """Meaning of the masks' values, if it is known without reading them."""
        if self.binary:
            return Classes(["background", "foreground"], kind="binary")
        if self._shards is None:
            return self.given()
        file = file_beside(self._shards.shards, *TABLES)
        return None if file is None else read_classes(file)

    @cached_property
    def _found(self) -> tuple[dict[str, MaskPictures], list[str]]:
        splits, paths, masks = self._files()
        table = self.looked_at(paths)
        good = np.flatnonzero((table["error"] == "").to_numpy())
        groups, paths, masks = splits[good], paths[good], masks[good]
        files = [masks.at(k) for k in range(len(masks))]
        sizes = table[["height", "width"]].to_numpy(np.int64)[good]
        digests = table["digest"].to_numpy(np.str_)[good]
        given = self._classes()
        given = None if given is None else by_order(given, files)
        seen = looks(files, given.kind if given else "numbers")
        self._check_files(paths, files, sizes, seen)
        classes = given or guessed(self.title, files, seen)
        self._check_values(files, seen, classes)
        parts = self._divided({split: np.flatnonzero(groups == split) for split in dict.fromkeys(splits.tolist())})
        warn_of_shared({name: (paths[rows], digests[rows]) for name, rows in parts.items()})
        images = ImageFiles(paths, digests, sizes, self.reading, self.cache)
        result: dict[str, MaskPictures] = {}
        for name, rows in parts.items():
            counts = np.zeros(256, np.int64)
            for one in (seen[i] for i in rows):
                np.add.at(counts, classes.apply(one.values), one.counts)
            content = " ".join([*digests[rows], *(seen[i].digest for i in rows), repr(sorted(classes.numbers.items()))])
            digest = digest_of(content.encode())
            result[name] = MaskPictures(images[rows], masks[rows], classes, digest, counts)
        if "train" not in result:
            return result, classes.names
        empty = [name for name, n in zip(classes.names, result["train"].counts, strict=False) if not n]
        if len(classes.names) - len(empty) < 2:
            there = next((name for name in classes.names if name not in empty), None)
            raise DataError(
                f"The masks to train on have {f'no class but {there!r}' if there else 'no pixel that counts'} in all of their "
                f"{len(parts['train'])} pictures: there is nothing to tell apart. Are these the masks? Add pictures of another class."
            )
        if empty:
            rank_zero_warn(
                f"No pixel to train on in class {empty[0]!r} ({len(empty)} of {len(classes.names)} are empty)."
            )
        return result, classes.names

    def _divided(self, parts: dict[str, NDArray[np.intp]]) -> dict[str, NDArray[np.intp]]:
        """Divides the images into splits; missing ones are 15 % of the images, drawn with a fixed seed."""
        whole, share = "all" if "all" in parts else "train", 0
        if whole in parts and "val" not in parts and not (whole == "all" and self.undivided):
            count = len(parts[whole])
            if count < (3 if whole == "all" else 2):
                raise DataError(
                    f"{count} {'picture is' if count == 1 else 'pictures are'} too few to draw some for validation"
                    f"{' and test' * (whole == 'all')}: add more, or name splits."
                )
            parts[whole], share = np.random.default_rng(0).permutation(parts[whole]), max(1, round(0.15 * count))

        def draw(rows: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
            return rows[share:], rows[:share]

        divided = self.divide(parts, draw, draw)
        return {name: np.sort(rows) for name, rows in divided.items()}

    @staticmethod
    def _check_files(
        paths: Paths, masks: Sequence[str | Member], sizes: NDArray[np.int64], looks: Sequence[Look]
    ) -> None:
        """Refuses masks that are unreadable or differ in size from their images."""
        faults = []
        for k, (path, file, (height, width), one) in enumerate(zip(paths, masks, sizes.tolist(), looks, strict=True)):
            if one.error:
                faults.append(one.error)
            elif one.size != (height, width):
                lies = one.size == (width, height)
                why = ""
                if lies and turned(paths.at(k)):
                    why = " The image is rotated by its EXIF tag, the mask is not."
                elif lies:
                    why = " One of the two lies on its side."
                faults.append(
                    f"{file} has {one.size[1]}×{one.size[0]} pixels, its image {path} has {width}×{height}.{why}"
                )
        _refuse(faults)

    @staticmethod
    def _check_values(masks: Sequence[str | Member], looks: Sequence[Look], classes: Classes) -> None:
        """Refuses masks with values that belong to no class."""
        faults = []
        for file, one in zip(masks, looks, strict=True):
            unknown = classes.unknown(one.values.tolist())
            if len(unknown) > BLURRED:
                faults.append(blurred(file, len(one.values)))
            elif unknown:
                shown = ", ".join([*map(classes.shown, unknown[:5]), *["…"] * (len(unknown) > 5)])
                known = [f"{classes.shown(v)} {classes.names[k]}" for v, k in classes.numbers.items() if k != IGNORE]
                share = one.counts[np.isin(one.values, unknown)].sum() / one.counts.sum()
                faults.append(
                    f"{file} has {classes.kind if classes.kind == 'colours' else 'values'} that stand for no class: {shown} "
                    f"({share:.1%} of its pixels). Known are {', '.join(known[:6])}, …; add the others to the table of classes, "
                    "or give them a row with the name ignore, which does not count."
                )
        _refuse(faults)

    @cached_property
    @override
    def label_names(self) -> list[str]:
        return self._found[1]

    @override
    def pictures(self) -> dict[str, MaskPictures]:
        return self._found[0]


def _refuse(faults: Sequence[str]) -> None:
    if faults:
        more = f" So have {len(faults) - 1} more masks." if len(faults) > 1 else ""
        raise DataError(f"{faults[0]}{more}")


def _place(folder: Path, name: str) -> Path:
    """Finds a sub-folder, ignoring case."""
    return child(folder, name) or folder / name


@dataclass(kw_only=True, eq=False, repr=False)
class MaskFolder(_MaskFiles):
    """A folder of images and a folder of masks with the same names.

    ``root`` has ``images/`` and ``masks/``; or ``train/``, ``val/``, ``test/`` with these two folders each; or
    ``images/`` and ``masks/`` with ``train/``, ``val/``, ``test/`` each; or ``train_images/``, ``train_masks/``, …; or
    ``train/``, … with images and masks in the same folder, as ``a.jpg`` and ``a_mask.png``. Missing validation and test
    splits are drawn from the rest. `pairing.matched` pairs masks with images.

    Masks are PNG (grey or indexed), TIFF (8 or 16 bits) or another lossless format, whose pixels are class indices; 255
    is ignored; see `masks.read_values`. A table of classes in ``root`` or with the masks has their names, or colours;
    see `masks.read_classes`. Without it, classes are named by their indices.

    Args:
        images: name of the folders of images.
        masks: name of the folders of masks.
        mask_suffix: suffix of the mask's name after the image's, such as ``_mask``; detected by default.
        binary: treat all non-zero values as one class, foreground.
    """

    images: str = "images"
    masks: str = "masks"
    mask_suffix: str = ""
    binary: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        also = f" and {self.mask_suffix}" if self.mask_suffix else ""
        self.wanted = f"of the same name{also} in {self.masks}/"

    def given(self) -> Classes | None:
        """See `_MaskFiles.given`; from a class table in the folder or beside the masks."""
        folders = [Path(self.root), *dict.fromkeys(masks for _, masks in self._places.values())]
        file = next((folder / name for folder in folders for name in TABLES if (folder / name).is_file()), None)
        return None if file is None else read_classes(file)

    @cached_property
    def _places(self) -> dict[str, tuple[Path, Path]]:
        """Image and mask folders of each split, or of ``all``; the same folder if they lie together."""
        root = Path(self.root)
        if not root.is_dir():
            raise DataError(f"There is no folder {root.resolve()}: give the folder of your images with --data.root.")
        pictures, masks = self.images, self.masks
        places: dict[str, tuple[Path, Path]] = {}
        for above in (place for place in (root, _place(root, pictures)) if place.is_dir()):
            for split, folder in by_split_name(sub_folders(above)).items():
                start = folder.name.removesuffix(pictures)
                beside = (root / f"{start}{join}{word}" for join in ("", "_", "-") for word in (masks, *MASKED))
                pairs = (
                    (_place(folder, pictures), _place(folder, masks)),
                    (_place(root, pictures) / folder.name, _place(root, masks) / folder.name),
                    (folder, next((place for place in beside if place.is_dir()), folder)),
                )
                found = next((pair for pair in pairs if pair[0].is_dir() and self._has_masks(*pair)), None)
                places |= {split: found} if found and split not in places else {}
        if "train" not in places:
            whole = (_place(root, pictures), _place(root, masks))
            if not whole[0].is_dir():
                raise DataError(
                    f"{root.resolve()} has neither {pictures}/ nor train/{pictures}/: name the folders of images and masks "
                    "with --data.images and --data.masks."
                )
            places = {"train": whole, **places} if places else {"all": whole}
        return places

    def _has_masks(self, images: Path, masks: Path) -> bool:
        """Whether a folder has images, and masks beside them if they should be there."""
        suffix = self.mask_suffix or TOGETHER
        return any(images != masks or file.stem.endswith(suffix) for file in images_in(images))

    @override
    def pairs(self) -> dict[str, list[tuple[Path, Path | None]]]:
        found: dict[str, list[tuple[Path, Path | None]]] = {}
        places = {folder for pair in self._places.values() for folder in pair}
        for split, (images, masks) in self._places.items():
            if not masks.is_dir() and split != "test":
                there = sorted(p.name for p in masks.parent.iterdir() if p.is_dir()) if masks.parent.is_dir() else []
                raise DataError(
                    f"There is no folder {masks.resolve()} of masks: name it with --data.masks"
                    f"{f' ({listed(there)} are there)' if there else ''}."
                )
            files, known = files_below(images, places), files_below(masks, places)
            suffix = self.mask_suffix or TOGETHER * (images == masks)
            if images == masks:
                known = [file for file in known if file.stem.endswith(suffix)]
                files = [file for file in files if not file.stem.endswith(suffix)]
            if not files:
                raise DataError(f"{images.resolve()} has no images in a supported format: {', '.join(EXTENSIONS)}.")
            if split == "test" and not known:
                rank_zero_warn(f"Left out: the {len(files)} images of the test split, which has no masks.")
                continue
            found[split] = matched(files, known, images, masks, suffix)
        return found


@dataclass(kw_only=True, eq=False, repr=False)
class VOCSegmentation(_MaskFiles):
    """Pascal VOC segmentation (Everingham et al. 2010): ``JPEGImages/``, PNG files in ``SegmentationClass/``, indexed
    or in VOC's colours, and lists ``ImageSets/Segmentation/train.txt``, ``val.txt`` and optionally ``test.txt``;
    without ``train.txt``, one list of all, such as CVAT's ``default.txt``. ``labelmap.txt`` may define other classes
    and colours.

    Args:
        root: the folder, as ``VOCdevkit/VOC2012``.
    """

    names: ClassVar[list[str]] = [
        "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
        "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
    ]  # fmt: skip
    wanted = "in SegmentationClass/"

    image_size: Own[WindowSize] = 384

    def given(self) -> Classes:
        """See `_MaskFiles.given`; from ``labelmap.txt``, or VOC's 20 classes after the background."""
        file = Path(self.root, "labelmap.txt")
        if file.is_file():
            return read_classes(file)
        masks = by_stem(Path(self.root, "SegmentationClass")).values()
        if are_numbers((str(mask) for mask in masks), indexed=True):
            return Classes(self.names, {k: k for k in range(len(self.names))})
        return voc_classes(self.names)

    @override
    def pairs(self) -> dict[str, list[tuple[Path, Path | None]]]:
        root = Path(self.root)
        lists = sorted((root / "ImageSets" / "Segmentation").glob("*.txt"))
        chosen = by_split_name(lists)
        if "train" not in chosen:  # CVAT calls its list default
            rest = [file for file in lists if file not in chosen.values()]
            whole = next((file for file in rest if file.stem.lower() == "default"), rest[0] if len(rest) == 1 else None)
            if whole is None:
                raise DataError(
                    f"{root.resolve()} has no ImageSets/Segmentation/train.txt: give Pascal VOC's folder, such as "
                    "VOCdevkit/VOC2012, with --data.root."
                )
            chosen = {"train": whole, **chosen} if chosen else {"all": whole}
        places = {name: by_stem(root / name) for name in ("JPEGImages", "SegmentationClass")}
        found: dict[str, list[tuple[Path, Path | None]]] = {}
        for split, file in chosen.items():
            part = []
            for line in text_of(file).splitlines():
                if name := line.strip().replace("\\", "/"):
                    image, mask = (
                        stems.get(folded(name), stems.get(folded(Path(name).stem))) for stems in places.values()
                    )
                    part.append((image or root / "JPEGImages" / f"{name}.jpg", mask))
            found |= {split: part} if part else {}
        return found


@dataclass(kw_only=True, eq=False, repr=False)
class COCOSegmentation(Folder, SegmentationDataModule):
    """Objects with outlines in COCO's JSON, as polygons or RLE, converted to class maps; class 0 is the background.

    Where objects overlap, a pixel belongs to the one that comes first in the file; crowds are ignored. ``root`` is as
    for `COCODetection`.

    Args:
        root: a JSON file, whose images are split, or a folder with one for each split.
        on_bad_box: what to do about an object that cannot be used: stop and name it, or drop it, counted and listed.
    """

    on_bad_box: Literal["error", "drop"] = "error"
    image_size: Own[WindowSize] = 384

    def __post_init__(self) -> None:
        super().__post_init__()
        self._boxes = COCODetection(
            self.root,
            in_chans=self.in_chans,
            bands=self.bands,
            bits=self.bits,
            masks=True,
            on_bad_file=self.on_bad_file,
            on_bad_box=self.on_bad_box,
        )

    @property
    @override
    def reading(self) -> Reading:
        return self._boxes.reading

    @cached_property
    def label_names(self) -> list[str]:
        """Names of the background and of the categories."""
        return ["background", *self._boxes.label_names]

    @override
    def pictures(self) -> Mapping[str, BoxSource]:
        if self.undivided:
            self._boxes.take_whole()
        sources, self.drawn = self._boxes.sources, self._boxes.drawn
        self.bad_files = self._boxes.bad_files
        return sources
