"""Scenes composed of labelled images: exact boxes and masks, at any size, without a download.

A scene is a canvas with a smooth random background and one to six images in front, each in its own colour, later ones
in front of earlier ones. One map has the front-most object at each pixel; boxes, instance masks and the class map are
all derived from it, so that they agree to the pixel.
"""

from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Annotated, Any, ClassVar, Literal

import albumentations as A
import cv2
import numpy as np
from annotated_types import Ge
from numpy.typing import NDArray
from typing_extensions import override

from datamodules.annotated.detection import DetectionDataModule, DetectionDataset
from datamodules.annotated.mixing import VISIBLE, boxes_of
from datamodules.annotated.segmentation import SegmentationDataModule, WindowSize
from datamodules.base import VisionDataModule
from datamodules.cache import Cache
from datamodules.digests import digest_of
from datamodules.errors import DataError
from datamodules.labelled.base import LabelledDataModule, MultiLabelDataModule
from datamodules.labelled.published import Digits
from datamodules.labelled.quantities import RegressionDataModule
from datamodules.labelled.sources import LabelSetSource, QuantitySource
from datamodules.loading import Key, Sample, Source
from datamodules.options import OWN, ImageSize, NonNegativeInt, Own
from datamodules.splits import SPLITS

VERSION = 2  # changes of the drawing change the data
INK = 64  # brighter pixels belong to the object
COVERED = 0.5  # maximum fraction of a box that may lie in another one: entangled strokes cannot be separated
KEPT = 512 << 20  # bytes of scenes that are cached for the next epoch


class Sprites:
    """Labelled images without their background, which is black.

    Args:
        source: grey images with ``image`` uint8 H×W×1 and ``label``.
    """

    def __init__(self, source: Source) -> None:
        samples = [source[i] for i in range(len(source))]
        self.labels = np.array([sample["label"] for sample in samples], np.int64)
        self.digest = source.digest
        self._pictures = [sample["image"][..., 0] for sample in samples]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        """Returns the image, uint8, cropped to its content."""
        picture = self._pictures[index]
        x, y, width, height = cv2.boundingRect((picture > INK).view(np.uint8))
        return picture[y : y + height, x : x + width]


