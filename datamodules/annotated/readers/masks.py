"""Mask files: pixel values, colours, class tables, and signs that they are not class maps."""

import csv
import io
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import PIL.Image
from numpy.typing import NDArray

from datamodules.annotated.sample import IGNORE, MOST
from datamodules.digests import digest_of
from datamodules.errors import DataError, repeated
from datamodules.paths import Member, content_of
from datamodules.tables import text_of

BLURRED = 64  # number of unknown values in a mask that indicates a lossy file
TABLES = ("classes.csv", "_classes.csv", "class_dict.csv", "labelmap.txt", "label_colors.txt")
UNCOUNTED = ("ignore", "void")
Kind = Literal["numbers", "colours", "binary"]
SYNONYMS = {
    "class": "name",
    "label": "name",
    "pixel value": "value",
    "id": "value",
    "red": "r",
    "green": "g",
    "blue": "b",
}


@dataclass
class Classes:
    """Meaning of a mask's values.

    Attributes:
        names: class names.
        numbers: class index of each value, 255 for ignored pixels. The value of a colour is 65536·red + 256·green +
            blue.
        kind: kind of values: class indices, colours, or only background and foreground.
    """

    names: list[str]
    numbers: dict[int, int] = field(default_factory=dict)
    kind: Kind = "numbers"

    @cached_property
    def table(self) -> NDArray[np.uint8]:
        """Class index of each value."""
        table = np.full(1 << (24 if self.kind == "colours" else 16), IGNORE, np.uint8)
        table[list(self.numbers)] = list(self.numbers.values())
        return table

    def apply(self, values: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Maps values to classes, uint8 of the same shape."""
        return (values > 0).astype(np.uint8) if self.kind == "binary" else self.table[values]

    def shown(self, value: int) -> str:
        """Formats a value for messages."""
        return _colour(value) if self.kind == "colours" else str(value)

    def unknown(self, values: Iterable[int]) -> list[int]:
        """Returns the values that belong to no class."""
        known = {IGNORE, *self.numbers} if self.kind == "numbers" else self.numbers.keys()
        return [] if self.kind == "binary" else [value for value in values if value not in known]


def _colour(value: int) -> str:
    return f"({value >> 16}, {value >> 8 & 255}, {value & 255})"


def _packed(colours: NDArray[np.int64]) -> NDArray[np.int64]:
    return (colours[..., 0] << 16) + (colours[..., 1] << 8) + colours[..., 2]


def read_values(file: str | Member, kind: Kind = "numbers") -> NDArray[np.int64]:
    """Reads the pixel values of a mask.

    Numbers are those of an indexed image (for GIF, whose palette order is arbitrary, the grey levels) or of a grey one
    of any depth. If colours are constant and the alpha channel is not, the alpha channel is the mask; if both vary,
    transparent pixels are 0.

    Args:
        file: the mask.
        kind: what to read: numbers; colours, as 65536·red + 256·green + blue; or 0 for the background and more for
            everything else, with a threshold of half of 255 for JPEG files, which blur.

    Returns:
        int64 H×W.

    Raises:
        DataError: it cannot be read, has several images, has numbers that are not class indices, or colours where
            numbers are expected.
    """
    with _silence():
        return _read(file, kind)[0]


@contextmanager
def _silence() -> Iterator[None]:
    """Silences Pillow's warnings about unusual files. Not thread-safe: threads would leave all warnings silenced."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _read(file: str | Member, kind: Kind) -> tuple[NDArray[np.int64], dict[int, int]]:
    """Pixel values and, for a palette, the colour of each index."""
    try:
        data = content_of(file)
        with PIL.Image.open(io.BytesIO(data)) as image:
            frames = getattr(image, "n_frames", 1)
            image.seek(0)
            image.load()
            pixels, palette = _pixels(image, data, kind)
            lossy = image.format == "JPEG"
    except PIL.UnidentifiedImageError:
        raise DataError(f"{file} cannot be read as a mask: it is not an image in a supported format.") from None
    except Exception as error:  # decoders raise all kinds of errors for broken files
        raise DataError(f"{file} cannot be read as a mask: {error or type(error).__name__}.") from None
    if frames > 1:
        raise DataError(
            f"{file} holds {frames} pictures, and it is not clear which one is the mask: save only that one."
        )
    if pixels.ndim == 3 and kind == "numbers":
        if (pixels[..., :1] != pixels[..., 1:]).any():
            raise DataError(
                f"{file} is in colour, but nothing says which class a colour stands for: write classes.csv with the "
                "columns "
                "name, r, g, b; or make all colours but black one class: --data.binary true."
            )
        pixels = pixels[..., 0]
    elif pixels.ndim == 3:
        pixels = _packed(pixels.astype(np.int64)) if kind == "colours" else pixels.max(2)
    if not np.isfinite(pixels).all():
        raise DataError(f"{file} has values that are not class numbers, such as nan.")
    whole = pixels.astype(np.int64)
    if kind == "colours":
        return whole, palette
    odd = (whole != pixels) | (whole < 0) | (whole > 65535)
    if kind == "numbers" and odd.any():
        raise DataError(f"{file} has values that are not class numbers, such as {pixels[odd][0]}.")
    return ((pixels > 127 if lossy else pixels > 0).astype(np.int64), {}) if kind == "binary" else (whole, palette)


def _pixels(image: PIL.Image.Image, data: bytes, kind: Kind) -> tuple[NDArray[Any], dict[int, int]]:
    """H×W, or H×W×3 for colours, with transparent pixels black; and the palette's colours."""
    if data[:4] == b"\x89PNG" and data[24] == 16 and data[25] in (2, 4, 6):  # Pillow converts these to 8 bits
        deep = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if deep is None:
            raise ValueError("its 16 bits per channel cannot be decoded")
        bands: NDArray[Any] = np.atleast_3d(deep)
        if kind == "colours":
            bands = bands >> 8
        colours, alpha = bands[..., :3][..., ::-1], bands[..., 3] if bands.shape[2] == 4 else None
    elif image.mode in ("P", "PA") and image.format != "GIF" and kind != "colours":
        numbers = np.asarray(image.getchannel(0) if image.mode == "PA" else image)
        table = np.asarray(image.getpalette("RGB") or [], np.int64).reshape(-1, 3)
        return numbers, {k: int(_packed(table[k])) for k in np.unique(numbers).tolist() if k < len(table)}
    elif image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;"):
        grey = np.asarray(image)
        return (np.minimum(grey, 255)[..., None].repeat(3, 2) if kind == "colours" else grey), {}
    else:
        whole = np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))
        colours, alpha = whole[..., :3], whole[..., 3] if whole.shape[2] == 4 else None
    if alpha is not None and (alpha != alpha[0, 0]).any():
        if kind != "colours" and (colours == colours[0, 0]).all():
            return alpha, {}
        colours = np.where(alpha[..., None] > 0, colours, 0)
    return colours, {}


