"""Visualises what a network has learned, also during training."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import lightning as L
import numpy as np
from torch import Tensor
from typing_extensions import override

from datamodules import VisionDataModule
from datamodules.loading import collate
from modules import VisionModule
from modules.inspection import NotApplicableError
from modules.inspection.pictures import draw_embedding, draw_explanation, draw_feature_maps, draw_filters
from modules.pictures.sheets import Image as Picture
from modules.training_data import settings_of


def take(data: VisionDataModule, count: int, prepare: Callable[[Any], Any] | None = None) -> tuple[Tensor, Any]:
    """Images spread evenly over the test split, or otherwise the validation split, and their labels if they have any.

    Args:
        data: the data.
        count: how many at most.
        prepare: turns a picture into the network's input; None leaves it to the data.

    Returns:
        uint8 N×C×S×S, and int64 N or None.
    """
    split = "test" if "test" in data.sources else "val"
    dataset = data.dataset(split, augmented=False)
    places = np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int)).tolist()
    taken = [data.sources[split][i] if prepare else dataset[i, 0] for i in places]
    labels = np.array([s["label"] for s in taken]) if all("label" in s for s in taken) else None
    images = [
        s["image"] if s["image"].ndim == 3 else s["image"][len(s["image"]) // 2] for s in taken
    ]  # of a clip one frame
    return collate([{"image": prepare(image) if prepare else image} for image in images])["image"], labels


class InspectionCallback(L.Callback):
    """Visualises a network during training: filters, feature maps, Grad-CAM, occlusion, embedding.

    Args:
        every_n_epochs: epochs from one showing to the next.
        images: pictures that are explained.
        points: images in the embedding, by PCA.
    """

    def __init__(self, every_n_epochs: int = 1, images: int = 2, points: int = 500) -> None:
        self.every_n_epochs, self.images, self.points = every_n_epochs, images, points

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draws, if a logger accepts pictures."""
        if (trainer.current_epoch + 1) % self.every_n_epochs or not isinstance(pl_module, VisionModule):
            return
        images, labels = take(settings_of(trainer).datamodule, self.points)
        names = getattr(settings_of(trainer).datamodule, "label_names", [])
        pictures: dict[str, Callable[[], Picture]] = {
            "filters": partial(draw_filters, pl_module),
            "feature_maps": partial(draw_feature_maps, pl_module, images[:1]),
            "embedding": partial(draw_embedding, pl_module, images, labels, names, "pca"),
        }
        for i in range(self.images):
            pictures[f"explanation_{i}"] = partial(draw_explanation, pl_module, images[i : i + 1])
        for key, draw in pictures.items():
            with suppress(NotApplicableError):
                pl_module.publisher.picture(trainer, f"inspect/{key}", draw, pl_module.clock)
