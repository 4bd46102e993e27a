"""Prediction with a registered model. MLflow stores this file with the model and runs it to load the model."""

import base64
import binascii
import importlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any, cast

import mlflow
import numpy as np
import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel
from numpy.typing import NDArray
from PIL import Image

from datamodules.augmentations import reduction as reduced_by
from datamodules.bands import scaled, taken
from datamodules.errors import DataError, listed
from datamodules.images import Reduction, as_seen, read_reduced
from datamodules.labelled.alignment import POINTS, FaceDetector
from datamodules.loading import collate
from datamodules.options import Preprocessing, point_columns
from datamodules.tables import spelled
from datamodules.tiles import pieces
from datamodules.videos import evenly, is_video, read_clip
from modules import VisionModule
from modules.answers import Answer
from modules.detection.tiles import Place, joined
from pipelines.serving.store import CODE, load_model

BATCH = 64
Sample = dict[str, NDArray[Any]]


@dataclass
class _Picture:
    """A picture, the positions of its tiles, and the module's predictions for them.

    Args:
        pixels: H×W×C; none where ``whole`` is the module's input.
        places: left and top edge of each piece.
        height: of the picture.
        width: of the picture.
        factor: how many times larger than ``pixels`` it is.
        whole: the module's input, where the picture is one piece.
        beside: its tabular inputs and keypoints.
    """

    pixels: NDArray[Any]
    places: list[Place]
    height: int
    width: int
    factor: int = 1
    whole: Sample | None = None
    beside: Sample = field(default_factory=dict)
    parts: list[tuple[Place, Answer]] = field(default_factory=list)


class ImageError(MlflowException, ValueError):
    """An image that cannot be read. MLflow's server tells its client the message of such an error, but of another only
    where it was raised."""

    def __init__(self, message: str) -> None:
        super().__init__(message, INVALID_PARAMETER_VALUE)


