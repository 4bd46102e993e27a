"""An autoencoder of points, to visualise its training."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from modules.callbacks.publish import PictureLogger
from modules.pictures.charts import new_figure, rasterize
from modules.pictures.sheets import Image


class PointAutoencoder(L.LightningModule):
    """Autoencoder of points with fully connected tanh layers: the code parametrises the curve or surface on which the
    points lie (Kramer 1991, doi:10.1002/aic.690370209).

    The reconstruction is drawn after the epochs in `shown`, as the image ``train/points`` and in `frames`.

    Args:
        dimensions: dimensions of the points, 2 or 3.
        code_size: size of the code.
        hidden: sizes of the hidden layers of the encoder; the decoder has them in reverse.
        lr: learning rate of Adam.
    """

    def __init__(
        self, dimensions: int = 2, code_size: int = 1, hidden: Sequence[int] = (64, 64), lr: float = 0.005
    ) -> None:
        super().__init__()
        self.lr = lr
        self.encoder = _layers([dimensions, *hidden, code_size])
        self.decoder = _layers([code_size, *reversed(hidden), dimensions])
        self.frames: list[tuple[int, NDArray[np.float32], NDArray[np.float32], NDArray[np.float32], float]] = []
        self._seen: list[Tensor] = []

    def forward(self, point: Tensor) -> Tensor:
        """Reconstructs float B×D."""
        return self.decoder(self.encoder(point))

    @property
    def shown(self) -> set[int]:
        """Epochs after which the reconstruction is drawn: 0, 1, 2, 5, 10, 20, 50, … and the last."""
        last = int(self.trainer.max_epochs or 0)
        steps = {k * 10**n for k in (1, 2, 5) for n in range(6)}
        return {0, last} | {step for step in steps if step < last}

    def on_train_start(self) -> None:
        """Draws the reconstruction of the untrained network."""
        self._draw(0)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Computes the squared distance, averaged over the batch."""
        loss = (self(batch["point"]) - batch["point"]).square().sum(1).mean()
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(batch["point"]), prog_bar=True)
        return loss

    def on_train_epoch_end(self) -> None:
        """Draws the reconstruction."""
        if self.current_epoch + 1 in self.shown:
            self._draw(self.current_epoch + 1)

    @torch.no_grad()
    def _draw(self, done: int) -> None:
        dataset: Any = cast(Any, self.trainer.train_dataloader).dataset
        point = torch.stack([dataset[i]["point"] for i in range(len(dataset))]).to(self.device)
        code = self.encoder(point)
        made = self.decoder(code)
        error = float(F.mse_loss(made, point, reduction="sum") / len(point))
        self.frames.append((done, point.cpu().numpy(), made.cpu().numpy(), code[:, 0].cpu().numpy(), error))
        for logger in self.loggers:
            if isinstance(logger, PictureLogger):
                logger.log_image("train/points", [draw_points(self.frames[-1:])], step=done)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Creates Adam."""
        return torch.optim.Adam(self.parameters(), self.lr)


def _layers(sizes: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def draw_points(frames: Sequence[tuple[int, Any, Any, Any, float]], columns: int = 4) -> Image:
    """Draws points in grey and their reconstructions, coloured by the first number of their code, in one panel per
    epoch.

    Args:
        frames: epochs, points N×D, reconstructions N×D, first number of the codes N, mean squared distance.
        columns: panels per row.
    """
    columns = min(columns, len(frames))
    rows = math.ceil(len(frames) / columns)
    figure = new_figure(3.2 * columns, 3.4 * rows)
    solid = frames[0][1].shape[1] == 3
    for k, (done, point, made, code, error) in enumerate(frames, 1):
        axes: Any = figure.add_subplot(rows, columns, k, **({"projection": "3d"} if solid else {}))
        axes.scatter(*point.T, s=2, color="0.8")
        axes.scatter(*made.T, s=4, c=code, cmap="viridis")
        axes.set_title(f"{done} passes, error {error:.4f}", fontsize=9)
        low, high = point.min(0) - 0.2, point.max(0) + 0.2
        axes.set_xlim(low[0], high[0])
        axes.set_ylim(low[1], high[1])
        if solid:
            axes.set_zlim(low[2], high[2])
        axes.tick_params(labelsize=6)
    figure.tight_layout()
    return rasterize(figure)
