"""Image files with boxes: checked before training, tiled if large."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from typing_extensions import override

from datamodules.annotated.checks import compiled, in_shares
from datamodules.annotated.detection import DetectionDataModule
from datamodules.annotated.mixing import VISIBLE, selected
from datamodules.annotated.readers.shards import read_boxes
from datamodules.annotated.sample import Annotations, BoxFormat, Record
from datamodules.checking import warn_of_shared
from datamodules.decoded import Caching, ImageFiles, as_it_is
from datamodules.errors import DataError
from datamodules.files import Folder, shards_at
from datamodules.images import Reduction, turned
from datamodules.loading import Sample
from datamodules.options import OWN, RGB, ImageSize, Own, PositiveInt, Preprocessing, Reading
from datamodules.paths import Paths
from datamodules.tables import Notes
from datamodules.tiles import TiledSource, pieces

if TYPE_CHECKING:
    from datamodules.shards import ShardSet

TOLD = {  # messages for the reports of `compiled`
    "a copy": "boxes are duplicates, and count once",
    "an outline apart": "objects have an outline that overlaps with less than half of their box, as one for another "
    "image size would",
    "in the first pixel": "boxes lie within the first pixel of their image: are they fractions of the image? They "
    "are read as pixels",
    "its own mask": "objects have a box but no outline, while others do: the box is used as their mask",
}


class BoxSource(TiledSource):
    """Image files with boxes, or tiles of them.

    Args:
        annotations: images, boxes and, for masks, outlines.
        reading: how images are decoded.
        tile: side of the square tiles that larger images are cut into, in pixels; None for no tiling.
        cache: see `ImageFiles`.
    """

    counts = None  # of pixels

    def __init__(
        self, annotations: Annotations, reading: Reading = RGB, tile: int | None = None, cache: Caching = "none"
    ) -> None:
        super().__init__(annotations.sizes, annotations.paths, lambda h, w: pieces(h, w, tile or max(h, w)))
        self.annotations, self.tile = annotations, tile
        self.images = ImageFiles(annotations.paths, annotations.digests, annotations.sizes, reading, cache)

    def reduced(self, reduction: Reduction) -> "BoxSource":
        """Returns the same samples; untiled images are decoded at reduced size, with boxes and masks scaled to
        match."""
        same = copy(self)
        same.images = self.images.reduced(as_it_is if self.tile else reduction)
        return same

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class of each box."""
        return self.annotations.labels

    @property
    def shapes(self) -> NDArray[np.int64]:
        """See `Boxes.shapes`."""
        whole = self.sizes[self.places[:, 0]]
        return np.minimum(whole, self.tile) if self.tile else whole

    @cached_property
    def digest(self) -> str:
        """See `Source.digest`."""
        a = self.annotations
        digest = hashlib.blake2b("\n".join(a.digests).encode(), digest_size=16)
        for values in (a.starts, a.boxes, a.labels, a.ignore, self.places):
            digest.update(np.ascontiguousarray(values).tobytes())
        for outline in () if a.outlines is None else a.outlines:
            digest.update(outline)
        return digest.hexdigest()

    @override
    def read(self, which: int) -> Sample:
        a, rows = self.annotations, slice(self.annotations.starts[which], self.annotations.starts[which + 1])
        image = np.require(self.images[which], requirements="W")
        factor = int(a.sizes[which, 0]) // len(image)
        if tuple(side * factor for side in image.shape[:2]) != tuple(a.sizes[which]):
            raise DataError(f"{a.paths[which]} has changed its size since it was checked: start again.")
        sample: Sample = {
            "image": image,
            "size": a.sizes[which],
            "boxes": a.boxes[rows] / factor,
            "labels": a.labels[rows],
            "ignore": a.ignore[rows],
        }
        if a.areas is not None:
            sample["area"] = a.areas[rows]
        if a.outlines is not None:
            half = factor // 2
            sample["masks"] = masks = np.ascontiguousarray(a.masks(which)[:, half::factor, half::factor])
            classes = np.zeros(image.shape[:2], np.uint8)
            for mask, label, ignore in zip(masks, sample["labels"], sample["ignore"], strict=True):
                classes[mask.view(bool) & (classes == 0)] = 255 if ignore else label + 1
            sample["mask"] = classes
        return sample

    def __getitem__(self, index: int) -> Sample:
        which, x, y = self.places[index].tolist()
        sample = self.whole(which)
        if self.tile:
            part = slice(y, y + self.tile), slice(x, x + self.tile)
            image = np.ascontiguousarray(sample["image"][part])
            height, width = image.shape[:2]
            sample = sample | {"image": image, "size": np.array([height, width], np.int64)}
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
        return sample