class VisionModel(PythonModel):
    """A trained module behind one method, `predict`."""

    def load_context(self, context: Any) -> None:
        """Loads the module when MLflow serves it, on the GPU if there is one (``CUDA_VISIBLE_DEVICES=""`` hides it).

        MLflow runs the code that a model carries, such as this; so what it carries of its user's is imported, too.
        """
        folder = Path(context.artifacts["model"])
        if carried := sorted((folder / CODE).glob("*.py")):
            sys.path.append(str(folder / CODE))
            for file in carried:
                importlib.import_module(file.stem)
        self.load(folder)

    def load(self, folder: Path, device: str = "auto") -> "VisionModel":
        """Loads the module from data; no code in the folder is run.

        Args:
            folder: what `pipelines.serving.store.save_model` wrote.
            device: where the module runs, such as ``cpu`` or ``cuda:1``; ``auto`` is the GPU if there is one.

        Raises:
            ValueError: the folder holds no such model, or there is no such device.
        """
        self.take(*load_model(folder))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.module.to(torch.device(device))
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"The device {device} cannot be used: {str(error).splitlines()[0]}") from None
        return self

    def take(self, module: VisionModule, preprocessing: Preprocessing) -> "VisionModel":
        """Uses an existing module, on its present device."""
        self.module, self.preprocessing = module.eval(), preprocessing
        self.transform = self.preprocessing.transform()
        # Pieces are cut out of all of it, and so are points found in all of it; else training, evaluation and answers decode alike.
        whole = self.preprocessing.tile or self.preprocessing.keypoints
        self.reduction: Reduction | None = None if whole else partial(reduced_by, self.transform)
        self._detector: FaceDetector | None = None
        self._finding = Lock()
        return self

    @property
    def asks_for(self) -> list[str]:
        """Tabular inputs that must be given with an image; landmarks of faces are detected if they are not given."""
        found = point_columns(POINTS) if self.preprocessing.keypoints == POINTS else []
        return [name for name in self.preprocessing.columns if name not in found]

    def named(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Names columns of images and of their tabular inputs as `predict` does, where they are spelled otherwise."""
        return rows.rename(columns=spelled(rows, ["image", *self.preprocessing.columns]))

    def read(self, image: Any) -> NDArray[Any]:
        """Reads an image in any form that `predict` accepts, H×W×C with the module's channels.

        Raises:
            ValueError: it cannot be read; the message names it.
        """
        return self._pixels(image["image"] if isinstance(image, Mapping) else image, None)[0]

    def prepare(self, image: Any) -> NDArray[Any]:
        """Reads an image in any form that `predict` accepts and preprocesses it for the module: uint8 H×W×C, or float32
        in [0, 1] for more than 8 bits.

        Raises:
            ValueError: it cannot be read; the message names it.
        """
        return self.transform(image=self._pixels(image, self.reduction)[0])["image"]

    def _read(self, image: Any) -> "_Picture | ValueError":
        """Reads an image, or returns why it cannot be read."""
        image = image.to_dict() if isinstance(image, pd.Series) else image  # a row of a DataFrame
        row = image if isinstance(image, Mapping) else {"image": image}
        if "image" not in row:
            return ValueError(f"An image is given as 'image', and there is only {listed(map(str, row)) or 'nothing'}.")
        image = row["image"]
        try:
            if self.preprocessing.frames:
                clip = self._clip(image, self.preprocessing.frames)
                whole = {"image": self.transform(images=clip)["images"]}
                return _Picture(clip[:0], [(0, 0)], clip.shape[1], clip.shape[2], whole=whole)
            pixels, factor = self._pixels(image, self.reduction)
            beside = self._beside(row, pixels) if self.preprocessing.columns else {}
        except ValueError as error:
            return error
        height, width = (side * factor for side in pixels.shape[:2])
        places = pieces(height, width, self.preprocessing.tile or max(height, width))
        picture = _Picture(pixels, places, height, width, factor, beside=beside)
        if len(places) == 1:  # what is not cut is made ready at once, so that its pixels need not be kept
            picture.whole, picture.pixels = self._piece(picture, (0, 0)), pixels[:0].copy()
        return picture

    def _piece(self, picture: "_Picture", place: Place) -> Sample:
        """Preprocesses a tile of an image."""
        if picture.whole is not None:
            return picture.whole
        left, top = place
        side = self.preprocessing.tile or max(picture.pixels.shape)
        part = picture.pixels[top : top + side, left : left + side]
        size = np.array(part.shape[:2], np.int64) * picture.factor
        made = self.transform(image=part, **picture.beside)
        return {key: made[key] for key in ("image", "tabular") if key in made} | {"size": size}

    def _beside(self, row: Mapping[str, Any], pixels: NDArray[Any]) -> Sample:
        """Tabular inputs and keypoints of an image.

        Args:
            row: the image as ``image``, with its tabular inputs by name; landmarks of a face are detected if they are not given.
            pixels: the image, uint8 H×W×C.

        Returns:
            ``tabular``, float32 T, and ``keypoints``, float32 K×2 in pixels, if there are any.

        Raises:
            ValueError: a number is missing, or no face is found.
        """
        wanted, beside = self.preprocessing, Sample()
        if wanted.tabular:
            beside["tabular"] = np.array([self._number(row, name) for name in wanted.tabular], np.float32)
        if wanted.keypoints == POINTS and all(pd.isna(row.get(name)) for name in point_columns(POINTS)):
            with self._finding:
                self._detector = self._detector or FaceDetector("cpu")
                found = self._detector.points(pixels)
            if not len(found):
                raise ValueError(
                    f"There is no face in {_named(row['image'])}, whose landmarks the model takes as a further input."
                )
            beside["keypoints"] = found[0].astype(np.float32)
        elif wanted.keypoints:
            values = [self._number(row, name) for name in point_columns(wanted.keypoints)]
            beside["keypoints"] = np.array(values, np.float32).reshape(-1, 2)
            if (beside["keypoints"] == beside["keypoints"][0]).all():
                raise ValueError(f"All keypoints of {_named(row['image'])} are at one place: correct them.")
        return beside

    def _number(self, row: Mapping[str, Any], name: str) -> float:
        try:
            if abs(value := float(row[name])) <= float(np.finfo(np.float32).max):
                return value
            given = f"There is no {name}" if np.isnan(value) else f"{name} {row[name]!r} is no number of 32 bits"
        except KeyError:
            given = f"There is no {name}"
        except (TypeError, ValueError):
            given = f"{name} {row[name]!r} is no number"
        raise ValueError(
            f"{given} with {_named(row['image'])}, and the model takes {listed(self.preprocessing.columns)} with each image: give "
            "predict a table with these columns and a column path; from Python or to a server, give these beside image."
        )

    def _clip(self, clip: Any, most: int) -> NDArray[np.uint8]:
        """Frames of a video, of an array T×H×W×C, or of an image as a clip of one frame; at most a given number."""
        if isinstance(clip, str | os.PathLike) and is_video(os.fspath(clip)):
            return read_clip(os.fspath(clip), most, self.preprocessing.in_chans, self.reduction)
        if isinstance(clip, np.ndarray) and clip.ndim == 4 and len(clip):
            return np.stack([self._pixels(frame, None)[0] for frame in clip[evenly(len(clip), most)]])
        return self._pixels(clip, self.reduction)[0][None]

    def check_pictures(self, model: str) -> None:
        """Makes sure that the model, whose address is given, takes pictures.

        Raises:
            ValueError: it takes numbers.
        """
        if self.preprocessing.numbers:
            raise ValueError(
                f"{model} has learned from numbers and not from pictures: python -m pipelines.q_learning play {model} lets it act, "
                "and from Python fovea.load takes arrays of them."
            )

    def _pixels(self, image: Any, reduction: Reduction | None) -> tuple[NDArray[Any], int]:
        """Decodes an image; returns also the factor by which it was decoded smaller."""
        reading, channels = self.preprocessing.reading, self.preprocessing.in_chans
        if self.preprocessing.numbers:
            try:
                return cast(Any, np.asarray(image, np.float32).reshape(1, 1, channels)), 1
            except (TypeError, ValueError):
                told = np.shape(image) if not isinstance(image, str | bytes | Path) else repr(str(image)[:40])
                raise ValueError(f"An observation is {channels} numbers, not {told}.") from None
        if isinstance(image, str) and not os.path.exists(image):
            text = image.partition(",")[2] if image.startswith("data:") else image
            try:
                data = base64.b64decode("".join(text.split()), validate=True)
                return read_reduced(data, reading, reduction)
            except (binascii.Error, ValueError) as error:
                why = f": {error}" if isinstance(error, DataError) else "."
                raise ValueError(
                    f"{image[:200].strip() or 'An empty text'} is neither a file nor an image in base64{why}"
                ) from None
        if isinstance(image, str | os.PathLike | bytes):
            return read_reduced(image, reading, reduction)
        if not isinstance(image, Image.Image) and not np.ndim(image):
            raise ValueError(
                f"An image is a path, bytes, a base64 text, an array or a picture of Pillow, not {image!r}."
            )
        if not reading.seen:
            return self._bands(np.asarray(image)), 1
        channels = reading.channels
        if isinstance(image, Image.Image):
            return as_seen(image, channels), 1
        pixels = np.asarray(image)
        if pixels.dtype != np.uint8:
            raise ValueError(f"An array of an image holds uint8, not {pixels.dtype}.")
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        if pixels.ndim != 3 or not (pixels.shape[2] in (1, 2, 3, 4, channels) and pixels.size):
            raise ValueError(f"An array of an image is H×W or H×W×C, not {'×'.join(map(str, pixels.shape))}.")
        if pixels.shape[2] == channels:
            return pixels, 1
        return as_seen(Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels), channels), 1

    def _bands(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """Interprets an array as the bands of a file with the same values."""
        reading = self.preprocessing.reading
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        if pixels.dtype not in (np.uint8, np.uint16) or pixels.ndim != 3 or not pixels.size:
            shape = "×".join(map(str, pixels.shape))
            raise ValueError(f"An array of an image is uint8 or uint16 H×W or H×W×B, not {pixels.dtype} {shape}.")
        try:
            return scaled(taken(pixels, reading), reading.bits)
        except ValueError as error:
            raise ValueError(f"An array of an image cannot be used: {error}.") from None

    def stream(
        self, images: Iterable[Any], batch_size: int = BATCH, progress: Callable[[float], None] | None = None
    ) -> Iterator[Answer | ValueError]:
        """Yields predictions image by image; threads read ahead while the network computes.

        Args:
            images: as for `predict`; taken as they are needed.
            batch_size: images, or pieces of images, that go through the network together; no more images than two such
                batches are held. One, where the network takes images of any size.
            progress: is told how many images are done, a large one piece by piece.

        Yields:
            For each image the answer, or why it cannot be read.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}.")
        if self.preprocessing.fit == "native":
            batch_size = 1
        ahead = min(2, batch_size) if self.preprocessing.tile else batch_size  # large ones would fill the memory
        done, waiting, pool = 0, iter(images), ThreadPoolExecutor()
        reading: deque[Future[_Picture | ValueError]] = deque()

        def reads() -> bool:
            reading.extend(pool.submit(self._read, image) for image in islice(waiting, ahead - len(reading)))
            return bool(reading)

        try:
            while reads():
                taken: list[_Picture | ValueError] = []
                count = 0
                while count < batch_size and reads():
                    taken.append(reading.popleft().result())
                    count += len(taken[-1].places) if isinstance(taken[-1], _Picture) else 1
                reads()
                good = [each for each in taken if isinstance(each, _Picture)]
                for share in self._answer(good, batch_size, pool):
                    if progress:
                        progress(done + share)
                done += len(taken)
                yield from (self._joined(each) if isinstance(each, _Picture) else each for each in taken)
        finally:
            pool.shutdown(cancel_futures=True)

    def _answer(self, pictures: "list[_Picture]", size: int, pool: ThreadPoolExecutor) -> Iterator[float]:
        """Predicts all tiles of some pictures in batches; yields the number of pictures that are complete."""
        work = [(picture, place) for picture in pictures for place in picture.places]
        chunks = [work[i : i + size] for i in range(0, len(work), size)]
        coming: list[Future[Sample]] = []
        for chunk, following in zip([[], *chunks], [*chunks, []], strict=True):
            current, coming = coming, [pool.submit(self._piece, *each) for each in following]
            if chunk:
                answers = self._ask([future.result() for future in current])
                for (picture, place), answer in zip(chunk, answers, strict=True):
                    picture.parts.append((place, answer))
                yield sum(len(picture.parts) / len(picture.places) for picture in pictures)

    def _joined(self, picture: "_Picture") -> Answer:
        if len(picture.parts) == 1:
            return picture.parts[0][1]
        across = bool(getattr(self.module, "across_classes", False))
        return joined(picture.parts, picture.height, picture.width, self.preprocessing.tile or 0, across)

    def _ask(self, samples: list[Sample]) -> list[Answer]:
        return self.module.predict({key: value.to(self.module.device) for key, value in collate(samples).items()})

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Predicts images.

        Args:
            context: MLflow's.
            model_input: a DataFrame with a column ``image``, and one for each tabular input; or just a list of images, or of
                dictionaries with these keys. Images are paths, bytes, base64 texts,
                pictures of Pillow, or uint8 arrays H×W or H×W×C, where the model was trained on bands or more than 8 bits uint8
                or uint16 in the files' own values; where the module is shown clips, also paths of videos and uint8 arrays
                T×H×W×C; where it is shown numbers, those. MLflow's wrapper around this, whose schema asks for
                the name, takes a DataFrame, ``{"image": [...]}`` and ``[{"image": ...}, ...]``, but no bare list.
            params: none are known.

        Returns:
            A row for each image; the columns are the task's, see the module's ``predict``.

        Raises:
            ImageError: an image cannot be read.
        """
        images: list[Any] = []
        if isinstance(model_input, pd.DataFrame):
            model_input = self.named(model_input)
            if self.preprocessing.columns or "image" not in model_input:
                model_input = cast(Any, model_input.to_dict("records"))
        for cell in model_input["image"] if isinstance(model_input, pd.DataFrame) else model_input:
            # MLflow makes a single row of {"image": [texts]}.
            images += cell if isinstance(cell, list | np.ndarray) and all(isinstance(i, str) for i in cell) else [cell]
        rows = []
        for number, answer in enumerate(self.stream(images), 1):
            if isinstance(answer, ValueError):
                which = f"Image {number} of {len(images)}: " if len(images) > 1 else ""
                raise ImageError(f"{which}{answer}") from answer
            rows.append(answer)
        return pd.DataFrame(rows)


def _named(image: Any) -> str:
    """An image in a message."""
    return str(image)[:200] if isinstance(image, str | os.PathLike) else "an image"


if __name__ != "pipelines.serving.model":  # MLflow runs this file as a script
    mlflow.models.set_model(VisionModel())