@dataclass
class Look:
    """Result of inspecting a mask.

    Attributes:
        error: why it is unusable.
        size: height and width.
        values: int64, values that occur, ascending.
        counts: int64, number of pixels of each value.
        digest: digest of the file's content.
        palette: for an indexed image, the colour of each number that occurs.
    """

    error: str = ""
    size: tuple[int, int] = (0, 0)
    values: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    digest: str = ""
    palette: dict[int, int] = field(default_factory=dict)


def looks(files: Sequence[str | Member], kind: Kind) -> list[Look]:
    """Reads and inspects masks."""
    with _silence(), ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda file: _look(file, kind), files))


def _look(file: str | Member, kind: Kind) -> Look:
    try:
        values, palette = _read(file, kind)
    except DataError as error:
        return Look(str(error))
    digest = digest_of(content_of(file))
    return Look("", values.shape, *np.unique(values, return_counts=True), digest, palette)


def blurred(file: str | Member, count: int) -> str:
    """Describes a mask with too many different values to be classes."""
    lossy = Path(file).suffix.lower() in (".jpg", ".jpeg")
    why = (
        "it is a JPEG, which changes the values of pixels. Save masks as PNG or TIFF"
        if lossy
        else "was it saved as JPEG, or smoothed in resizing? Both change the values of pixels"
    )
    return (
        f"{file} has {count} different values, too many for classes: {why}. If each object has a number of its "
        "own, make all of them one class: --data.binary true."
    )


