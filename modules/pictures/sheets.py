"""Image grids with a heading and captions, and images as data URLs."""

import base64
import io
import math
from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from PIL import ImageDraw, ImageFont
from torch import Tensor

Image = NDArray[np.uint8]
LEAST = 64  # smallest side, in pixels, at which an image is recognisable
LONGEST = 4096  # side of an enlarged image, in pixels, since file formats and memory have limits
GAP = 6


def as_rgb(image: Tensor | Image) -> Image:
    """Converts an image to RGB, uint8 H×W×3.

    Args:
        image: a tensor, uint8 C×H×W, or an array, uint8 H×W×C or H×W. Of more than three channels the first three are
            used, of fewer the first one as grey. Float32 images in [0, 1], of more than 8 bits, are stretched from
            their 1st to their 99th percentile.

    >>> as_rgb(torch.zeros(1, 4, 6, dtype=torch.uint8)).shape
    (4, 6, 3)
    """
    pixels = image.permute(1, 2, 0).cpu().numpy() if isinstance(image, Tensor) else image
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    pixels = pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., :1].repeat(3, 2)
    if pixels.dtype != np.uint8:
        low, high = np.percentile(pixels, (1, 99))
        pixels = ((pixels - low) / max(high - low, 1e-6) * 255).clip(0, 255).round().astype(np.uint8)
    return np.ascontiguousarray(pixels)


def to_uint8(image: Tensor) -> Tensor:
    """Converts float N×C×H×W in [0, 1] to uint8, on the CPU.

    >>> to_uint8(torch.tensor([0.0, 0.5, 2.0])).tolist()
    [0, 128, 255]
    """
    return (image.detach().float().clamp(0, 1) * 255).round().byte().cpu()


def signed(values: Tensor) -> Tensor:
    """Converts signed values to images: zero is grey, and each image is scaled by its largest absolute value.

    Args:
        values: float N×C×H×W.

    >>> signed(torch.tensor([[[[-2.0, 0, 1]]]])).tolist()
    [[[[0, 128, 191]]]]
    """
    return to_uint8(0.5 + 0.5 * values / values.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-12))


