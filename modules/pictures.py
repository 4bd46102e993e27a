"""The pictures that a task shows, as uint8 H×W×3."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import ImageDraw, ImageFont

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


def captioned_grid(images: Image, captions: Sequence[str], columns: int = 6, side: int = 112) -> Image:
    """Pictures with a caption each.

    Args:
        images: uint8 N×C×H×W with one or three channels.
        captions: N texts of two lines at most.
        columns: pictures in a row.
        side: longer side of a picture on the sheet, in pixels.
    """
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    width, height = side + 12, side + 36
    sheet = PIL.Image.new("RGB", (columns * width, rows * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = (i % columns) * width + 6, (i // columns) * height
        picture = PIL.Image.fromarray(image[0] if len(image) == 1 else image[:3].transpose(1, 2, 0))
        picture = picture.resize((side, side), PIL.Image.Resampling.NEAREST if image.shape[2] < side else None)
        sheet.paste(picture, (x, y + 32))
        lines = [line if len(line) <= 20 else f"{line[:19]}…" for line in caption.splitlines()]
        draw.multiline_text((x, y + 3), "\n".join(lines), "black", font, spacing=2)
    return np.asarray(sheet)


def captioned(image: Image, caption: str, side: int = 112) -> Image:
    """A picture with a line of text above, which is never cut off.

    Args:
        image: uint8 H×W×3.
        caption: the text.
        side: shortest side of the picture in the result; smaller ones are enlarged by a whole factor.
    """
    scale = -(-side // min(image.shape[:2]))
    image = image.repeat(scale, 0).repeat(scale, 1)
    height, width = image.shape[:2]
    font = ImageFont.load_default(max(14, min(height, width) // 20))
    _, _, right, bottom = map(round, font.getbbox(caption := " ".join(caption.split())))
    sheet = PIL.Image.new("RGB", (max(width, right + 8), height + bottom + 8), "white")
    ImageDraw.Draw(sheet).text((4, 2), caption, "black", font)
    sheet.paste(PIL.Image.fromarray(image), (0, bottom + 8))
    return np.asarray(sheet)


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
        boxes: N×4, xyxy in pixels of the image.
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
    font = ImageFont.load_default(letters)
    for i, (box, caption) in enumerate(zip(boxes, captions, strict=True)):
        colour = (
            "white" if colours is None else tuple(int(255 * part) for part in colormaps["tab10"](colours[i] % 10)[:3])
        )
        left, top, right, bottom = (float(value) * scale for value in box)
        if right <= left or bottom <= top:
            continue
        draw.rectangle((left, top, right - 1, bottom - 1), outline=colour, width=width)
        frame = draw.textbbox((left + 2, max(0, top - letters - 2)), caption, font)
        draw.rectangle((frame[0] - 2, frame[1] - 1, frame[2] + 1, frame[3] + 1), fill=colour)
        draw.text((left + 2, max(0, top - letters - 2)), caption, "black" if colours is None else "white", font)
    return np.asarray(picture)


def confusion_matrix(counts: NDArray[np.int64], label_names: Sequence[str]) -> Image:
    """A confusion matrix, each row in shares of its true class.

    Args:
        counts: K×K, true classes in rows, predicted ones in columns.
        label_names: K names.
    """
    classes = len(label_names)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(3 + 0.4 * classes, 14)
    figure = Figure((side, side), dpi=80)
    margin = min(0.3, (0.4 + 0.09 * max(map(len, label_names))) / side) if classes <= 40 else 0.05
    axes = figure.add_axes((margin, margin, 0.98 - margin, 0.98 - margin))
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
