"""Predict with a registered model: ``python -m pipelines.predict models:/NAME@ALIAS FILES``."""

import os
import sys
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from datamodules.forms import AnswerFormat
from modules.ranges import Mirroring
from pipelines.engine.command import command
from pipelines.engine.terminal import say

if TYPE_CHECKING:
    from pipelines.serving.answers import Sink

LEAST_TILE = 32


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
    classes: list[str] | str | None = None,
    tile: int | None = None,
    save_crops: bool = False,
    support: str | None = None,
    tta: Mirroring = "none",
) -> int:
    """Prints a registered model's predictions for images and for each frame of videos, or for whole videos if the model
    was trained on clips.

    Args:
        model: ``models:/name@alias`` or ``models:/name/version``.
        paths: files, folders, patterns; tables (CSV, Parquet) of images, with a column ``path`` and one for each tabular input of the
            model; a camera by its number, such as ``0``, or a stream by its address, such as
            ``rtsp://HOST/PATH``, until Ctrl-C.
        out: folder for ``predictions.jsonl`` and a drawing of each prediction, in the images' sub-folders; for a video an
            ``.mp4``. For masks, also ``NAME.mask.png`` (class numbers, with a palette) and ``coco.json`` (RLE).
        json: print one JSON object per image or frame instead of a table.
        batch_size: number of images per batch.
        device: where the model runs, such as ``cuda``; ``auto`` is the GPU if there is one.
        track: track the objects in a video: each keeps its number, in ``ids``, from frame to frame.
        form: also write detections to ``out`` in another tool's format: ``coco`` (COCO results), ``yolo`` (text files) or
            ``mot`` (MOTChallenge).
        truth: a COCO annotation file, whose image and category ids are used in the results of ``coco``.
        threshold: minimum score of returned boxes; by default the one that was best in validation.
        nms: IoU above which the lower-scoring of two boxes of a class is suppressed; by default as in training.
        max_detections: maximum number of boxes per image, or per tile; by default as in training.
        across_classes: suppress overlapping boxes across classes, too.
        classes: return only boxes of these classes, such as ``car,bus``; a list if names contain commas.
        tile: split larger pictures into square tiles of this side, in pixels, with an overlap of a fifth, and merge the
            results, so that small objects are seen larger; 0 for whole pictures. By default as in training.
        save_crops: save the content of each box to ``crops/CLASS`` below ``out``.
        support: few-shot recognition of the classes in this folder, which has a sub-folder with a few pictures for each.
        tta: test-time augmentation: predictions are averaged over the picture and its mirror image (``flip``), and also over
            both upside down (``flips``).

    Returns:
        The exit code: 0; 1 if there were files that could not be read, which are named and skipped; 2 if nothing was
        found.

    Raises:
        ValueError: there is no such model or device, a drawing would replace an image, the answers have no such form, or
            there are no two classes in ``support``.
    """
    if batch_size < 1:
        raise ValueError(f"--batch_size must be at least 1, not {batch_size}.")
    if form and not out:
        raise ValueError(f"--form {form} writes files: say where with --out FOLDER.")
    if truth and form != "coco":
        raise ValueError("--truth goes with COCO's results: --form coco.")
    if tile is not None and tile != 0 and tile < LEAST_TILE:
        raise ValueError(f"--tile must be at least {LEAST_TILE} pixels, or 0 to leave pictures whole, not {tile}.")
    from pipelines.serving import registry

    if not os.path.exists(model):  # MLflow also accepts a folder
        registry.check(model)  # before the import of PyTorch, which takes seconds

    from datamodules import DataError
    from datamodules.errors import listed
    from datamodules.paths import SHARDS
    from datamodules.videos import Video, is_picture_address, is_stream, is_video, without_login
    from modules import DetectionModule
    from pipelines.serving import video
    from pipelines.serving.answers import FolderSink, Told, places, readable
    from pipelines.serving.embedding import taught
    from pipelines.serving.files import beside, find, is_table, rows_of

    bad: list[str] = []

    def tell(message: str) -> None:
        bad.append(message)
        say(message)

    if addresses := [without_login(path) for path in paths if is_picture_address(path)]:
        raise ValueError(
            f"{addresses[0]} is a picture, and addresses are opened as streams, which know no EXIF rotation and no 16 bits: "
            "download it, and give the file."
        )
    streams = dict.fromkeys(filter(is_stream, paths))
    tables = {path: rows_of(path) for path in paths if is_table(path)}
    named = [image for table in tables.values() for image in table.index]
    files, missing, root = find([*(path for path in paths if path not in {*streams, *tables}), *named], out)
    files, root = [*files, *streams], root or os.getcwd()
    for path in missing:
        tell(f"{path}: there is no such file or folder.")
    if not files:
        shards = any(path.lower().endswith(SHARDS) for path in paths)
        way = (
            " Those inside of tar and Parquet files are measured by pipelines.evaluate; unpack them to ask about each."
            if shards
            else ""
        )
        say(f"No images were found.{way}")
        return 2
    drawings = places(files, root, out) if out else {}
    answering = registry.load(model, device)
    columns = answering.preprocessing.columns
    rows = {os.path.abspath(file): row for table in tables.values() for file, row in beside(table, columns).items()}
    if support is not None:
        answering = taught(answering, model, support)
    module = answering.module
    module.views.choose(tta)
    classes = [name.strip() for name in classes.split(",")] if isinstance(classes, str) else classes
    choice = {"threshold": threshold, "nms": nms, "max_detections": max_detections, "across_classes": across_classes,
              "classes": classes}  # fmt: skip
    if given := [name for name, value in choice.items() if value is not None]:
        finder = getattr(module, "detection", module)  # of several tasks, the one
        if not isinstance(finder, DetectionModule):
            raise ValueError(f"--{given[0]} is about boxes, which a {type(module).__name__} does not find.")
        finder.choose(**choice)  # type: ignore[arg-type]
    if track and not isinstance(module, DetectionModule):
        raise ValueError(f"--track follows boxes, which a {type(module).__name__} does not find.")
    if tile is not None:
        if not isinstance(module, DetectionModule):
            raise ValueError(f"--tile is for detectors, whose boxes can be merged, and {model} is not one.")
        answering.take(module, replace(answering.preprocessing, tile=tile or None))
    whole = answering.preprocessing.frames is not None
    if whole and streams:
        raise ValueError(f"{model} answers for a clip as a whole, and a stream has no end: give files.")
    if whole and answering.preprocessing.image_size == 1:
        raise ValueError(
            f"{model} has learned from series of numbers: ask python -m pipelines.sequences extend {model}."
        )
    answering.check_pictures(model)
    if answering.asks_for and not rows:
        raise ValueError(
            f"{model} takes {listed(answering.asks_for)} with each image: instead of images, give a table with these columns and a column path."
        )
    if rows and (lacking := [name for name in answering.asks_for if not any(name in row for row in rows.values())]):
        raise ValueError(
            f"{listed(tables)} has no column {listed(lacking)}, which {model} takes with each image: add it."
        )
    images = [file for file in files if whole or not is_video(file)]
    if form and not isinstance(module, DetectionModule):
        raise ValueError(f"--form {form} is for the answers of detectors, and {model} is not one.")
    if save_crops and not (out and isinstance(module, DetectionModule)):
        raise ValueError("--save_crops is for what detectors find: give one, and say where with --out FOLDER.")
    if form == "coco" and len(images) < len(files):
        raise ValueError("--form coco is for images, and there are videos: choose yolo or mot.")
    if save_crops and len(images) < len(files):
        raise ValueError(
            "--save_crops is for images, and there are videos: name the images alone, as in 'FOLDER/*.jpg'."
        )
    with ExitStack() as stack:
        sinks: list[Sink] = [stack.enter_context(Told(json))]
        progress = stack.enter_context(_bars(json))
        if out:
            reading = answering.preprocessing.reading
            folder = FolderSink(out, module, drawings, root, form, truth, save_crops, 2 * batch_size, tell, reading)
            sinks.append(stack.enter_context(folder))
        bar = progress.add_task("images", total=len(images), visible=bool(images))
        asked = (rows.get(os.path.abspath(file), {}) | {"image": Path(file)} for file in images)
        answers = answering.stream(asked, batch_size, lambda done: progress.update(bar, completed=done))
        for file, answer in readable(images, answers, tell):
            for sink in sinks:
                sink.add({"path": file}, answer)
        for file in () if whole else filter(is_video, files):
            try:
                film = Video(file)
            except DataError as error:
                tell(f"passed over: {error}")
                continue
            bar = progress.add_task(f"frames of {os.path.basename(film.name)}", total=film.length or None)
            if film.live and file != files[-1]:
                say(f"{film.name} is answered until it ends or Ctrl-C is pressed, and what comes after it only then.")
            try:
                with (
                    video.Drawing(drawings[file][0], film.rate) if out else nullcontext() as drawing,
                    video.Tracker(module, film.rate) if track else nullcontext() as tracker,
                ):
                    for number, (frame, answer) in enumerate(video.answered(answering, film, batch_size, tracker)):
                        progress.advance(bar)
                        for sink in sinks:
                            sink.add(
                                {"path": film.name, "frame": number, "seconds": round(film.seconds[number], 3)}, answer
                            )
                        if drawing:
                            drawing.write(module.answers.draw(frame, answer), film.seconds[number])
            except KeyboardInterrupt:
                if not film.live:
                    raise
            if film.live:
                dropped = (
                    f"; {film.dropped} more came while others were processed, and were dropped" if film.dropped else ""
                )
                say(f"{film.name}: ended after {len(film.seconds)} frames{dropped}.")
            if film.cut_off:
                tell(film.cut_off)
    if bad:
        say(f"{len(bad)} of {len(files) + len(missing)} files could not be read.")
    return 1 if bad else 0


def _bars(json: bool) -> Progress:
    """Progress bars; disabled if the JSON lines go to the same terminal."""
    screen = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    quiet = not screen.is_terminal or (json and sys.stdout.isatty())
    return Progress(*columns, console=screen, disable=quiet, transient=True, redirect_stdout=False)


if __name__ == "__main__":
    command(predict)
