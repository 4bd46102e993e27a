"""Face recognition with a registered model: enrol, identify, verify, cluster."""

import glob
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from json import dumps
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from filelock import FileLock
from PIL import Image

from datamodules import DataError
from datamodules.checking import warn_of_two_names
from datamodules.digests import digest_of
from datamodules.images import EXTENSIONS, read_image
from datamodules.labelled.alignment import FaceDetector, FaceForm, faces_of
from modules import FaceNetModule
from modules.facenet.metrics import connected_people
from modules.pictures.sheets import sheet
from pipelines.engine.disk import write_image, write_text
from pipelines.engine.terminal import say, table
from pipelines.serving.embedding import embed
from pipelines.serving.files import check_new, pictures_in
from pipelines.serving.gallery import Gallery
from pipelines.serving.model import VisionModel
from pipelines.serving.registry import load_as, pinned

SHEET = 60  # pictures on a contact sheet at most


def _load(model: str, device: str) -> tuple[VisionModel, FaceNetModule]:
    return load_as(FaceNetModule, model, ", which embeds no faces.", device)


def _threshold(given: float | None, module: FaceNetModule) -> float:
    """Squared distance below which two faces belong to the same person."""
    threshold = module.threshold if given is None else given
    if threshold is None:
        raise ValueError(
            "The model has no calibrated threshold, since it was never validated: give one with --threshold."
        )
    if not 0 <= threshold <= 4:
        raise ValueError(f"--threshold is a squared distance between 0 and 4, not {threshold}.")
    return float(threshold)


def _matches(paths: Sequence[str]) -> list[str]:
    """Expands patterns to paths: only image files, and paths without a match unchanged."""
    result = []
    for path in paths:
        matches = [] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        kept = [match for match in matches if os.path.isdir(match) or match.lower().endswith(EXTENSIONS)]
        result += kept or [path]
    return result


def _warn(module: FaceNetModule, form: FaceForm | None, files: Sequence[str]) -> None:
    """Warns if pictures do not look like what a published face network was trained on, which makes its distances
    unreliable."""
    own = getattr(module.backbone, "form", None)
    if own in (None, form):
        return
    if form:
        say(
            f"The model's backbone was published for faces of --faces {own}, not {form}: unless you trained it on those, its "
            f"distances and threshold say little. Give --faces {own}."
        )
        return
    sizes = {}
    for file in files:
        with suppress(OSError, ValueError), Image.open(file) as picture:  # which reads no pixels
            sizes[file] = picture.size
    oblong = [file for file, (width, height) in sizes.items() if width != height]
    if oblong:
        width, height = sizes[oblong[0]]
        say(
            f"{len(oblong)} of {len(files)} pictures are not square and are compared as a whole, but the model's backbone was published "
            f"for faces that are cut out: if these are photographs, give --faces {own}. The first is {oblong[0]}, {width} × {height} "
            "pixels."
        )


def _embedded(
    answering: VisionModel, files: Sequence[str], form: FaceForm | None, device: str, every: bool = False
) -> tuple[list[str], Any, list[list[float] | None]]:
    """Detected faces, one row each: their files, embeddings (float32 N×D) and boxes.

    Args:
        answering: the model.
        files: the pictures.
        form: how faces are cut out of them; None takes whole pictures.
        device: where the detector runs.
        every: take all faces of a picture, not the foremost alone.

    Raises:
        ValueError: none can be read, or none has a face.
    """
    _warn(cast(FaceNetModule, answering.module), form, files)
    if form is None:
        found, embeddings = embed(answering, files)
        return found, embeddings, [None] * len(found)
    detector, rows = FaceDetector(device), list[tuple[str, list[float]]]()

    def cut() -> Iterator[Any]:
        for file in files:
            try:
                faces = faces_of(read_image(file), detector, form)
            except DataError as error:
                print(f"passed over: {error}", file=sys.stderr)
                continue
            if not faces:
                print(f"no face: {file}", file=sys.stderr)
            elif len(faces) > 1 and not every:
                print(f"{len(faces)} faces, of which the foremost is taken: {file}", file=sys.stderr)
            for face in faces if every else faces[:1]:
                rows.append((file, face.box))
                yield face.pixels

    answers: list[Any] = [*answering.stream(cut())]
    if not answers:
        raise ValueError("There is no face in any of the pictures.")
    embeddings = np.asarray([answer["embedding"] for answer in answers], np.float32)
    return [file for file, _ in rows], embeddings, [box for _, box in rows]


