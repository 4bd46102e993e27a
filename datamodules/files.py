"""Settings of data that are image files: how files are decoded, and the statistics of their values."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from datamodules.checking import check_images
from datamodules.errors import DataError
from datamodules.images import EXTENSIONS, sub_folders
from datamodules.options import OWN, Check, Own, PositiveInt, Reading
from datamodules.paths import PACKED, SHARDS, Paths, is_remote

if TYPE_CHECKING:
    import pandas as pd

    from datamodules.shards import ShardSet

Bits = Literal["auto", 8, 10, 12, 14, 16]
MEASURED = 256  # images that the statistics are computed from


@dataclass(kw_only=True, eq=False, repr=False)
class Files:
    """Settings of all data that are image files.

    Args:
        in_chans: 3 to read images as RGB, 1 as grey; another number for files with this many bands, which are read
            unchanged.
        bands: bands to read from files that may have more, counted from 1 and in this order; drawings use the first
            three as red, green and blue.
        bits: 8 keeps the upper 8 bits. A larger number keeps all: images are then float32 in [0, 1], values divided by
            the largest value of this bit depth. ``auto`` uses the smallest of 8, 10, 12, 14 or 16 that holds the
            largest value of all files. None is 8 for RGB and grey, otherwise ``auto``.
        mean: mean of each channel, in the files' own values, subtracted before the network; by default that of the
            backbone for 8-bit RGB and grey, otherwise that of up to 256 training images.
        std: standard deviation of each channel, by which values are divided; defaults as for ``mean``.
        on_bad_file: what to do about an unreadable image: raise an error, or ``skip`` it, counted and listed;
            ``skip_all`` also if more than one in a hundred is unreadable.
        cache: keep decoded images as far as there is space: in ``memory``, for this training only, or on the ``disk``,
            under ``$XDG_CACHE_HOME/fovea/decoded``, also for later ones. The cache does not change the images.
    """

    in_chans: PositiveInt = 3
    bands: list[PositiveInt] | None = None
    bits: Own[Bits] = OWN
    mean: list[float] | None = None
    std: list[float] | None = None
    on_bad_file: Literal["error", "skip", "skip_all"] = "error"
    cache: Literal["none", "memory", "disk"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        if self.bands is not None:
            if not self.bands or min(self.bands) < 1:
                raise DataError(f"--data.bands are counted from 1, such as [4, 3, 2], not {self.bands}.")
            usual = type(self).__dataclass_fields__["in_chans"].default
            if self.in_chans not in (usual, len(self.bands)):
                raise DataError(
                    f"--data.bands {self.bands} are {len(self.bands)} channels, and --data.in_chans says {self.in_chans}: leave it out."
                )
            self.in_chans = len(self.bands)
        if self.bits is None:
            if Reading(self.in_chans, self._chosen).seen:
                self.bits = 8
            else:
                self.bits = "auto"
        if (self.mean is None) != (self.std is None):
            raise DataError("--data.mean and --data.std go together: give both, or none.")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != self.in_chans:
                raise DataError(f"--data.{name} must have a number for each of {self.in_chans} channels, not {values}.")
        if self.std is not None and min(self.std) <= 0:
            raise DataError(f"--data.std must be above 0, not {self.std}.")
        self._depth: int | None = None  # the detected bit depth

    @property
    def _samples(self) -> dict[str, Any]:
        return cast(Any, self).sources

    @property
    def _chosen(self) -> tuple[int, ...] | None:
        return None if self.bands is None else tuple(self.bands)

    @property
    def reading(self) -> Reading:
        """How the files are decoded; with ``bits`` set to ``auto``, they are inspected first."""
        if self.bits == "auto" and self._depth is None:
            _ = self._samples
        bits = (self._depth or 8) if self.bits == "auto" else self.bits
        return Reading(self.in_chans, self._chosen, bits)

    def looked_at(self, paths: Iterable[str], check: Check = "all") -> "pd.DataFrame":
        """Inspects files; see `check_images`."""
        auto = self.bits == "auto"
        reading = Reading(self.in_chans, self._chosen, 16) if auto else self.reading
        table, self.bad_files = check_images(Paths.of(paths), self.on_bad_file, reading=reading, check=check)
        self._depth = int(table["bits"][table["error"] == ""].to_numpy().max(initial=8)) if auto else None
        return table

    @cached_property
    def _statistics(self) -> tuple[list[float], list[float]] | None:
        """Mean and standard deviation of each channel, relative to the largest value."""
        reading = self.reading
        if self.mean is not None and self.std is not None:
            most = (1 << reading.bits) - 1
            return [value / most for value in self.mean], [value / most for value in self.std]
        if reading.seen or "train" not in self._samples:
            return None
        source, total = self._samples["train"], np.zeros((2, self.in_chans))
        chosen = np.unique(np.linspace(0, len(source) - 1, min(MEASURED, len(source))).astype(int)).tolist()
        for index in chosen:
            values = source[index]["image"].reshape(-1, self.in_chans).astype(np.float64)
            values = values if reading.deep else values / 255
            total += [values.mean(0), (values**2).mean(0)]
        mean, square = total / len(chosen)
        std = np.sqrt(np.maximum(0, square - mean**2))
        std[std < 1e-6] = 1  # of a constant band
        return mean.tolist(), std.tolist()

    @property
    def channel_mean(self) -> list[float] | None:
        """See `modules.spec.DataSpec`."""
        return None if self._statistics is None else self._statistics[0]

    @property
    def channel_std(self) -> list[float] | None:
        """See `modules.spec.DataSpec`."""
        return None if self._statistics is None else self._statistics[1]


@dataclass(eq=False, repr=False)
class Folder(Files):
    """Settings of data in a folder, or described by a file.

    Args:
        root: the folder or file.
    """

    root: str

    @property
    def title(self) -> str:
        """See `VisionDataModule.title`; the name of the folder or file."""
        return titled(self.root)


def titled(root: str) -> str:
    """Returns the name of a folder or of a file without its ending; of a pattern, the last part that is none."""
    place = Path(root).resolve()
    if place.exists():
        return place.stem if place.is_file() else place.name
    parts = re.split(r"[/\\]", root)
    names = [name for name in parts if name and not re.search(r"[*?{\[]|^\w+:$", name)]
    return names[-1].partition(".")[0] if names else place.stem


def shards_at(root: str, or_table: bool = False) -> "ShardSet | None":
    """Returns the samples in tar or Parquet files, where ``root`` is such a file, a pattern or an address of some, or a folder of
    them with no JSON, picture or folder of other files beside; None for other places. So is a Parquet file without pictures, and,
    if the place may be a table (``or_table``), one that cannot be read."""
    kinds, place = (*SHARDS, *PACKED), root.lower()
    if os.path.isdir(root):
        folders = [Path(root), *sub_folders(Path(root))]
        names = [[name.lower() for name in os.listdir(folder)] for folder in folders]
        packed = [any(name.endswith(kinds) for name in own) for own in names]
        found = any(packed) and all(packed[1:]) and not any(name.endswith((".json", *EXTENSIONS)) for name in names[0])
    elif os.path.isfile(root):
        found = place.endswith(kinds)
    else:
        found = is_remote(root) or (place.endswith(kinds) and re.search(r"[*?{\[]", root) is not None)
    if not found:
        return None
    from datamodules.shard_index import has_pictures
    from datamodules.shards import ShardSet

    if os.path.isfile(root) and place.endswith(".parquet") and not has_pictures(root, otherwise=not or_table):
        return None
    return ShardSet(root)
