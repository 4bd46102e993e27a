"""Colours of classes and objects, and overlays of class maps on images."""

from collections.abc import Sequence
from colorsys import hsv_to_rgb
from functools import cache

import numpy as np
from numpy.typing import NDArray

from modules.pictures.sheets import Image, stacked, written

IGNORED = (224, 224, 192)  # colour of ignored pixels


@cache
def palette(num_classes: int = 255) -> NDArray[np.uint8]:
    """Returns the colours of classes, uint8 256×3: black for class 0, then hues a golden angle apart, so that
    neighbouring classes differ most; the last colour is for ignored pixels.

    Args:
        num_classes: colours from this index on are black.

    >>> palette()[[0, 1, 255]].tolist()
    [[0, 0, 0], [0, 255, 74], [224, 224, 192]]
    """
    colours = np.zeros((256, 3), np.uint8)
    for k in range(1, min(num_classes, 255)):
        hue = k * 0.381966
        colours[k] = [round(255 * part) for part in hsv_to_rgb(hue % 1, (1, 0.65)[k // 8 % 2], (1, 0.75)[k // 4 % 2])]
    colours[255] = IGNORED
    colours.flags.writeable = False
    return colours


def colour_of(number: int) -> int:
    """Returns the row of the `palette` for an object or class index from 0 on, if there is no background.

    >>> colour_of(0), colour_of(200)
    (1, 1)
    """
    return 1 + number % 200


def tint(image: Image, mask: NDArray[np.uint8], share: float = 0.5) -> Image:
    """Overlays a map of classes or objects on an image; pixels with 0 and 255 (ignored) keep their colour.

    Args:
        image: uint8 H×W×3; not modified.
        mask: uint8 H×W, rows of the `palette`.
        share: opacity of the overlay, in [0, 1].

    >>> tint(np.full((1, 2, 3), 100, np.uint8), np.array([[0, 1]], np.uint8)).tolist()
    [[[100, 100, 100], [50, 177, 87]]]
    """
    result, colours = image.copy(), palette() * np.float32(share)
    for top in range(0, len(image), 256):  # in chunks, since floats take four times the memory
        rows = slice(top, top + 256)
        tinted = (mask[rows] > 0) & (mask[rows] < 255)
        result[rows][tinted] = result[rows][tinted] * np.float32(1 - share) + colours[mask[rows][tinted]]
    return result


def legend(names: Sequence[str], width: int) -> Image:
    """Draws the names of classes next to their colours.

    Args:
        names: names of the classes 0, 1, …
        width: width of the result, in pixels.

    >>> legend(["background", "leaf"], 300).shape
    (21, 300, 3)
    """
    entries = []
    for name, colour in zip(names, palette(), strict=False):
        swatch = np.full((21, 21, 3), 255, np.uint8)
        swatch[2:18, 2:18], swatch[3:17, 3:17] = 128, colour
        entries.append(np.concatenate((swatch, written(name, 14)), 1))
    cell = max(entry.shape[1] for entry in entries) + 12
    cells = [np.pad(entry, ((0, 0), (0, cell - entry.shape[1]), (0, 0)), constant_values=255) for entry in entries]
    columns = max(1, width // cell)
    lines = [np.concatenate(cells[start : start + columns], 1) for start in range(0, len(cells), columns)]
    return stacked([np.full((0, width, 3), 255, np.uint8), *lines])
