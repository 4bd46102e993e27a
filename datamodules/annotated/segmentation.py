"""Base class of data with class maps: windows of images, augmentation, class weights, batches."""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Annotated, Any, Literal, Protocol

import albumentations as A
import numpy as np
from annotated_types import Ge
from numpy.typing import NDArray
from typing_extensions import override

from datamodules.annotated.sample import IGNORE, MOST
from datamodules.augmentations import MASKED, padding, training_with_masks
from datamodules.augmenting import Augmentation, Augmenter
from datamodules.base import VisionDataModule
from datamodules.decoded import as_it_is
from datamodules.digests import digest_of
from datamodules.errors import DataError
from datamodules.images import Reduction
from datamodules.loading import Key, KeyedDataset, KeyedLoader, Sample, Source, randomness
from datamodules.options import BatchSize, Own, Preprocessing
from datamodules.paths import Paths
from datamodules.tiles import Place, TiledSource, tile_starts

LEAST = 16  # minimum side of a window
WindowSize = Annotated[int, Ge(LEAST)] | str  # see `augmentations.sides`
Weighting = Literal["none", "median", "sqrt"]


class Pictures(Source, Protocol):
    """Interface of whole images; sample i has ``image`` uint8 H×W×C and ``mask`` uint8 H×W."""

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Height and width of each image, int64 N×2."""

    @property
    def counts(self) -> NDArray[np.int64] | None:
        """Number of pixels of each class, int64 256, if known."""

    @property
    def paths(self) -> Paths | None:
        """The files, if the images are files."""


class WindowSource(TiledSource):
    """Images, or windows of them, so that every pixel is in at least one window, and counts in exactly one.

    Args:
        pictures: whole images.
        window: height and width of the windows, in pixels; a smaller image is one window; None for whole images.
    """

    def __init__(self, pictures: Pictures, window: tuple[int, int] | None) -> None:
        tall, wide = window or (None, None)

        def layout(height: int, width: int) -> list[Place]:
            return [(x, y) for y in tile_starts(height, tall) for x in tile_starts(width, wide)]

        super().__init__(pictures.sizes, pictures.paths, layout)
        self.pictures, self.window = pictures, window

    def reduced(self, reduction: Reduction) -> "WindowSource":
        """Returns the same windows of images that are cached if requested; images are not reduced, since windows are in
        their pixels."""
        same = copy(self)
        if reduced := getattr(self.pictures, "reduced", None):
            same.pictures = reduced(as_it_is)
        return same

    @cached_property
    def digest(self) -> str:
        """See `Source.digest`."""
        window = self.window[0] if self.window and self.window[0] == self.window[1] else self.window
        return digest_of(f"{self.pictures.digest} {window}".encode())

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Number of pixels of each class, int64 256."""
        if self.pictures.counts is not None:
            return self.pictures.counts
        masks = (self.pictures[i]["mask"] for i in range(len(self.pictures)))
        return sum((np.bincount(mask.ravel(), minlength=256) for mask in masks), np.zeros(256, np.int64))

    @override
    def read(self, which: int) -> Sample:
        sample = self.pictures[which]
        return {key: sample[key] for key in ("image", "mask")}

    def __getitem__(self, index: int) -> Sample:
        """Returns a window at its position; pixels that an earlier window covers are ignored."""
        return self.cut(index, None)

    def cut(self, index: int, generator: np.random.Generator | None) -> Sample:
        """Returns a window at its position, or shifted at random by up to half of its side, with all of its pixels
        counting."""
        which, x, y = self.places[index].tolist()
        sample = self.whole(which)
        height, width = sample["mask"].shape
        tall, wide = self.window or (height, width)
        if generator is not None:
            y, x = (
                int(np.clip(start + generator.integers(-(side // 2), side // 2 + 1), 0, max(0, length - side)))
                for start, length, side in ((y, height, tall), (x, width, wide))
            )
        part = slice(y, y + tall), slice(x, x + wide)
        image, mask = (np.ascontiguousarray(sample[key][part]) for key in ("image", "mask"))
        if generator is None:
            for axis, (start, length, side) in enumerate(((y, height, tall), (x, width, wide))):
                before = max((s + side for s in tile_starts(length, side) if s < start), default=0)
                if before > start:
                    mask = mask.copy()
                    mask[(slice(None),) * axis + (slice(0, before - start),)] = IGNORE
        return {"image": image, "mask": mask, "size": np.array(mask.shape, np.int64)}


class SegmentationDataset(KeyedDataset):
    """Windows with class maps; in training, at random positions."""

    source: WindowSource

    def __init__(self, source: WindowSource, transform: A.Compose | None, seed: int, moved: bool) -> None:
        super().__init__(source, transform, seed)
        self.moved = moved

    def __getitem__(self, key: Key) -> Sample:
        index, epoch = key
        generator = randomness(self.seed, epoch, index)
        sample = self.source.cut(index, generator if self.moved else None)
        return sample if self.transform is None else self.augment(sample, generator)

    def __getitems__(self, keys: Sequence[Key]) -> list[Sample]:
        """Pads whole images of a batch to the size of the largest; ``size`` has their original sizes."""
        samples = [self[key] for key in keys]
        height, width = np.max([sample["mask"].shape for sample in samples], 0).tolist()
        for sample in samples:
            rim = [(0, height - sample["mask"].shape[0]), (0, width - sample["mask"].shape[1])]
            if np.any(rim):
                sample["image"] = np.pad(sample["image"], [*rim, (0, 0)])
                sample["mask"] = np.pad(sample["mask"], rim, constant_values=IGNORE)
        return samples


@dataclass(kw_only=True, eq=False, repr=False)
class SegmentationDataModule(VisionDataModule[WindowSource]):
    """Images with a class per pixel.

    Batches: ``image`` uint8 B×C×H×W of ``image_size``; ``mask`` uint8 B×H×W, classes from 0, 255 for ignored pixels;
    ``size`` int64 B×2, height and width without padding.

    Images keep their resolution. The network is trained on random windows of this size, new ones in each epoch; it is
    evaluated on adjacent windows, in which each pixel counts once. Smaller images are padded with grey, which is
    ignored.

    Args:
        augmentation: strength of the augmentation of training images: none, light, standard or strong; or a list of
            albumentations' transforms with their settings, such as ``[light, {RandomGamma: {p: 0.5}}]``.
        class_weighting: weight of the pixels of each class in the loss: ``none``, equal weights; ``median``, the median
            class frequency divided by that of the class (Eigen & Fergus 2015, arXiv:1411.4734); or ``sqrt``, the square
            root of that.
        image_size: size of the network's input windows: the side of a square in pixels, or ``HEIGHTxWIDTH`` such as
            ``256x512``.
        flip: mirror training images at random; for classes that do not change by mirroring.
        turn: also rotate training images by 90°, for images without an upright orientation.
    """

    augmentation: Augmentation = "standard"
    class_weighting: Weighting = "none"
    image_size: Own[WindowSize] = 256
    flip: Own[bool] = True
    turn: bool = False
    batch_size: BatchSize = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size and min(self.size) < LEAST:
            raise DataError(f"--data.image_size must be at least {LEAST} pixels high and wide, not {self.image_size}.")
        if self.turn and self.size[0] != self.size[1]:
            raise DataError(
                f"--data.turn true rotates by 90°, so it takes a square --data.image_size, not {self.image_size}."
            )

    @property
    def label_names(self) -> list[str]:
        """Class names, by index; the first is the background, if there is one."""
        raise NotImplementedError

    def pictures(self) -> Mapping[str, Pictures]:
        """Loads and checks the splits as whole images; see `VisionDataModule.load`."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """Number of classes, including the background.

        Raises:
            DataError: there are fewer than two, or too many.
        """
        count = len(self.label_names)
        if not 2 <= count <= MOST:
            raise DataError(f"{self.title} has {count} classes; there must be from two to {MOST}.")
        return count

    @property
    @override
    def class_weights(self) -> list[float] | None:
        """See ``class_weighting``; a class without pixels has weight 0."""
        if self.class_weighting == "none" or "train" not in self.sources:
            return None
        counts = self.sources["train"].counts[: self.num_classes].astype(float)
        there = counts > 0
        weights = np.zeros(len(counts))
        weights[there] = np.median(counts[there]) / counts[there]
        return (weights**0.5 if self.class_weighting == "sqrt" else weights).tolist()

    @property
    @override
    def preprocessing(self) -> Preprocessing:
        return self.fitted("native")

    @override
    def load(self) -> dict[str, WindowSource]:
        _ = self.num_classes  # labels must fit into bytes
        return {name: WindowSource(part, self.size) for name, part in self.pictures().items()}

    def transform(self, training_split: bool) -> A.Compose | None:
        """See `VisionDataModule.transform`; with the keys of albumentations, and ``size``."""
        if training_split and self.augmentation != "none":
            colour, deep = self.reading.colour, self.reading.deep
            fit = [padding(*self.size, deep)]
            build = partial(training_with_masks, flip=self.flip, turn=self.turn, colour=colour, deep=deep)
            augmenter = Augmenter(self.size, self.in_chans, fit, MASKED, build, masks=("mask",), deep=deep)
            return augmenter.compose(self.augmentation)
        return A.Compose([padding(*self.size, self.reading.deep)])

    @override
    def dataset(self, split: str, augmented: bool) -> SegmentationDataset:
        return SegmentationDataset(self.sources[split], self.transform(augmented), self.seed, augmented)

    def predict_dataloader(self) -> KeyedLoader:
        """Returns whole images of the test split, or of the validation split without one: one by one, except for some
        batches if processes cannot have the same number of images."""
        source = self.sources["test" if "test" in self.sources else "val"]
        dataset = SegmentationDataset(WindowSource(source.pictures, None), None, self.seed, False)
        return self._loader(dataset, batch_size=1)

    def identity(self) -> dict[str, Any]:
        """Returns name, label names, and for each split the windows, the images, the pixels of each class and the
        content digest."""
        identity = super().identity() | {"label_names": list(self.label_names)}
        for name, source in self.sources.items():
            part = identity["splits"][name]
            part["pictures"] = len(source.pictures)
            if source.pictures.counts is not None:
                counts = source.counts[: len(self.label_names)].tolist()
                part["pixels"] = dict(zip(self.label_names, counts, strict=True))
        return identity
