"""The pictures that a task shows, as uint8 H×W×3."""

from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

Image = NDArray[np.uint8]


def rasterize(figure: Figure) -> Image:
    """Draws a figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def image_grid(images: Image, columns: int = 8) -> Image:
    """Lays pictures side by side.

    Args:
        images: uint8 N×C×H×W with one or three channels.
        columns: pictures in a row.
    """
    scale = max(1, 64 // images.shape[2])
    tiles = images[:, :3].repeat(scale, 2).repeat(scale, 3).transpose(0, 2, 3, 1)
    if tiles.shape[3] == 1:
        tiles = tiles.repeat(3, 3)
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    height, width = tiles.shape[1] + 2, tiles.shape[2] + 2
    sheet = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        y, x = (i // columns) * height, (i % columns) * width
        sheet[y : y + height - 2, x : x + width - 2] = tile
    return sheet


def captioned_grid(images: Image, captions: Sequence[str], columns: int = 6) -> Image:
    """Pictures with a caption each.

    Args:
        images: uint8 N×C×H×W with one or three channels.
        captions: N texts.
        columns: pictures in a row.
    """
    rows = max(1, -(-len(images) // columns))
    figure = Figure((columns * 1.7, rows * 1.9), dpi=80, layout="tight")
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.imshow(image[0] if len(image) == 1 else image[:3].transpose(1, 2, 0), cmap="gray", vmin=0, vmax=255)
        axes.set_title(caption, fontsize=7)
        axes.axis("off")
    return rasterize(figure)


def confusion_matrix(counts: NDArray[np.int64], label_names: Sequence[str]) -> Image:
    """A confusion matrix, each row in shares of its true class.

    Args:
        counts: K×K, true classes in rows, predicted ones in columns.
        label_names: K names.
    """
    classes = len(label_names)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(3 + 0.4 * classes, 14)
    figure = Figure((side, side), dpi=80, layout="tight")
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if classes <= 40:
        axes.set_xticks(range(classes), label_names, rotation=90, fontsize=8)
        axes.set_yticks(range(classes), label_names, fontsize=8)
    if classes <= 15:
        for i, j in np.ndindex(classes, classes):
            if counts[i, j]:
                shade = "white" if shares[i, j] > 0.5 else "black"
                axes.text(j, i, str(counts[i, j]), ha="center", va="center", color=shade, fontsize=7)
    return rasterize(figure)
