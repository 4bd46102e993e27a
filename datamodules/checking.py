"""Inspection of image files before a training: those that cannot be read, and those that are in two splits or classes."""

import errno
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from datamodules.bands import decoded, depth_of, taken
from datamodules.cache import cache_folder
from datamodules.digests import digest_of
from datamodules.errors import DataError, listed
from datamodules.images import UNREADABLE, as_seen, depth, not_an_image, opened
from datamodules.options import RGB, Check, Reading
from datamodules.paths import CHUNK, Member, Paths, content_of

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


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
        image = opened(data)
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
        return digest, not_an_image(data) if data else "empty file", 0, 0, 0, 0
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
        return digest, not_an_image(data) if data else "empty file", 0, 0, 0, 0
    except UNREADABLE as error:
        return digest, str(error).rstrip(".") or type(error).__name__, 0, 0, 0, 0
    return digest, "", *pixels.shape[:2], 8 if pixels.dtype == np.uint8 else depth_of(pixels), 1


def inspect_images(
    paths: Iterable[str], look: Look = _inspect, kind: str = "images", reading: Reading = RGB
) -> "pd.DataFrame":
    """Decodes every file once and caches the result, so that files are only read again if they have changed.

    Args:
        paths: the files.
        look: inspects a file.
        kind: plural name of the files, for messages.
        reading: how images are decoded.

    Returns:
        A table with one row per path, in the same order: ``digest`` (blake2b of the content), ``error`` (empty for a
        readable file), ``height`` and ``width`` as displayed, in pixels, ``bits`` (`depth`), ``frames``. It is cached
        under ``$XDG_CACHE_HOME/fovea``, together with what was found below the same folder before; changes of a file are
        detected by its size and its times of modification and of status change.
    """
    import pandas as pd

    files = Paths.of(paths)
    how = b""  # RGB and grey are inspected alike
    if not reading.seen:
        look, how = partial(_inspect_bands, reading=reading), repr(reading).encode()
    cache = cache_folder() / f"{kind}-{digest_of(files.root + how)}.parquet"
    table = pd.DataFrame(files.signatures, columns=["size", "time"]).assign(key=_keys(files))
    table = table.assign(digest="", error="", height=0, width=0, bits=0, frames=0)
    try:
        known = pd.read_parquet(cache, columns=[*table])
    except (OSError, ValueError):  # missing or incomplete
        known = table.head(0)
    alike = len(known) == len(table) and known["key"].equals(table["key"])
    place = np.arange(len(table)) if alike else pd.Index(known["key"]).get_indexer(table["key"])
    if len(known):  # a file that is not there takes any row, and is stale
        table = known.take(place).set_axis(table.index).assign(key=table["key"])
    stale = np.flatnonzero((place < 0) | (table[["size", "time"]].to_numpy() != files.signatures).any(1))
    table[["size", "time"]] = files.signatures
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
            others = known[~known["key"].isin(table["key"])]  # what other data below the same folder have
            pd.concat([others, table]).to_parquet(temporary)
            temporary.replace(cache)
    return table


def _keys(files: Paths) -> NDArray[np.uint64]:
    """Returns a hash of each path, N, by which it is found among those that were looked at before."""
    import pandas as pd

    rest, parts = files.encoded(absolute=True), [np.zeros(0, np.uint64)]
    while part := [*islice(rest, CHUNK)]:
        parts.append(pd.util.hash_array(np.array(part, object)))
    keys = np.concatenate(parts)
    repeats = pd.Series(keys).groupby(keys).cumcount()  # an archive may have a name twice
    return np.asarray(keys + repeats.to_numpy(np.uint64), np.uint64)


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
    return table["digest"].to_numpy(object).astype("S32")


def _fixed(digests: NDArray[Any]) -> "pa.FixedSizeBinaryArray":
    """Returns digests as an Arrow array, which is compared without a Python object for each."""
    import pyarrow as pa

    values = np.ascontiguousarray(digests, "S32")
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), len(values), [None, pa.py_buffer(values)])


def warn_of_shared(parts: Mapping[str, tuple[Paths | NDArray[np.str_], NDArray[Any]]]) -> None:
    """Warns of images that are in two splits."""
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
    """Warns of images that occur under two classes, or as two people."""
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