def guessed(name: str, files: Sequence[str | Member], looks: Sequence[Look]) -> Classes:
    """Creates classes named after the values that occur.

    Args:
        name: name of the data set.
        files: the masks.
        looks: their inspections.

    Raises:
        DataError: the values are not class indices, or ambiguous.
    """
    for file, one in zip(files, looks, strict=True):
        if len(one.values) > BLURRED:
            raise DataError(blurred(file, len(one.values)))
    _check_palettes(files, looks)
    values = sorted({int(value) for one in looks for value in one.values})
    known = [value for value in values if value != IGNORE]
    if IGNORE in values and known in ([0], []):
        raise DataError(
            f"The masks of {name} have the values {' and '.join(map(str, values))} only, and pixels with 255 are "
            "ignored. If 255 is your foreground: --data.binary true."
        )
    if len(known) < 2:
        raise DataError(
            f"All pixels of the masks of {name} have the value {known[0] if known else 'none'}: there is nothing to "
            "learn. Are these the masks?"
        )
    ones = [file for file, one in zip(files, looks, strict=True) if {0, 1} == set(one.values.tolist())]
    full = [file for file, one in zip(files, looks, strict=True) if {0, IGNORE} == set(one.values.tolist())]
    if known == [0, 1] and ones and full and len(ones) + len(full) >= sum(len(one.values) > 1 for one in looks):
        raise DataError(
            f"Some masks of {name} have a foreground of 1, as {ones[0]}, others one of 255, as {full[0]}, which "
            "means that a pixel is ignored. If both are your foreground: --data.binary true."
        )
    remedy = (
        "--data.binary true makes all of them one class; if they are classes, name them in classes.csv (name,value)."
    )
    if known[-1] >= MOST:
        raise DataError(
            f"The masks of {name} have values up to {known[-1]}, more than {MOST} classes: write classes.csv with the columns "
            "name and value; or, if each object has a number of its own, make all of them one class: --data.binary true."
        )
    if sign := _sign_of_objects(files, looks):
        raise DataError(f"In the masks of {name} each object seems to have a number of its own: {sign}. {remedy}")
    count = known[-1] + 1
    if count - len(known) > len(known):
        more = "…" * (len(values) > 8)
        rows = "".join(f"; {value},{value}" for value in values[:8]) + more
        raise DataError(
            f"The masks of {name} have the values {', '.join(map(str, values[:8]))}{more}: as class numbers they "
            f"would be {count}, "
            f"{count - len(known)} of them empty. Write classes.csv with a row for each value: name,value{rows} "
            "(with your names; a class called ignore is ignored)."
        )
    return Classes([str(k) for k in range(count)], {k: k for k in range(count)})


def _check_palettes(files: Sequence[str | Member], looks: Sequence[Look]) -> None:
    """Refuses indexed pictures whose palettes give the same index different colours."""
    first: dict[int, tuple[int, str | Member]] = {}
    for file, one in zip(files, looks, strict=True):
        for number, colour in one.palette.items():
            other, where = first.setdefault(number, (colour, file))
            if other != colour:
                raise DataError(
                    f"The number {number} is {_colour(other)} in the palette of {where} and {_colour(colour)} in that of {file}. "
                    "Say what stands for classes in classes.csv: colours in the columns name, r, g, b; numbers in name, value."
                )


def _sign_of_objects(files: Sequence[str | Member], looks: Sequence[Look]) -> str:
    """Describes signs that values are object numbers rather than classes; empty if there are none.

    Object ids are consecutive in each mask, with different maxima in most; or they are globally unique, so that most
    occur in one or two masks only. Each is a single connected component.
    """
    objects = [[v for v in one.values.tolist() if v not in (0, IGNORE)] for one in looks]
    counts = Counter(value for values in objects for value in values)
    if len(counts) < 4:
        return ""
    lengths = {len(values) for values in objects if values}
    running = len(lengths) >= 3 and all(values == list(range(1, len(values) + 1)) for values in objects)
    scattered = len(counts) >= 16 and len(looks) >= 4 and np.median(list(counts.values())) <= max(1, 0.1 * len(looks))
    if not (running or scattered):
        return ""
    pieces = []
    for i in np.unique(np.linspace(0, len(files) - 1, 20).astype(int)):
        values = read_values(files[i])
        pieces += [cv2.connectedComponents((values == v).astype(np.uint8))[0] - 1 for v in objects[i]]
    if np.mean(np.array(pieces) == 1) < 0.9:
        return ""
    if running:
        shortest, longest = min(filter(None, objects), key=len), max(objects, key=len)
        return f"they run from 1 to {len(shortest)} in one mask and to {len(longest)} in another, each in one piece"
    return f"of {len(counts)} numbers most are in one mask only, each in one piece"


def read_classes(file: Path | Member) -> Classes:
    """Reads class values from ``classes.csv`` (columns name; name, value; or name, r, g, b; Roboflow's
    ``_classes.csv``) or from a colour list: ``labelmap.txt`` of CVAT and Datumaro, ``label_colors.txt`` of CamVid.

    Rows with the same name are one class. ``ignore`` or ``void`` is ignored; ``background`` comes first.

    Raises:
        DataError: it is not such a table, or has a value twice.
    """
    text, lines = text_of(file), str(file).endswith(".txt")
    rows, coloured = _colour_lines(file, text) if lines else _class_rows(file, text)
    rows = [(" ".join(name.split()), value) for name, value in rows]
    if odd := next((name for name, _ in rows if not name.isprintable()), ""):
        raise DataError(f"{file} has a name that cannot be printed, {odd[:80]!r}: is it a text file in UTF-8?")
    if twice := repeated(value for _, value in rows):
        raise DataError(f"{file} gives two classes the same value, {_colour(twice[0]) if coloured else twice[0]}.")
    names = list(dict.fromkeys(name for name, _ in rows if name.lower() not in UNCOUNTED))
    if lines:
        names.sort(key=lambda name: name.lower() != "background")
    if not 2 <= len(names) <= MOST:
        raise DataError(
            f"{file} names {len(names)} classes beside those that are ignored; there must be from two to {MOST}, the background among them."
        )
    numbers = {value: names.index(name) if name in names else IGNORE for name, value in rows}
    return Classes(names, numbers, "colours" if coloured else "numbers")