@dataclass(eq=False)
class SceneSource:
    """Scenes as a split of a data set: scene i is a function of (seed, split, i) and the sprites.

    A sample has ``image`` uint8 S×S×3 or S×S×1, ``boxes`` float32 N×4 (xyxy in pixels, the visible extent; the right
    and bottom edges are one past the last pixel), ``labels`` int64 N, ``ignore`` bool N (always false), ``size`` int64
    2 (height, width); with ``masks`` also ``masks`` uint8 N×S×S of 0 and 1, and ``mask`` uint8 S×S, 0 for the
    background and label + 1 elsewhere.

    Args:
        sprites: objects of the scenes.
        split: train, val or test.
        count: number of scenes.
        size: side of the canvas, in pixels.
        objects: minimum and maximum number of objects.
        extent: minimum and maximum length of an object's longer side, relative to the canvas.
        seed: seed of the scenes.
        in_chans: 3 for colour, 1 for grey.
        masks: whether samples have masks.
    """

    paths = counts = labels = None  # scenes are not files, and their contents are not counted

    sprites: Sprites
    split: str
    count: int
    size: int = 128
    objects: tuple[int, int] = (1, 6)
    extent: tuple[float, float] = (0.15, 0.42)
    seed: int = 0
    in_chans: int = 3
    masks: bool = False

    def __post_init__(self) -> None:
        self.sizes = np.full((self.count, 2), self.size, np.int64)
        self._cache: Cache[tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.int64]]] = Cache(KEPT)

    def __len__(self) -> int:
        return self.count

    @cached_property
    def digest(self) -> str:
        """See `Source.digest`."""
        recipe = (VERSION, self.sprites.digest, self.split, self.count, self.size, *self.objects, *self.extent)
        return digest_of(repr((*recipe, self.seed, self.in_chans)).encode())

    @property
    def shapes(self) -> NDArray[np.int64]:
        """See `Boxes.shapes`."""
        return self.sizes

    def with_masks(self) -> "SceneSource":
        """Returns the same scenes with masks."""
        twin = copy(self)
        twin.masks = True
        return twin

    def __getitem__(self, index: int) -> Sample:
        image, owner, labels = self._cache.get(index, self._compose)
        masks = [(owner == k + 1).view(np.uint8) for k in range(len(labels))]
        sample = {
            "image": image,
            "boxes": boxes_of(masks),
            "labels": labels,
            "ignore": np.zeros(len(labels), bool),
            "size": np.array(image.shape[:2], np.int64),
        }
        if self.masks:
            sample["masks"] = np.stack(masks)
            sample["mask"] = np.append(0, labels + 1).astype(np.uint8)[owner]
        return sample

    def _compose(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.int64]]:
        """Composes the image; the front-most object at each pixel, by its number from 1, or 0; and the objects'
        labels."""
        rng = np.random.Generator(np.random.PCG64([self.seed, SPLITS.index(self.split), index]))
        canvas, paper = self.background(rng)
        owner = np.zeros((self.size, self.size), np.uint8)
        labels: list[int] = []
        areas, seen = np.zeros(0, np.int64), np.zeros(0, np.int64)
        boxes: list[tuple[int, int, int, int]] = []
        for _ in range(rng.integers(self.objects[0], self.objects[1] + 1)):
            for _ in range(10):  # positions that hide too much are rejected
                which = int(rng.integers(len(self.sprites)))
                picture, inside = self.resized(which, rng)
                height, width = picture.shape
                y, x = (int(rng.integers(self.size - side + 1)) for side in (height, width))
                place = slice(y, y + height), slice(x, x + width)
                hidden = np.bincount(owner[place][inside], minlength=len(areas) + 1)[1:]
                box = x, y, x + width, y + height
                if not (seen - hidden < VISIBLE * areas).any() and all(_covered(box, b) <= COVERED for b in boxes):
                    break
            else:
                continue
            canvas[place] = painted(canvas[place], picture, inside, paper, tint(rng, paper))
            boxes.append(box)
            labels.append(int(self.sprites.labels[which]))
            owner[place][inside] = len(labels)
            area = int(inside.sum())
            areas, seen = np.append(areas, area), np.append(seen - hidden, area)
        if self.in_chans == 1:
            canvas = np.asarray(cv2.cvtColor(canvas, cv2.COLOR_RGB2GRAY)[..., None], np.uint8)
        return canvas, owner, np.array(labels, np.int64)

    def background(self, rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Draws a smooth pattern around one colour, with fine noise; returns it with that colour."""
        paper = rng.integers(25, 231, 3).astype(np.float32)
        cells = int(rng.integers(2, 7))
        pattern = paper + rng.normal(0, 18, (cells, cells, 3)).astype(np.float32)
        canvas = cv2.resize(pattern, (self.size, self.size), interpolation=cv2.INTER_CUBIC)
        noise = np.frombuffer(rng.bytes(canvas.size), np.uint8).reshape(canvas.shape)
        amount = float(rng.uniform(0, 40))
        canvas = cv2.addWeighted(canvas, 1, noise, amount / 255, -amount / 2, dtype=cv2.CV_32F)
        return np.clip(canvas, 0, 255).astype(np.uint8), paper

    def resized(self, which: int, rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Resizes an image for the scene, uint8, and returns it with its filled outline."""
        from scipy.ndimage import binary_fill_holes

        picture = self.sprites[which]
        longest = max(6.0, rng.uniform(*self.extent) * self.size)
        factor = longest / max(picture.shape)
        stretch = float(rng.uniform(0.9, 1.1))
        sides = [
            max(3, min(self.size, round(side * factor))) for side in (picture.shape[1] * stretch, picture.shape[0])
        ]
        way = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
        picture = np.asarray(cv2.resize(picture, sides, interpolation=way), np.uint8)
        return picture, binary_fill_holes(picture > INK)


def _covered(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Returns the intersection of two boxes relative to the smaller one."""
    width, height = (min(a[k + 2], b[k + 2]) - max(a[k], b[k]) for k in (0, 1))
    return max(0, width) * max(0, height) / min((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b))


def tint(rng: np.random.Generator, paper: NDArray[np.float32]) -> NDArray[np.float32]:
    """Draws a random colour that differs from the background by a luma of at least 70."""
    luma = np.array([0.299, 0.587, 0.114], np.float32)
    while True:
        tint = rng.integers(0, 256, 3).astype(np.float32)
        if abs(float((tint - paper) @ luma)) >= 70:
            return tint


def painted(
    ground: NDArray[np.uint8],
    picture: NDArray[np.uint8],
    inside: NDArray[np.bool_],
    paper: NDArray[np.float32],
    tint: NDArray[np.float32],
) -> NDArray[np.uint8]:
    """Draws the tinted image over the ground; its holes are opaque, in the colour of the background."""
    colour = paper + (tint - paper) * (picture[..., None].astype(np.float32) / 255)
    return np.where(inside[..., None], np.rint(colour).astype(np.uint8), ground)


@dataclass(kw_only=True, eq=False, repr=False)
class Scenes:
    """Settings of data with scenes composed of real digits, on the fly: no download.

    Training scenes have training digits, test scenes test digits. Equal numbers give equal scenes on every machine.

    Args:
        scene_size: side of the scenes, in pixels.
        train: number of training scenes.
        val: number of validation scenes.
        test: number of test scenes.
        objects: minimum and maximum number of digits in a scene.
        scene_seed: seed of the scenes; unlike ``seed`` it changes the data set.
        in_chans: 3 for colour, 1 for grey.
    """

    scene_size: Annotated[int, Ge(32)] = 128
    train: NonNegativeInt = 2000
    val: NonNegativeInt = 300
    test: NonNegativeInt = 500
    objects: tuple[int, int] = (1, 6)
    scene_seed: int = 0
    in_chans: Literal[1, 3] = 3
    items: ClassVar[type[VisionDataModule[Any]]] = Digits

    def scenes(self, masks: bool) -> dict[str, SceneSource]:
        """Creates the splits that have scenes.

        Raises:
            DataError: the number of objects is invalid.
        """
        least, most = self.objects
        if not 0 <= least <= most <= 250:
            raise DataError(
                f"--data.objects must be two numbers from 0 to 250, the smaller first, such as [1, 6], not [{least}, {most}]."
            )
        items, counts = self.items().sources, {"train": self.train, "val": self.val, "test": self.test}
        make = partial(
            SceneSource,
            size=self.scene_size,
            objects=self.objects,
            seed=self.scene_seed,
            in_chans=self.in_chans,
            masks=masks,
        )
        return {name: make(Sprites(items[name]), name, count) for name, count in counts.items() if count}


@dataclass(kw_only=True, eq=False, repr=False)
class DigitScenes(Scenes, DetectionDataModule[SceneSource]):
    """Scenes composed of real digits (see `Digits`) with exact boxes; see `Scenes`.

    Args:
        masks: return masks.
        image_size: size of the network's input; None for ``scene_size``.
    """

    masks: bool = False
    image_size: Own[ImageSize] = OWN
    flip: Own[bool] = False  # it would change digits
    label_names: ClassVar[list[str]] = [str(digit) for digit in range(10)]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.image_size = self.image_size or self.scene_size

    @override
    def load(self) -> dict[str, SceneSource]:
        return self.scenes(self.masks)

    def transform(self, training_split: bool) -> A.Compose | None:
        """See `VisionDataModule.transform`; None if nothing changes."""
        plain = not training_split or self.augmentation == "none"
        return None if plain and self.image_size == self.scene_size else super().transform(training_split)

    def dataset(self, split: str, augmented: bool) -> DetectionDataset:
        """See `VisionDataModule.dataset`; objects to paste are cut out with their masks."""
        dataset = super().dataset(split, augmented)
        if augmented and self.mixing.copy_paste:
            dataset.source = self.sources[split].with_masks()
        return dataset


class CountedScenes(DetectionDataset):
    """Scenes that also have a ``label``: the number of objects, up to ``most``."""

    most = 0

    @override
    def __getitem__(self, key: Key) -> Sample:
        sample = super().__getitem__(key)
        return sample | {"label": np.int64(min(self.most, len(sample["labels"])))}


@dataclass(kw_only=True, eq=False, repr=False)
class DigitTasks(DigitScenes):
    """Scenes composed of real digits for multi-task learning: boxes and masks as in `DigitScenes`, and ``label``, int64
    B, the number of digits; see `Scenes`.

    Args:
        masks: return masks.
    """

    masks: bool = True
    dataset_class = CountedScenes

    @property
    def count_names(self) -> list[str]:
        """Class names of ``label``: the possible numbers of digits."""
        return [str(count) for count in range(self.objects[1] + 1)]

    @property
    @override
    def targets(self) -> dict[str, list[str]]:
        return super().targets | {"classification": self.count_names}

    @override
    def dataset(self, split: str, augmented: bool) -> DetectionDataset:
        dataset = super().dataset(split, augmented)
        assert isinstance(dataset, CountedScenes)
        dataset.most = self.objects[1]
        return dataset


@dataclass(kw_only=True, eq=False, repr=False)
class DigitMasks(Scenes, SegmentationDataModule):
    """Scenes composed of real digits with a class map, background and ten digits, exact to the pixel; see `Scenes`.

    Args:
        image_size: size of the network's input windows; None for ``scene_size``.
    """

    image_size: Own[WindowSize] = OWN
    flip: Own[bool] = False  # it would change digits
    label_names: ClassVar[list[str]] = ["background", *(str(digit) for digit in range(10))]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.image_size = self.image_size or self.scene_size

    @override
    def pictures(self) -> Mapping[str, SceneSource]:
        return self.scenes(masks=True)


@dataclass(kw_only=True, eq=False, repr=False)
class FewDigits(Scenes, LabelledDataModule[Any]):
    """Small scenes composed of zero to four real digits; see `Scenes`.

    Args:
        image_size: size of the network's input; None for ``scene_size``.
    """

    scene_size: Annotated[int, Ge(32)] = 64
    train: NonNegativeInt = 3000
    objects: tuple[int, int] = (0, 4)
    image_size: Own[ImageSize] = OWN
    flip: Own[bool] = False  # it would change digits

    def __post_init__(self) -> None:
        self.image_size = self.image_size or self.scene_size
        super().__post_init__()

    def images_and_digits(self) -> Iterator[tuple[str, NDArray[np.uint8], list[NDArray[np.int64]]]]:
        """Yields for each split the name, the images, uint8 N×S×S×C, and the digits of each image."""
        for name, scenes in self.scenes(masks=False).items():
            samples = [scenes[i] for i in range(len(scenes))]
            yield name, np.stack([sample["image"] for sample in samples]), [sample["labels"] for sample in samples]


@dataclass(kw_only=True, eq=False, repr=False)
class DigitSets(FewDigits, MultiLabelDataModule):
    """Multi-label images: the digits in each scene. See `FewDigits`."""

    label_names: ClassVar[list[str]] = [str(digit) for digit in range(10)]

    @override
    def load(self) -> dict[str, LabelSetSource]:
        return {
            name: LabelSetSource(
                images, np.stack([np.bincount(own, minlength=10) > 0 for own in digits]).astype(np.int64)
            )
            for name, images, digits in self.images_and_digits()
        }


@dataclass(kw_only=True, eq=False, repr=False)
class DigitSums(FewDigits, RegressionDataModule):
    """Regression: the number of digits in each scene, and their sum. See `FewDigits`."""

    label_names: ClassVar[list[str]] = ["count", "sum"]

    @override
    def load(self) -> dict[str, QuantitySource]:
        return {
            name: QuantitySource(images, np.array([(len(own), own.sum()) for own in digits], np.float32))
            for name, images, digits in self.images_and_digits()
        }
