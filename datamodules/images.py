"""Reading image files the way a person sees them, and finding those that cannot be read."""

import errno
import io
import os
import struct
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import cv2
import numpy as np
import pandas as pd
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from datamodules.bands import decoded, depth_of, scaled, taken, upper
from datamodules.base import DataError, digest_of, listed
from datamodules.options import RGB, Check, Reading

# How many times smaller a file of this height and width, in either order, is decoded: 1, 2, 4 or 8.
Reduction = Callable[[int, int], int]

# What is also written, as drawings and aligned faces are.
WRITTEN = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".pgm", ".ppm")
EXTENSIONS = (*WRITTEN, ".jfif", ".jpe", ".gif", ".avif", ".jp2", ".j2k", ".jpx", ".jpf", ".j2c", ".pbm", ".pnm", ".dib",
              ".apng", ".tga", ".pcx", ".ras", ".sgi", ".qoi", ".psd", ".ico")  # fmt: skip
KINDS = "JPEG, PNG, WebP, GIF, AVIF, JPEG 2000, BMP, TIFF, PNM, TGA and a few more"  # for messages
JUNK = {"__macosx", "@eadir", "thumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "lost+found"}
# Beside images these say something about them, or hold their annotations.
TEXTS = {".txt", ".md", ".rst", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".html", ".pdf", ".parquet"}


def is_junk(name: str) -> bool:
    """Whether a file or folder of this name is what systems, archives and notebooks leave behind, or hidden."""
    return name.startswith(".") or name.casefold() in JUNK


def composed(name: str) -> str:
    """A name whose umlauts are one letter each, of which macOS makes two in the names of files and folders."""
    return unicodedata.normalize("NFC", name)


def folded(name: str) -> str:
    """A name as names of files are compared: `composed`, and capitals do not matter."""
    return composed(name).casefold()


def is_image(file: Path) -> bool:
    """Whether it is a file of a kind that is read, by its name."""
    return file.suffix.lower() in EXTENSIONS and not is_junk(file.name) and file.is_file()


def sub_folders(folder: Path) -> list[Path]:
    """The folders in a folder, linked ones too, sorted; without `is_junk`.

    Raises:
        DataError: a name is not in UTF-8; it could not be a label.
    """
    found = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not is_junk(entry.name))
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


def names_in(folder: Path, left_out: list[Path] | None = None, extensions: tuple[str, ...] = EXTENSIONS) -> list[str]:
    """The images in a folder and in those below, linked ones too, sorted as paths are; without `is_junk`.

    Args:
        folder: where they are looked for.
        left_out: is extended by the files that are neither images of a kind that is read nor texts; see
            `warn_of_left_out`.
        extensions: what the names of files end with that are looked for.
    """
    found: list[str] = []  # of millions, which as paths take seconds and gigabytes
    # A link to a folder further up would otherwise lead round and round.
    start = os.path.realpath(folder)
    above = {os.fspath(folder): {start, *map(str, Path(start).parents)}}
    for place, folders, files in os.walk(folder, followlinks=True):
        trail, shown = above.pop(place), "" if place == os.curdir else os.fspath(Path(place))
        folders[:] = sorted(name for name in folders if not is_junk(name))
        for name in list(folders):
            path = os.path.join(place, name)
            real = os.path.realpath(path)
            if real in trail:
                folders.remove(name)
            else:
                above[path] = trail | {real}
        for name in files:
            suffix = os.path.splitext(name)[1].lower()
            if is_junk(name):
                continue
            if suffix in extensions:
                found.append(os.path.join(shown, name))
            elif left_out is not None and suffix not in TEXTS:
                left_out.append(Path(place, name))
    return sorted(found, key=lambda name: name.split(os.sep))


def turned(file: str) -> bool:
    """Whether an image's EXIF tag lays it on its side."""
    with Image.open(file) as image:
        return image.getexif().get(0x0112, 1) > 4


def warn_of_left_out(files: Sequence[Path]) -> None:
    """Warns of files that are not read, with their number, kinds and the first one's name."""
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
    """Reads an image, by itself as a viewer shows it.

    EXIF rotation is applied; transparency is laid over white; palettes and CMYK become RGB; of 16 bits the upper 8 are
    taken, or the upper 8 of 10, 12 or 14 where the largest value needs no more; grey becomes RGB by repetition, RGB becomes
    grey by the ITU-R 601-2 luma. Of several frames or pages the first is read. Otherwise see `datamodules.bands`.

    Args:
        file: path of the file, or its bytes.
        reading: how.

    Returns:
        uint8 H×W×C; float32 in [0, 1] where more than 8 bits are kept.

    Raises:
        DataError: the file is no image that can be read; the message names it.
    """
    return read_reduced(file, reading)[0]


