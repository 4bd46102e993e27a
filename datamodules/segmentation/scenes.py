"""Scenes composed from real digits, with a class for each pixel."""

from typing import Any, ClassVar, Literal

import numpy as np

from datamodules.augmentations import Strength
from datamodules.detection import DigitScenes
from datamodules.segmentation.base import Pictures, SegmentationDataModule, Weighting


class _ScenePictures:
    """The scenes of a split; each is of the same size.

    Args:
        scenes: with masks.
    """

    def __init__(self, scenes: Any) -> None:
        self.scenes, self.digest = scenes, scenes.digest
        self.sizes = np.full((len(scenes), 2), scenes.size, np.int64)

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.scenes[index]


class DigitMasks(SegmentationDataModule):
    """The scenes of `DigitScenes` with a class map each, background and ten digits: nothing to download, exact to the pixel.

    Args:
        scene_size: side of the scenes, in pixels.
        train: training scenes.
        val: validation scenes.
        test: test scenes.
        objects: least and greatest number of digits in a scene.
        scene_seed: seed of the scenes; unlike ``seed`` it changes the data set.
        in_chans: 3 for colour, 1 for grey.
        augmentation: strength of the changes made to training images.
        class_weighting: what the classes' pixels weigh in the loss; see `SegmentationDataModule`.
        image_size: side of the square windows that the network sees, in pixels; None takes ``scene_size``.
        flip: mirror training images; None says no, since that changes digits.
        batch_size: samples in a batch, for each process.
        num_workers: processes that read and augment; None chooses by the cores at hand.
        seed: seed of order and augmentation.
    """

    native_flip = False
    label_names: ClassVar[list[str]] = ["background", *(str(digit) for digit in range(10))]

    def __init__(
        self,
        scene_size: int = 128,
        train: int = 2000,
        val: int = 300,
        test: int = 500,
        objects: tuple[int, int] = (1, 6),
        scene_seed: int = 0,
        in_chans: Literal[1, 3] = 3,
        augmentation: Strength = "standard",
        class_weighting: Weighting = "none",
        image_size: int | None = None,
        flip: bool | None = None,
        batch_size: int = 16,
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            augmentation, class_weighting, image_size or scene_size, flip, False, batch_size, num_workers, seed
        )
        self.in_chans = in_chans
        self._scenes = DigitScenes(scene_size, train, val, test, objects, scene_seed, in_chans, masks=True)

    def pictures(self) -> dict[str, Pictures]:
        """See `SegmentationDataModule.pictures`."""
        return {name: _ScenePictures(source) for name, source in self._scenes.load().items()}
