"""Scenes composed from real digits, with a class for each pixel."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from datamodules.detection.scenes import Scenes
from datamodules.options import OWN, Own
from datamodules.segmentation.base import Pictures, SegmentationDataModule, WindowSide


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


@dataclass(kw_only=True, eq=False, repr=False)
class DigitMasks(Scenes, SegmentationDataModule):
    """Scenes composed from real digits with a class map, background and ten digits, exact to the pixel; see `Scenes`.

    Args:
        image_size: side of the square windows that the network sees, in pixels; None takes ``scene_size``.
    """

    image_size: Own[WindowSide] = OWN
    flip: Own[bool] = False  # it would change digits
    label_names: ClassVar[list[str]] = ["background", *(str(digit) for digit in range(10))]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.image_size = self.image_size or self.scene_size

    def pictures(self) -> dict[str, Pictures]:
        """See `SegmentationDataModule.pictures`."""
        return {name: _ScenePictures(source) for name, source in self.scenes(masks=True).items()}
