"""Sheets: images as tiles, with captions and headings."""

import base64
import io
from collections.abc import Sequence

import numpy as np
import PIL.Image
from matplotlib.font_manager import findfont
from numpy.typing import NDArray
from PIL import ImageDraw, ImageFont
from torch import Tensor

Image = NDArray[np.uint8]


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
    draw, font = ImageDraw.Draw(sheet), typeface(11)
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
    font = typeface(max(14, min(height, width) // 20))
    _, _, right, bottom = map(round, font.getbbox(caption := " ".join(caption.split())))
    sheet = PIL.Image.new("RGB", (max(width, right + 8), height + bottom + 8), "white")
    ImageDraw.Draw(sheet).text((4, 2), caption, "black", font)
    sheet.paste(PIL.Image.fromarray(image), (0, bottom + 8))
    return np.asarray(sheet)


def as_tile(image: Image, side: int) -> Image:
    """A picture, uint8 H×W×C or H×W, as uint8 side×side×3: enlarged without blur, made smaller with it."""
    picture = PIL.Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image).convert("RGB")
    return np.asarray(picture.resize((side, side), 0 if max(image.shape[:2]) <= side else PIL.Image.Resampling.LANCZOS))


def typeface(size: int) -> ImageFont.FreeTypeFont:
    """The letters that are drawn into pictures, of a size in pixels."""
    return ImageFont.truetype(findfont("DejaVu Sans"), size)  # comes with matplotlib and knows more signs than Pillow's


def rows_of_tiles(rows: Sequence[tuple[str, Sequence[Image], Sequence[str]]], side: int = 96) -> Image:
    """Rows of pictures; each row with a heading, each picture with a line of text below.

    Args:
        rows: heading, pictures as `as_tile` takes them, and a caption for each or none at all.
        side: of a picture on the sheet, in pixels.
    """
    head, font = typeface(14), typeface(11)
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
