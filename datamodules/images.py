"""Decoding of image files as an image viewer would, and detection of unreadable files."""

import errno
import io
import os
import struct
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import cv2
import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from datamodules.bands import decoded, depth_of, scaled, taken, upper
from datamodules.base import DataError, digest_of, digest_of_lines, listed
from datamodules.options import RGB, Check, Reading
from datamodules.paths import CHUNK, Member, Paths, binary, content_of

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

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


def sub_folders(folder: Path) -> list[Path]:
    """Returns the sub-folders of a folder, including links, sorted; without `is_junk`.

    Raises:
        DataError: a name is not in UTF-8, and could not be a label.
    """
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not is_junk(entry.name))
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
            if entry.is_dir():
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


def turned(file: str) -> bool:
    """Whether an image's EXIF tag rotates it by 90 degrees."""
    with Image.open(file) as image:
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

    Args:
        file: path of the file, or its content.
        reading: how it is decoded.

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
        return as_seen(_opened(data), channels), 1


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
    name = "the given bytes" if isinstance(file, bytes) else os.fspath(file)
    data = b""
    try:
        data = file if isinstance(file, bytes) else content_of(file)
        yield data
    except UnidentifiedImageError:
        raise DataError(f"{name} is {_not_an_image(data)} ({len(data)} bytes).") from None
    except UNREADABLE as error:
        raise DataError(f"{name} cannot be read as an image: {str(error).rstrip('.')}.") from None


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


def _opened(data: bytes) -> Image.Image:
    """Opens an image with Pillow. It only keeps the upper 8 of 16 bits in colour, so OpenCV reads images that would be
    dark."""
    image = Image.open(io.BytesIO(data))
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


def _not_an_image(data: bytes) -> str:
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


SAMPLE = 1000  # number of files that --data.check sample decodes
MANY = 20_000  # number of files from which decoding takes long
FOUND = ["digest", "error", "height", "width", "bits", "frames"]
Look = Callable[[str | Member], tuple[str, str, int, int, int, int]]  # inspects a file


