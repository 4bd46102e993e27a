"""The pictures that a task shows, as uint8 H×W×3."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import ImageDraw, ImageFont
from torch import Tensor

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


def picture(image: Tensor) -> Image:
    """uint8 C×H×W with any channels to uint8 H×W×3."""
    pixels = image.cpu().numpy().transpose(1, 2, 0)
    return pixels.repeat(3, 2) if pixels.shape[2] == 1 else np.ascontiguousarray(pixels[..., :3])


def as_address(image: Image) -> str:
    """uint8 H×W×C with one or three channels as a ``data:`` address of a PNG, for answers that are pictures."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def from_address(address: str) -> Image:
    """What `as_address` was given."""
    image = np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))))
    return image[..., None] if image.ndim == 2 else image


def sheet(tiles: Sequence[Image], columns: int) -> Image:
    """Pictures of the same size, ``columns`` in a row."""
    rows = -(-len(tiles) // columns)
    height, width = tiles[0].shape[0] + 8, tiles[0].shape[1] + 8
    result = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        y, x = (i // columns) * height + 4, (i % columns) * width + 4
        result[y : y + height - 8, x : x + width - 8] = tile
    return result


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
    font = ImageFont.load_default(letters)
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


def as_tile(image: Image, side: int) -> Image:
    """A picture, uint8 H×W×C or H×W, as uint8 side×side×3: enlarged without blur, made smaller with it."""
    picture = PIL.Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image).convert("RGB")
    return np.asarray(picture.resize((side, side), 0 if max(image.shape[:2]) <= side else PIL.Image.Resampling.LANCZOS))


def heat(values: NDArray[np.float32], colours: str = "viridis") -> Image:
    """A map H×W in colours of matplotlib's, from its lowest to its highest value: uint8 H×W×3."""
    low, high = float(values.min()), float(values.max())
    return (colormaps[colours]((values - low) / max(high - low, 1e-12))[..., :3] * 255).round().astype(np.uint8)


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(findfont("DejaVu Sans"), size)  # comes with matplotlib and knows more signs than Pillow's


def rows_of_tiles(rows: Sequence[tuple[str, Sequence[Image], Sequence[str]]], side: int = 96) -> Image:
    """Rows of pictures; each row with a heading, each picture with a line of text below.

    Args:
        rows: heading, pictures as `as_tile` takes them, and a caption for each or none at all.
        side: of a picture on the sheet, in pixels.
    """
    head, font = _font(14), _font(11)
    heights = [26 * bool(heading) + side + (20 if captions else 6) for heading, _, captions in rows]
    width = max(
        [6 + (side + 6) * len(tiles) for _, tiles, _ in rows] + [round(head.getlength(row[0])) + 12 for row in rows]
    )
    sheet = PIL.Image.new("RGB", (width, sum(heights) + 2), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for (heading, tiles, captions), height in zip(rows, heights, strict=True):
        draw.text((6, top + 4), heading, "black", head)
        top, height = top + 26 * bool(heading), height - 26 * bool(heading)
        for i, tile in enumerate(tiles):
            left = 6 + i * (side + 6)
            sheet.paste(PIL.Image.fromarray(as_tile(tile, side)), (left, top))
            if captions:
                text = captions[i]
                while font.getlength(text) > side and len(text) > 1:
                    text = f"{text[:-2]}…"
                draw.text((left, top + 2 + side), text, "black", font)
        top += height
    return np.asarray(sheet)


def overlays(
    image: Image, title: str, maps: Sequence[tuple[str, NDArray[np.float32], str]], side: float = 3.4
) -> Image:
    """A picture, and beside it the same picture in grey under each of some maps, with a scale.

    Args:
        image: uint8 S×S×C.
        title: what stands above the picture.
        maps: heading, values h×w that cover all of the picture, and the name of matplotlib's colours. Where some values
            are below zero, zero is in the middle of the scale.
        side: of a picture, in inches.
    """
    wide = side * (1 + 1.25 * len(maps))
    figure = Figure((wide, side + 0.35), dpi=100)
    grey, edge = image.mean(2), (-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5)
    for i, (heading, values, colours) in enumerate([(title, None, "grey"), *maps]):
        left = side * (1.25 * i - (0.2 if i else 0)) / wide
        axes = figure.add_axes((left, 0.01, 0.97 * side / wide, 0.97 * side / (side + 0.35)))
        axes.set_title(heading, fontsize=11, pad=4)
        axes.set_axis_off()
        if values is None:
            axes.imshow(image, cmap="grey", interpolation="nearest")
            continue
        most = max(float(np.abs(values).max()), 1e-12)
        axes.imshow(grey, cmap="grey", vmin=-64, vmax=319, interpolation="nearest")
        norm = Normalize(-most if values.min() < 0 else 0, most)
        paint = ScalarMappable(norm, colours)
        axes.imshow(values, cmap=colours, norm=norm, alpha=0.55, extent=edge, interpolation="bilinear")
        place = (left + 0.98 * side / wide, 0.03, 0.04 * side / wide, 0.84)
        figure.colorbar(paint, cax=figure.add_axes(place)).ax.tick_params(labelsize=8)
    return rasterize(figure)


def scatter(points: NDArray[np.float32], labels: NDArray[np.int64] | None, names: Sequence[str], title: str) -> Image:
    """Points in the plane, coloured by class.

    Args:
        points: N×2.
        labels: classes of the points, N; None draws all alike.
        names: the classes' names.
        title: what stands above.
    """
    present = [] if labels is None else np.unique(labels).tolist()
    wide = -(-min(len(present), 60) // 20)  # columns of the legend
    figure = Figure((6.5 + 1.6 * wide, 6.3), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=12)
    axes.set_xticks([])
    axes.set_yticks([])
    if labels is None:
        axes.scatter(points[:, 0], points[:, 1], s=14)
        return rasterize(figure)
    colours = colormaps["tab10" if len(present) <= 10 else "tab20" if len(present) <= 20 else "gist_rainbow"]
    for i, label in enumerate(present):
        colour = colours(i if len(present) <= 20 else i / len(present))
        name = names[label] if i < 60 else None
        x, y = points[labels == label].T
        axes.scatter(x, y, 14, color=colour, label=name, linewidths=0)
    figure.legend(loc="outside right upper", ncols=wide, markerscale=2, fontsize=10, frameon=False)
    return rasterize(figure)


def nested_squares(image: Image, squares: Sequence[tuple[str, int | None]], title: str) -> Image:
    """Squares about the middle of a picture, one in the other.

    Args:
        image: uint8 S×S×C.
        squares: what the legend says of each, and its side in pixels; None for all of the picture.
        title: what stands above.
    """
    side = image.shape[0]
    figure = Figure((7.2, 4.4), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(image, cmap="grey", interpolation="nearest", alpha=0.75)
    # What is beyond the picture is cut off: a frame of its own is left for it.
    rim = 0.06 * side
    axes.set_xlim(-0.5 - rim, side - 0.5 + rim)
    axes.set_ylim(side - 0.5 + rim, -0.5 - rim)
    for i, (name, size) in enumerate(squares):
        drawn = side if size is None else min(size, side + rim)
        colour = colormaps["plasma"](0.9 * i / max(1, len(squares) - 1))
        corner = (side / 2 - 0.5 - drawn / 2,) * 2
        axes.add_patch(Rectangle(corner, drawn, drawn, fill=False, edgecolor=colour, linewidth=2.5, label=name))
    axes.set_axis_off()
    axes.set_title(title, fontsize=12)
    figure.legend(loc="outside right upper", fontsize=10, frameon=False)
    return rasterize(figure)
