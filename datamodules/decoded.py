"""Image files as an array: decoded no larger than needed, and cached if requested."""

import errno
import math
import mmap
import os
import shutil
import struct
import tempfile
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import suppress
from copy import copy
from pathlib import Path
from typing import Any, Literal, Self, overload

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from typing_extensions import override

from datamodules.bands import scaled
from datamodules.cache import cache_folder
from datamodules.errors import DataError
from datamodules.images import Reduction, read_bands, read_reduced
from datamodules.options import RGB, Reading
from datamodules.paths import Paths

Caching = Literal["none", "memory", "disk"]
SPARED = 2 << 30  # bytes that are left free, for checkpoints on disk and for other uses of memory
HEADER = struct.Struct("<4I")  # of a file: magic number, height, width, channels
MAGIC: dict[np.dtype[Any], int] = {np.dtype(np.uint8): 0x31564F46, np.dtype(np.uint16): 0x32564F46}


class ImageFiles:
    """Image files as an array that is read lazily: an index returns an image, which may be read-only, an array of
    indices a subset of the files.

    Args:
        paths: paths of N files.
        digests: content digests, N.
        sizes: height and width as displayed, int64 N×2.
        reading: how files are decoded.
        cache: where decoded images are kept: ``memory`` is shared with forked processes, ``disk`` with all processes,
            now and later. Without enough space, images are decoded each time; the cache does not change them.
        checked: whether all files were decoded before; see `check_images`.
    """

    def __init__(
        self,
        paths: Iterable[str],
        digests: NDArray[Any],
        sizes: NDArray[np.int64],
        reading: Reading = RGB,
        cache: Caching = "none",
        checked: bool = True,
    ) -> None:
        self.paths, self.digests = Paths.of(paths), np.asarray(digests, "S32")
        self.sizes, self.reading, self.cache = sizes, reading, cache
        self.checked = checked
        self._reduction: Reduction | None = None
        self._kept: _Kept | None = None
        self._known: dict[bytes, _Kept] = {}  # by the reduction factors of all files; shared with copies

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> NDArray[Any]: ...

    @overload
    def __getitem__(self, index: NDArray[Any]) -> Self: ...

    def __getitem__(self, index: int | NDArray[Any]) -> "NDArray[Any] | ImageFiles":
        if isinstance(index, np.ndarray):
            part = copy(self)
            part.paths, part.digests, part.sizes = self.paths[index], self.digests[index], self.sizes[index]
            part._reduction, part._kept, part._known = None, None, {}
            return part
        try:
            pixels = self.read(index) if self._kept is None else self._kept.get(index, lambda: self.read(index))
        except DataError as error:
            if self.checked:
                raise
            raise DataError(
                f"{error} It was not looked at before: a new training, with another --output and --data.check all, finds all such "
                "files, and leaves them out with --data.on_bad_file skip."
            ) from None
        return scaled(pixels, self.reading.bits)

    def read(self, index: int) -> NDArray[Any]:
        """Decodes an image, uint8 H×W×C, at the size that `reduced` allows; or its bands without scaling, uint8 or
        uint16."""
        if not self.reading.seen:
            return read_bands(self.paths.at(index), self.reading)
        return read_reduced(self.paths.at(index), self.reading, self._reduction)[0]

    def reduced(self, reduction: Reduction) -> Self:
        """Returns the same files, decoded at reduced size, and cached if requested."""
        same = copy(self)
        same._reduction = reduction = reduction if self.reading.seen else as_it_is
        if self.cache != "none":
            found, which = np.unique(self.sizes, axis=0, return_inverse=True)
            factors = np.array([reduction(*size) for size in found.tolist()], np.uint8)[which.reshape(-1)]
            kind = {"memory": _Memory, "disk": _Disk}[self.cache]
            key = factors.tobytes()
            if key not in self._known:
                self._known[key] = kind(self, factors)
            same._kept = self._known[key]
        return same


def as_it_is(height: int, width: int) -> int:
    """The `Reduction` that keeps the full size."""
    return 1


