"""A complete task in one file: key points. Each image shows a red and a green cross, and the network says where they are.

``python -m examples.keypoints fit`` trains it; docs/new_task.md goes through it line by line.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from datamodules.base import VisionDataModule
from datamodules.loading import Source
from datamodules.options import PositiveInt, Preprocessing
from modules.answers import Answer, Answers
from modules.base import VisionModule
from modules.callbacks.means import Losses
from modules.optimization import Optimization
from modules.spec import Backbone, DataSpec
from pipelines.engine.task import Task

POINTS = 2


class CrossSource:
    """Made images of crosses on noise, each a function of (seed, index)."""

    def __init__(self, count: int, image_size: int, seed: int) -> None:
        self.count, self.image_size, self.seed = count, image_size, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = np.random.default_rng((self.seed, index))
        image = generator.integers(0, 80, (self.image_size, self.image_size, 3), np.uint8)
        points = generator.integers(2, self.image_size - 2, (POINTS, 2))
        for channel, (x, y) in enumerate(points):
            image[y, x - 2 : x + 3, channel] = image[y - 2 : y + 3, x, channel] = 255
        return {"image": image, "points": points.astype(np.float32) / self.image_size}

    @property
    def digest(self) -> str:
        """What tells these images from others."""
        return f"crosses-{self.count}-{self.image_size}-{self.seed}"


@dataclass(kw_only=True, eq=False, repr=False)
class Crosses(VisionDataModule):
    """Images of a red and a green cross.

    Batches: ``image`` uint8 B×3×S×S, ``points`` float32 B×2×2, x and y as shares of the side.

    Args:
        image_size: side of the images, in pixels.
        train: number of training images; validation and test have a quarter each.
    """

    image_size: PositiveInt = 32
    train: PositiveInt = 2000

    def load(self) -> dict[str, Source]:
        """The splits."""
        sizes = {"train": self.train, "val": self.train // 4, "test": self.train // 4}
        return {name: CrossSource(size, self.image_size, seed) for seed, (name, size) in enumerate(sizes.items())}

    def transform(self, training: bool) -> None:
        """Nothing is augmented."""

    @property
    def preprocessing(self) -> Preprocessing:
        """How a picture becomes the network's input."""
        return Preprocessing(self.image_size, self.in_chans, crop_pct=1.0)


class KeypointModule(VisionModule):
    """A backbone and a linear regression of points, trained by the L1 distance (Sun et al. 2018, arXiv:1711.08229).

    Args:
        data: description of its data.
        backbone: the network that it is built on.
        optimization: how it is trained.
    """

    monitor = "val/distance"

    def __init__(
        self,
        data: DataSpec,
        backbone: Backbone = Backbone("lenet5"),
        optimization: Optimization | None = None,
    ) -> None:
        super().__init__(data, backbone, optimization)
        self.head = nn.Linear(self.backbone.head_hidden_size, 2 * POINTS)
        self.answers = PointAnswers(data.image_size)

    def forward(self, image: Tensor) -> Tensor:
        """uint8 B×C×S×S to points, float B×2×2 as shares of the side."""
        return self.head(self.backbone(self.normalize(image))).view(-1, POINTS, 2)

    def losses(self, batch: dict[str, Tensor]) -> Losses:
        """The mean L1 distance, and the mean Euclidean distance in pixels; in all stages."""
        error = self(batch["image"]) - batch["points"]
        return Losses({"loss": error.abs().mean()}, {"distance": error.norm(dim=2).mean() * self.image_size})

    @torch.inference_mode()
    def predict(self, batch: dict[str, Tensor]) -> list[Answer]:
        """For each image its ``points`` in pixels of the network's input."""
        return [{"points": points} for points in (self(batch["image"]) * self.image_size).round(decimals=2).tolist()]


class PointAnswers(Answers):
    """Points in a picture.

    Args:
        side: of the network's input, in pixels.
    """

    def __init__(self, side: int) -> None:
        self.side = side

    def draw(self, image: NDArray[np.uint8], answer: Answer) -> NDArray[np.uint8]:
        """Marks the points in white."""
        drawn = super().draw(image, answer)
        for x, y in np.array(answer["points"]) * np.array(image.shape[1::-1]) / self.side:
            drawn[round(min(max(y, 0), len(drawn) - 1)), round(min(max(x, 0), drawn.shape[1] - 1))] = 255
        return drawn


keypoints = Task("keypoints", "examples.keypoints.KeypointModule", "examples.keypoints.Crosses")


if __name__ == "__main__":  # under its own name, by which a registered model finds its class
    import_module("examples.keypoints").keypoints.main()
