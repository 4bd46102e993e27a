"""Atomic writing of files, and locks on folders."""

import errno
import fcntl
import os
import platform
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


class DiskError(OSError):
    """A file could not be written; the message names the file, the reason and what to do."""


class LockError(ValueError):
    """Another process holds the folder; the message names both."""


def disk_error(error: BaseException | None, file: str | Path) -> DiskError | None:
    """Explains an error while writing a file if the disk is the cause: full, failing, read-only, or over quota."""
    if isinstance(error, DiskError):
        return error
    cause = error
    while cause is not None:
        number = cause.errno if isinstance(cause, OSError) else None
        if said := re.search(r"\(os error (\d+)\)", str(cause)):  # Rust's, of safetensors
            number = int(said[1])
        if number in FAULTS:
            break
        cause = cause.__cause__ or cause.__context__
    if cause is None or number is None:
        return None
    if isinstance(cause, OSError) and isinstance(cause.filename, str):
        file = cause.filename
    folder = Path(file).absolute().parent
    free = ""
    with suppress(OSError):
        free = f"; {shutil.disk_usage(folder).free / 2**20:,.1f} MB are free on the disk of {folder}"
    return DiskError(
        f"{Path(file).absolute()} could not be written: {os.strerror(number)}{free}. Make room, and give the same command "
        "again; a training goes on from its last checkpoint with the same --output."
    )


@contextmanager
def whole(file: str | Path, twins: Iterable[str | Path] = ()) -> Iterator[Path]:
    """Context that yields a temporary path, renamed to the file's name once everything is on the disk. Creates the
    folder.

    Whenever a kill comes, and if the disk is full, the file is what it was before, or absent.

    Args:
        file: the file; a former one is replaced.
        twins: other names of the same file, which it takes before; where the disk has no hard links, they are copies.

    Yields:
        Another name in the same folder with the same suffix.

    Raises:
        DiskError: the disk is full, broken or read-only.
    """
    file, part = Path(file), _part(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with part.open("rb") as stream:
            os.fsync(stream.fileno())
        for twin in twins:
            _link(part, Path(twin))
        part.replace(file)
    except BaseException as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        if fault := disk_error(error, file):
            raise fault from error
        raise


def _part(file: str | Path) -> Path:
    """Temporary path of a file; a new attempt after a kill overwrites it."""
    file = Path(file)
    return file.with_name(f".{file.stem[:100]}.part{file.suffix}")


def _link(file: Path, name: Path) -> None:
    """Gives a file a second name, atomically."""
    part = _part(name)
    name.parent.mkdir(parents=True, exist_ok=True)
    part.unlink(missing_ok=True)
    try:
        os.link(file, part)
    except OSError:
        with whole(name) as part:
            shutil.copyfile(file, part)
    else:
        part.replace(name)


def write_text(file: str | Path, text: str) -> None:
    """Writes a text atomically; see `whole`.

    Raises:
        DiskError: see `whole`.
    """
    with whole(file) as part:
        part.write_text(text)


def write_image(file: str | Path, image: Image.Image | NDArray[np.uint8], **options: Any) -> None:
    """Writes a picture atomically; see `whole`.

    Args:
        file: the file.
        image: uint8 H×W×3, or H×W×1 for grey; or a picture of Pillow's.
        options: of Pillow's `Image.save`.

    Raises:
        DiskError: see `whole`.
        ValueError: files of this kind cannot hold the picture.
    """
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    with whole(file) as part:
        try:
            image.save(part, **options)
        except OSError as error:
            if error.errno is not None:  # the system's; what an encoder refuses has no number
                raise
            size = f"{image.width} × {image.height} pixels"
            raise ValueError(f"{file} cannot be written as a picture of {size}: {error}.") from error


_held: set[Path] = set()


@contextmanager
def held(folder: Path, fresh: bool = False) -> Iterator[None]:
    """Locks a folder, such as a training's output folder, against other processes.

    The system ends the hold with the process, however that dies. The processes that a holder forks do not inherit it, and
    within one process it may be nested.

    Args:
        folder: it; made where there is none.
        fresh: remove it at the end if nothing was written to it.

    Raises:
        LockError: another process holds it.
    """
    folder = folder.absolute()
    if folder in _held:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    # Record locks, not `flock`: workers that were forked would keep that for seconds after their parent was killed.
    with (folder / ".lock").open("a+") as stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            stream.seek(0)
            raise LockError(
                f"{folder} is in use by {stream.read().strip() or 'another process'}: wait until that has ended, or "
                "choose another folder."
            ) from None
        except OSError:  # a file system without locks, where nobody can be kept out
            pass
        if not os.fstat(stream.fileno()).st_nlink:  # its last holder has just removed it
            raise LockError(f"{folder} was removed by another process: give the command again.")
        with suppress(OSError):  # a full disk may lack the room for a name
            stream.truncate(0)
            stream.write(f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            stream.flush()
        _held.add(folder)
        try:
            yield
        finally:
            _held.discard(folder)
            with suppress(OSError):
                stream.truncate(0)
                if fresh and os.listdir(folder) == [".lock"]:
                    (folder / ".lock").unlink()
                    folder.rmdir()
