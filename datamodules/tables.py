"""Text files and tables that list images: in any usual encoding, as CSV or Parquet."""

import codecs
import difflib
import gzip
import io
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray

from datamodules.errors import DataError, listed
from datamodules.images import EXTENSIONS, folded
from datamodules.paths import Member, content_of
from datamodules.splits import SPLITS, split_of

if TYPE_CHECKING:
    import pandas as pd

ROWS = 50_000  # of a table that are read at once, since each cell is a Python object then
LIST = "\x1f"  # ends each value of a list that is a cell, as those of JSON become, and begins a cell of objects
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def decoded(data: bytes, declared: str | None = None) -> tuple[str, bool]:
    """Text in the encoding of its byte-order mark, else UTF-8, else the declared one, else Windows-1252.

    Returns:
        The text, and whether its encoding was guessed.
    """
    for mark, encoding in MARKS:
        if data.startswith(mark):
            return data[len(mark) :].decode(encoding, "replace"), False
    for name in ("utf-8", declared):
        try:
            return data.decode(name or "utf-8"), False
        except (UnicodeError, LookupError):
            continue
    return data.decode("cp1252", "replace"), True


class Notes:
    """Collects deviations of files from their format, by kind, for warnings."""

    def __init__(self) -> None:
        self._places: dict[str, list[str]] = {}

    def add(self, what: str, place: object) -> None:
        """Adds a deviation."""
        self._places.setdefault(what, []).append(str(place))

    def tell(self) -> None:
        """Warns once per kind, with the number of cases and the first one."""
        for what, places in self._places.items():
            rank_zero_warn(f"{what} ({len(places)} times; the first: {places[0]}).")
        self._places.clear()


def text_of(file: Path | Member, notes: Notes | None = None, declared: str | None = None) -> str:
    """Reads the text of a file; see `decoded`.

    Args:
        file: the file.
        notes: where a guessed encoding is noted; None warns at once.
        declared: encoding that the file declares.

    Raises:
        DataError: it cannot be read.
    """
    try:
        text, guessed = decoded(content_of(file), declared)
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}.") from None
    if guessed:
        own = notes or Notes()
        own.add("A file is not in UTF-8 and was read as Windows-1252; look at the names in it", file)
        if notes is None:
            own.tell()
    return text


def read_table(file: Path, option: str) -> "pd.DataFrame":
    """Reads a table; cells of a CSV stay text, so that labels such as 007 and NA are preserved.

    Text may have any encoding that `decoded` supports; Excel's first line ``sep=;`` and empty rows are skipped.

    Raises:
        DataError: it does not exist, cannot be read, or has no rows.
    """
    import pandas as pd

    if not file.is_file():
        raise DataError(f"There is no file {file.resolve()}: give the table of your images with {option}.")
    try:
        if file.suffix.lower() == ".parquet":
            table = pd.read_parquet(file)
        else:
            data = file.read_bytes()
            text, guessed = decoded(gzip.decompress(data) if file.suffix.lower() == ".gz" else data)
            if "\0" in text or data.startswith(b"PK\3\4"):
                raise ValueError("it is not text")
            said = re.match(r"\s*\"?sep=(.)\"?[\r\n]+", text)
            text = text[said.end() :] if said else text
            # Programs write a semicolon where the comma is decimal.
            separator = said[1] if said else max(",;\t", key=text.partition("\n")[0].count)
            content = io.BytesIO(text.encode())  # text in a stream takes four bytes a character
            del data, text
            parts = pd.read_csv(
                content, sep=separator, dtype=str, keep_default_na=False, na_values=[""], chunksize=ROWS
            )
            table = pd.concat([*parts]).dropna(how="all")
            content.seek(0)
            header = pd.read_csv(content, sep=separator, dtype=str, header=None, nrows=1).iloc[0].dropna()
            if len(twice := header[header.duplicated()]):
                name = twice.iloc[0]
                rank_zero_warn(
                    f"{file} has several columns {name!r}; the first keeps that name, the next is {name + '.1'!r}."
                )
            if guessed:
                rank_zero_warn(f"{file} is not in UTF-8 and was read as Windows-1252; look at the names in it.")
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise DataError(
            f"{file.resolve()} cannot be read as a table ({str(error)[:200]}): give one in CSV or Parquet."
        ) from None
    return table.rename(columns=lambda name: str(name).strip())