def _class_rows(file: Path | Member, text: str) -> tuple[list[tuple[str, int]], bool]:
    lines = [line for line in text.splitlines() if re.match(r"(?!#|\"?sep=.\"?$)\S", line.strip())]  # Excel's sep=;
    head = lines[0] if lines else ""
    mark = next((mark for mark in (",", ";", "\t") if mark in head), ",")
    table = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=mark, skipinitialspace=True)]
    columns = [SYNONYMS.get(cell.lower(), cell.lower()) for cell in (table[0] if table else [])]
    wrong = f"{file} is not a table of classes: its columns are name, or name and value, or name, r, g, b"
    if "name" not in columns:
        raise DataError(f"{wrong}, not {head[:80]!r}.")
    coloured = {"r", "g", "b"} <= set(columns)
    keys = ("r", "g", "b") if coloured else ("value",) if "value" in columns else ()
    rows = []
    for number, cells in enumerate(table[1:]):
        row = dict(zip(columns, cells, strict=False))
        try:
            given = [float(row[key]) for key in keys] or [float(number)]
        except (KeyError, ValueError):
            raise DataError(f"{wrong}; a row is {','.join(cells)!r}.") from None
        top = 255 if coloured else 65535
        if not row["name"] or any(value != int(value) or not 0 <= value <= top for value in given):
            raise DataError(
                f"{file}: a row is {','.join(cells)!r}, but each has a name, and values of classes are from 0 to 65535, channels "
                "of colours from 0 to 255."
            )
        rows.append((row["name"], int(_packed(np.array(given, np.int64))) if coloured else int(given[0])))
    return rows, coloured


def _colour_lines(file: Path | Member, text: str) -> tuple[list[tuple[str, int]], bool]:
    """Parses lines ``name:r,g,b:…`` or ``r g b name``."""
    rows = []
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = re.match(r"(?P<name>.+?):(?P<r>\d+),\s*(?P<g>\d+),\s*(?P<b>\d+)(?::.*)?$", line.strip()) or re.match(
            r"(?P<r>\d+)\s+(?P<g>\d+)\s+(?P<b>\d+)\s+(?P<name>.+)$", line.strip()
        )
        colour = [int(found[channel]) for channel in "rgb"] if found else [256]
        if not found or max(colour) > 255:
            raise DataError(
                f"{file}: {line.strip()[:80]!r} is no class with its colour, such as car:128,0,0:: or 128 0 0 car."
            )
        rows.append((found["name"].strip(), int(_packed(np.array(colour, np.int64)))))
    return rows, True


def voc_classes(names: Sequence[str]) -> Classes:
    """Classes in Pascal VOC's colours (the development kit's ``VOClabelcolormap``), whose borders are ignored."""
    colours = np.zeros((len(names), 3), np.int64)
    for k in range(len(names)):
        for bit in range(8):
            colours[k] |= (k >> (3 * bit + np.arange(3)) & 1) << (7 - bit)
    border = (224 << 16) + (224 << 8) + 192
    return Classes(
        list(names), dict(zip(_packed(colours).tolist(), range(len(names)), strict=True)) | {border: IGNORE}, "colours"
    )


def are_numbers(files: Iterable[str | Member], indexed: bool = False) -> bool:
    """Whether all readable masks store numbers, as grey or indexed pictures."""
    for file in files:
        try:
            with PIL.Image.open(io.BytesIO(file.read()) if isinstance(file, Member) else file) as image:
                mode, indices = image.mode, image.mode == "P" and image.format != "GIF"
        except Exception:  # reported when it is read
            continue
        if not (mode in ("1", "L", "I") or mode.startswith("I;") or (indexed and indices)):
            return False
    return True


def by_order(classes: Classes, files: Sequence[str | Member]) -> Classes:
    """Numbers the rows of a colour table from 0, for grey masks whose table has colours."""
    grey = all(v >> 16 == v >> 8 & 255 == v & 255 for v in classes.numbers)
    if classes.kind != "colours" or grey or not are_numbers(files):
        return classes
    return Classes(classes.names, dict(enumerate(classes.numbers.values())))
