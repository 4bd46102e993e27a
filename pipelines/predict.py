"""Predict with a registered model: ``python -m pipelines.predict models:/NAME@ALIAS FILES``."""

import os
import sys
from collections import Counter, deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from json import dumps
from pathlib import Path
from typing import Any, TextIO

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from datamodules import DataError
from datamodules.images import WRITTEN, read_image
from datamodules.writers import AnswerFormat, AnswerWriter
from modules import DetectionModule, VisionModule
from pipelines.engine.command import command
from pipelines.engine.terminal import table
from pipelines.serving import video
from pipelines.serving.files import find
from pipelines.serving.registry import load


def predict(
    model: str,
    paths: list[str],
    out: str | None = None,
    json: bool = False,
    batch_size: int = 64,
    device: str = "auto",
    track: bool = False,
    form: AnswerFormat | None = None,
    truth: str | None = None,
    threshold: float | None = None,
    nms: float | None = None,
    max_detections: int | None = None,
    across_classes: bool | None = None,
) -> int:
    """Prints what a registered model says about images, and about each frame of videos.

    Args:
        model: ``models:/name@alias`` or ``models:/name/version``.
        paths: files, folders, patterns.
        out: folder for ``predictions.jsonl`` and, with the sub-folders that the images are in, a drawing of each answer;
            of a video an ``.mp4``. Where the answers have masks, also ``NAME.mask.png`` (numbers of classes, with a palette)
            and ``coco.json`` (run-length codes).
        json: print a line of JSON for each image or frame instead of a table.
        batch_size: images that go through the network together.
        device: where the model runs, such as ``cuda``; ``auto`` is the GPU if there is one.
        track: give the objects in a video numbers, ``ids``, that they keep from frame to frame.
        form: write a detector's answers into ``out`` for other tools too: ``coco``, results of COCO's; ``yolo``, text files;
            ``mot``, the MOTChallenge's.
        truth: an annotation file in COCO's format, whose ids of images and categories the results of ``coco`` take.
        threshold: least score of boxes that are told; by default the one that was best in validation.
        nms: overlap (IoU) from which of two boxes of a class the less certain is dropped; by default as in training.
        max_detections: boxes of an image, or of a piece of one, that are told at most; by default as in training.
        across_classes: drop the less certain box where the two are of different classes too.

    Returns:
        The exit code: 0; 1 if there were files that could not be read, which are named and passed over; 2 if nothing was
        found.

    Raises:
        ValueError: there is no such model or device, a drawing would replace an image, or the answers have no such form.
    """
    if batch_size < 1:
        raise ValueError(f"--batch_size is at least 1, not {batch_size}.")
    if form and not out:
        raise ValueError(f"--form {form} writes files: say where with --out FOLDER.")
    if truth and form != "coco":
        raise ValueError("--truth is for results of COCO's: --form coco.")
    screen = Console(stderr=True, highlight=False, soft_wrap=True)
    files, missing, root = find(paths, out)
    bad = len(missing)
    for path in missing:
        screen.print(f"{path}: there is no such file or folder.", markup=False)
    if not files:
        screen.print("No images were found.")
        return 2
    drawings = _drawings(files, root, out) if out else []
    answering = load(model, device)
    choice = {"threshold": threshold, "nms": nms, "max_detections": max_detections, "across_classes": across_classes}
    if given := [name for name, value in choice.items() if value is not None]:
        if not isinstance(answering.module, DetectionModule):
            raise ValueError(f"--{given[0]} is about boxes, which a {type(answering.module).__name__} does not find.")
        answering.module.choose(**choice)  # type: ignore[arg-type]
    rows: list[dict[str, str]] = []
    images = [i for i, file in enumerate(files) if not _is_video(file)]
    coco = COCOFile(answering.module)
    if form and not isinstance(answering.module, DetectionModule):
        raise ValueError(f"--form {form} is for what detectors answer, and {model} is none.")
    if form == "coco" and len(images) < len(files):
        raise ValueError("--form coco is for images, and there are videos: choose yolo or mot.")
    # A bar on the terminal that the JSON lines go to would mix with them.
    quiet = not screen.is_terminal or (json and sys.stdout.isatty())
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with ExitStack() as stack:
        progress = stack.enter_context(
            Progress(*columns, console=screen, disable=quiet, transient=True, redirect_stdout=False)
        )
        lines: TextIO | None = None
        if out:
            os.makedirs(out, exist_ok=True)
            lines = stack.enter_context(open(os.path.join(out, "predictions.jsonl"), "w"))
        writer: AnswerWriter | None = None
        if out and form:
            names = answering.module.label_names
            writer = stack.enter_context(AnswerWriter(out, form, names, truth))
        pool = stack.enter_context(ThreadPoolExecutor())
        stack.callback(pool.shutdown, cancel_futures=True)

        def tell(row: dict[str, Any]) -> None:
            if writer:
                writer.add(os.path.relpath(os.path.abspath(row["path"]), root), row, row.get("frame"))
            if json:
                print(dumps(row))
            else:
                rows.append(_shown(row))
            if lines:
                lines.write(dumps(row) + "\n")

        def drew(file: str, future: Future[None]) -> bool:
            try:
                future.result()
            except OSError:  # nothing more can be written
                raise
            except Exception as error:
                screen.print(f"{file} was answered, but could not be drawn: {error!r}", markup=False)
                return False
            return True

        bar = progress.add_task("images", total=len(images), visible=bool(images))
        drawn: deque[tuple[str, Future[None]]] = deque()
        answers = answering.stream(
            (Path(files[i]) for i in images), batch_size, lambda done: progress.update(bar, completed=done)
        )
        for done, (i, answer) in enumerate(zip(images, answers, strict=True), 1):
            progress.update(bar, completed=done)
            if isinstance(answer, ValueError):
                bad += 1
                screen.print(f"passed over: {answer}", markup=False)
                continue
            tell({"path": files[i], **answer})
            if out:
                coco.add(os.path.relpath(os.path.abspath(files[i]), os.path.realpath(out)), answer)
                drawn.append((files[i], pool.submit(_draw, answering.module, files[i], answer, *drawings[i])))
                if len(drawn) > 2 * batch_size:  # it must not fall far behind
                    bad += not drew(*drawn.popleft())
        bad += sum(not drew(*each) for each in drawn)
        for i in sorted(set(range(len(files))) - set(images)):
            try:
                film = video.Video(files[i])
            except DataError as error:
                bad += 1
                screen.print(f"passed over: {error}", markup=False)
                continue
            bar = progress.add_task(f"frames of {os.path.basename(files[i])}", total=film.length or None)
            drawing = video.Drawing(drawings[i][0], film.rate) if out else None
            with video.Tracker(answering.module, film.rate) if track else nullcontext() as tracker:
                for number, (frame, answer) in enumerate(video.answered(answering, film, batch_size, tracker)):
                    progress.advance(bar)
                    tell({"path": files[i], "frame": number, "seconds": round(film.seconds[number], 3), **answer})
                    if drawing:
                        drawing.write(answering.module.draw_answer(frame, answer), film.seconds[number])
            if drawing:
                drawing.close()
            if film.cut_off:
                bad += 1
                screen.print(film.cut_off, markup=False)
    if out and coco.content["categories"] and images:
        Path(out, "coco.json").write_text(dumps(coco.content))
    if rows:
        print(table(rows))
    if bad:
        screen.print(f"{bad} of {len(files) + len(missing)} files could not be read.")
    return 1 if bad else 0