class _Kept(ABC):
    """Base class of caches of decoded images.

    Args:
        files: the files.
        factors: reduction factor of each file, uint8 N.
    """

    name: str  # for messages

    def __init__(self, files: ImageFiles, factors: NDArray[Any]) -> None:
        self.reading, self.factors, self.full = files.reading, factors, False
        self.depth = files.reading.channels * (2 if files.reading.deep else 1)  # maximum number of bytes per pixel
        sides = -(-files.sizes // factors[:, None].astype(np.int64))
        needed, room = int(sides.prod(1).sum()) * self.depth, self.room() - SPARED
        if needed > room:
            self._give_up(f"they need {needed / 2**30:,.1f} GB, and {max(0, room) / 2**30:,.1f} GB are available")

    def get(self, index: int, read: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """Returns the image of a file from the cache, possibly read-only, or reads it and adds it to the cache."""
        pixels = self._find(index)
        if pixels is None:
            pixels = read()
            if not self.full:
                try:
                    if self.room() - pixels.nbytes < SPARED:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    self._keep(index, pixels)
                except OSError as error:
                    self._give_up(error.strerror or str(error))
        return pixels

    def _give_up(self, why: str) -> None:
        self.full = True
        rank_zero_warn(f"Not all decoded images are kept {self.name}: {why}. The others are decoded each time.")

    @abstractmethod
    def room(self) -> int:
        """Returns the number of free bytes."""

    @abstractmethod
    def _find(self, index: int) -> NDArray[Any] | None:
        """Returns the image of a file, or None if it is not cached."""

    @abstractmethod
    def _keep(self, index: int, pixels: NDArray[Any]) -> None:
        """Caches an image; raises OSError if that is impossible."""


class _Disk(_Kept):
    """Images in files under ``$XDG_CACHE_HOME/fovea/decoded``, named by the digest of the original file.

    A file gets its name once it is complete, and is only used if its size matches its header.
    """

    def __init__(self, files: ImageFiles, factors: NDArray[Any]) -> None:
        self.digests = files.digests
        self.folder = cache_folder() / "decoded"
        self.name = f"in {self.folder}"
        super().__init__(files, factors)
        self._bands = "".join(f"-{band}" for band in self.reading.bands or ()) + "-deep" * self.reading.deep

    def _place(self, index: int) -> str:
        digest = self.digests[index].decode()
        return f"{self.folder}/{digest[:2]}/{digest}-{self.reading.channels}-{self.factors[index]}{self._bands}"

    @override
    def room(self) -> int:
        there = next(folder for folder in (self.folder, *self.folder.parents) if folder.is_dir())
        return shutil.disk_usage(there).free

    @override
    def _find(self, index: int) -> NDArray[Any] | None:
        try:
            with open(self._place(index), "rb", buffering=0) as file:
                magic, *shape = HEADER.unpack(file.read(HEADER.size).ljust(HEADER.size))
                kind = next((dtype for dtype, number in MAGIC.items() if number == magic), None)
                size = math.prod(shape) * (kind.itemsize if kind else 0)
                if kind is None or os.fstat(file.fileno()).st_size != HEADER.size + size:
                    return None
                pixels = np.empty(shape, kind)
                return pixels if file.readinto(pixels.data.cast("B")) == size else None
        except OSError:
            return None

    @override
    def _keep(self, index: int, pixels: NDArray[Any]) -> None:
        place = Path(self._place(index))
        part = place.with_name(f".{place.name}.{os.getpid()}.{threading.get_ident()}")
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as file:
                file.write(HEADER.pack(MAGIC[pixels.dtype], *pixels.shape))
                file.write(np.ascontiguousarray(pixels).data)
            part.replace(place)
        except OSError:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise


class _Memory(_Kept):
    """Images in an anonymous file in memory, which is freed with the last process that has it open.

    Space for each image is reserved at its maximum size; unwritten parts take no memory.
    """

    name = "in memory"

    def __init__(self, files: ImageFiles, factors: NDArray[Any]) -> None:
        super().__init__(files, factors)
        self._made_of = files, factors
        sizes = files.sizes.prod(1) * self.depth
        self._starts = np.concatenate([[0], np.cumsum(-(-sizes // mmap.PAGESIZE) * mmap.PAGESIZE)])
        if hasattr(os, "memfd_create"):
            self._file = os.memfd_create("fovea")
        else:  # otherwise a file without a name
            with tempfile.TemporaryFile() as file:
                self._file = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._file)
        os.truncate(self._file, int(self._starts[-1]))
        # Copied from a mapping, an image takes a third of the time that reading the file takes.
        self._pixels = mmap.mmap(self._file, int(self._starts[-1]), access=mmap.ACCESS_READ)
        self._shapes = np.frombuffer(mmap.mmap(-1, max(1, 12 * len(files))), np.int32)[: 3 * len(files)].reshape(-1, 3)

    def __reduce__(self) -> Any:  # a process that is not forked creates its own
        return type(self), self._made_of

    @override
    def room(self) -> int:
        return free_memory()

    @override
    def _find(self, index: int) -> NDArray[Any] | None:
        height, width, size = self._shapes[index].tolist()
        if not height:
            return None
        shape, start = (height, width, self.reading.channels), int(self._starts[index])
        return np.ndarray(shape, f"u{size}", self._pixels, start)

    @override
    def _keep(self, index: int, pixels: NDArray[Any]) -> None:
        if (
            os.pwrite(self._file, np.ascontiguousarray(pixels).data.cast("B"), int(self._starts[index]))
            == pixels.nbytes
        ):
            self._shapes[index, 1:] = pixels.shape[1], pixels.itemsize
            self._shapes[index, 0] = pixels.shape[0]  # last, since it marks the image as present


def free_memory() -> int:
    """Returns the number of bytes of available memory, of the machine or of the container."""
    free = [os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE]
    with suppress(OSError):
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        free.append(next(int(amount) << 10 for name, amount, *_ in lines if name == "MemAvailable:"))
    with suppress(OSError, ValueError):  # no container, or one without a limit
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free.append(limit - used + int(stat["inactive_file"]))
    return min(free)
