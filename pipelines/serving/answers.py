"""Output of predictions: terminal, folders, drawings, other tools' formats, and merging of tiles."""

import math
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import groupby
from json import dumps
from pathlib import Path
from typing import Any, Protocol, TypeVar

from typing_extensions import override

from datamodules.annotated.writers import AnswerWriter
from datamodules.forms import AnswerFormat
from datamodules.images import WRITTEN, read_image
from datamodules.options import RGB, Reading
from datamodules.videos import Video, is_stream, is_video, without_login
from modules import VisionModule
from modules.answers import Answer
from modules.detection.tiles import joined
from modules.pictures.sheets import as_rgb
from pipelines.engine.disk import held, write_image, write_text
from pipelines.engine.terminal import say, table
from pipelines.serving import video

ROWS = 100_000  # of a table: a camera has no end

T = TypeVar("T")


def readable(
    files: Sequence[str], answers: Iterable[T | ValueError], tell: Callable[[str], object]
) -> Iterator[tuple[str, T]]:
    """Yields the readable files with their predictions; unreadable ones are reported and skipped."""
    for file, answer in zip(files, answers, strict=True):
        if isinstance(answer, ValueError):
            tell(f"passed over: {answer}")
        else:
            yield file, answer


class Sink(Protocol):
    """Base class of outputs for the predictions of images and video frames."""

    def add(self, where: Answer, answer: Answer) -> None:
        """Takes a prediction.

        Args:
            where: ``path``; of a video also ``frame``, its number, and ``seconds``.
            answer: as the module gives it.
        """


class Told:
    """Prints predictions to stdout: as JSON lines at once, or as one table at the end, of the last `ROWS` if there are
    more.

    Args:
        json: the former.
    """

    def __init__(self, json: bool) -> None:
        self.json = json
        self._rows: deque[dict[str, str]] = deque(maxlen=ROWS)
        self._left_out = 0

    def __enter__(self) -> "Told":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._rows:
            told = {name for row in self._rows for name, cell in row.items() if cell}
            print(table([{name: cell for name, cell in row.items() if name in told} for row in self._rows]))
            if self._left_out:
                say(f"There were {self._left_out} answers before these; --out or --json true has them all.")

    def add(self, where: Answer, answer: Answer) -> None:
        """Takes a prediction; see `Sink.add`."""
        if self.json:
            print(dumps(where | answer), flush=True)
        else:
            self._left_out += len(self._rows) == ROWS
            self._rows.append(_shown(where) | (_shown(answer) or _inner(answer) or _lengths(answer)))


def _shown(row: Answer) -> dict[str, str]:
    """Table cells of a prediction: its numbers and texts, for lists the count of each name, of a picture its size."""
    cells = {}
    for key, value in row.items():
        if isinstance(value, str) and value.startswith("data:"):
            cells[key] = f"a picture of {len(value) * 3 // 4000} kB, saved with --out"
        elif isinstance(value, list) and all(isinstance(item, str) for item in value):
            cells[key] = ", ".join(f"{name} ×{count}" if count > 1 else name for name, count in Counter(value).items())
        elif not isinstance(value, dict | list):
            cells[key] = f"{value:.3f}" if isinstance(value, float) else str(value)
    return cells


def _inner(answer: Answer) -> dict[str, str]:
    """Table cells of nested predictions: numbers by name, such as quantities; for several tasks, the cells of each."""
    cells: dict[str, str] = {}
    for key, value in answer.items():
        if isinstance(value, dict) and all(isinstance(each, int | float) for each in value.values()):
            cells |= {name: f"{each:.6g}" for name, each in value.items()}
        elif isinstance(value, dict):
            cells |= {f"{key}: {name}": cell for name, cell in _shown(value).items() if cell}
    return cells


def _lengths(answer: Answer) -> dict[str, str]:
    """Table cells of a prediction that is too long for one, such as an embedding."""
    lists = {key: value for key, value in answer.items() if isinstance(value, list)}
    return {key: f"{len(value)} numbers, told with --json true" for key, value in lists.items()}


