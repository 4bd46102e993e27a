"""Evaluation batches of images of equal shape, which are padded no more than the network needs."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from datamodules.errors import DataError
from datamodules.loading import KeyedDataset, KeyedLoader


def padded_shapes(sizes: NDArray[np.int64], size: tuple[int, int], multiple: int) -> NDArray[np.int64]:
    """Computes the shapes of images after resizing to fit a size and padding to multiples of a number, int64 N×2.

    >>> padded_shapes(np.array([[480, 640], [333, 500]]), (640, 640), 32).tolist()
    [[480, 640], [448, 640]]

    Args:
        sizes: height and width of the images, int64 N×2.
        size: maximum height and width.
        multiple: divisor of the results.
    """
    scale = (np.array(size) / sizes).min(1, keepdims=True)
    scaled = np.maximum(1, np.round(sizes * scale)).astype(np.int64)
    return -(-scaled // multiple) * multiple


def equal_shapes(shapes: NDArray[np.int64], batch_size: int, world_size: int) -> list[NDArray[np.int64]]:
    """Divides samples into batches of one shape each, the same number for each process.

    Args:
        shapes: height and width of the samples, int64 N×2.
        batch_size: maximum number of samples in a batch.
        world_size: number of processes; process r takes the batches r, r + W, ….

    Returns:
        Indices of the samples of each batch; batches are ordered by their first sample.

    Raises:
        DataError: there are too few samples for so many processes.
    """
    _, which = np.unique(shapes, axis=0, return_inverse=True)
    groups = (np.flatnonzero(which.ravel() == k) for k in range(which.max() + 1))
    batches = [part for group in groups for part in np.array_split(group, -(-len(group) // batch_size))]
    while len(batches) % world_size:  # all processes need the same number of steps
        largest = max(range(len(batches)), key=lambda k: len(batches[k]))
        if len(batches[largest]) == 1:
            raise DataError(
                f"{len(shapes)} images of {len(batches)} different shapes cannot be divided evenly among {world_size} processes: give "
                "fewer --trainer.devices, or leave --data.pad_multiple out."
            )
        batches[largest : largest + 1] = np.array_split(batches[largest], 2)
    return sorted(batches, key=lambda batch: int(batch[0]))


class RectangularLoader(KeyedLoader):
    """Evaluation batches of images of equal shape. Each sample is used exactly once over all processes; its shape is
    independent of the batch size and of the number of processes.

    Args:
        dataset: yields dictionaries by (index, epoch), with images of ``shapes``.
        shapes: height and width of the images, int64 N×2.
        batch_size: maximum number of samples in a batch.
        seed: seed of the run.
        rank, world_size: rank of this process, and number of processes.
        num_workers: number of worker processes.
    """

    def __init__(
        self,
        dataset: KeyedDataset,
        shapes: NDArray[np.int64],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
    ) -> None:
        self.batches = equal_shapes(shapes, batch_size, world_size)[rank::world_size]
        super().__init__(dataset, batch_size, False, seed, rank, world_size, num_workers)

    @override
    def __len__(self) -> int:
        return len(self.batches)

    @override
    def split(self) -> Sequence[NDArray[np.int64]]:
        return self.batches