def enrol(
    model: str,
    gallery: str,
    paths: list[str],
    name: str | None = None,
    faces: FaceForm | None = None,
    device: str = "auto",
) -> str:
    """Adds pictures of known people to a gallery, which is created if necessary.

    Args:
        model: ``models:/name@alias`` or ``models:/name/version``.
        gallery: the file, such as people.parquet.
        paths: folders with a sub-folder for each person, or folders of pictures named after the person; patterns such as
            "people/*" are allowed. With --name, any pictures.
        name: name of the person in the pictures.
        faces: detect the main face of each picture and align it in this form, which must be that of the model's training
            pictures; needs the package facenet-pytorch. None uses whole pictures.
        device: where the model runs, such as ``cuda``; ``auto`` is the GPU if there is one.

    Raises:
        ValueError: the model, the gallery or the pictures cannot be used.
    """
    if name is not None and not name.strip():
        raise ValueError("--name is empty: say who is in the pictures.")
    model, (answering, _) = pinned(model), _load(model, device)
    who: dict[str, str] = {}
    for path in _matches(paths):
        if os.path.isfile(path) and name is None:
            raise ValueError(
                f"Who is in {path}? Say it with --name, or give a folder with a sub-folder for each person."
            )
        for file in pictures_in([path]):
            inner = Path(os.path.relpath(file, path)).parts
            person = name if name is not None else (inner[0] if len(inner) > 1 else Path(path).resolve().name)
            _check_one(file, who.setdefault(file, person), person)
    files, embeddings, _ = _embedded(answering, list(who), faces, device)
    people = [who[file] for file in files]
    files = [os.path.abspath(file) for file in files]
    Path(gallery).absolute().parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{gallery}.lock"):  # of two at once, each adds to what the other has
        if os.path.exists(gallery):
            old = Gallery.read(gallery)
            if old.model != model:
                raise ValueError(
                    f"{gallery} holds embeddings of {old.model}, with which those of {model} cannot be compared: enrol with "
                    "that model, or make a new gallery."
                )
            if old.form != faces:
                raise ValueError(
                    f"{gallery} holds embeddings of {_pictures(old.form)}, with which those of {_pictures(faces)} cannot be "
                    "compared: give the same --faces, or make a new gallery."
                )
            given = dict(zip(files, people, strict=True))
            for known, file in zip(old.people, old.files, strict=True):
                _check_one(file, known, given.get(file, known))
            fresh = set(zip(people, files, strict=True))
            keep = [i for i, row in enumerate(zip(old.people, old.files, strict=True)) if row not in fresh]
            people, files = [*(old.people[i] for i in keep), *people], [*(old.files[i] for i in keep), *files]
            embeddings = np.concatenate([old.embeddings[keep], embeddings])
        Gallery(model, people, files, embeddings, faces).write(gallery)
    digests = [digest_of(Path(file).read_bytes()) if os.path.isfile(file) else file for file in files]
    warn_of_two_names(*map(np.array, (files, digests, people)))
    several = len(set(people)) != 1
    return f"{gallery} holds {len(people)} pictures of {len(set(people))} {'people' if several else 'person'}."


def _pictures(form: FaceForm | None) -> str:
    return f"faces cut out as --faces {form}" if form else "whole pictures"


def _check_one(file: str, first: str, second: str) -> None:
    if first != second:
        raise ValueError(
            f"{file} is a picture of {first} and of {second}: enrol it for one of them, or cut both faces out."
        )


def identify(
    gallery: str, paths: list[str], threshold: float | None = None, json: bool = False, device: str = "auto"
) -> str:
    """Identifies the people in pictures; a face that matches nobody in the gallery is unknown.

    Where the gallery was made with --faces, all faces of each picture are found, and each has a row, the foremost first.

    Args:
        gallery: a file that enrol wrote.
        paths: files, folders, patterns.
        threshold: squared distance up to which a face matches the nearest person; None for the model's own.
        json: print one JSON object per picture instead of a table.
        device: where the model runs.

    Returns:
        A table: picture, the face's box in pixels (left, top, right, bottom) where faces are found, person, squared
        distance to the nearest picture, and whose that is.

    Raises:
        ValueError: the gallery or the pictures cannot be used.
    """
    known = Gallery.read(gallery)
    answering, module = _load(known.model, device)
    limit = _threshold(threshold, module)
    files, embeddings, boxes = _embedded(answering, pictures_in(paths), known.form, device, every=True)
    rows = [
        {
            "path": file,
            **({"box": box} if box else {}),
            "person": known.people[place] if distance <= limit else "unknown",
            "distance": round(float(distance), 4),
            "nearest": known.people[place],
        }
        for file, box, distance, place in zip(files, boxes, *known.search(embeddings), strict=True)
    ]
    return "\n".join(map(dumps, rows)) if json else table(rows)


