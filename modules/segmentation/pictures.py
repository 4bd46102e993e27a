"""The pictures that segmentation shows."""

from collections.abc import Sequence
from colorsys import hsv_to_rgb
from dataclasses import dataclass

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from PIL import ImageDraw
from torch import Tensor

from modules.pictures.sheets import Image, picture, typeface

IGNORED = (224, 224, 192)  # colour of pixels that do not count


def palette(num_classes: int) -> NDArray[np.uint8]:
    """Colours of classes, uint8 256×3: black for the first one, then hues a golden angle apart, so that neighbours differ
    most; the last is for pixels that do not count.

    Args:
        num_classes: from this number on, colours are black.
    """
    colours = np.zeros((256, 3), np.uint8)
    for k in range(1, min(num_classes, 255)):
        hue = k * 0.381966
        colours[k] = [round(255 * part) for part in hsv_to_rgb(hue % 1, (1, 0.65)[k // 8 % 2], (1, 0.75)[k // 4 % 2])]
    colours[255] = IGNORED
    return colours


def overlay(image: Image, mask: NDArray[np.uint8], num_classes: int, share: float = 0.5) -> Image:
    """A picture with its classes as a tint; the first class and what does not count stay as they are.

    Args:
        image: uint8 H×W×3.
        mask: uint8 H×W.
        num_classes: number of classes.
        share: of the tint, in [0, 1].
    """
    result, colours = image.copy(), palette(num_classes).astype(np.float32) * share
    for top in range(0, len(image), 256):  # piece by piece, since in floats a large picture is four times as large
        rows = slice(top, top + 256)
        tinted = (mask[rows] > 0) & (mask[rows] < num_classes)
        result[rows][tinted] = result[rows][tinted] * np.float32(1 - share) + colours[mask[rows][tinted]]
    return result


def error_map(image: Image, found: NDArray[np.uint8], truth: NDArray[np.uint8]) -> Image:
    """The picture in faint grey, with wrong pixels in red and those that do not count in yellowish white."""
    grey = image.mean(2, keepdims=True).repeat(3, 2)
    result = (grey * 0.35).astype(np.uint8)
    result[found != truth] = (230, 40, 40)
    result[truth == 255] = IGNORED
    return result


@dataclass
class Example:
    """An image with its true and predicted classes.

    Args:
        image: uint8 C×S×S.
        found: uint8 S×S.
        truth: uint8 S×S.
    """

    image: Tensor
    found: Tensor
    truth: Tensor

    def cpu(self) -> "Example":
        """The same on the CPU, without a share in a batch."""
        return Example(*(part.cpu().clone() for part in (self.image, self.found, self.truth)))

    def errors(self) -> float:
        """The share of pixels that are wrong."""
        seen = self.truth != 255
        return float(((self.found != self.truth) & seen).sum() / seen.sum().clamp(min=1))

    def draw(self, num_classes: int, side: int = 160) -> Image:
        """The image, its overlay, the truth, the prediction, and the errors, side by side."""
        image, found, truth = picture(self.image), self.found.numpy(), self.truth.numpy()
        scale = max(1, -(-side // len(image)))
        colours = palette(num_classes)
        parts = [
            image,
            overlay(image, found, num_classes),
            colours[truth],
            colours[found],
            error_map(image, found, truth),
        ]
        gap = np.full((len(image) * scale, 4, 3), 255, np.uint8)
        tiles = [part for tile in parts for part in (tile.repeat(scale, 0).repeat(scale, 1), gap)]
        return np.concatenate(tiles[:-1], 1)


def column(examples: Sequence[Example], num_classes: int, label_names: Sequence[str]) -> Image:
    """Examples below each other, with a legend of columns and classes above.

    Args:
        examples: they have the same size.
        num_classes: number of classes.
        label_names: their names.
    """
    rows = [example.draw(num_classes) for example in examples]
    width = rows[0].shape[1]
    colours, font = palette(num_classes), typeface(13)
    shown = list(label_names)[:40]
    cell = max([int(font.getlength(name)) for name in shown], default=0) + 34
    per_line = max(1, width // cell)
    lines = -(-len(shown) // per_line)
    head = PIL.Image.new("RGB", (width, 24 + 20 * lines), "white")
    draw = ImageDraw.Draw(head)
    for i, title in enumerate(("image", "overlay", "truth", "prediction", "errors")):
        draw.text((i * (width + 4) // 5 + 2, 3), title, "black", font)
    for k, name in enumerate(shown):
        x, y = k % per_line * cell, 24 + k // per_line * 20
        draw.rectangle((x + 2, y + 2, x + 16, y + 15), fill=tuple(colours[k].tolist()), outline="grey")
        draw.text((x + 21, y), name, "black", font)
    gap = np.full((4, width, 3), 255, np.uint8)
    return np.concatenate([np.asarray(head), *(part for row in rows for part in (row, gap))])
