"""Points in two or three dimensions: known curves and surfaces, or a table."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from datamodules.errors import DataError


def _spiral(t: NDArray[Any], _: NDArray[Any]) -> list[NDArray[Any]]:
    angle = 0.5 * np.pi + 3 * np.pi * t
    return [angle * np.cos(angle), angle * np.sin(angle)]


def _helix(t: NDArray[Any], _: NDArray[Any]) -> list[NDArray[Any]]:
    return [np.cos(4 * np.pi * t), np.sin(4 * np.pi * t), 2 * t - 1]


def _swiss_roll(t: NDArray[Any], u: NDArray[Any]) -> list[NDArray[Any]]:
    angle = 1.5 * np.pi * (1 + 2 * t)
    return [angle * np.cos(angle), 21 * (u - 0.5), angle * np.sin(angle)]


def _wave(t: NDArray[Any], _: NDArray[Any]) -> list[NDArray[Any]]:
    return [4 * t - 2, np.sin(2 * np.pi * t)]


SHAPES = {"wave": _wave, "spiral": _spiral, "helix": _helix, "swiss_roll": _swiss_roll}


class PointCloud(L.LightningDataModule):
    """Points, each coordinate standardised. Batches: ``point`` float32 B×D.

    Args:
        shape: ``wave``, ``spiral`` (2-D curves), ``helix`` (3-D curve), ``swiss_roll`` (3-D surface), or a file: CSV with
            a header, or ``.npy`` N×D.
        samples: number of points of a shape.
        noise: standard deviation of noise added to the standardised points of a shape.
        batch_size: points in a batch.
        seed: seed of points and order.
    """

    def __init__(
        self, shape: str = "spiral", samples: int = 1000, noise: float = 0.03, batch_size: int = 100, seed: int = 0
    ) -> None:
        super().__init__()
        self.batch_size, self.seed = batch_size, seed
        generator = np.random.default_rng(seed)
        if shape in SHAPES:
            points = np.stack(SHAPES[shape](generator.random(samples), generator.random(samples)), 1)
        else:
            points, noise = _read(Path(shape)), 0
        spread = points.std(0)
        points = (points - points.mean(0)) / np.where(spread > 0, spread, 1)
        points += noise * generator.standard_normal(points.shape)
        self.points = points.astype(np.float32)

    @property
    def dimensions(self) -> int:
        """Number of coordinates of a point."""
        return int(self.points.shape[1])

    def train_dataloader(self) -> DataLoader[dict[str, torch.Tensor]]:
        """Returns all points, shuffled in each epoch."""
        samples: Any = [{"point": torch.from_numpy(point)} for point in self.points]
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(samples, self.batch_size, shuffle=True, generator=generator)


def _read(file: Path) -> NDArray[np.float64]:
    import pandas as pd

    if not file.is_file():
        raise DataError(f"{file} is neither a file nor one of the shapes {', '.join(SHAPES)}.")
    try:
        points = np.load(file) if file.suffix == ".npy" else pd.read_csv(file).to_numpy()
        points = points.astype(np.float64)
    except (ValueError, OSError) as error:
        raise DataError(f"{file} cannot be read as points: {str(error)[:200]}.") from None
    if points.ndim != 2 or points.shape[1] not in (2, 3) or len(points) < 2 or not np.isfinite(points).all():
        raise DataError(f"{file} holds {'×'.join(map(str, points.shape))} values; they must be N×2 or N×3, all finite.")
    return points