@dataclass(kw_only=True, eq=False, repr=False)
class BoxFiles(Folder, DetectionDataModule[BoxSource]):
    """Base class of the annotation formats: images and boxes are checked before training.

    Missing splits are drawn deterministically: 15 % of the images for testing and 15 % of the rest for validation if
    there are no splits, 15 % for validation if only that is missing. The training split keeps images of every class.

    Args:
        root: the folder or file; or tar or Parquet files of pictures with their objects beside them, as for `Shards`.
        masks: return masks; every object needs an outline.
        tile: cut larger images into square tiles of this side, in pixels, which overlap by a fifth; for aerial images
            with small objects. None for no tiling.
        on_bad_box: what to do about an unusable box: raise an error; or clip it if it extends beyond the image and drop
            it otherwise, counted and listed.
        image_size: size of the network's input; None for ``tile``, or 640.
    """

    noun: ClassVar[str] = "object"
    remedy: ClassVar[str] = ""
    box_format: BoxFormat = field(default="xyxy", init=False)

    masks: bool = False
    tile: PositiveInt | None = None
    on_bad_box: Literal["error", "drop"] = "error"
    image_size: Own[ImageSize] = OWN

    def __post_init__(self) -> None:
        super().__post_init__()
        self.image_size = self.image_size or self.tile or 640
        if self.mixing.copy_paste and not self.masks:
            raise DataError("--data.mixing.copy_paste needs masks: --data.masks true, with outlines in the files.")
        self.notes = Notes()

    @property
    @override
    def preprocessing(self) -> Preprocessing:  # a model trained on tiles predicts tiles
        return replace(super().preprocessing, tile=self.tile)

    @property
    @override
    def targets(self) -> dict[str, list[str]]:
        if self.tile:
            raise DataError(
                f"--data.tile {self.tile} cuts images into tiles, and only predicted boxes can be merged from tiles: leave it out, "
                "or train detection alone."
            )
        return super().targets

    def read(self) -> tuple[dict[str, list[Record]], list[str]]:
        """Images of each split (``all`` if there are no splits) and the class names."""
        raise NotImplementedError

    @cached_property
    def _shards(self) -> "ShardSet | None":
        return shards_at(self.root)

    @cached_property
    def _read(self) -> tuple[dict[str, list[Record]], list[str]]:
        if self._shards is not None:
            self.box_format = "xywh"
            splits, names = read_boxes(self._shards)
        elif Path(self.root).exists():
            splits, names = self.read()
        else:
            raise DataError(f"There is no {Path(self.root).resolve()}: say where your images are with --data.root.")
        self.notes.tell()
        for what, groups in (("", [*splits.values()]), (" to train on", [splits.get("train", splits.get("all", []))])):
            if not any(box for records in groups for record in records for box in record.boxes):
                raise DataError(f"{Path(self.root).resolve()} has no boxes{what}, in {sum(map(len, groups))} images.")
        return splits, names

    @cached_property
    def label_names(self) -> list[str]:
        """Class names in the order of their indices."""
        return self._read[1]

    @override
    def load(self) -> dict[str, BoxSource]:
        splits, names = self._read
        records = [record for group in splits.values() for record in group]
        if self._shards is None:
            paths = Paths.of(record.path for record in records)
        else:
            paths = self._shards.members[np.array([record.place for record in records], np.int64)]
        if not (paths.signatures[:, 0] >= 0).any():
            raise DataError(
                f"None of the {len(paths)} images was found; the first is {paths[0]}, named by {records[0].file}."
            )
        table = self.looked_at(paths)
        sizes = table[["height", "width"]].to_numpy(np.int64)
        digests, good = table["digest"].to_numpy(dtype=np.str_), (table["error"] == "").to_numpy()
        for k in np.flatnonzero(good).tolist():
            said, seen = records[k].size, (int(sizes[k][0]), int(sizes[k][1]))
            if said is not None and said != seen:
                why = ""
                if said[::-1] == seen:
                    why = (
                        " Its EXIF tag rotates it, which the boxes do not take into account."
                        if turned(paths.at(k))
                        else " Width and height seem to be swapped."
                    )
                raise DataError(
                    f"{records[k].file} says that {records[k].path} has {said[1]}×{said[0]} pixels, but it has "
                    f"{seen[1]}×{seen[0]}.{why} Its boxes seem to belong to another picture: make the two agree."
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
            parts[name], report = compiled(kept, paths[rows], names, self.box_format, self.on_bad_box, sizes[rows], digests[rows],
                                           self.noun, self.masks, outlined, self.remedy)  # fmt: skip
            reports |= report
        self._tell(reports)
        self.bad_files |= reports
        divided = self.divide(parts, lambda whole: spared(whole) if len(whole) > 2 else None, spared)
        warn_of_shared({name: (part.paths, part.digests) for name, part in divided.items()})
        if "train" in divided:
            self._warn_of_rare(divided["train"])
        return {name: BoxSource(part, self.reading, self.tile, self.cache) for name, part in divided.items()}

    def _scale(self, records: Sequence[Record], sizes: NDArray[np.int64]) -> None:
        """Converts boxes that should be in pixels, but are all relative to the image, to pixels."""
        if self.box_format == "yolo" or not in_shares([box.values for record in records for box in record.boxes]).all():
            return
        first = next(record for record in records if record.boxes)
        rank_zero_warn(
            f"All boxes of {Path(self.root).resolve()} lie within the first pixel, so they are read as fractions of "
            f"the images; the first is [{', '.join(f'{value:g}' for value in first.boxes[0].values)}] in {first.file}."
        )
        self.box_format = "xyxy" if self.box_format == "voc" else self.box_format
        for record, (height, width) in zip(records, sizes.tolist(), strict=True):
            for box in record.boxes:
                box.values = (np.array(box.values) * (width, height, width, height)).tolist()

    def _tell(self, report: dict[str, str]) -> None:
        """Warns of boxes that were corrected or left out."""
        first = {what: place for place, what in reversed(report.items())}
        counts = Counter(report.values())
        if gone := counts["dropped"] + counts["cut off"]:
            place = next(place for place, what in report.items() if what in ("dropped", "cut off"))
            rank_zero_warn(
                f"{counts['dropped']} boxes that cannot be used were dropped, {gone - counts['dropped']} were cut off at the "
                f"edge; the first: {place}."
            )
        for what, count in counts.items():
            if what in TOLD:
                rank_zero_warn(f"{count} {TOLD[what]}; the first: {first[what]}.")

    def _warn_of_rare(self, train: Annotations) -> None:
        counts = np.bincount(train.labels[~train.ignore], minlength=len(self.label_names))
        empty = [name for name, count in zip(self.label_names, counts, strict=True) if not count]
        if empty:
            rank_zero_warn(
                f"No box to train on in class {empty[0]!r} ({len(empty)} of {len(counts)} classes are empty)."
            )


def spared(annotations: Annotations) -> tuple[Annotations, Annotations]:
    """Splits off a random 15 % of the images, drawn with a fixed seed, and returns the rest and these; the rest keeps
    every class.

    Raises:
        DataError: there is only one image.
    """
    size = len(annotations)
    if size < 2:
        raise DataError("One image is too few to keep some for validation: add images, or provide your own splits.")
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
