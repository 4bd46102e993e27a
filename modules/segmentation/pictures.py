"""Images that semantic segmentation logs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from modules.pictures.palette import IGNORED, legend, palette, tint
from modules.pictures.sheets import Image, as_rgb, enlarged, sheet, stacked

COLUMNS = ("image", "overlay", "truth", "prediction", "errors")


def error_map(image: Image, found: NDArray[np.uint8], truth: NDArray[np.uint8]) -> Image:
    """Draws the image in faint grey, wrong pixels in red, and ignored pixels in yellowish white."""
    grey = image.mean(2, keepdims=True).repeat(3, 2)
    result = (grey * 0.35).astype(np.uint8)
    result[found != truth] = (230, 40, 40)
    result[truth == 255] = IGNORED
    return result


@dataclass
class MapExample:
    """An image with its predicted and true class maps.

    Args:
        image: uint8 C×S×S.
        found: predicted classes, uint8 S×S.
        truth: true classes, uint8 S×S.
    """

    image: Tensor
    found: Tensor
    truth: Tensor

    def cpu(self) -> "MapExample":
        """Copies the example to the CPU, without references to the batch."""
        return MapExample(*(part.cpu().clone() for part in (self.image, self.found, self.truth)))

    def errors(self) -> float:
        """Returns the fraction of wrong pixels."""
        seen = self.truth != 255
        return float(((self.found != self.truth) & seen).sum() / seen.sum().clamp(min=1))

    def draw(self, side: int = 160) -> list[Image]:
        """Draws the image, the overlay, the ground truth, the prediction, and the errors."""
        image, found, truth = as_rgb(self.image), self.found.numpy(), self.truth.numpy()
        parts = image, tint(image, found), palette()[truth], palette()[found], error_map(image, found, truth)
        return [enlarged(part, side) for part in parts]


def column(examples: Sequence[MapExample], label_names: Sequence[str]) -> Image:
    """Stacks examples below a legend of the classes.

    Args:
        examples: examples of the same size.
        label_names: names of the classes.
    """
    tiles = [tile for example in examples for tile in example.draw()]
    page = sheet(tiles, len(COLUMNS), COLUMNS * len(examples))
    return stacked([legend(label_names[:40], page.shape[1]), page])