def verify(
    model: str,
    first: str,
    second: str,
    threshold: float | None = None,
    faces: FaceForm | None = None,
    device: str = "auto",
) -> str:
    """Decides whether two pictures show the same person.

    Args:
        model: ``models:/name@alias`` or ``models:/name/version``.
        first: a picture.
        second: another picture.
        threshold: squared distance up to which two pictures match; None for the model's own.
        faces: detect and align the main face of each picture first, as for enrol; None uses whole pictures.
        device: where the model runs.

    Returns:
        The decision, with the squared distance.

    Raises:
        ValueError: the model or a picture cannot be used.
    """
    answering, module = _load(model, device)
    limit = _threshold(threshold, module)
    if faces is None:
        _warn(module, None, [first])
        pictures: Any = [Path(first), Path(second)]
        one, other = answering.predict(None, pictures)["embedding"]
    else:
        found, embeddings, _ = _embedded(answering, [first, second], faces, device)
        if lacking := [file for file in (first, second) if file not in found]:
            raise ValueError(f"There is no face in {' and none in '.join(lacking)}.")
        one, other = embeddings
    distance = float(np.square(np.subtract(one, other)).sum())
    answer = "one person" if distance <= limit else "two people"
    return f"{answer}: squared distance {distance:.4f}, threshold {limit:.4f}"


def cluster(
    model: str,
    paths: list[str],
    out: str = "people",
    method: Literal["agglomerative", "dbscan"] = "agglomerative",
    threshold: float | None = None,
    device: str = "auto",
) -> str:
    """Groups photographs by person: a folder of copies and a contact sheet for each, the most frequent first.

    Args:
        model: ``models:/name@alias`` or ``models:/name/version``.
        paths: files, folders, patterns.
        out: a new folder for the result; people with only one picture go to its sub-folder ``single``.
        method: ``agglomerative`` compares each picture with every other; ``dbscan`` also suits many thousands of
            pictures.
        threshold: squared distance up to which two pictures match; None for the model's own.
        device: where the model runs.

    Raises:
        ValueError: the model or the pictures cannot be used, or the folder is not empty.
    """
    check_new(out)
    answering, module = _load(model, device)
    limit = _threshold(threshold, module)
    found = pictures_in(paths, out)
    _warn(module, None, found)
    files, embeddings = embed(answering, found)
    if method == "agglomerative" and len(files) > 20_000:
        raise ValueError(f"{len(files)} pictures are too many to compare each with every other: --method dbscan.")
    numbers = connected_people(embeddings, limit, method)
    groups = [np.flatnonzero(numbers == n).tolist() for n in np.unique(numbers[numbers >= 0])]
    several = sorted((group for group in groups if len(group) > 1), key=len, reverse=True)
    alone = sorted(set(range(len(files))) - {i for group in several for i in group})
    width = len(str(len(several)))
    named = [(f"person_{n:0{width}d}", group) for n, group in enumerate(several, 1)] + [("single", alone)] * bool(alone)
    rows = []
    for name, group in named:
        folder = Path(out, name)
        folder.mkdir(parents=True)
        for i in group:
            target = folder / Path(files[i]).name
            copies = 1
            while target.exists():  # two cameras number alike
                copies += 1
                target = folder / f"{Path(files[i]).stem}-{copies}{Path(files[i]).suffix}"
            shutil.copy2(files[i], target)
            rows.append({"person": name, "path": files[i], "copy": str(target)})
        images = [answering.prepare(Path(files[i])) for i in group[:SHEET]]
        drawn = sheet(images, 6, [Path(files[i]).name for i in group[:SHEET]], side=112)
        write_image(Path(out, f"{name}.png"), drawn)
    write_text(Path(out, "clusters.jsonl"), "\n".join(map(dumps, rows)) + "\n")
    return f"{len(files)} pictures: {len(several)} people with several, {len(alone)} pictures alone. See {out}."
