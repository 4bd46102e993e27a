"""Tables that list images, as CSV or Parquet."""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from datamodules.base import DataError


def listed(given: Iterable[str]) -> str:
    """Some names for a message."""
    names = list(given)
    shown = ", ".join(map(str, names[:8]))
    return f"{shown}, … ({len(names)} in all)" if len(names) > 8 else shown


def read_table(file: Path, option: str) -> pd.DataFrame:
    """Reads a table; the cells of a CSV stay text, so that the label 007 stays what it is, and NA is a label.

    Args:
        file: the table.
        option: the setting that names it, for the message.

    Raises:
        DataError: it is not there, cannot be read, or has no rows.
    """
    if not file.is_file():
        raise DataError(f"There is no file {file.resolve()}: give the table of your images with {option}.")
    try:
        if file.suffix == ".parquet":
            table = pd.read_parquet(file)
        else:
            table = pd.read_csv(file, dtype=str, keep_default_na=False, na_values=[""])
    except (OSError, ValueError) as error:
        raise DataError(
            f"{file.resolve()} cannot be read as a table ({str(error)[:200]}): give one in CSV or Parquet."
        ) from None
    return table


def check_table(table: pd.DataFrame, file: Path, columns: dict[str, str], filled: Sequence[str]) -> None:
    """Checks what a table has.

    Args:
        table: the table.
        file: where it comes from.
        columns: the columns that it must have, each with the setting that names it.
        filled: those of which no cell may be empty.

    Raises:
        DataError: a column or a cell lacks, there are no rows, or splits have other names.
    """
    for column in columns:
        if column not in table:
            near = difflib.get_close_matches(column, map(str, table.columns), 1, 0)
            settings = " or ".join(dict.fromkeys(columns.values()))
            raise DataError(
                f"{file.resolve()} has no column {column!r}; it has {listed(table.columns)}. "
                f"Did you mean {near[0]!r}? Name it with {settings}."
            )
    if table.empty:
        raise DataError(f"{file.resolve()} has no rows.")
    needed = [name for name in (*filled, "split") if name in table]
    missing = table[needed].isna()
    if missing.any(axis=None):
        row, column = next(zip(*missing.to_numpy().nonzero(), strict=True))
        raise DataError(f"{file.resolve()} has nothing under {needed[column]!r} in row {row + 1}: fill it in.")
    if "split" in table:
        splits = set(table["split"])
        if unknown := sorted(map(str, splits - {"train", "val", "test"})):
            raise DataError(
                f"{file.resolve()} has a row of the split {unknown[0]!r}: name the splits train, val and test."
            )
        if "train" not in splits:
            raise DataError(f"{file.resolve()} has no row of the split 'train': say which images to train on.")


def by_split(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each split; ``all`` where there is no column ``split``."""
    if "split" not in table:
        return {"all": table}
    return {str(name): rows for name, rows in table.groupby("split")}
