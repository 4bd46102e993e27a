"""The web page of `pipelines.app`: uploads pictures and videos, shows drawn predictions and the pictures of the model's
run."""

import ipaddress
import json
import re
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, HTMLResponse
from mlflow.exceptions import MlflowException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect

from datamodules.videos import Video, is_video
from modules.answers import Answer
from pipelines.serving import video
from pipelines.serving.answers import drawn
from pipelines.serving.model import VisionModel
from pipelines.serving.subject import Subject
from pipelines.tracking.client import tracking_client

LARGEST = 2 << 30  # bytes of a file that is taken
LONG = 200  # characters of a text that is shown whole
SUFFIX = r"\.[A-Za-z0-9]{1,8}"  # that a file keeps
KEPT = 40  # drawings that can still be fetched
LOGGED = re.compile(
    r"images/(?P<name>.+)[+%]step[+%](?P<step>\d+)[+%]timestamp.*\.(png|jpe?g|webp)$"
)  # as MLflow names them


def shortened(answer: Any) -> str:
    """A prediction as indented JSON with embeddings, mask codes and pictures abbreviated.

    >>> print(shortened({"label": "cat", "embedding": [0.5] * 60}))
    {
     "label": "cat",
     "embedding": "[0.5, 0.5, 0.5, 0.5, …] (60 in all)"
    }
    """

    def short(value: Any) -> Any:
        if isinstance(value, str) and len(value) > LONG:
            return f"{value[:40]}… ({len(value)} characters)"
        if isinstance(value, list) and len(value) > LONG // 4 and not isinstance(value[0], dict):
            return f"[{', '.join(map(str, value[:4]))}, …] ({len(value)} in all)"
        if isinstance(value, dict):
            return {key: short(each) for key, each in value.items()}
        return [short(each) for each in value] if isinstance(value, list) else value

    return json.dumps(short(answer), indent=1, ensure_ascii=False)


@dataclass
class Asked:
    """A model on the page.

    Args:
        subject: a version of it.
        model: the same, loaded.
    """

    subject: Subject
    model: VisionModel
    _one: Lock = field(default_factory=Lock)

    def answer(self, file: Path, folder: Path) -> dict[str, str]:
        """Predicts a picture or video.

        Returns:
            ``answer``, JSON of what `predict` gives, or of a video one for each frame, in which long texts and lists are cut
            short; ``drawing``, the name of its file.

        Raises:
            ValueError: it cannot be read.
        """
        moves, module = is_video(str(file)), self.model.module
        drawing = folder / f"{uuid.uuid4().hex}{'.mp4' if moves else '.jpg'}"
        with self._one:  # a model answers one after the other
            if moves and self.model.preprocessing.frames is None:
                film, frames = Video(str(file)), list[Answer]()
                with video.Drawing(str(drawing), film.rate) as target:
                    for frame, answer in video.answered(self.model, film, video.BATCH, None):
                        seconds = film.seconds[len(frames)]
                        frames.append({"seconds": round(seconds, 3)} | answer)
                        target.write(module.answers.draw(frame, answer), seconds)
                return {"answer": shortened(frames), "drawing": drawing.name}
            said = next(iter(self.model.stream([file])))
            if isinstance(said, ValueError):
                raise said
            reading = self.model.preprocessing.reading
            drawn(module, str(file), said, str(drawing), drawing.with_suffix(".png"), reading)
            return {"answer": shortened(said), "drawing": drawing.name}

    def logged(self) -> dict[str, dict[int, str]]:
        """Paths of the pictures that the model's run logged, by name and step; empty if they are unavailable."""
        found: dict[str, dict[int, str]] = {}
        try:
            for file in tracking_client().list_artifacts(str(self.subject.version.run_id), "images"):
                if match := LOGGED.match(file.path):
                    name = re.sub(r"[~#]", "/", match["name"])
                    found.setdefault(name, {})[int(match["step"])] = file.path
        except (MlflowException, OSError, ValueError):
            return {}
        return {name: dict(sorted(found[name].items())) for name in sorted(found)}


@contextmanager
def page(models: Sequence[Asked], host: str = "127.0.0.1") -> Iterator[FastAPI]:
    """The web application; uploaded and predicted files are deleted when the context ends.

    Args:
        models: one, or two to be compared.
        host: where it is listened at. On an address of this machine alone, requests for other hosts are refused, so that
            no page of another can ask through a name that points here.
    """
    served = FastAPI(openapi_url=None)
    if host == "localhost" or (
        re.fullmatch(r"[\d.]+|[\da-fA-F:]+:[\d.:]*", host) and ipaddress.ip_address(host).is_loopback
    ):
        said = "[" if ":" in host else host  # what Starlette makes of [::1]:7860
        served.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", said])
    with TemporaryDirectory(prefix="fovea-page-") as name:
        folder, kept = Path(name), deque[Path]()

        def chosen(number: int) -> Asked:
            if not 0 <= number < len(models):
                raise HTTPException(404, f"There is no model {number} here.")
            return models[number]

        @served.get("/", response_class=HTMLResponse)
        def start() -> str:
            return Path(__file__).with_name("page.html").read_text()

        @served.get("/models")
        def listed() -> list[dict[str, Any]]:
            return [
                {"address": each.subject.address, "kind": type(each.model.module).__name__.removesuffix("Module")}
                for each in models
            ]

        @served.put("/answer/{number}")
        async def answer(number: int, name: str, request: Request) -> dict[str, Any]:
            model, suffix, size = chosen(number), Path(name).suffix, 0
            with TemporaryDirectory(dir=folder) as own:  # what is written beside the drawing goes with it
                file = Path(own, f"asked{suffix.lower() if re.fullmatch(SUFFIX, suffix) else ''}")
                try:
                    with file.open("wb") as target:
                        async for part in request.stream():
                            size += len(part)
                            if size > LARGEST:
                                raise HTTPException(413, f"{name} has more than {LARGEST >> 30} GB.")
                            target.write(part)
                    told = await run_in_threadpool(model.answer, file, Path(own))
                    Path(own, told["drawing"]).replace(folder / told["drawing"])
                except ClientDisconnect:
                    raise HTTPException(400, f"{name} has not come as a whole.") from None
                except ValueError as error:
                    raise HTTPException(422, str(error).replace(str(file), name)) from None
                except OSError as error:
                    raise HTTPException(500, f"{name} cannot be answered: {error}") from None
            kept.append(folder / told["drawing"])
            while len(kept) > KEPT:
                kept.popleft().unlink(missing_ok=True)
            return told

        @served.get("/drawings/{name}")
        def drawing(name: str) -> FileResponse:
            if not re.fullmatch(r"[0-9a-f]{32}\.(jpg|mp4)", name) or not (folder / name).is_file():
                raise HTTPException(404, "This drawing is no longer kept.")
            return FileResponse(folder / name)

        @served.get("/logged/{number}")
        def logged(number: int) -> dict[str, dict[int, str]]:
            return chosen(number).logged()

        @served.get("/logged/{number}/{path:path}")
        def picture(number: int, path: str) -> FileResponse:
            if not LOGGED.match(path) or ".." in path:
                raise HTTPException(404, "There is no such picture.")
            run = str(chosen(number).subject.version.run_id)
            try:
                return FileResponse(tracking_client().download_artifacts(run, path))
            except (MlflowException, OSError) as error:
                raise HTTPException(404, f"{path} cannot be had: {error}") from None

        yield served