def enlarged(image: Image, side: int) -> Image:
    """Enlarges an image by an integer factor so that its shorter side has at least ``side`` pixels.

    Elongated images are enlarged less: their longer side stays within `LONGEST`.

    >>> enlarged(np.zeros((28, 40, 3), np.uint8), 64).shape
    (84, 120, 3)
    >>> enlarged(np.zeros((1, 1000, 3), np.uint8), 64).shape
    (4, 4000, 3)
    """
    height, width = image.shape[:2]
    scale = max(1, min(-(-side // min(height, width)), LONGEST // max(height, width)))
    return image if scale == 1 else image.repeat(scale, 0).repeat(scale, 1)


def resized(image: Image, height: int, width: int) -> Image:
    """Resizes an image, uint8 H×W×3: nearest neighbour to enlarge, Lanczos to reduce.

    >>> resized(np.zeros((300, 200, 3), np.uint8), 96, 64).shape
    (96, 64, 3)
    """
    smaller = image.shape[0] > height or image.shape[1] > width
    filtering = PIL.Image.Resampling.LANCZOS if smaller else PIL.Image.Resampling.NEAREST
    return np.asarray(PIL.Image.fromarray(image).resize((width, height), filtering))


@cache
def typeface(size: int) -> ImageFont.FreeTypeFont:
    """Returns the font for texts in images.

    Args:
        size: size in pixels.

    >>> typeface(12).getname()[0]
    'DejaVu Sans'
    """
    from matplotlib.font_manager import findfont

    return ImageFont.truetype(findfont("DejaVu Sans"), size)  # comes with matplotlib and has more glyphs than Pillow's


def written(text: str, size: int = 14, width: int | None = None) -> Image:
    """Draws lines of text, black on white.

    Args:
        text: text of one or several lines.
        size: font size, in pixels.
        width: width of the result; longer lines are cut off with "…". None for the width of the text.

    >>> written("a\\nb", 10, width=50).shape
    (32, 50, 3)
    """
    font = typeface(size)
    lines = text.split("\n")
    for i, line in enumerate(lines):
        while width is not None and font.getlength(line) > width and len(line) > 1:
            line = lines[i] = f"{line[:-2]}…"
    space = max(map(font.getlength, lines)) + 2
    page = PIL.Image.new("RGB", (width or int(space), len(lines) * (size + 5) + 2), "white")
    ImageDraw.Draw(page).multiline_text((0, 1), "\n".join(lines), "black", font, spacing=2)
    return np.asarray(page)


def stacked(pages: Iterable[Image]) -> Image:
    """Stacks images vertically, padded with white to the same width.

    >>> stacked([np.zeros((2, 5, 3), np.uint8), np.zeros((3, 4, 3), np.uint8)]).shape
    (5, 5, 3)
    """
    pages = list(pages)
    height, width = sum(page.shape[0] for page in pages), max(page.shape[1] for page in pages)
    stack = np.full((height, width, *pages[0].shape[2:]), 255, np.uint8)  # np.pad copies slowly
    top = 0
    for page in pages:
        stack[top : (top := top + page.shape[0]), : page.shape[1]] = page
    return stack


def sheet(
    tiles: Tensor | Sequence[Tensor | Image],
    columns: int = 8,
    captions: Sequence[str] = (),
    heading: str = "",
    side: int | None = None,
) -> Image:
    """Arranges images in a grid.

    Args:
        tiles: N images that `as_rgb` accepts, of one size if ``side`` is None.
        columns: images per row.
        captions: N texts below the images, cut off at the image's width; or none.
        heading: text above the grid, never cut off.
        side: side of the square tiles, in pixels; images that all have the same shape keep it, with the area of that
            square. None keeps images of at least 64 pixels and enlarges smaller ones by an integer factor.

    Returns:
        uint8 H×W×3.

    >>> sheet(torch.zeros(10, 1, 64, 64, dtype=torch.uint8), 4, heading="ten zeros").shape
    (237, 286, 3)
    """
    from torchvision.utils import make_grid

    images = [as_rgb(tile) for tile in tiles]
    if side is None:
        images = [enlarged(image, LEAST) for image in images]
    else:
        height, width = images[0].shape[:2] if len({image.shape for image in images}) == 1 else (1, 1)
        scale = side / math.sqrt(height * width)
        images = [resized(image, max(1, round(height * scale)), max(1, round(width * scale))) for image in images]
    height, width = images[0].shape[:2]
    if captions:
        most = max(caption.count("\n") for caption in captions)
        texts = [caption + "\n" * (most - caption.count("\n")) for caption in captions]
        size = max(11, min(height, width) // 24)
        images = [stacked((image, written(text, size, width))) for image, text in zip(images, texts, strict=True)]
    grid = make_grid(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), columns, GAP, pad_value=255)
    page = grid.permute(1, 2, 0).numpy()
    return stacked((written(heading, max(14, min(height, width) // 20)), page)) if heading else page


def as_address(image: Image, kind: str = "png") -> str:
    """Encodes an image, uint8 H×W×C with one or three channels, as a ``data:`` URL.

    Args:
        image: the image.
        kind: ``png``, or ``webp``, which is smaller and lossy.

    >>> as_address(np.zeros((2, 2, 1), np.uint8))[:22]
    'data:image/png;base64,'
    """
    buffer = io.BytesIO()
    PIL.Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(buffer, kind)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def from_address(address: str) -> Image:
    """Decodes an image of `as_address`.

    >>> from_address(as_address(np.full((2, 3, 1), 7, np.uint8))).shape
    (2, 3, 1)
    """
    image = np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))))
    return image[..., None] if image.ndim == 2 else image
