"""Boxes drawn on images."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import ImageDraw

from modules.pictures.sheets import Image, typeface


def draw_boxes(
    image: Image,
    boxes: NDArray[np.floating[Any]],
    captions: Sequence[str],
    colours: Sequence[int] | None = None,
    side: int = 0,
) -> Image:
    """Draws boxes with a caption each.

    Args:
        image: uint8 H×W×3; it is left as it is.
        boxes: N×4, xyxy in pixels of the image; of one that is smaller than a pixel, the pixel is drawn, and none of what
            is empty, inverted or no number.
        captions: N texts.
        colours: N numbers, equal ones for boxes of equal colour; None draws all in white.
        side: shortest side of the result; smaller images are enlarged by a whole factor.

    Returns:
        uint8 H×W×3.
    """
    scale = max(1, -(-side // min(image.shape[:2])))
    picture = PIL.Image.fromarray(image.repeat(scale, 0).repeat(scale, 1))
    draw = ImageDraw.Draw(picture)
    width = max(1, round(min(picture.size) / 200))
    letters = max(11, min(picture.size) // 36)
    font = typeface(letters)
    for i, (box, caption) in enumerate(zip(boxes, captions, strict=True)):
        colour = (
            "white" if colours is None else tuple(int(255 * part) for part in colormaps["tab10"](colours[i] % 10)[:3])
        )
        left, top, right, bottom = (float(value) * scale for value in box)
        if not (right > left and bottom > top and np.isfinite((left, top, right, bottom)).all()):
            continue
        draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=width)
        frame = draw.textbbox((left + 2, max(0, top - letters - 2)), caption, font)
        draw.rectangle((frame[0] - 2, frame[1] - 1, frame[2] + 1, frame[3] + 1), fill=colour)
        draw.text((left + 2, max(0, top - letters - 2)), caption, "black" if colours is None else "white", font)
    return np.asarray(picture)
