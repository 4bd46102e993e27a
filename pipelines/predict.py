"""Asks a registered model about image files: ``python -m pipelines.predict models:/NAME@ALIAS PATH…``."""

import glob
import os
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from json import dumps
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from datamodules.images import EXTENSIONS, read_image
from modules import VisionModule
from pipelines.registry import load


def find(paths: list[str], without: str | None = None) -> tuple[list[str], list[str], str]:
    """The image files that paths, folders and patterns name, sorted within each, none of them twice.

    Args:
        paths: files, folders (with all folders below), patterns.
        without: folder that is not looked into.

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
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not (without and _same(os.path.join(place, name), without))]
        yield from (os.path.join(place, file) for file in files if file.lower().endswith(EXTENSIONS))


def _same(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def predict(
    model: str,
    paths: list[str],
    out: str | None = None,
    json: bool = False,
    batch_size: int = 64,
    device: str = "auto",
) -> int:
    """Prints what a registered model says about images.

    Args:
        model: ``models:/name@alias`` or ``models:/name/version``.
        paths: files, folders, patterns.
        out: folder for ``predictions.jsonl`` and, with the sub-folders that the images are in, a drawing of each answer.
        json: print a line of JSON for each image instead of a table.
        batch_size: images that go through the network together.
        device: where the model runs, such as ``cuda``; ``auto`` is the GPU if there is one.

    Returns:
        The exit code: 0; 1 if there were files that could not be read, which are named and passed over; 2 if nothing was
        found.

    Raises:
        ValueError: there is no such model or device, or a drawing would replace an image.
    """
    if batch_size < 1:
        raise ValueError(f"--batch_size is at least 1, not {batch_size}.")
    screen = Console(stderr=True, highlight=False, soft_wrap=True)
    files, missing, root = find(paths, out)
    bad = len(missing)
    for path in missing:
        screen.print(f"{path}: there is no such file or folder.", markup=False)
    if not files:
        screen.print("No images were found.")
        return 2
    drawings = _drawings(files, root, out) if out else []
    answering, table = load(model, device), Table()
    # A bar on the terminal that the JSON lines go to would mix with them.
    quiet = not screen.is_terminal or (json and sys.stdout.isatty())
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("images"), TimeRemainingColumn())
    with ExitStack() as stack:
        progress = stack.enter_context(
            Progress(*columns, console=screen, disable=quiet, transient=True, redirect_stdout=False)
        )
        bar = progress.add_task("", total=len(files))
        if out:
            os.makedirs(out, exist_ok=True)
            lines = stack.enter_context(open(os.path.join(out, "predictions.jsonl"), "w"))
            pool = stack.enter_context(ThreadPoolExecutor())
            stack.callback(pool.shutdown, cancel_futures=True)
        drawn: deque[Future[None]] = deque()
        for i, answer in enumerate(answering.stream(map(Path, files), batch_size)):
            progress.advance(bar)
            if isinstance(answer, ValueError):
                bad += 1
                screen.print(f"passed over: {answer}", markup=False)
                continue
            row = {"path": files[i], **answer}
            if json:
                print(dumps(row))
            else:
                _add(table, row)
            if out:
                lines.write(dumps(row) + "\n")
                drawn.append(pool.submit(_draw, answering.module, files[i], answer, drawings[i]))
                if len(drawn) > 2 * batch_size:  # it must not fall far behind
                    drawn.popleft().result()
        for future in drawn:
            future.result()
    if not json and table.row_count:
        # In a file or a pipe no line is broken.
        Console(width=None if sys.stdout.isatty() else 10_000).print(table)
    if bad:
        screen.print(f"{bad} of {len(files) + len(missing)} files could not be read.")
    return 1 if bad else 0


def _add(table: Table, row: dict[str, Any]) -> None:
    shown = {key: value for key, value in row.items() if not isinstance(value, dict | list)}
    if not table.columns:
        for key in shown:
            table.add_column(key, overflow="fold")
    table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in shown.values()))


def _drawings(files: list[str], root: str, out: str) -> list[str]:
    """Where the drawing of each file goes, which is never where an image of the user's is."""
    places = []
    for file in files:
        place = os.path.join(out, os.path.relpath(os.path.abspath(file), root))
        places.append(place if place.lower().endswith(EXTENSIONS) else f"{place}.png")
    if taken := {os.path.realpath(place) for place in places} & {os.path.realpath(file) for file in files}:
        raise ValueError(f"The drawing would replace {min(taken)}: choose another folder with --out.")
    return places


def _draw(module: VisionModule, file: str, answer: dict[str, Any], place: str) -> None:
    # The image is read again: to keep those of two batches would take gigabytes where they are photographs.
    drawing = Image.fromarray(module.draw_answer(read_image(file), answer))
    os.makedirs(os.path.dirname(place), exist_ok=True)
    drawing.save(place, quality=90)


def main(args: Sequence[str] | None = None) -> None:
    """The command; a mistake of the user's ends in one paragraph and exit code 2.

    Args:
        args: the command line; None takes the process's own.
    """
    parser = ArgumentParser(
        prog="python -m pipelines.predict", description="Prints what a registered model says about images."
    )
    parser.add_function_arguments(predict, as_positional=True, skip={"paths"})
    parser.add_argument("paths", nargs="+", help="files, folders, patterns")
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names of files need not be text
    try:
        sys.exit(predict(**vars(parser.parse_args(args))))
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # as after `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
