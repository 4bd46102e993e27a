"""Asks a registered model about image files: ``python -m pipelines.predict models:/NAME@ALIAS PATH…``."""

import glob
import sys
from pathlib import Path

from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

from datamodules import DataError
from datamodules.images import EXTENSIONS
from pipelines.registry import load


def files_of(paths: list[str]) -> list[str]:
    """The image files that paths, folders and patterns name, sorted within each."""
    found: list[str] = []
    for path in paths:
        if Path(path).is_dir():
            found += sorted(str(file) for file in Path(path).rglob("*") if file.suffix.lower() in EXTENSIONS)
        else:
            found += sorted(glob.glob(path, recursive=True)) or [path]
    return found


def predict(model: str, paths: list[str], json: bool = False, device: str = "cpu") -> int:
    """Prints what a registered model says about images.

    Args:
        model: ``models:/name@alias`` or ``models:/name/version``.
        paths: files, folders, patterns.
        json: print a line of JSON for each image instead of a table.
        device: where the model runs, such as ``cuda``.

    Returns:
        The number of files that could not be read; they are named and passed over.
    """
    answering, bad, shown = load(model, device), 0, []
    for path in files_of(paths):
        try:
            shown.append(answering.predict(None, [path]).assign(path=path))
        except (DataError, ValueError) as error:
            bad += 1
            print(f"passed over: {error}", file=sys.stderr)
    if json:
        for row in shown:
            print(row.to_json(orient="records", lines=True), end="")
        return bad
    table = Table()
    columns = [column for column in (shown[0].columns if shown else []) if column not in ("path", "top")]
    for column in ("path", *columns):
        table.add_column(column, overflow="fold")
    for row in shown:
        values = row.iloc[0]
        table.add_row(values["path"], *(f"{v:.3f}" if isinstance(v, float) else str(v) for v in values[columns]))
    Console().print(table)
    return bad


if __name__ == "__main__":
    try:
        sys.exit(1 if auto_cli(predict, as_positional=True) else 0)
    except ValueError as error:
        sys.exit(f"error: {error}")