SPELLINGS = {
    "image": ("path", "image_path", "filename", "file_name"),
    "path": ("image_path", "filename", "file_name", "image", "imageid"),
    "label": ("class", "class_name", "category", "labelname"),
    "identity": ("person",),
    "xmin": ("x_min", "x1"),
    "ymin": ("y_min", "y1"),
    "xmax": ("x_max", "x2"),
    "ymax": ("y_max", "y2"),
}


def spelled(table: "pd.DataFrame", names: Sequence[str]) -> dict[str, str]:
    """Finds columns of a table in another common spelling or capitalisation of missing names.

    Returns:
        The table's name of each column that was found, with the expected name.
    """
    own = {folded(name): name for name in table.columns[::-1]}
    found = {}
    for name in names:
        if name not in table and (
            known := next((own[s] for s in (folded(name), *SPELLINGS.get(name, ())) if s in own), None)
        ):
            found[known] = name
    return found


def warn_of_alike(names: Sequence[str]) -> None:
    """Warns of names of classes or people that differ only in case or spaces."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault("".join(str(name).casefold().split()), []).append(name)
    if pairs := [same for same in alike.values() if len(same) > 1]:
        rank_zero_warn(
            "These names differ only in case or spaces, and are treated as different: "
            f"{'; '.join(', '.join(map(repr, same)) for same in pairs[:5])}. If they are the same, write them alike."
        )


def numbered(table: "pd.DataFrame", row: int) -> str:
    """Name of a row of a file for messages, by its number there."""
    return f"row {table.index[row] + 1}"


def check_table(
    table: "pd.DataFrame",
    file: Path,
    columns: dict[str, str],
    filled: Sequence[str],
    must_train: bool = True,
    named: "Callable[[pd.DataFrame, int], str]" = numbered,
) -> None:
    """Checks the columns of a table.

    Args:
        table: the table.
        file: file of the table, for messages.
        columns: required columns, each with the setting that names it.
        filled: columns without empty cells.
        must_train: if there are splits, one must be ``train``.
        named: names a row for messages.

    Raises:
        DataError: a column or a cell is missing, there are no rows, or a split is unknown.
    """
    for column in columns:
        if column not in table:
            if any(str(name).lower().endswith(EXTENSIONS) for name in table.columns):
                raise DataError(
                    f"The first line of {file.resolve()} does not name columns, but an image: "
                    f"{listed(table.columns)}. Put a line "
                    f"with the names above it: {', '.join(columns)}."
                )
            near = difflib.get_close_matches(column, map(str, table.columns), 1)
            guess = f" Did you mean {near[0]!r}?" if near else ""
            settings = " or ".join(dict.fromkeys(columns.values()))
            raise DataError(
                f"{file.resolve()} has no column {column!r}; it has {listed(table.columns)}.{guess} Name it with {settings}."
            )
    if table.empty:
        raise DataError(f"{file.resolve()} has no rows.")
    needed = [name for name in (*filled, "split") if name in table]
    missing = table[needed].isna()
    if missing.any(axis=None):
        row, column = next(zip(*missing.to_numpy().nonzero(), strict=True))
        raise DataError(f"{file.resolve()} has nothing under {needed[column]!r} in {named(table, row)}: fill it in.")
    if "split" in table:
        if unknown := sorted({str(name) for name in table["split"].unique() if not split_of(name)}):
            raise DataError(
                f"{file.resolve()} has a row of the split {unknown[0]!r}: name the splits train, val and test."
            )
        if must_train and "train" not in {split_of(name) for name in table["split"].unique()}:
            raise DataError(f"{file.resolve()} has no row of the split 'train': say which images to train on.")
    else:
        for column in set(table.columns) - set(columns):
            values = table[column].dropna().unique()[:20]
            if {"train"} < {split_of(value) for value in values}:
                raise DataError(
                    f"Does the column {column!r} of {file.resolve()} say which split a row is of? It has "
                    f"{listed(values)}. Name it 'split' if so; else leave it out."
                )


def by_split(table: "pd.DataFrame") -> "dict[str, pd.DataFrame]":
    """Groups the rows by split, in any spelling of `split_of`; ``all`` without a column ``split``."""
    if "split" not in table:
        return {"all": table}
    names = table["split"].map({name: split_of(name) for name in table["split"].unique()})
    return {split: table[names == split] for split in SPLITS if (names == split).any()}


UNKNOWN = ("", "nan", "na", "n/a", "null", "none", "-")


def numbers_in(cells: "pd.Series[Any]") -> tuple[NDArray[np.float32], list[str]]:
    """Numbers of a column, NaN for missing ones, and the cells that are not numeric. The decimal separator may be a
    comma; see `unclear`."""
    text, exact = _parsed(cells)
    with np.errstate(over="ignore"):
        numbers = exact.astype(np.float32)
    wrong = text[~np.isfinite(numbers) & (text != "").to_numpy()].unique().tolist()
    return numbers, wrong or ([] if np.isfinite(numbers).any() else [""])


def _parsed(cells: "pd.Series[Any]") -> "tuple[pd.Series[str], NDArray[np.float64]]":
    """Text of cells, empty for missing numbers, and its numbers, NaN where there is none."""
    import pandas as pd

    text = cells.fillna("").astype(str).str.strip()
    text = text.where(~text.str.casefold().isin(UNKNOWN), "")
    plain = text.str.replace(",", "" if unclear(text) else ".", regex=False)
    return text, pd.to_numeric(plain, errors="coerce").to_numpy(np.float64)


def check_distinct(cells: "pd.Series[Any]", file: Path) -> None:
    """Checks that the network's float32 tells a column's numbers apart: it rounds them by less than a hundredth of their
    standard deviation.

    Raises:
        DataError: it does not.
    """
    exact = _parsed(cells)[1]
    exact = exact[np.abs(exact) < np.finfo(np.float32).max]
    if len(exact) and np.abs(exact - exact.astype(np.float32)).max() > exact.std() / 100 > 0:
        raise DataError(
            f"{file.resolve()} has numbers from {exact.min():,.12g} to {exact.max():,.12g} under {cells.name!r}, which the network, "
            "whose numbers have seven digits, does not tell apart: subtract their smallest from all of them, or leave the "
            "column out."
        )


def unclear(cells: "pd.Series[Any]") -> str | None:
    """A number whose comma might be a thousands separator, if that is possible for the whole column."""
    text = cells.dropna().astype(str).str.strip()
    commas = text[text.str.contains(",", regex=False)]
    return (
        str(commas.iloc[0])
        if len(commas) and commas.str.fullmatch(r"[-+]?[1-9]\d{0,2}(,\d{3})+(\.\d*)?").all()
        else None
    )


def numeric_columns(
    table: "pd.DataFrame", names: Sequence[str], file: Path, named: "Callable[[pd.DataFrame, int], str]" = numbered
) -> NDArray[np.float32]:
    """Reads columns in which every row must have a number.

    Args:
        table: the table; its index is the row number, from 0.
        names: names of the columns.
        file: the file of the table, for messages.
        named: names a row for messages.

    Returns:
        float32 N×K.

    Raises:
        DataError: a cell is empty or not numeric, or float32 does not tell the numbers apart.
    """
    columns = np.zeros((len(table), len(names)), np.float32)
    for k, name in enumerate(names):
        columns[:, k], _ = numbers_in(table[name])
        if (lacking := np.flatnonzero(~np.isfinite(columns[:, k]))).size or unclear(table[name]):
            lacking = (
                lacking if lacking.size else np.flatnonzero(table[name].astype(str).str.contains(",", regex=False))
            )
            row = int(lacking[0])
            raise DataError(
                f"{file.resolve()} has {str(table[name].iloc[row])!r} under {name!r} in {named(table, row)}, where the network needs a "
                f"number ({lacking.size} of {len(table)} rows): write one, with a point for the decimals; remove the "
                "row; or leave the column out."
            )
        check_distinct(table[name], file)
    return columns
