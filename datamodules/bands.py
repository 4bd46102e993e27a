"""Reading image files as bands with their full bit depth, rather than as a viewer shows them."""

import io
from typing import Any

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from datamodules.options import Reading

DEEP = (10, 12, 14, 16)  # bits that cameras and scanners store in 16-bit files
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def depth_of(values: NDArray[Any]) -> int:
    """Smallest bit depth, 10, 12, 14 or 16, that holds the given 16-bit values."""
    return next((bits for bits in DEEP if int(values.max()) < 1 << bits), DEEP[-1])


def upper(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Upper 8 bits of values, relative to the bit depth they need."""
    return (values >> (depth_of(values) - 8)).astype(np.uint8)


def decoded(data: bytes) -> NDArray[Any]:
    """Decodes all bands of an image file, uint8 or uint16 H×W×B, rotated by its EXIF tag.

    A TIFF may store them in its pixels, in planes or as pages. Colours are in the order red, green, blue.

    Raises:
        ValueError: it has values other than integers of 8 or 16 bits, or dimensions other than bands.
        OSError: it cannot be read.
    """
    pixels, turned = _from_tiff(data) if data[:4] in TIFF else _from_picture(data)
    if pixels.dtype.kind == "f":
        raise ValueError(
            "it holds floating-point values, whose range is not known; save it with 8 or 16 bits, such as reflectances times 10,000"
        )
    if pixels.dtype not in (np.uint8, np.uint16):
        if pixels.dtype == bool:
            pixels = pixels.astype(np.uint8) * 255
        elif pixels.size and (pixels.min() < 0 or pixels.max() >= 1 << 16):
            raise ValueError(f"its values, from {pixels.min()} to {pixels.max()}, are beyond 16 bits without a sign")
        else:
            pixels = pixels.astype(np.uint16)
    return np.ascontiguousarray(_upright(pixels, turned))


def _from_tiff(data: bytes) -> tuple[NDArray[Any], int]:
    """Bands of a TIFF, H×W×B, and its EXIF orientation."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        series, page = file.series[0], file.pages[0].aspage()
        tag = page.tags.get(274)
        turned = int(tag.value) if tag else 1
        more = [
            f"{n} of {axis}" for axis, n in zip(series.axes, series.shape, strict=True) if axis not in "YX" and n > 1
        ]
        if len(more) > 1:
            raise ValueError(f"it has {' and '.join(more)} beside rows and columns, and bands may be in one place only")
        if page.photometric == tifffile.PHOTOMETRIC.PALETTE:
            return _from_picture(data)
        try:
            pixels = series.asarray()
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            return _from_raster(data, str(page.compression).rpartition(".")[2]), turned
        rows, columns = (series.axes.index(axis) for axis in "YX")
        pixels = np.moveaxis(pixels, (rows, columns), (0, 1))
        return pixels.reshape(*pixels.shape[:2], -1), turned


def _from_raster(data: bytes, compression: str) -> NDArray[Any]:
    """Bands of a file that GDAL reads, H×W×B."""
    try:
        from rasterio.io import MemoryFile  # an optional dependency
    except ImportError:
        raise ValueError(f"it is compressed by {compression}, which needs rasterio: pip install rasterio") from None
    with MemoryFile(data) as memory, memory.open() as file:
        return np.moveaxis(file.read(), 0, 2)


def _from_picture(data: bytes) -> tuple[NDArray[Any], int]:
    """Bands of any other file, H×W×B, and its EXIF orientation."""
    image: Image.Image = Image.open(io.BytesIO(data))
    deep = image.mode.startswith("I") or any(";16" in str(tile) for tile in getattr(image, "tile", ()))
    turned = int(image.getexif().get(0x0112, 1))  # reads all of a PNG
    if deep:  # Pillow does not support 16-bit colour
        values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if values is None:
            raise ValueError("it has more than 8 bits and cannot be read by OpenCV")
        if values.ndim == 3:
            values = values[..., [2, 1, 0, *range(3, values.shape[2])]]
        return values.reshape(*values.shape[:2], -1), turned
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    elif image.mode not in ("1", "L", "LA", "RGB", "RGBA", "F"):
        image = image.convert("RGB")
    pixels = np.asarray(image)
    return pixels.reshape(*pixels.shape[:2], -1), turned


def _upright(pixels: NDArray[Any], turned: int) -> NDArray[Any]:
    """Applies an EXIF orientation to pixels."""
    if turned > 4:
        pixels = pixels.swapaxes(0, 1)
    across, down = turned in (2, 3, 6, 7), turned in (3, 4, 7, 8)
    return pixels[:: -1 if down else 1, :: -1 if across else 1]


def taken(pixels: NDArray[Any], reading: Reading) -> NDArray[Any]:
    """Selects bands with the values of the file: uint8, or uint16 if more than 8 bits are kept.

    Args:
        pixels: all bands, uint8 or uint16 H×W×B.
        reading: the bands to select. Without ``bands``, one band is repeated to three, and RGB becomes grey by the
            ITU-R 601-2 luma.

    Raises:
        ValueError: the file has other bands, or values exceed the bits.
    """
    count = pixels.shape[2]
    if reading.bands is not None:
        if max(reading.bands) > count:
            raise ValueError(f"it has {_bands(count)}, and band {max(reading.bands)} is asked for")
        pixels = pixels[..., [band - 1 for band in reading.bands]]
    elif (count, reading.channels) == (1, 3):
        pixels = pixels.repeat(3, 2)
    elif (count, reading.channels) == (3, 1):
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[..., None]
    elif count != reading.channels:
        raise ValueError(
            f"it has {_bands(count)}, and {reading.channels} are asked for; a training takes all by --data.in_chans {count}"
            + (", and some by --data.bands, such as '[1, 2]'" if count > reading.channels else "")
        )
    if pixels.dtype == np.uint16 and not reading.deep:
        return np.ascontiguousarray(upper(pixels))
    if pixels.dtype == np.uint16 and pixels.max(initial=0) >= 1 << reading.bits:
        raise ValueError(
            f"its values reach {pixels.max()}, and images of {reading.bits} bits have {(1 << reading.bits) - 1} at most; a "
            f"training takes more by --data.bits {depth_of(pixels)}"
        )
    return np.ascontiguousarray(pixels)


def _bands(count: int) -> str:
    return f"{count} band{'s' * (count != 1)}"


def scaled(pixels: NDArray[Any], bits: int) -> NDArray[Any]:
    """Bands as network input: uint8, or float32 in [0, 1] for more bits, where 1 is the maximum of that bit depth, and
    255 in 8-bit files.

    >>> scaled(np.array([[[0, 819, 4095]]], np.uint16), 12).tolist()
    [[[0.0, 0.20000000298023224, 1.0]]]
    """
    if bits == 8:
        return pixels
    return pixels.astype(np.float32) / np.float32(255 if pixels.dtype == np.uint8 else (1 << bits) - 1)
