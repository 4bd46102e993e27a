"""What a registered model answers. MLflow stores this file with the model and runs it to load the model."""

import base64
import binascii
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.pyfunc import PythonModel
from numpy.typing import NDArray

from datamodules.augmentations import evaluation
from datamodules.base import collate
from datamodules.images import read_image
from pipelines.registry import load_model

BATCH = 64


class VisionModel(PythonModel):
    """A trained module behind one call, `predict`."""

    def load_context(self, context: Any) -> None:
        """Rebuilds the module from data."""
        self.module, self.preprocessing = load_model(Path(context.artifacts["model"]))
        self.transform = evaluation(self.preprocessing["image_size"], self.preprocessing["crop_pct"])

    def _pixels(self, image: Any) -> NDArray[np.uint8]:
        channels = self.preprocessing["in_chans"]
        if isinstance(image, str) and not Path(image[:4096]).exists():
            try:
                image = base64.b64decode(image, validate=True)
            except (binascii.Error, ValueError):
                raise ValueError(f"{image[:200]} is neither a file nor an image in base64.") from None
        if isinstance(image, str | Path | bytes):
            return read_image(image, channels)
        pixels = np.asarray(image)
        if pixels.dtype != np.uint8:
            raise ValueError(f"An array of an image holds uint8, not {pixels.dtype}.")
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels[..., :3]
        if pixels.shape[2] == channels:
            return pixels
        if channels == 3:
            return pixels.repeat(3, 2)
        luma = pixels @ np.array([0.299, 0.587, 0.114])
        return luma.round().astype(np.uint8)[..., None]

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Answers for images.

        Args:
            context: MLflow's.
            model_input: a DataFrame with a column ``image``, or just a list of images: paths, bytes, base64 texts, pictures of Pillow,
                or uint8 arrays H×W or H×W×C.
            params: none are known.

        Returns:
            A row for each image; the columns are the task's, see the module's ``answers``.
        """
        images = list(model_input["image"] if isinstance(model_input, pd.DataFrame) else model_input)
        rows: list[dict[str, Any]] = []
        for start in range(0, len(images), BATCH):
            samples = [{"image": self.transform(image=self._pixels(i))["image"]} for i in images[start : start + BATCH]]
            rows += self.module.answers({"image": collate(samples)["image"].to(self.module.device)})
        return pd.DataFrame(rows)


if __name__ != "pipelines.pyfunc":  # MLflow runs this file as a script
    mlflow.models.set_model(VisionModel())
