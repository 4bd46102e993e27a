"""Images with boxes."""

import random
from collections.abc import Sequence
from typing import Any, ClassVar

import albumentations as A
import numpy as np
import torch

from datamodules.augmentations import Strength, evaluation
from datamodules.base import DataError, Key, KeyedDataset, Source, VisionDataModule
from datamodules.classification import Digits
from datamodules.scenes import SPLITS, SceneSource, Sprites, boxes_of


class DetectionDataset(KeyedDataset):
    """Samples with boxes: pipelines move them with the picture, and what leaves the picture is dropped."""

    def __getitem__(self, key: Key) -> dict[str, Any]:
        return finished(super().__getitem__(key))

    def __getitems__(self, keys: Sequence[Key]) -> list[dict[str, Any]]:
        return [self[key] for key in keys]

    def augment(self, sample: dict[str, Any], generator: np.random.Generator) -> dict[str, Any]:
        """See `KeyedDataset.augment`."""
        assert self.transform is not None
        self.transform.set_random_state(generator, random.Random(int(generator.integers(2**63))))
        moved = {key: sample[key] for key in ("image", "masks", "mask") if key in sample}
        moved = self.transform(**moved, bboxes=sample["boxes"], index=np.arange(len(sample["boxes"])))
        boxes = np.asarray(moved.pop("bboxes"), np.float32).reshape(-1, 4)
        kept = np.asarray(moved.pop("index"), np.int64).reshape(-1)
        if "masks" in moved:  # they are exact
            masks = moved["masks"][kept]
            seen = masks.any((1, 2))
            kept, moved["masks"] = kept[seen], masks[seen]
            boxes = boxes_of(moved["masks"])
        moved |= {"boxes": boxes, "labels": sample["labels"][kept], "ignore": sample["ignore"][kept]}
        return moved | {"size": sample["size"]}


def finished(sample: dict[str, Any]) -> dict[str, Any]:
    """The sample with what differs in length from image to image as tensors, which are not stacked to a batch."""
    lists = {key: torch.from_numpy(sample[key]) for key in ("boxes", "labels", "ignore", "masks") if key in sample}
    return sample | lists


class DetectionDataModule(VisionDataModule):
    """Images with boxes.

    Batches: ``image`` uint8 B×C×S×S with S = ``image_size``; ``boxes`` B tensors float32 N×4, xyxy in pixels of it;
    ``labels`` B tensors int64 N, from 0; ``ignore`` B tensors bool N (crowds and difficult ones: neither learned, nor hit
    nor miss); ``size`` int64 B×2, height and width of the images as they were read. With masks also ``masks``, B tensors
    uint8 N×S×S of 0 and 1, and ``mask`` uint8 B×S×S: label + 1, 0 for the background, 255 for what is ignored.

    Args:
        augmentation: strength of the changes made to training images.
        image_size: side of the square images that the network sees, in pixels; None takes the set's own size.
        flip: mirror training images; None says yes but for digits.
        batch_size: samples in a batch, for each process.
        num_workers: processes that read and augment; None chooses by the cores at hand.
        seed: seed of order and augmentation.
    """

    native_size: ClassVar[int] = 640
    native_flip: ClassVar[bool] = True
    in_chans: int = 3
    masks: bool = False

    def __init__(
        self,
        augmentation: Strength = "standard",
        image_size: int | None = None,
        flip: bool | None = None,
        batch_size: int = 16,
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        self.augmentation = augmentation
        self.image_size = image_size or self.native_size
        self.flip = self.native_flip if flip is None else flip

    @property
    def label_names(self) -> list[str]:
        """The classes' names, in the order of their numbers."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """Number of classes; the background is none."""
        return len(self.label_names)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What turns a picture into the network's input, as data."""
        return {"image_size": self.image_size, "in_chans": self.in_chans, "fit": "pad"}

    def transform(self, training_split: bool) -> A.Compose | None:
        """See `VisionDataModule.transform`."""
        boxes = A.BboxParams("pascal_voc", ["index"], clip=True)
        return evaluation(self.image_size, fit="pad", boxes=boxes)

    def dataset(self, split: str, augmented: bool) -> DetectionDataset:
        """See `VisionDataModule.dataset`."""
        return DetectionDataset(self.sources[split], self.transform(augmented), self.seed)


class DigitScenes(DetectionDataModule):
    """Scenes composed from real digits (see `Digits`), on the fly: nothing to download, and the boxes are exact.

    Training scenes show training digits, test scenes test digits. The same numbers make the same scenes everywhere.

    Args:
        scene_size: side of the scenes, in pixels.
        train: training scenes.
        val: validation scenes.
        test: test scenes.
        objects: least and greatest number of digits in a scene.
        scene_seed: seed of the scenes; unlike ``seed`` it changes the data set.
        in_chans: 3 for colour, 1 for grey.
        masks: give masks too.
        augmentation: strength of the changes made to training images.
        image_size: side of the square images that the network sees, in pixels; None takes ``scene_size``.
        flip: mirror training images; None says no, since that changes digits.
        batch_size: samples in a batch, for each process.
        num_workers: processes that read and augment; None chooses by the cores at hand.
        seed: seed of order and augmentation.
    """

    native_flip = False
    items: ClassVar[type[VisionDataModule]] = Digits
    label_names: ClassVar[list[str]] = [str(digit) for digit in range(10)]

    def __init__(
        self,
        scene_size: int = 128,
        train: int = 2000,
        val: int = 300,
        test: int = 500,
        objects: tuple[int, int] = (1, 6),
        scene_seed: int = 0,
        in_chans: int = 3,
        masks: bool = False,
        augmentation: Strength = "standard",
        image_size: int | None = None,
        flip: bool | None = None,
        batch_size: int = 16,
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(augmentation, image_size or scene_size, flip, batch_size, num_workers, seed)
        self.scene_size, self.objects, self.scene_seed = scene_size, objects, scene_seed
        self.counts = {"train": train, "val": val, "test": test}
        self.in_chans, self.masks = in_chans, masks

    def load(self) -> dict[str, Source]:
        """See `VisionDataModule.load`."""
        least, most = self.objects
        if not 0 <= least <= most <= 250:
            raise DataError(f"--data.objects is a least and a greatest number up to 250, not {least} and {most}.")
        if self.scene_size < 32:
            raise DataError(f"--data.scene_size is at least 32 pixels, not {self.scene_size}.")
        items = self.items().sources
        return {
            name: SceneSource(
                Sprites(items[name]),
                name,
                self.counts[name],
                self.scene_size,
                self.objects,
                seed=self.scene_seed,
                in_chans=self.in_chans,
                masks=self.masks,
            )
            for name in SPLITS
            if self.counts[name]
        }

    def transform(self, training_split: bool) -> A.Compose | None:
        """See `VisionDataModule.transform`; None where there is nothing to do."""
        plain = not training_split or self.augmentation == "none"
        return None if plain and self.image_size == self.scene_size else super().transform(training_split)
