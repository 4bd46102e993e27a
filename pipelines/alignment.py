"""Faces in photographs: cut out and aligned, or their landmarks in a table."""

import os
import sys
from collections.abc import Iterator, Sequence
from json import dumps
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from datamodules import DataError
from datamodules.images import EXTENSIONS, WRITTEN, read_image
from datamodules.labelled.alignment import POINTS, FaceDetector, FaceForm, faces_of
from datamodules.options import point_columns
from datamodules.splits import split_of
from pipelines.engine.disk import write_image, write_text
from pipelines.serving.files import check_new, pictures_in


def align(
    folder: str, out: str = "aligned", form: FaceForm = "arcface", size: int | None = None, device: str = "auto"
) -> str:
    """Crops and aligns the face in each photograph, so that eyes, nose and mouth are always at the same place.

    The pictures keep their names and sub-folders, so that those of people stay as they are. Of several faces the largest and
    most central one is taken; where no face is upright, the picture is turned. What came of each picture is in ``alignment.jsonl``. It needs the package
    facenet-pytorch.

    Args:
        folder: the photographs, in any sub-folders.
        out: a new folder for the aligned ones.
        form: alignment: ``arcface`` and ``dlib`` move eyes, nose and mouth to the positions that these networks were trained
            with; ``facenet`` crops the box around the face.
        size: side of the square output pictures, in pixels; None for the form's own, 112, 150 or 160.
        device: where the detector runs, such as ``cuda``; ``auto`` is the GPU if there is one.

    Raises:
        ValueError: the package is missing, there are no pictures or no faces, or the new folder is not empty.
    """
    check_new(out)
    if size is not None and size < 16:
        raise ValueError(f"--size must be at least 16 pixels, not {size}.")
    files = _photographs(folder, out)
    detector = FaceDetector(device)
    rows: list[dict[str, Any]] = []
    for file, image in _opened(files, "align"):
        rows.append({"path": file, "aligned": None, "form": form})
        if isinstance(image, DataError):
            rows[-1]["error"] = str(image)
            continue
        faces = faces_of(image, detector, form, size)
        rows[-1]["faces"] = len(faces)
        if not faces:
            print(f"no face: {file}", file=sys.stderr)
            continue
        face = faces[0].pixels
        target = Path(out, os.path.relpath(file, folder))
        if target.suffix.lower() not in WRITTEN:
            target = target.with_name(f"{target.name}.png")
        grey = (face == face[..., :1]).all()
        write_image(target, face[..., :1] if grey else face, quality=95, subsampling=0)
        rows[-1]["aligned"] = str(target)
    counts = [row.get("faces") for row in rows]
    if not any(counts):
        raise ValueError(f"There is no face in any of the {len(files)} pictures in {folder}.")
    write_text(Path(out, "alignment.jsonl"), "\n".join(map(dumps, rows)) + "\n")
    several = sum(count > 1 for count in counts if count)
    return (
        f"{len(files)} pictures: {sum(map(bool, counts))} faces are in {out}, {several} of them the foremost of several. "
        f"Without a face: {counts.count(0)}. Not readable: {counts.count(None)}."
    )


def landmarks(folder: str, out: str = "landmarks.csv", device: str = "auto") -> str:
    """Finds eyes, nose and mouth of the face in each picture, and writes a table for ``--data Manifest`` with ``--data.keypoints``.

    The table has a row for each picture with a face: ``path``, relative to the table; ``label``, the folder that the picture is in;
    ``split``, if the first folder is one of ``train``, ``val`` and ``test`` in any usual spelling; and x and y of the five
    landmarks in pixels, left and right as seen in the picture. Of several faces, the largest and most central one is taken. This
    needs the package facenet-pytorch.

    Args:
        folder: the pictures, with a sub-folder for each person or class.
        out: the table, in CSV.
        device: where the detector runs, such as ``cuda``; ``auto`` is the GPU if there is one.

    Raises:
        ValueError: the package is missing, or there are no pictures or no faces.
    """
    files = _photographs(folder)
    detector, rows, without = FaceDetector(device), list[dict[str, Any]](), 0
    for file, image in _opened(files, "landmarks"):
        if isinstance(image, DataError):
            continue
        found = detector.points(image)
        if not len(found):
            print(f"no face: {file}", file=sys.stderr)
            without += 1
            continue
        row = {"path": os.path.relpath(file, Path(out).parent), "label": Path(file).resolve().parent.name}
        if split := split_of(Path(os.path.relpath(file, folder)).parts[0]):
            row["split"] = split
        rows.append(row | dict(zip(point_columns(POINTS), found[0].round(2).ravel().tolist(), strict=True)))
    if not rows:
        raise ValueError(f"There is no face in any of the {len(files)} pictures in {folder}.")
    write_text(Path(out), pd.DataFrame(rows).to_csv(index=False))
    return f"{len(files)} pictures: the points of {len(rows)} faces are in {out}. Without a face: {without}. Not readable: {len(files) - len(rows) - without}."


def _photographs(folder: str, without: str | None = None) -> list[str]:
    """The pictures below a folder."""
    if not os.path.isdir(folder):
        raise ValueError(f"There is no folder {os.path.abspath(folder)}.")
    return [file for file in pictures_in([folder], without) if file.lower().endswith(EXTENSIONS)]


def _opened(files: Sequence[str], title: str) -> Iterator[tuple[str, NDArray[np.uint8] | DataError]]:
    """Yields each file with its picture, uint8 H×W×3, or with why it is passed over, which is said; shows the progress."""
    screen = Console(stderr=True)
    for file in track(files, title, console=screen, transient=True, disable=not screen.is_terminal):
        try:
            yield file, read_image(file)
        except DataError as error:
            print(f"passed over: {error}", file=sys.stderr)
            yield file, error