def _is_video(file: str) -> bool:
    return file.lower().endswith(video.EXTENSIONS)


def _shown(row: dict[str, Any]) -> dict[str, str]:
    """What a table shows of an answer: its numbers and texts, and how many there are of each name in a list."""
    cells = {}
    for key, value in row.items():
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            cells[key] = ", ".join(f"{name} ×{count}" if count > 1 else name for name, count in Counter(value).items())
        elif not isinstance(value, dict | list):
            cells[key] = f"{value:.3f}" if isinstance(value, float) else str(value)
    return cells


def _drawings(files: list[str], root: str, out: str) -> list[tuple[str, Path]]:
    """Where the drawing of each file goes, which is never where an image of the user's is, and what stands for the file's
    name where something is written beside it: its stem, or if others have that too, all of it."""
    names = [os.path.join(out, os.path.relpath(os.path.abspath(file), root)) for file in files]
    taken = Counter(start for name in names for start in _starts(name))
    places = []
    for file, name in zip(files, names, strict=True):
        stem, end = os.path.splitext(name)
        stem = name if taken[stem.casefold()] > 1 else stem
        if _is_video(file):
            place = f"{stem}.mp4" if stem == name and end.lower() != ".mp4" else f"{os.path.splitext(name)[0]}.mp4"
        else:
            place = name if end.lower() in WRITTEN else f"{name}.png"
        places.append((place, Path(f"{stem}.png")))
    originals = {os.path.realpath(file) for file in files}
    if replaced := {os.path.realpath(place) for place, _ in places} & originals:
        raise ValueError(f"The drawing would replace {min(replaced)}: choose another folder with --out.")
    return places


def _starts(name: str) -> Iterable[str]:
    """What a file's name begins with, up to each of its dots, in small letters."""
    folder, base = os.path.split(name.casefold())
    parts = base.split(".")
    return (os.path.join(folder, ".".join(parts[:k])) for k in range(1, len(parts)))


def _draw(module: VisionModule, file: str, answer: dict[str, Any], place: str, beside: Path) -> None:
    # The image is read again: to keep those of two batches would take gigabytes where they are photographs.
    drawing = Image.fromarray(module.draw_answer(read_image(file), answer))
    os.makedirs(os.path.dirname(place), exist_ok=True)
    drawing.save(place, quality=90)
    module.write_answer(answer, beside)


class COCOFile:
    """Answers as a file in COCO's format, where the module has such annotations.

    Args:
        module: whose answers they are.
    """

    def __init__(self, module: VisionModule) -> None:
        self.module = module
        categories = [{"id": k, "name": name} for k, name in module.categories().items()]
        self.content: dict[str, Any] = {
            "info": {}, "licenses": [], "images": [], "annotations": [], "categories": categories
        }  # fmt: skip

    def add(self, file: str, answer: dict[str, Any]) -> None:
        """Adds the answer for an image, whose file is named as it is found from where the annotations are."""
        images, found = self.content["images"], self.content["annotations"]
        size = dict(zip(("height", "width"), answer.get("size", ()), strict=False))
        images.append({"id": len(images) + 1, "file_name": file, **size})
        for one in self.module.annotations(answer):
            found.append({"id": len(found) + 1, "image_id": len(images), **one})


if __name__ == "__main__":
    command(predict)