class FolderSink(ExitStack):
    """Saves predictions in a folder: ``predictions.jsonl``, a drawing of each image, ``coco.json`` if there are masks.

    Args:
        out: the folder.
        module: whose answers they are.
        places: where drawings go; see `places`.
        root: the folder that all files have in common.
        form: a format of another tool in which the answers are written too.
        truth: see `AnswerWriter`.
        crops: whether what is in boxes is written too, into ``crops/CLASS``.
        ahead: answers that may wait to be drawn.
        tell: takes what is to be told of drawings that fail.
        reading: how images are read; in colour, where they are seen in grey.
    """

    def __init__(
        self,
        out: str,
        module: VisionModule,
        places: dict[str, tuple[str, Path]],
        root: str,
        form: AnswerFormat | None,
        truth: str | None,
        crops: bool,
        ahead: int,
        tell: Callable[[str], object],
        reading: Reading = RGB,
    ) -> None:
        super().__init__()
        self.reading = RGB if reading.seen else reading
        self.out, self.module, self.places, self.root = out, module, places, root
        self.form, self.truth, self.crops, self.ahead, self.tell = form, truth, crops, ahead, tell
        self._coco = COCOFile(module)
        self._drawn: deque[tuple[str, Future[None]]] = deque()

    @override
    def __enter__(self) -> "FolderSink":
        self.enter_context(held(Path(self.out)))
        self._lines = self.enter_context(open(os.path.join(self.out, "predictions.jsonl"), "w", buffering=1))
        self._writer: AnswerWriter | None = None
        if self.form:
            names: Any = self.module.label_names
            self._writer = self.enter_context(AnswerWriter(self.out, self.form, names, self.truth))
        if self.crops:
            self._remove_crops()
        self._pool = ThreadPoolExecutor()
        self.callback(self._pool.shutdown, cancel_futures=True)
        return self

    @override
    def __exit__(self, kind: type[BaseException] | None, *more: Any) -> None:
        try:
            while self._drawn and kind is None:
                self._see()
            content = self._coco.content
            if kind is None and content["categories"] and content["images"]:
                write_text(Path(self.out, "coco.json"), dumps(content))
        finally:
            super().__exit__(kind, *more)

    def add(self, where: Answer, answer: Answer) -> None:
        """Takes a prediction; see `Sink.add`."""
        file, row = where["path"], where | answer
        if self._writer:
            self._writer.add(_below(file, self.root), row, where.get("frame"))
        self._lines.write(dumps(row) + "\n")
        if "frame" not in where:
            crops = Path(self.out) if self.crops else None
            self._coco.add(os.path.relpath(os.path.abspath(file), os.path.realpath(self.out)), answer)
            drawing = self._pool.submit(drawn, self.module, file, answer, *self.places[file], self.reading, crops)
            self._drawn.append((file, drawing))
            if len(self._drawn) > self.ahead:
                self._see()

    def _remove_crops(self) -> None:
        """Deletes the crops that an earlier command saved of these images, since there may be fewer now."""
        names = {_crop_name(beside, self.out) for _, beside in self.places.values()}
        for crop in Path(self.out, "crops").glob("*/*.png"):
            if crop.stem.rpartition("-")[0] in names and crop.stem.rpartition("-")[2].isdigit():
                crop.unlink()

    def _see(self) -> None:
        """Waits for the oldest drawing."""
        file, drawing = self._drawn.popleft()
        try:
            drawing.result()
        except OSError:  # nothing more can be written
            raise
        except Exception as error:
            self.tell(f"{file} was answered, but could not be drawn: {error!r}")


def places(files: Sequence[str], root: str, out: str) -> dict[str, tuple[str, Path]]:
    """Path of each file's drawing, which never overwrites one of the user's images, and the name used for files beside
    it: the stem or, if stems clash, the whole name.

    Raises:
        ValueError: a drawing would replace one of the files.
    """
    names = [os.path.join(out, _below(file, root)) for file in files]
    taken = Counter(start for name in names for start in _starts(name))
    found = {}
    for file, name in zip(files, names, strict=True):
        stem, end = os.path.splitext(name)
        stem = name if taken[stem.casefold()] > 1 else stem
        if is_video(file):
            place = f"{stem}.mp4" if stem == name and end.lower() != ".mp4" else f"{os.path.splitext(name)[0]}.mp4"
        else:
            place = name if end.lower() in WRITTEN else f"{name}.png"
        found[file] = place, Path(f"{stem}.png")
    originals = {os.path.realpath(file) for file in files}
    if replaced := {os.path.realpath(place) for place, _ in found.values()} & originals:
        raise ValueError(f"The drawing would replace {min(replaced)}: choose another folder with --out.")
    return found


