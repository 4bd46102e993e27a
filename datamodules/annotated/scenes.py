"""Scenes composed from labelled pictures: exact boxes and masks, at any size, without a download.

A scene is a canvas with a soft random background on which one to six pictures stand, each in a colour of its own, the
later ones in front of the earlier. One map says which object is on top at each pixel; boxes, instance masks and the
class map all come from it, so that they agree to the pixel.
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
from scipy.ndimage import binary_fill_holes
from typing_extensions import override

from datamodules.annotated.detection import DetectionDataModule, DetectionDataset
from datamodules.annotated.mixing import VISIBLE, boxes_of
from datamodules.annotated.segmentation import SegmentationDataModule, WindowSize
from datamodules.base import DataError, Key, Source, VisionDataModule, digest_of
from datamodules.cache import Cache
from datamodules.labelled.base import LabelledDataModule, MultiLabelDataModule
from datamodules.labelled.published import Digits
from datamodules.labelled.quantities import RegressionDataModule
from datamodules.labelled.sources import LabelSetSource, QuantitySource
from datamodules.options import OWN, ImageSize, NonNegativeInt, Own
from datamodules.splits import SPLITS

VERSION = 2  # a change of what is drawn is a change of the data
INK = 64  # what is brighter belongs to the object
COVERED = 0.5  # greatest share of a box that may lie in another one: entangled strokes are nobody's to tell apart
KEPT = 512 << 20  # bytes of scenes that are kept for the next epoch


class Sprites:
    """Labelled pictures cut out of their background, which is black.

    Args:
        source: grey pictures with ``image`` uint8 H×W×1 and ``label``.
    """

    def __init__(self, source: Source) -> None:
        samples = [source[i] for i in range(len(source))]
        self.labels = np.array([sample["label"] for sample in samples], np.int64)
        self.digest = source.digest
        self._pictures = [sample["image"][..., 0] for sample in samples]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        """The picture, uint8 and no larger than need be."""
        picture = self._pictures[index]
        x, y, width, height = cv2.boundingRect((picture > INK).view(np.uint8))
        return picture[y : y + height, x : x + width]


@dataclass(eq=False)
class SceneSource:
    """Scenes as a split of a data set: scene i is a function of (seed, split, i) and of the sprites.

    A sample has ``image`` uint8 S×S×3 or S×S×1, ``boxes`` float32 N×4 (xyxy in pixels, the visible extent, so that the
    right and bottom edges are one past the last pixel), ``labels`` int64 N, ``ignore`` bool N (always false), ``size``
    int64 2 (height, width); with ``masks`` also ``masks`` uint8 N×S×S of 0 and 1, and ``mask`` uint8 S×S, which is 0
    for the background and label + 1 elsewhere.

    Args:
        sprites: what stands in the scenes.
        split: train, val or test.
        count: number of scenes.
        size: side of the canvas, in pixels.
        objects: least and greatest number of objects.
        extent: least and greatest length of an object's longer side, as a share of the canvas.
        seed: seed of the scenes.
        in_chans: 3 for colour, 1 for grey.
        masks: whether samples have masks.
    """

    paths = counts = labels = None  # scenes are no files, and how much of what is in them is not counted

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

    def with_masks(self) -> "SceneSource":
        """The same scenes with masks."""
        twin = copy(self)
        twin.masks = True
        return twin

    def __getitem__(self, index: int) -> dict[str, Any]:
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
        """The picture; which object is on top at each pixel, by its number from 1, or 0; the objects' labels."""
        rng = np.random.Generator(np.random.PCG64([self.seed, SPLITS.index(self.split), index]))
        canvas, paper = self.background(rng)
        owner = np.zeros((self.size, self.size), np.uint8)
        labels: list[int] = []
        areas, seen = np.zeros(0, np.int64), np.zeros(0, np.int64)
        boxes: list[tuple[int, int, int, int]] = []
        for _ in range(rng.integers(self.objects[0], self.objects[1] + 1)):
            for _ in range(10):  # places that hide too much of what is there already are given up
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
        """A soft pattern around one colour, with fine noise; and that colour."""
        paper = rng.integers(25, 231, 3).astype(np.float32)
        cells = int(rng.integers(2, 7))
        pattern = paper + rng.normal(0, 18, (cells, cells, 3)).astype(np.float32)
        canvas = cv2.resize(pattern, (self.size, self.size), interpolation=cv2.INTER_CUBIC)
        noise = np.frombuffer(rng.bytes(canvas.size), np.uint8).reshape(canvas.shape)
        amount = float(rng.uniform(0, 40))
        canvas = cv2.addWeighted(canvas, 1, noise, amount / 255, -amount / 2, dtype=cv2.CV_32F)
        return np.clip(canvas, 0, 255).astype(np.uint8), paper

    def resized(self, which: int, rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """A picture at its size in the scene, uint8, and its outline there with the holes filled."""
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
    """The part that two boxes share, as a share of the smaller one."""
    width, height = (min(a[k + 2], b[k + 2]) - max(a[k], b[k]) for k in (0, 1))
    return max(0, width) * max(0, height) / min((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b))


def tint(rng: np.random.Generator, paper: NDArray[np.float32]) -> NDArray[np.float32]:
    """A random colour that can be told from the background: its luma is at least 70 away."""
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
    """The picture in its tint over the ground; its holes are opaque, in the colour of the background."""
    colour = paper + (tint - paper) * (picture[..., None].astype(np.float32) / 255)
    return np.where(inside[..., None], np.rint(colour).astype(np.uint8), ground)


@dataclass(kw_only=True, eq=False, repr=False)
class Scenes:
    """Settings of all data that show scenes composed from real digits, on the fly: nothing to download.

    Training scenes show training digits, test scenes test digits. The same numbers make the same scenes everywhere.

    Args:
        scene_size: side of the scenes, in pixels.
        train: training scenes.
        val: validation scenes.
        test: test scenes.
        objects: least and greatest number of digits in a scene.
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
        """The splits, which have scenes.

        Args:
            masks: whether samples have masks.

        Raises:
            DataError: there cannot be so many objects.
        """
        least, most = self.objects
        if not 0 <= least <= most <= 250:
            raise DataError(f"--data.objects is a least and a greatest number up to 250, not {least} and {most}.")
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
    """Scenes composed from real digits (see `Digits`), whose boxes are exact; see `Scenes`.

    Args:
        masks: give masks too.
        image_size: of the images that the network sees; None takes ``scene_size``.
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
        """See `VisionDataModule.transform`; None where there is nothing to do."""
        plain = not training_split or self.augmentation == "none"
        return None if plain and self.image_size == self.scene_size else super().transform(training_split)

    def dataset(self, split: str, augmented: bool) -> DetectionDataset:
        """See `VisionDataModule.dataset`; what is pasted into scenes is cut out by their masks."""
        dataset = super().dataset(split, augmented)
        if augmented and self.mixing.copy_paste:
            dataset.source = self.sources[split].with_masks()
        return dataset


class CountedScenes(DetectionDataset):
    """Scenes that also have a ``label``: how many objects there are, up to ``most``."""

    most = 0

    @override
    def __getitem__(self, key: Key) -> dict[str, Any]:
        sample = super().__getitem__(key)
        return sample | {"label": np.int64(min(self.most, len(sample["labels"])))}


@dataclass(kw_only=True, eq=False, repr=False)
class DigitTasks(DigitScenes):
    """Scenes composed from real digits with the targets of several tasks: boxes and masks as in `DigitScenes`, and ``label``,
    int64 B, how many digits there are; see `Scenes`.

    Args:
        masks: give masks too.
    """

    masks: bool = True
    dataset_class = CountedScenes

    @property
    def count_names(self) -> list[str]:
        """The classes of ``label``: the numbers of digits that there can be."""
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
    """Scenes composed from real digits with a class map, background and ten digits, exact to the pixel; see `Scenes`.

    Args:
        image_size: size of the windows that the network sees; None takes ``scene_size``.
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
    """Small scenes composed from none to four real digits; see `Scenes`.

    Args:
        image_size: of the images that the network sees; None takes ``scene_size``.
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
        """Of each split the name, the images, uint8 N×S×S×C, and the digits on each."""
        for name, scenes in self.scenes(masks=False).items():
            samples = [scenes[i] for i in range(len(scenes))]
            yield name, np.stack([sample["image"] for sample in samples]), [sample["labels"] for sample in samples]


@dataclass(kw_only=True, eq=False, repr=False)
class DigitSets(FewDigits, MultiLabelDataModule):
    """Which digits are there? See `FewDigits`."""

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
    """How many digits are there, and what is their sum? See `FewDigits`."""

    label_names: ClassVar[list[str]] = ["count", "sum"]

    @override
    def load(self) -> dict[str, QuantitySource]:
        return {
            name: QuantitySource(images, np.array([(len(own), own.sum()) for own in digits], np.float32))
            for name, images, digits in self.images_and_digits()
        }
