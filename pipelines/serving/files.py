"""Expansion of a command's paths: files, folders, patterns, tables."""

import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodules import DataError, images, videos
from datamodules.errors import listed, repeated
from datamodules.finding import paths_in
from datamodules.paths import SHARDS
from datamodules.tables import numbers_in, read_table, spelled, unclear

if TYPE_CHECKING:
    import pandas as pd


def find(paths: list[str], without: str | None = None) -> tuple[list[str], list[str], str]:
    """Images and videos matching paths, folders and patterns, sorted within each, without duplicates.

    Returns:
        The files; those of the paths that lead to nothing; the folder that the former have in common.
    """
    found: dict[str, str] = {}
    missing, roots = [], []
    for path in paths:
        matches = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        missing += [] if matches else [path]
        for match in matches:
            roots.append(os.path.abspath(match if os.path.isdir(match) else os.path.dirname(match)))
            for file in sorted(_below(match, without)) if os.path.isdir(match) else [match]:
                found.setdefault(os.path.abspath(file), file)
    return list(found.values()), missing, os.path.commonpath(roots) if roots else ""


def _below(folder: str, without: str | None) -> Iterable[str]:
    kinds = images.EXTENSIONS + videos.EXTENSIONS
    left_out = without and os.path.realpath(without)
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(place, name)) != left_out]
        yield from (os.path.join(place, file) for file in files if file.lower().endswith(kinds))


def pictures_in(paths: Sequence[str], without: str | None = None) -> list[str]:
    """The files that `find` finds.

    Raises:
        ValueError: a path leads to nothing, to a shard, or there are no pictures.
    """
    files, missing, _ = find(list(paths), without)
    if packed := [file for file in files if file.lower().endswith(SHARDS)]:
        raise ValueError(f"{packed[0]} is no picture: unpack those inside, and give their folder.")
    if missing:
        raise ValueError(f"There is no file or folder {missing[0]}.")
    if not files:
        raise ValueError(f"There are no pictures in {', '.join(paths)}.")
    return files


def check_new(folder: str) -> None:
    """Checks that a folder to write to is new or empty.

    Raises:
        ValueError: it is not.
    """
    if os.path.isdir(folder) and os.listdir(folder):
        raise ValueError(f"{os.path.abspath(folder)} is not empty: name a new folder with --out.")


def is_table(path: str) -> bool:
    """Whether a file is a table, by its name."""
    return path.lower().endswith((".csv", ".csv.gz", ".tsv", ".parquet"))


def rows_of(table: str) -> "pd.DataFrame":
    """Reads a table of images.

    Returns:
        Its rows, with the path of each image, from the column ``path``, as index.

    Raises:
        DataError: it cannot be read, has no such column, or names an image twice.
    """
    file, found = Path(table), read_table(Path(table), "the command")
    found = found.rename(columns=spelled(found, ["path"]))
    if "path" not in found:
        raise DataError(
            f"{table} has no column 'path', but {listed(found.columns)}: rename the column with the images' paths to path."
        )
    found = found.dropna(subset="path")
    paths = paths_in(found["path"], file)
    if twice := repeated(paths):
        raise DataError(f"{table} names {twice[0]} in {twice[1]} rows: ask about one of them at a time.")
    return found.set_axis(list(paths))


def beside(rows: "pd.DataFrame", columns: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Reads columns of numbers as a training does: in any capitalisation, and with a comma for the decimals.

    Args:
        rows: a result of `rows_of`.
        columns: names of the columns; others are left as they are, and so are cells without a clear number.

    Returns:
        Path of each image -> cells of its row.
    """
    rows = rows.rename(columns=spelled(rows, columns))
    for name in columns:
        if name in rows and not unclear(rows[name]):
            numbers, _ = numbers_in(rows[name])
            rows[name] = rows[name].astype(object).mask(np.isfinite(numbers), numbers)
    cells: list[Any] = rows.to_dict("records")
    return dict(zip(rows.index, cells, strict=True))
