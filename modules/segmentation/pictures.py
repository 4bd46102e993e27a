"""The pictures that segmentation shows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from modules.pictures.palette import IGNORED, legend, palette, tint
from modules.pictures.sheets import Image, as_rgb, enlarged, sheet, stacked

COLUMNS = ("image", "overlay", "truth", "prediction", "errors")


def error_map(image: Image, found: NDArray[np.uint8], truth: NDArray[np.uint8]) -> Image:
    """The picture in faint grey, with wrong pixels in red and those that do not count in yellowish white."""
    grey = image.mean(2, keepdims=True).repeat(3, 2)
    result = (grey * 0.35).astype(np.uint8)
    result[found != truth] = (230, 40, 40)
    result[truth == 255] = IGNORED
    return result


@dataclass
class MapExample:
    """An image with its true and predicted classes.

    Args:
        image: uint8 C×S×S.
        found: uint8 S×S.
        truth: uint8 S×S.
    """

    image: Tensor
    found: Tensor
    truth: Tensor

    def cpu(self) -> "MapExample":
        """The same on the CPU, without a share in a batch."""
        return MapExample(*(part.cpu().clone() for part in (self.image, self.found, self.truth)))

    def errors(self) -> float:
        """The share of pixels that are wrong."""
        seen = self.truth != 255
        return float(((self.found != self.truth) & seen).sum() / seen.sum().clamp(min=1))

    def draw(self, side: int = 160) -> list[Image]:
        """The image, its overlay, the truth, the prediction, and the errors."""
        image, found, truth = as_rgb(self.image), self.found.numpy(), self.truth.numpy()
        parts = image, tint(image, found), palette()[truth], palette()[found], error_map(image, found, truth)
        return [enlarged(part, side) for part in parts]


def column(examples: Sequence[MapExample], label_names: Sequence[str]) -> Image:
    """Examples below each other, with a legend of the classes above.

    Args:
        examples: they have the same size.
        label_names: the classes' names.
    """
    tiles = [tile for example in examples for tile in example.draw()]
    page = sheet(tiles, len(COLUMNS), COLUMNS * len(examples))
    return stacked([legend(label_names[:40], page.shape[1]), page])
