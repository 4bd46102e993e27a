"""What a registered model answers. MLflow stores this file with the model and runs it to load the model."""

import base64
import binascii
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch
from mlflow.pyfunc import PythonModel
from numpy.typing import NDArray
from PIL import Image

from datamodules.augmentations import evaluation
from datamodules.base import DataError, collate
from datamodules.images import as_seen, pieces, read_image
from pipelines.storage import load_model

BATCH = 64
Pieces = list[tuple[tuple[int, int], dict[str, NDArray[Any]]]]


class VisionModel(PythonModel):
    """A trained module behind one call, `predict`."""

    def load_context(self, context: Any) -> None:
        """Rebuilds the module where MLflow serves it: on the GPU if there is one (``CUDA_VISIBLE_DEVICES=""`` hides it)."""
        self.load(Path(context.artifacts["model"]))

    def load(self, folder: Path, device: str = "auto") -> "VisionModel":
        """Rebuilds the module from data; no code in the folder is run.

        Args:
            folder: what `pipelines.storage.save_model` wrote.
            device: where the module runs, such as ``cpu`` or ``cuda:1``; ``auto`` is the GPU if there is one.

        Returns:
            Itself.

        Raises:
            ValueError: the folder holds no such model, or there is no such device.
        """
        self.module, self.preprocessing = load_model(folder)
        settings = {key: self.preprocessing[key] for key in ("crop_pct", "fit") if key in self.preprocessing}
        self.transform = evaluation(self.preprocessing["image_size"], **settings)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.module.to(torch.device(device))
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"The device {device} cannot be used: {str(error).splitlines()[0]}") from None
        return self

    def prepare(self, image: Any) -> NDArray[np.uint8]:
        """Reads an image in any of the forms of `predict` and makes it the module's input, uint8 H×W×C.

        Raises:
            ValueError: it cannot be read; the message names it.
        """
        return self.transform(image=self._pixels(image))["image"]

    def _samples(self, image: Any) -> Pieces:
        """The image, or its pieces where the module learned from pieces, as the module's input, by their place."""
        pixels, side = self._pixels(image), self.preprocessing.get("tile")
        result = []
        height, width = pixels.shape[:2]
        for x, y in pieces(height, width, side or max(height, width)):
            part = pixels[y : y + side, x : x + side] if side else pixels
            size = np.array(part.shape[:2], np.int64)
            result.append(((x, y), {"image": self.transform(image=part)["image"], "size": size}))
        return result

    def _pixels(self, image: Any) -> NDArray[np.uint8]:
        channels = self.preprocessing["in_chans"]
        if isinstance(image, str) and not os.path.exists(image):
            text = image.partition(",")[2] if image.startswith("data:") else image
            try:
                return read_image(base64.b64decode("".join(text.split()), validate=True), channels)
            except (binascii.Error, ValueError) as error:
                why = f": {error}" if isinstance(error, DataError) else "."
                raise ValueError(f"{image[:200]} is neither a file nor an image in base64{why}") from None
        if isinstance(image, str | os.PathLike | bytes):
            return read_image(image, channels)
        if isinstance(image, Image.Image):
            return as_seen(image, channels)
        pixels = np.asarray(image)
        if pixels.dtype != np.uint8:
            raise ValueError(f"An array of an image holds uint8, not {pixels.dtype}.")
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        if pixels.ndim != 3 or not (pixels.shape[2] in (1, 2, 3, 4, channels) and pixels.size):
            raise ValueError(f"An array of an image is H×W or H×W×C, not {'×'.join(map(str, pixels.shape))}.")
        if pixels.shape[2] == channels:
            return pixels
        return as_seen(Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels), channels)

    def stream(self, images: Iterable[Any], batch_size: int = BATCH) -> Iterator[dict[str, Any] | ValueError]:
        """Answers one image after the other; threads read the next batch while the network computes.

        Args:
            images: as for `predict`; taken as they are needed.
            batch_size: images that go through the network together; no more than two such batches are held. One, where
                the network takes images of any size.

        Yields:
            For each image the answer, or why it cannot be read.
        """

        def read(image: Any) -> Pieces | ValueError:
            try:
                return self._samples(image)
            except ValueError as error:
                return error

        if self.preprocessing.get("fit") == "native":
            batch_size = 1
        waiting, pool = iter(images), ThreadPoolExecutor()

        def submit() -> list[Future[Pieces | ValueError]]:
            return [pool.submit(read, image) for image in islice(waiting, batch_size)]

        try:
            coming = submit()
            while coming:
                current, coming = coming, submit()
                batch = [future.result() for future in current]
                samples = [sample for parts in batch if not isinstance(parts, ValueError) for _, sample in parts]
                answers = iter([a for i in range(0, len(samples), BATCH) for a in self._ask(samples[i : i + BATCH])])
                for parts in batch:
                    yield parts if isinstance(parts, ValueError) else _joined([(at, next(answers)) for at, _ in parts])
        finally:
            pool.shutdown(cancel_futures=True)

    def _ask(self, samples: list[dict[str, NDArray[Any]]]) -> list[dict[str, Any]]:
        return self.module.answers({key: value.to(self.module.device) for key, value in collate(samples).items()})

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Answers for images.

        Args:
            context: MLflow's.
            model_input: a DataFrame with a column ``image``, or just a list of images: paths, bytes, base64 texts,
                pictures of Pillow, or uint8 arrays H×W or H×W×C. MLflow's wrapper around this, whose schema asks for
                the name, takes a DataFrame, ``{"image": [...]}`` and ``[{"image": ...}, ...]``, but no bare list.
            params: none are known.

        Returns:
            A row for each image; the columns are the task's, see the module's ``answers``.

        Raises:
            ValueError: an image cannot be read.
        """
        images: list[Any] = []
        for cell in model_input["image"] if isinstance(model_input, pd.DataFrame) else model_input:
            # MLflow makes a single row of {"image": [texts]}.
            images += cell if isinstance(cell, list | np.ndarray) and all(isinstance(i, str) for i in cell) else [cell]
        rows = []
        for answer in self.stream(images):
            if isinstance(answer, ValueError):
                raise answer
            rows.append(answer)
        return pd.DataFrame(rows)


def _joined(parts: list[tuple[tuple[int, int], dict[str, Any]]]) -> dict[str, Any]:
    """One answer for an image from those for its pieces, which overlap.

    Of boxes of the same label of which one covers half of the other or more, the most certain is kept.
    """
    if len(parts) == 1:
        return parts[0][1]
    found = [
        ([box[0] + x, box[1] + y, box[2] + x, box[3] + y], label, score)
        for (x, y), answer in parts
        for box, label, score in zip(answer["boxes"], answer["labels"], answer["scores"], strict=True)
    ]
    kept: dict[str, list[Any]] = {"boxes": [], "labels": [], "scores": []}
    for box, label, score in sorted(found, key=lambda each: -each[2]):
        others = np.array([b for b, k in zip(kept["boxes"], kept["labels"], strict=True) if k == label]).reshape(-1, 4)
        shared = np.clip(np.minimum(others[:, 2:], box[2:]) - np.maximum(others[:, :2], box[:2]), 0, None).prod(1)
        smaller = np.minimum((others[:, 2:] - others[:, :2]).prod(1), (box[2] - box[0]) * (box[3] - box[1]))
        if not (shared > 0.5 * smaller).any():
            for key, value in zip(kept, (box, label, score), strict=True):
                kept[key].append(value)
    return kept


if __name__ != "pipelines.pyfunc":  # MLflow runs this file as a script
    mlflow.models.set_model(VisionModel())
