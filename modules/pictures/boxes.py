"""Drawing of bounding boxes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modules.pictures.palette import palette
from modules.pictures.sheets import Image, enlarged, typeface

CROWDED = 100  # number of boxes from which overlapping labels are not moved apart, which takes quadratic time


def draw_boxes(
    image: Image,
    boxes: NDArray[np.floating[Any]],
    captions: Sequence[str],
    colours: Sequence[int] | None = None,
    side: int = 0,
) -> Image:
    """Draws boxes with captions.

    Args:
        image: uint8 H×W×3; not modified.
        boxes: N×4, xyxy in pixels of the image; boxes smaller than a pixel are drawn as one, and empty, inverted or
            non-finite ones are not drawn.
        captions: N texts.
        colours: N integers, one colour for each value; None draws all boxes in white.
        side: minimum length of the shorter side of the result; smaller images are enlarged by an integer factor.

    Returns:
        uint8 H×W×3.

    >>> drawn = draw_boxes(np.zeros((100, 100, 3), np.uint8), np.array([[10.0, 20, 50, 60]]), ["cat"])
    >>> drawn[59, 49].tolist(), drawn[60, 50].tolist()
    ([255, 255, 255], [0, 0, 0])
    """
    import supervision as sv  # only here: it takes a second to import

    kept = np.flatnonzero(np.isfinite(boxes).all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1))
    scene = enlarged(image, side).copy()
    corners = boxes[kept] * (min(scene.shape[:2]) // min(image.shape[:2]))
    corners[:, 2:] = np.maximum(corners[:, :2], corners[:, 2:] - 1)  # the last pixel inside the box
    numbers = np.zeros(len(kept), int) if colours is None else np.array(colours, int)[kept]
    # Lighter than in `tint`, so that lines are visible on dark images.
    paints = np.full((1, 3), 255) if colours is None else 64 + palette()[1:201].astype(int) * 3 // 4
    bright = paints @ (0.299, 0.587, 0.114) > 110
    # supervision expects BGR images; colours are reversed instead.
    shades = sv.ColorPalette([sv.Color(*paint[::-1].tolist()) for paint in paints])
    letters = sv.ColorPalette([sv.Color.BLACK if light else sv.Color.WHITE for light in bright])
    found, short = sv.Detections(corners.astype(np.float32), class_id=numbers), min(scene.shape[:2])
    scene = sv.BoxAnnotator(shades, max(1, round(short / 200))).annotate(scene, found)
    labels = sv.RichLabelAnnotator(
        color=shades,
        text_color=letters,
        font_path=str(typeface(11).path),
        font_size=max(11, short // 36),
        text_padding=2,
        smart_position=len(kept) < CROWDED,
    )
    return np.asarray(labels.annotate(scene, found, [captions[i] for i in kept.tolist()]))