def read_reduced(
    file: str | os.PathLike[str] | bytes, reading: Reading = RGB, reduction: Reduction | None = None
) -> tuple[NDArray[Any], int]:
    """Reads an image as `read_image` does, but no larger than needed where that saves time.

    The decoder of JPEGs gives a half, a quarter or an eighth of the size for less work than all of it: each pixel stands for
    a square of as many (the last row and column for what is left), without aliasing.

    Args:
        file: see `read_image`.
        reading: see `read_image`.
        reduction: how many times smaller it may be decoded; None decodes all.

    Returns:
        As of `read_image`, and how many times smaller it is: 1, 2, 4 or 8.

    Raises:
        DataError: see `read_image`.
    """
    if not reading.seen:
        return scaled(read_bands(file, reading), reading.bits), 1
    channels = reading.channels
    with _named(file) as data:
        if size := _plain_jpeg(data):  # OpenCV decodes these faster, and as well
            factor = reduction(*size) if reduction else 1
            flag = (cv2.IMREAD_COLOR_RGB if channels == 3 else cv2.IMREAD_GRAYSCALE) | REDUCED[factor]
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
            if pixels is not None:
                return pixels.reshape(*pixels.shape[:2], channels).astype(np.uint8, copy=False), factor
        return as_seen(_opened(data), channels), 1


def read_bands(file: str | os.PathLike[str] | bytes, reading: Reading) -> NDArray[Any]:
    """Reads bands of an image in the values of its file, uint8 or uint16 H×W×C; see `bands.taken`.

    Raises:
        DataError: see `read_image`.
    """
    with _named(file) as data:
        return taken(decoded(data), reading)


@contextmanager
def _named(file: str | os.PathLike[str] | bytes) -> Iterator[bytes]:
    """The content of a file, or of what is given; what is wrong with it is told with its name."""
    name = "the given bytes" if isinstance(file, bytes) else os.fspath(file)
    data = b""
    try:
        data = file if isinstance(file, bytes) else Path(file).read_bytes()
        yield data
    except UnidentifiedImageError:
        raise DataError(f"{name} is {_not_an_image(data)} ({len(data)} bytes).") from None
    except UNREADABLE as error:
        raise DataError(f"{name} cannot be read as an image: {str(error).rstrip('.')}.") from None


# What Pillow, OpenCV, tifffile and rasterio raise for files that are damaged.
UNREADABLE = (
    OSError, SyntaxError, ValueError, LookupError, TypeError, RuntimeError, struct.error, zlib.error, cv2.error,
    Image.DecompressionBombError,
)  # fmt: skip


REDUCED = {
    1: 0,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}  # flags that are added to one of colour, or to none for grey


def _plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG of 8 bits, with one or three channels and no bomb, by its frame header (T.81, B.2.2)."""
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
    """Opens an image with Pillow, which takes the upper 8 of 16 bits in colour; OpenCV reads what is dark by that."""
    image = Image.open(io.BytesIO(data))
    if image.mode.startswith("I") or not any(";16" in str(tile) for tile in image.tile):
        return image
    exif = image.getexif()
    bands = cast(Any, image.getextrema())
    largest = max(
        high for _, high in (bands if isinstance(bands[0], tuple) else [bands])[: 4 if "A" not in image.mode else -1]
    )
    if largest >= 1 << 6:  # what 14 bits leave of the upper 8
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
    """How many bits of a picture of Pillow's hold something: 10, 12, 14 or 16 where it has 16, else 8."""
    return depth_of(np.asarray(image)) if image.mode.startswith("I") else int(image.info.get("bits", 8))