def _inspect(path: str | Member) -> tuple[str, str, int, int, int, int]:
    """Inspects an image file: content digest; error if it cannot be decoded completely; height and width as displayed;
    `depth`; number of frames or pages."""
    try:
        data = content_of(path)
    except OSError as error:
        if isinstance(path, Member):  # its server may answer the next time: not to be remembered
            raise DataError(f"{path.name} cannot be read: {error.strerror or error}.") from None
        return "", error.strerror or str(error), 0, 0, 0, 0
    digest = digest_of(data)
    try:
        image = _opened(data)
        width, height = image.size
        if image.getexif().get(0x0112, 1) > 4:  # rotated by 90 degrees
            width, height = height, width
        eighth = (max(1, image.width // 8), max(1, image.height // 8))
        image.draft("L", eighth)  # a JPEG is decoded completely, but at an eighth of the size
        image.load()
        if image.mode not in ("L", "RGB"):
            as_seen(image, 3)
        frames = getattr(image, "n_frames", 1) if image.format in ("GIF", "PNG", "WEBP", "AVIF", "TIFF") else 1
        return digest, "", height, width, depth(image), frames
    except UnidentifiedImageError:
        return digest, _not_an_image(data) if data else "empty file", 0, 0, 0, 0
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return digest, str(error).rstrip("."), 0, 0, 0, 0


def _inspect_bands(path: str | Member, reading: Reading) -> tuple[str, str, int, int, int, int]:
    """Like `_inspect` for a file that is read as bands; it counts as one frame, and the bits are those of the selected
    bands."""
    digest = ""
    try:
        data = content_of(path)
        digest = digest_of(data)
        pixels = taken(decoded(data), reading)
    except UnidentifiedImageError:
        return digest, _not_an_image(data) if data else "empty file", 0, 0, 0, 0
    except UNREADABLE as error:
        return digest, str(error).rstrip(".") or type(error).__name__, 0, 0, 0, 0
    return digest, "", *pixels.shape[:2], 8 if pixels.dtype == np.uint8 else depth_of(pixels), 1


def cache_folder() -> Path:
    """Returns the folder for files that can be recreated: ``$XDG_CACHE_HOME/fovea``, or ``~/.cache/fovea`` if that is
    not an absolute path, as in the XDG Base Directory Specification."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "fovea"


def inspect_images(
    paths: Iterable[str], look: Look = _inspect, kind: str = "images", reading: Reading = RGB
) -> "pd.DataFrame":
    """Decodes every file once and caches the result, so that unchanged files are not read again.

    Args:
        paths: the files.
        look: inspects a file.
        kind: plural name of the files, for messages.
        reading: how images are decoded.

    Returns:
        A table with one row per path, in the same order: ``digest`` (blake2b of the content), ``error`` (empty for a
        readable file), ``height`` and ``width`` as displayed, in pixels, ``bits`` (`depth`), ``frames``. It is cached
        under ``$XDG_CACHE_HOME/fovea``; changes of a file are detected by its size and its times of modification and of
        status change.
    """
    import pandas as pd

    files = Paths.of(paths)
    how = []  # RGB and grey are inspected alike
    if not reading.seen:
        look, how = partial(_inspect_bands, reading=reading), [repr(reading).encode()]
    name = digest_of_lines(chain(files.encoded(absolute=True), how))
    cache = cache_folder() / f"{kind}-{name}.parquet"
    table = pd.DataFrame(files.signatures, columns=["size", "time"])
    try:
        known = pd.read_parquet(cache, columns=["size", "time", *FOUND])
    except (OSError, ValueError):  # missing or incomplete
        known = table.assign(size=-2, digest="", error="", height=0, width=0, bits=0, frames=0)
    stale = np.flatnonzero((known[["size", "time"]] != table).any(axis=1))
    table[FOUND] = known[FOUND]
    if len(stale) >= MANY:
        rank_zero_warn(
            f"{len(stale):,} {kind} are decoded once, to find those that cannot be used; what is found is kept for the "
            "next time. Of labelled ones, --data.check sample looks at a thousand only."
        )
    if len(stale):
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for part in np.array_split(stale, -(-len(stale) // CHUNK)):
                found = list(pool.map(look, map(files.at, part.tolist())))
                table.loc[part, FOUND] = pd.DataFrame(found, columns=FOUND, index=part)
        temporary = cache.with_suffix(f".{os.getpid()}")
        with suppress(OSError):  # without a cache, files are read again the next time
            cache.parent.mkdir(parents=True, exist_ok=True)
            table.to_parquet(temporary)
            temporary.replace(cache)
    return table


def _sampled(paths: Paths, check: Literal["sample", "none"], look: Look, kind: str, reading: Reading) -> "pd.DataFrame":
    """Applies `inspect_images` to a fixed random sample of files, or to none. Other files count as readable if they
    exist; their digest is that of name and size, and their other columns are 0."""
    import pandas as pd

    count = min(SAMPLE, len(paths)) if check == "sample" else 0
    chosen = np.sort(np.random.default_rng(0).permutation(len(paths))[:count])
    sizes = paths.signatures[:, 0].tolist()
    table = pd.DataFrame(dict.fromkeys(FOUND[2:], 0), index=range(len(paths)))
    table["digest"] = [digest_of(b"%s %d" % both) for both in zip(paths.relative(), sizes, strict=True)]
    table["error"] = [os.strerror(errno.ENOENT) if size < 0 else "" for size in sizes]
    seen = inspect_images(paths[chosen], look, kind, reading)
    kept = [name for name in FOUND if name != "digest"]
    table.loc[chosen, kept] = seen[kept].to_numpy()
    return table


def check_images(
    paths: Paths,
    on_bad_file: Literal["error", "skip", "skip_all"],
    look: Look = _inspect,
    kind: str = "images",
    reading: Reading = RGB,
    check: Check = "all",
) -> "tuple[pd.DataFrame, dict[str, str]]":
    """Applies the policy for unreadable files.

    Args:
        paths: the files.
        on_bad_file: raise an error, or skip them: with ``skip`` if they are few, with ``skip_all`` always.
        look, kind, reading: see `inspect_images`.
        check: which of the files are decoded.

    Returns:
        The result of `inspect_images` (see `_sampled` for files that are not decoded), and the files to skip with their
        reasons.

    Raises:
        DataError: there are unreadable files; with ``skip``, more than one in a hundred.
    """
    if check == "all":
        table = inspect_images(paths, look, kind, reading)
    else:
        table = _sampled(paths, check, look, kind, reading)
    bad = (table["error"] != "").to_numpy()
    bad_files = dict(zip(paths[bad].tolist(), table["error"][bad], strict=True))
    if bad_files:
        reasons = [f"{path} ({reason})" for path, reason in bad_files.items()]
        shown = "; ".join(reasons[:3] + ["…"] * (len(reasons) > 3))
        looked = min(SAMPLE, len(paths)) if check == "sample" else len(paths)
        of = f"{len(paths)} {kind}" if looked == len(paths) else f"{looked} {kind} that were looked at of {len(paths)}"
        count = f"{len(reasons)} of {of} cannot be read: {shown}"
        many = len(bad_files) > 0.01 * looked and len(bad_files) > 1
        if len(bad_files) == looked > 1:
            raise DataError(
                f"None of {of} can be read: {reasons[0]}, and so on. Change the settings, or repair the files."
            )
        if on_bad_file == "error":
            way = "skip_all" if many else "skip"
            raise DataError(f"{count}. Repair or remove them, or continue without them: --data.on_bad_file {way}.")
        if on_bad_file == "skip" and many:
            raise DataError(
                f"{count}. More than one in a hundred is too many to skip: look at the folder, or --data.on_bad_file skip_all."
            )
        rank_zero_warn(f"Skipped: {count}.")
    several = (table["frames"].to_numpy() > 1) & (kind == "images")
    if several.any():
        rank_zero_warn(
            f"{several.sum()} images have several frames or pages, of which the first is used, such as "
            f"{paths[several][0]}. If its pages are bands: --data.in_chans {table['frames'][several].iloc[0]}."
        )
    bits = Counter(table["bits"][table["bits"] > 8])
    if bits.keys() - {16} and not reading.deep:
        said = listed(f"{count} reach {kind} bits" for kind, count in sorted(bits.items()))
        warning = " They will not be equally bright: bring all to one range if they should be." if len(bits) > 1 else ""
        rank_zero_warn(
            f"Of the images with 16 bits {said}, and of these the upper 8 are taken; "
            f"--data.bits auto keeps all.{warning}"
        )
    return table, bad_files


def digests_in(table: "pd.DataFrame") -> NDArray[np.bytes_]:
    """Returns the content digests in a table of `inspect_images`, N strings of 32 bytes."""
    return np.fromiter((digest.encode() for digest in table["digest"]), "S32", len(table))


def _fixed(digests: NDArray[Any]) -> "pa.FixedSizeBinaryArray":
    """Returns digests as an Arrow array, which is compared without a Python object for each."""
    import pyarrow as pa

    values = np.ascontiguousarray(digests, "S32")
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), len(values), [None, pa.py_buffer(values)])


def warn_of_shared(parts: Mapping[str, tuple[Paths | NDArray[np.str_], NDArray[Any]]]) -> None:
    """Warns of images that are in two splits.

    Args:
        parts: paths and content digests of each split.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    earlier: list[pa.Array] = []
    for name, (paths, digests) in parts.items():
        own = _fixed(digests)
        if earlier:
            shared = np.flatnonzero(pc.is_in(own, value_set=pa.concat_arrays(earlier)))
            if len(shared):
                rank_zero_warn(
                    f"{len(shared)} images of the {name} split are also in another one, so the figures look better than "
                    f"they are; the first: {paths[int(shared[0])]}."
                )
        earlier.append(own)


def warn_of_two_names(paths: Paths | NDArray[Any], digests: NDArray[Any], names: NDArray[Any]) -> None:
    """Warns of images that occur under two classes, or as two people.

    Args:
        paths: paths of the images.
        digests: content digests of the images.
        names: class or person of each image.
    """
    import pandas as pd

    content = _fixed(digests).dictionary_encode()
    numbers, kinds = pd.factorize(np.asarray(names, object))
    table = pd.DataFrame({"digest": content.indices.to_numpy(), "name": numbers}).drop_duplicates()
    several = table[table["digest"].duplicated(keep=False)]
    if len(several):
        count = several["digest"].nunique()
        least = min(several["digest"], key=lambda number: content.dictionary[number].as_py())
        first = sorted((kinds[name], row) for row, name in several["name"][several["digest"] == least].items())
        shown = " and ".join(f"{paths[row]} as {name!r}" for name, row in first)
        rank_zero_warn(
            f"{'1 image occurs' if count == 1 else f'{count} images occur'} under more than one name; the first: {shown}. Keep the "
            "right one."
        )


def warn_of_cut(paths: Paths, sizes: NDArray[np.int64], size: tuple[int, int]) -> None:
    """Warns of images that lose more than half of their area in the centre crop.

    Args:
        paths: paths of the images.
        sizes: height and width of each image, N×2.
        size: height and width of the crop.
    """
    scales = sizes / size
    cut = scales.max(1) > 2 * scales.min(1)
    if cut.any():
        height, width = sizes[cut][0]
        rank_zero_warn(
            f"{cut.sum()} of {len(paths)} images lose more than half of their area, since only their middle is seen; the first: "
            f"{paths[cut][0]}, {width}×{height}. To see all of them: --data.fit pad, or extend, or stretch; or a --data.image_size "
            "of their shape, such as 240x320."
        )
