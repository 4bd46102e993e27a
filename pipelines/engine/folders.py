"""Output folders of runs."""

import os
import tempfile
import time
from itertools import count
from pathlib import Path

import psutil

RUN_FILE = "run.json"  # in the folder of a tracked run: which that is


def is_training(folder: Path) -> bool:
    """Whether a folder belongs to a training, that is, holds weights."""
    return any(folder.glob("*.ckpt"))


def own_folder(folder: Path, verb: str, stamp: str) -> Path:
    """Output folder of an evaluation: the given one, or a new folder inside it if it belongs to another run."""
    from pipelines.engine.launch import is_child, launcher

    if is_child():
        return folder
    run, since = folder / RUN_FILE, time.time()
    if launcher() is not None:  # another process of this job may have begun the run
        since = psutil.Process(os.getppid()).create_time()
    if not is_training(folder) and not (run.exists() and run.stat().st_mtime < since):
        return folder
    place, number = folder / f"{verb}-{stamp}", 1
    while launcher() is None and place.exists():
        number += 1
        place = folder / f"{verb}-{stamp}+{number}"
    return place


def new_folder(folder: Path) -> Path:
    """Creates a folder, adding a number to the name if it exists; the processes of one job share theirs."""
    from pipelines.engine.launch import launcher

    if launcher() is not None:
        return folder
    for number in count(2):
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            folder = folder.with_name(f"{folder.name.partition('+')[0]}+{number}")
    return folder


def try_to_write(folder: Path, make: bool) -> None:
    """Checks that files can be written to a folder.

    Args:
        folder: it.
        make: whether it is made; else the nearest of its parents that there is is tried.

    Raises:
        OSError: there cannot.
    """
    if make:
        folder.mkdir(parents=True, exist_ok=True)
    place = next(each for each in (folder, *folder.absolute().parents) if each.is_dir())
    # A file of its own for each process: those of one job try the folder at the same moment.
    with tempfile.TemporaryFile(dir=place):
        pass