def _not_an_image(data: bytes) -> str:
    """What a file is that Pillow does not know."""
    if data[:4] in (b"II*\0", b"MM\0*"):
        with suppress(Exception):  # whatever its header has
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
    """The pixels of a picture of Pillow's as a viewer shows it; see `read_image`.

    Args:
        image: the picture, in any mode.
        channels: 3 for RGB, 1 for grey.

    Returns:
        uint8 H×W×channels.

    Raises:
        ValueError: it holds floating-point values, more than 16 bits, or 16 of which only the lower 8 are used.
        OSError: its file is not whole.
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
    pixels = np.array(image.convert("RGB" if channels == 3 else "L"))  # a copy, since Pillow's own is read-only
    return pixels.reshape(*pixels.shape[:2], channels)


SAMPLE = 1000  # files that are looked at of all
MANY = 20_000  # files that take long to look at
FOUND = ["digest", "error", "height", "width", "bits", "frames"]
Look = Callable[[str], tuple[str, str, int, int, int, int]]  # from a path to these


def _inspect(path: str) -> tuple[str, str, int, int, int, int]:
    """Content digest and, for a file that cannot be decoded to its end, the reason; height and width as seen; `depth`;
    number of frames or pages."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        return "", error.strerror or str(error), 0, 0, 0, 0
    digest = digest_of(data)
    try:
        image = _opened(data)
        width, height = image.size
        if image.getexif().get(0x0112, 1) > 4:  # lies on its side
            width, height = height, width
        eighth = (max(1, image.width // 8), max(1, image.height // 8))
        image.draft("L", eighth)  # a JPEG is decoded to its end, but at an eighth of the size
        image.load()
        if image.mode not in ("L", "RGB"):
            as_seen(image, 3)
        frames = getattr(image, "n_frames", 1) if image.format in ("GIF", "PNG", "WEBP", "AVIF", "TIFF") else 1
        return digest, "", height, width, depth(image), frames
    except UnidentifiedImageError:
        return digest, _not_an_image(data) if data else "empty file", 0, 0, 0, 0
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return digest, str(error).rstrip("."), 0, 0, 0, 0


def _inspect_bands(path: str, reading: Reading) -> tuple[str, str, int, int, int, int]:
    """The same of a file that is read as bands; it counts as one frame, and its bits are those of the bands that are taken."""
    digest = ""
    try:
        data = Path(path).read_bytes()
        digest = digest_of(data)
        pixels = taken(decoded(data), reading)
    except UnidentifiedImageError:
        return digest, _not_an_image(data) if data else "empty file", 0, 0, 0, 0
    except UNREADABLE as error:
        return digest, str(error).rstrip(".") or type(error).__name__, 0, 0, 0, 0
    return digest, "", *pixels.shape[:2], 8 if pixels.dtype == np.uint8 else depth_of(pixels), 1


def cache_folder() -> Path:
    """Where is kept what can be made again: ``$XDG_CACHE_HOME/fovea``, or ``~/.cache/fovea`` where that names no absolute path,
    as the XDG Base Directory Specification has it."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "fovea"


def _signature(path: str) -> tuple[int, int]:
    """Size and time of a file, by which it counts as unchanged; -1 where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return -1, -1
    return found.st_size, max(found.st_mtime_ns, found.st_ctime_ns)  # copies keep the former


def inspect_images(
    paths: Sequence[str] | NDArray[np.str_], look: Look = _inspect, kind: str = "images", reading: Reading = RGB
) -> pd.DataFrame:
    """Decodes every file once and remembers the result, so that unchanged files are not read again.

    Args:
        paths: the files.
        look: finds out what the table has of a file.
        kind: what the files are.
        reading: how images are read.

    Returns:
        A table with a row a path, in the same order: ``digest`` (blake2b of the content), ``error`` (empty for a good
        file), ``height`` and ``width`` as a viewer shows it, in pixels, ``bits`` (`depth`), ``frames``. It is kept under ``$XDG_CACHE_HOME/fovea``; a file counts as unchanged by its size and the times of its
        content and its place.
    """
    absolute = [os.path.abspath(path) for path in paths]
    how = []  # RGB and grey are looked at alike
    if not reading.seen:
        look, how = partial(_inspect_bands, reading=reading), [repr(reading)]
    name = digest_of(os.fsencode("\n".join([*absolute, *how])))
    cache = cache_folder() / f"{kind}-{name}.parquet"
    table = pd.DataFrame(
        np.fromiter(map(_signature, absolute), np.dtype((np.int64, 2)), len(absolute)), columns=["size", "time"]
    )
    try:
        known = pd.read_parquet(cache, columns=["size", "time", *FOUND])
    except (OSError, ValueError):  # none yet, or not whole
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
            found = list(pool.map(look, [absolute[i] for i in stale]))
        table.loc[stale, FOUND] = pd.DataFrame(found, columns=FOUND, index=stale)
        temporary = cache.with_suffix(f".{os.getpid()}")
        with suppress(OSError):  # where nothing can be kept, the files are read again the next time
            cache.parent.mkdir(parents=True, exist_ok=True)
            table.to_parquet(temporary)
            temporary.replace(cache)
    return table


def _sampled(
    paths: NDArray[np.str_], check: Literal["sample", "none"], look: Look, kind: str, reading: Reading
) -> pd.DataFrame:
    """`inspect_images` of a sample of files or of none, always the same. The others count as good if they are there; their
    digest is that of name and size, and the rest of what would be found is 0."""
    count = min(SAMPLE, len(paths)) if check == "sample" else 0
    chosen = np.sort(np.random.default_rng(0).permutation(len(paths))[:count])
    root = os.path.commonpath([os.path.dirname(path) for path in paths.tolist()])
    names = [os.path.relpath(path, root) for path in paths.tolist()]  # the same wherever the folder is
    sizes = [_signature(path)[0] for path in paths.tolist()]
    table = pd.DataFrame(dict.fromkeys(FOUND[2:], 0), index=range(len(paths)))
    table["digest"] = [digest_of(os.fsencode(f"{name} {size}")) for name, size in zip(names, sizes, strict=True)]
    table["error"] = [os.strerror(errno.ENOENT) if size < 0 else "" for size in sizes]
    seen = inspect_images(paths[chosen].tolist(), look, kind, reading)
    kept = [name for name in FOUND if name != "digest"]
    table.loc[chosen, kept] = seen[kept].to_numpy()
    return table


def check_images(
    paths: NDArray[np.str_],
    on_bad_file: Literal["error", "skip", "skip_all"],
    look: Look = _inspect,
    kind: str = "images",
    reading: Reading = RGB,
    check: Check = "all",
) -> tuple[pd.DataFrame, dict[str, str]]:
    """Applies the policy for files that cannot be read.

    Args:
        paths: the files.
        on_bad_file: stop and name them, or go on without them: with ``skip`` if they are few, with ``skip_all`` in any case.
        look, kind, reading: see `inspect_images`.
        check: which of the files are looked at.

    Returns:
        What `inspect_images` found (see `_sampled` for files that were not looked at), and the files to skip with their
        reasons.

    Raises:
        DataError: there are such files; with ``skip``, more than one in a hundred.
    """
    if check == "all":
        table = inspect_images(paths.tolist(), look, kind, reading)
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


def warn_of_shared(parts: dict[str, tuple[NDArray[np.str_], NDArray[np.str_]]]) -> None:
    """Warns of images that are in two splits.

    Args:
        parts: paths and content digests of each split.
    """
    seen: dict[str, str] = {}
    for name, (paths, digests) in parts.items():
        shared = [path for path, digest in zip(paths, digests, strict=True) if seen.get(digest, name) != name]
        if shared:
            rank_zero_warn(
                f"{len(shared)} images of the {name} split are also in another one, so the figures look better than "
                f"they are; the first: {shared[0]}."
            )
        seen.update(dict.fromkeys(digests, name))


def warn_of_two_names(paths: NDArray[np.str_], digests: NDArray[np.str_], names: NDArray[Any]) -> None:
    """Warns of images that are there under two classes, or as two people.

    Args:
        paths: the images.
        digests: of their contents.
        names: of the class or the person of each.
    """
    # Not the paths: names of files need not be text that pandas takes.
    table = pd.DataFrame({"digest": digests, "name": names})
    several = table[table.groupby("digest")["name"].transform("nunique") > 1].sort_values(["digest", "name"])
    if len(several):
        first = several[several["digest"] == several["digest"].iloc[0]].drop_duplicates("name")["name"]
        shown = " and ".join(f"{paths[row]} as {name!r}" for row, name in first.items())
        count = several["digest"].nunique()
        rank_zero_warn(
            f"{'1 image occurs' if count == 1 else f'{count} images occur'} under more than one name; the first: {shown}. Keep the "
            "right one."
        )


def warn_of_cut(paths: NDArray[np.str_], sizes: NDArray[np.int64], size: tuple[int, int]) -> None:
    """Warns of images of which less than half is seen, since their middle is cut out.

    Args:
        paths: the images.
        sizes: height and width of each, N×2.
        size: height and width of what is cut out.
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
