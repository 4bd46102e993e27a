"""Listing image files, and decoding them as an image viewer would."""

import io
import os
import struct
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from datamodules.bands import decoded, depth_of, scaled, taken, upper
from datamodules.errors import DataError, listed
from datamodules.options import RGB, Reading
from datamodules.paths import Member, Paths, binary, content_of

# The reduction factor in decoding for a height and width, in either order: 1, 2, 4 or 8.
Reduction = Callable[[int, int], int]

# Formats that are also written, for drawings and aligned faces.
WRITTEN = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".pgm", ".ppm")
EXTENSIONS = (*WRITTEN, ".jfif", ".jpe", ".gif", ".avif", ".jp2", ".j2k", ".jpx", ".jpf", ".j2c", ".pbm", ".pnm", ".dib",
              ".apng", ".tga", ".pcx", ".ras", ".sgi", ".qoi", ".psd", ".ico")  # fmt: skip
KINDS = "JPEG, PNG, WebP, GIF, AVIF, JPEG 2000, BMP, TIFF, PNM, TGA and a few more"  # for messages
JUNK = {"__macosx", "@eadir", "thumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "lost+found"}
# Descriptions or annotations of images.
TEXTS = {".txt", ".md", ".rst", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".html", ".pdf", ".parquet"}


def is_junk(name: str) -> bool:
    """Whether a file or folder name is hidden, or that of files which systems, archives and notebooks leave behind."""
    return name.startswith(".") or name.casefold() in JUNK


def composed(name: str) -> str:
    """Normalises a name to composed Unicode (NFC); macOS decomposes umlauts in file names."""
    return unicodedata.normalize("NFC", name)


def folded(name: str) -> str:
    """Normalises a file name for comparison: `composed`, and case-insensitive."""
    return composed(name).casefold()


def is_image(file: Path) -> bool:
    """Whether a file is an image in a supported format, by its name."""
    return file.suffix.lower() in EXTENSIONS and not is_junk(file.name) and file.is_file()


def leads_to_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one; a link in a circle, or to what is not shown, is none."""
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path))


def sub_folders(folder: Path) -> list[Path]:
    """Returns the sub-folders of a folder, including links, sorted; without `is_junk`.

    Raises:
        DataError: a name is not in UTF-8, and could not be a label.
    """
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if leads_to_folder(entry) and not is_junk(entry.name))
    found = [folder / name for name in names]
    for entry in found:
        if os.fsencode(entry.name).decode(errors="replace") != entry.name:
            raise DataError(
                f"The name {entry.name} in {folder.resolve()} is not in UTF-8: rename it.".encode(
                    errors="backslashreplace"
                ).decode()
            )
    return found


def images_in(folder: Path, left_out: list[Path] | None = None, extensions: tuple[str, ...] = EXTENSIONS) -> list[Path]:
    """See `names_in`."""
    return [Path(name) for name in names_in(folder, left_out, extensions)]


def names_in(folder: Path, left_out: list[Path] | None = None, extensions: tuple[str, ...] = EXTENSIONS) -> Paths:
    """Returns the images below a folder, including linked folders, sorted as paths; without `is_junk`.

    Args:
        folder: the folder.
        left_out: extended by the files that are neither supported images nor texts; see `warn_of_left_out`.
        extensions: extensions of the files to find.
    """
    folders: list[bytes] = []
    places: list[int] = []
    names: list[bytes] = []

    def visit(place: str, shown: str, above: set[str]) -> None:
        """Adds the files of a folder and of its sub-folders, all in the order of their names.

        ``above`` has the real paths of the folders above: a link to one of them would otherwise lead to an endless loop.
        """
        try:
            with os.scandir(place) as entries:
                inner = sorted(entries, key=lambda entry: entry.name)
        except OSError:
            return
        folders.append(os.fsencode(os.path.join(shown, "")))
        number = len(folders) - 1
        for entry in inner:
            if is_junk(entry.name):
                continue
            suffix = os.path.splitext(entry.name)[1].lower()
            if leads_to_folder(entry):
                real = os.path.realpath(entry.path)
                if real not in above:
                    visit(entry.path, os.path.join(shown, entry.name), above | {real})
            elif suffix in extensions:
                places.append(number)
                names.append(os.fsencode(entry.name))
            elif left_out is not None and suffix not in TEXTS:
                left_out.append(Path(place, entry.name))

    start = os.path.realpath(folder)
    shown = os.fspath(folder)
    visit(shown, "" if shown == os.curdir else shown, {start, *map(str, Path(start).parents)})
    return Paths(binary(folders), np.array(places, np.int32), binary(names))


def turned(file: str | Member) -> bool:
    """Whether an image's EXIF tag rotates it by 90 degrees."""
    with Image.open(io.BytesIO(content_of(file))) as image:
        return image.getexif().get(0x0112, 1) > 4


def warn_of_left_out(files: Sequence[Path]) -> None:
    """Warns of unsupported files, with their number, extensions and the name of the first."""
    if files:
        kinds = Counter(
            (file.suffix.lower() or "without suffix") if file.exists() else "broken link" for file in files
        ).most_common()
        rank_zero_warn(
            f"Left out: {len(files)} files in formats that are not supported "
            f"({listed(f'{n} {kind}' for kind, n in kinds)}); the "
            f"first: {files[0]}. Convert pictures to one of these: {KINDS}."
        )


def read_image(file: str | os.PathLike[str] | bytes, reading: Reading = RGB) -> NDArray[Any]:
    """Decodes an image, by default as an image viewer would.

    EXIF rotation is applied; transparency is composited on white; palettes and CMYK are converted to RGB; 16-bit values
    are reduced to the upper 8 bits, or the upper 8 of 10, 12 or 14 if the largest value needs no more; grey is repeated
    to RGB, and RGB is converted to grey with the ITU-R 601-2 luma. Of several frames or pages, the first is read. For
    other readings, see `datamodules.bands`.

    Returns:
        uint8 H×W×C; float32 in [0, 1] if more than 8 bits are kept.

    Raises:
        DataError: the file is not a readable image; the message names it.
    """
    return read_reduced(file, reading)[0]


def read_reduced(
    file: str | os.PathLike[str] | bytes, reading: Reading = RGB, reduction: Reduction | None = None
) -> tuple[NDArray[Any], int]:
    """Decodes an image as `read_image` does, but no larger than needed if that saves time.

    The JPEG decoder can return a half, a quarter or an eighth of the size at a lower cost: each pixel averages a square
    of pixels (the last row and column what remains), without aliasing.

    Args:
        file: see `read_image`.
        reading: see `read_image`.
        reduction: returns the factor by which it may be reduced; None for no reduction.

    Returns:
        The image, as in `read_image`, and the factor by which it is reduced: 1, 2, 4 or 8.

    Raises:
        DataError: see `read_image`.
    """
    if not reading.seen:
        return scaled(read_bands(file, reading), reading.bits), 1
    channels = reading.channels
    with _named(file) as data:
        if size := _plain_jpeg(data):  # OpenCV decodes these faster, with equal quality
            factor = reduction(*size) if reduction else 1
            flag = (cv2.IMREAD_COLOR_RGB if channels == 3 else cv2.IMREAD_GRAYSCALE) | REDUCED[factor]
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
            if pixels is not None:
                return pixels.reshape(*pixels.shape[:2], channels).astype(np.uint8, copy=False), factor
        return as_seen(opened(data), channels), 1


def read_bands(file: str | os.PathLike[str] | bytes, reading: Reading) -> NDArray[Any]:
    """Decodes bands of an image with the values of the file, uint8 or uint16 H×W×C; see `bands.taken`.

    Raises:
        DataError: see `read_image`.
    """
    with _named(file) as data:
        return taken(decoded(data), reading)


@contextmanager
def _named(file: str | os.PathLike[str] | bytes) -> Iterator[bytes]:
    """Context with the content of a file; adds the file's name to errors."""
    name = "the given data" if isinstance(file, bytes) else os.fspath(file)
    data = b""
    try:
        data = file if isinstance(file, bytes) else content_of(file)
        yield data
    except UnidentifiedImageError:
        raise DataError(f"{name} is {not_an_image(data)} ({len(data)} bytes).") from None
    except UNREADABLE as error:
        why = (
            error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        )  # which would name the file again
        raise DataError(f"{name} cannot be read as an image: {why.rstrip('.')}.") from None


# Errors of Pillow, OpenCV, tifffile and rasterio for damaged files.
UNREADABLE = (
    OSError, SyntaxError, ValueError, LookupError, TypeError, RuntimeError, struct.error, zlib.error, cv2.error,
    Image.DecompressionBombError,
)  # fmt: skip


REDUCED = {
    1: 0,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}  # flags that are added to that of colour, or used alone for grey


def _plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """Returns height and width of an 8-bit JPEG with one or three channels within Pillow's size limit, from its frame
    header (T.81, B.2.2); None for others."""
    position = 2 if data.startswith(b"\xff\xd8\xff") else len(data)
    while position + 10 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = (int.from_bytes(data[position + i : position + i + 2]) for i in (5, 7))
            fits = height * width <= (Image.MAX_IMAGE_PIXELS or 0)
            plain = fits and data[position + 4] == 8 and data[position + 9] in (1, 3)
            return (height, width) if plain else None
        position += 1 if marker == 0xFF else 2 + int.from_bytes(data[position + 2 : position + 4])
    return None


def opened(data: bytes) -> Image.Image:
    """Opens an image with Pillow. It only keeps the upper 8 of 16 bits in colour, so OpenCV reads images that would be
    dark."""
    try:
        image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise ValueError(
            f"it has more than {most / 1e6:.0f} million pixels; cut it into pieces, or reduce it"
        ) from None
    if image.mode.startswith("I") or not any(";16" in str(tile) for tile in image.tile):
        return image
    exif = image.getexif()
    bands = cast(Any, image.getextrema())
    largest = max(
        high for _, high in (bands if isinstance(bands[0], tuple) else [bands])[: 4 if "A" not in image.mode else -1]
    )
    if largest >= 1 << 6:  # the value of 14-bit images in the upper 8 bits
        return image
    values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype != np.uint16:
        return image
    colours = values if values.ndim == 2 else values[..., 2::-1]
    pixels = upper(colours)
    if values.ndim == 3 and values.shape[2] == 4:
        pixels = np.dstack([pixels, upper(values[..., 3])])
    deep = Image.fromarray(pixels)
    deep.getexif().update(exif)
    deep.info["bits"] = depth_of(colours)
    return deep


def depth(image: Image.Image) -> int:
    """Returns the bit depth of a Pillow image: 10, 12, 14 or 16 if it has 16 bits, otherwise 8."""
    return depth_of(np.asarray(image)) if image.mode.startswith("I") else int(image.info.get("bits", 8))


def not_an_image(data: bytes) -> str:
    """Describes a file that Pillow does not recognise."""
    if data[:4] in (b"II*\0", b"MM\0*"):
        with suppress(Exception):  # the header may be damaged
            file = io.BytesIO(data)
            header = ImageFileDirectory_v2(file.read(8))
            file.seek(header.next)
            header.load(file)
            bits = header.get(258, (1,))
            return (
                f"a TIFF with {header.get(277, 1)} bands of {bits[0]} bits that are not red, green and blue with or without "
                f"alpha: read them all by --data.in_chans {header.get(277, 1)}, or some by --data.bands, such as [1, 2, 3]"
            )
    return "not an image" if data else "an empty file"


def as_seen(image: Image.Image, channels: int) -> NDArray[np.uint8]:
    """Converts a Pillow image to the pixels that a viewer shows; see `read_image`.

    Args:
        image: image in any mode.
        channels: 3 for RGB, 1 for grey.

    Returns:
        uint8 H×W×channels.

    Raises:
        ValueError: it has floating-point values, more than 16 bits, or 16 bits of which only the lower 8 are used.
        OSError: the file is incomplete.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        values = np.asarray(image, np.int64)
        if 0 < values.max() < 256:
            raise ValueError(f"its 16-bit values reach only {values.max()}, which is black; save it with 8 bits")
        if values.min() < 0 or values.max() >= 1 << 16:
            raise ValueError("its values are beyond 16 bits")
        image = Image.fromarray(upper(values))
    elif image.mode == "F":
        raise ValueError("it holds floating-point values, whose range is not known; save it with 8 or 16 bits")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    pixels = np.array(image.convert("RGB" if channels == 3 else "L"))  # a copy, since Pillow's own array is read-only
    return pixels.reshape(*pixels.shape[:2], channels)