def _below(file: str, root: str) -> str:
    """Path of a file as seen from a folder above it; of a stream, a file-name stem."""
    if not is_stream(file):
        return os.path.relpath(os.path.abspath(file), root)
    return f"camera-{file}" if file.isdecimal() else re.sub(r"[^\w-]+", "-", without_login(file))


def _starts(name: str) -> Iterable[str]:
    """The beginnings of a file name up to each dot, in lower case."""
    folder, base = os.path.split(name.casefold())
    parts = base.split(".")
    return (os.path.join(folder, ".".join(parts[:k])) for k in range(1, len(parts)))


def drawn(
    module: VisionModule,
    file: str,
    answer: Answer,
    place: str,
    beside: Path,
    reading: Reading = RGB,
    crops: Path | None = None,
) -> None:
    """Draws the prediction for a picture, or for a video as a whole.

    Args:
        module: whose answer it is.
        file: the picture or video.
        answer: what the module says.
        place: the drawing's file.
        beside: what the names of further pictures begin with, with any suffix.
        reading: how the picture is read; in colour, where it is seen in grey.
        crops: folder for what is in each box.
    """
    if is_video(file):
        film = Video(file)
        with video.Drawing(place, film.rate) as drawing:
            for frame in film:
                drawing.write(module.answers.draw(frame, answer), film.seconds[-1])
        return
    # Read again: the pictures of two batches would take gigabytes where they are photographs.
    image = as_rgb(read_image(file, RGB if reading.seen else reading))
    write_image(place, module.answers.draw(image, answer), quality=90)
    for suffix, picture in module.answers.pictures(answer).items():
        write_image(beside.with_suffix(suffix), picture)
    if crops is not None:
        stem = _crop_name(beside, crops)
        for k, (label, box) in enumerate(zip(answer["labels"], answer["boxes"], strict=True)):
            left, top = (max(0, int(value)) for value in box[:2])
            part = image[top : max(top + 1, math.ceil(box[3])), left : max(left + 1, math.ceil(box[2]))]
            if part.size:
                write_image(crops / "crops" / label.replace("/", "-") / f"{stem}-{k + 1}.png", part)


def _crop_name(beside: Path, out: str | Path) -> str:
    """File-name prefix of an image's crops."""
    return "-".join(beside.relative_to(out).with_suffix("").parts)


class COCOFile:
    """Saves predictions in COCO format, if the module supports it.

    Args:
        module: whose answers they are.
    """

    def __init__(self, module: VisionModule) -> None:
        self.module = module
        categories = [{"id": k, "name": name} for k, name in module.answers.categories().items()]
        self.content: dict[str, Any] = {
            "info": {}, "licenses": [], "images": [], "annotations": [], "categories": categories
        }  # fmt: skip

    def add(self, file: str, answer: Answer) -> None:
        """Adds the prediction for an image; its path is relative to the annotation file."""
        images, found = self.content["images"], self.content["annotations"]
        size = dict(zip(("height", "width"), answer.get("size", ()), strict=False))
        images.append({"id": len(images) + 1, "file_name": file, **size})
        for one in self.module.answers.annotations(answer):
            found.append({"id": len(found) + 1, "image_id": len(images), **one})


def whole_pictures(rows: Sequence[tuple[int, Answer]], source: Any, across_classes: bool = False) -> list[Answer]:
    """Predictions in the pixels of the original picture, with its path if it is a file.

    Args:
        rows: a sample's number and the answer for it, in the order of the numbers; samples may lack.
        source: the samples. Those of one with ``tile`` are pieces, and their boxes are joined; those of one with ``window``
            are windows of class maps.
        across_classes: see `modules.detection.tiles.joined`.
    """
    paths = getattr(source, "paths", None)
    answers: list[Answer] = [({} if paths is None else {"path": str(paths[k])}) | answer for k, answer in rows]
    if getattr(source, "tile", None):
        places, sizes = source.places.tolist(), source.sizes.tolist()
        pieces = [(*places[k], answer) for (k, _), answer in zip(rows, answers, strict=True)]
        return [
            joined(
                [((x, y), answer) for _, x, y, answer in parts],
                sizes[picture][0],
                sizes[picture][1],
                source.tile,
                across_classes,
            )
            for picture, parts in ((key, list(group)) for key, group in groupby(pieces, key=lambda piece: piece[0]))
        ]
    if getattr(source, "window", None):
        for (k, _), answer in zip(rows, answers, strict=True):
            _, left, top = source.places[k].tolist()
            answer["window"] = [left, top, *answer["size"][::-1]]
    return answers
