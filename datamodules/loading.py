"""Exact, resumable loading: the order, the augmentation and the batches are functions of a seed."""

import random
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from operator import length_hint
from typing import Any, Protocol, cast

import albumentations as A
import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from datamodules.augmentations import RandomResizedCrop, reduction
from datamodules.errors import DataError

Key = tuple[int, int]  # (index of the sample, epoch)
Sample = dict[str, Any]  # ``image`` and the task's own keys, see `Source`


class Source(Protocol):
    """Interface of a split before augmentation: sample i is a dictionary with ``image`` (uint8 H×W×C, for more than 8
    bits float32 in [0, 1]; for clips T×H×W×C) and the task's own keys.

    A source of files may have ``paths``, the file of each sample, and ``reduced(reduction)``, which returns the same
    samples decoded at reduced size; a source in memory may have ``batch(indices)``, which returns several samples
    stacked.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    @property
    def digest(self) -> str:
        """Digest of the content; see `digest_of`."""


class KeyedDataset(Dataset[dict[str, Any]]):
    """Augments a source with randomness that depends on nothing but (seed, epoch, index).

    Index i + k·N of a source with N samples is sample i with another augmentation.

    Args:
        source: the samples; files are decoded no larger than the pipelines need, see `augmentations.reduction`.
        transform: albumentations pipeline, which gets all keys of a sample and changes those that it knows (``image``,
            ``mask``, ``bboxes``, …), or None for no transform.
        seed: seed of the run.
        views: pipelines of additional views of the image, which are returned as ``views``, in this order.
    """

    def __init__(self, source: Source, transform: A.Compose | None, seed: int, views: Sequence[A.Compose] = ()) -> None:
        reduced = getattr(source, "reduced", None)
        self.source = reduced(partial(_least_reduction, (transform, *views))) if reduced else source
        self.transform, self.seed, self.views = transform, seed, views

    def __len__(self) -> int:
        return len(self.source)

    @property
    def epoch_size(self) -> int:
        """Number of indices in `order`."""
        return len(self)

    def order(self, generator: np.random.Generator) -> NDArray[np.int64]:
        """Returns the indices of a training epoch; consecutive slices are the batches."""
        return generator.permutation(self.epoch_size)

    def taken(self, generator: np.random.Generator, own: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        """Draws a number of the given samples in random order, all equally often, and each time with another
        augmentation."""
        return np.resize(generator.permutation(own), count) + np.arange(count) // len(own) * len(self)

    def __getitem__(self, key: Key) -> Sample:
        index, epoch = key
        given = sample = self.source[index % len(self.source)]
        if self.transform is not None:
            sample = self.augment(given, randomness(self.seed, epoch, index))
        if self.views:
            draws = (randomness(self.seed, epoch, index, n) for n in range(1, len(self.views) + 1))
            views = [_augmented(given, *each)["image"] for each in zip(self.views, draws, strict=True)]
            sample = {**sample, "views": views}
        return sample

    def augment(self, sample: dict[str, Any], generator: np.random.Generator) -> dict[str, Any]:
        """Applies `transform` with the given random generator; all frames of a clip are transformed alike."""
        assert self.transform is not None
        return _augmented(sample, self.transform, generator)

    def __getitems__(self, keys: Sequence[Key]) -> dict[str, torch.Tensor] | list[dict[str, Any]]:
        """Loads a whole batch, see `collate`: sources in memory are indexed at once if there is no transform."""
        batch = getattr(self.source, "batch", None) if self.transform is None else None
        if batch is not None:
            size = len(self.source)
            return collate(batch([index % size for index, _ in keys]))
        return collate(map(self.__getitem__, keys), len(keys))

    def load(self, keys: Sequence[Key]) -> dict[str, torch.Tensor]:
        """Returns the samples as a batch, see `collate`."""
        return _collate_once(self.__getitems__(keys))


def randomness(*numbers: int) -> np.random.Generator:
    """Returns ``np.random.default_rng(numbers)``, made in less time."""
    return np.random.default_rng(np.array(numbers, np.uint32) if max(numbers) < 1 << 32 else numbers)


def _augmented(sample: dict[str, Any], transform: A.Compose, generator: np.random.Generator) -> dict[str, Any]:
    """Applies a pipeline to a sample; see `KeyedDataset.augment`."""
    transform.set_random_state(generator, random.Random(int(generator.integers(2**63))))
    first = transform.transforms[0] if transform.transforms else None
    if not isinstance(first, RandomResizedCrop) or first.p < 1:  # others may write into the image
        sample = {**sample, "image": np.require(sample["image"], requirements="W")}
    if sample["image"].ndim == 3:
        augmented: dict[str, Any] = transform(**sample)
    else:  # albumentations' key of clips
        augmented = transform(images=sample["image"], **{k: v for k, v in sample.items() if k != "image"})
        augmented["image"] = augmented.pop("images")
    return augmented


def _least_reduction(transforms: Sequence[A.Compose | None], height: int, width: int) -> int:
    """Returns the smallest `augmentations.reduction` of several pipelines."""
    return min(reduction(transform, height, width) for transform in transforms)


def collate(
    samples: Mapping[str, NDArray[Any]] | Iterable[Mapping[str, Any]], count: int | None = None
) -> dict[str, Any]:
    """Stacks samples to a batch.

    Args:
        samples: dictionaries of arrays and numbers of the same shapes, or one dictionary of stacked arrays; ``image``
            is uint8 H×W×C, or for clips T×H×W×C. Tensors, such as the boxes of an image, are not stacked.
        count: number of samples, if they are made one by one as they are stacked.

    Returns:
        The same keys as tensors, or as lists of tensors; ``image`` is uint8 B×C×H×W in channels-last memory format. For
        clips it is B×T×C×H×W, with black frames after the end of shorter ones, and ``length``, int64 B, is the number
        of valid frames. ``views`` is a list of uint8 B×C×H×W.
    """
    batch: dict[str, Any] = {}
    gathered = samples if isinstance(samples, Mapping) else _gathered(samples, count)
    for key, values in gathered.items():
        if isinstance(values, list) and isinstance(values[0], torch.Tensor):
            batch[key] = values
        elif key == "views":
            batch[key] = [torch.from_numpy(np.stack(view)).movedim(-1, -3) for view in zip(*values, strict=True)]
        elif key == "image" and values[0].ndim == 4:
            batch["length"] = torch.tensor([len(clip) for clip in values])
            batch[key] = pad_sequence(
                [torch.from_numpy(np.ascontiguousarray(clip)) for clip in values], batch_first=True
            )
        else:
            batch[key] = torch.from_numpy(np.ascontiguousarray(values))
    batch["image"] = batch["image"].movedim(-1, -3)
    return batch


def _gathered(samples: Iterable[Mapping[str, Any]], count: int | None) -> dict[str, Any]:
    """Returns the values of each key; an image is copied to its place in the batch while the processor's cache has it."""
    gathered: dict[str, Any] = {}
    for place, sample in enumerate(samples):
        for key, value in sample.items():
            if key == "image" and value.ndim == 3:
                if not place:
                    gathered[key] = np.empty((count or length_hint(samples), *value.shape), value.dtype)
                gathered[key][place] = value
            else:
                gathered.setdefault(key, []).append(value)
    return gathered


def _collate_once(samples: Any) -> dict[str, torch.Tensor]:
    return samples if isinstance(samples, dict) else collate(samples)


def _start_worker(_: int) -> None:
    # Parallelism comes from the workers: OpenCV's own threads would compete for the same cores.
    cv2.setNumThreads(0)
    cv2.ocl.setUseOpenCL(False)
    torch.set_num_threads(1)


class KeyedLoader:
    """A loader whose batches are a function of (seed, epoch, position), and which resumes in mid-epoch.

    Training batches are consecutive slices of one permutation of the whole set; each of ``world_size`` processes takes
    its share of every slice, so that two processes with batch size B get the samples of one with 2·B. An incomplete
    last slice is dropped unless it is the only one. In evaluation each sample is used exactly once over all processes,
    and every process gets the same number of non-empty batches.

    It is not a DataLoader, so that Lightning does not replace its sampler.

    Args:
        dataset: returns dictionaries by (index, epoch).
        batch_size: samples per batch and process.
        training: shuffle in each epoch, and drop an incomplete last batch.
        seed: seed of the run.
        rank, world_size: rank of this process, and number of processes.
        num_workers: worker processes that read and augment; batches do not depend on their number.
        same_order: use the order of epoch 0 in all epochs, to overfit a few batches.

    Raises:
        DataError: there are fewer samples than processes.
    """

    def __init__(
        self,
        dataset: KeyedDataset,
        batch_size: int,
        training: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        same_order: bool = False,
    ) -> None:
        if cast(Any, batch_size) == "auto":
            if training:
                raise DataError("--data.batch_size auto is chosen by the command fit alone: give a number here.")
            batch_size = 64
        if len(dataset) < world_size:
            raise DataError(
                f"{len(dataset)} sample{'s' * (len(dataset) != 1)} cannot be divided among {world_size} processes: give fewer --trainer.devices, or more samples."
            )
        self.dataset, self.batch_size, self.training, self.seed = dataset, batch_size, training, seed
        self.rank, self.world_size, self.same_order = rank, world_size, same_order
        self.epoch = self.batches_done = self._first = 0
        self.num_workers, self.batch_sampler = num_workers, _Batches(self)
        self._loader: DataLoader[dict[str, torch.Tensor]] | None = None

    def __len__(self) -> int:
        size, whole = len(self.dataset), self.batch_size * self.world_size
        if self.training:
            return max(1, self.dataset.epoch_size // whole)
        return min(-(-size // whole), size // self.world_size)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iteration."""
        if epoch != self.epoch:
            self.epoch, self._first = epoch, 0

    def keys(self) -> Iterator[list[Key]]:
        """Returns the remaining batches of this epoch and process as lists of (index, epoch)."""
        epoch, batches = self.epoch, self.split()[self._first :]
        return ([(index, epoch) for index in batch.tolist()] for batch in batches)  # without `self`, see `_Batches`

    def split(self) -> Sequence[NDArray[np.int64]]:
        """Returns the indices of all batches of this epoch and process."""
        if not self.training:
            return np.array_split(np.arange(self.rank, len(self.dataset), self.world_size), len(self))
        order = self.dataset.order(np.random.default_rng((self.seed, 0 if self.same_order else self.epoch)))
        piece = self.batch_size * self.world_size
        return [order[i * piece : (i + 1) * piece][self.rank :: self.world_size] for i in range(len(self))]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        # A generator starts at its first `next`, by which time Lightning has called set_epoch.
        self.batches_done = self._first
        batches: Iterable[dict[str, torch.Tensor]]
        if self.num_workers == 0 and not torch.cuda.is_available():  # all that a DataLoader then does, in half the time
            torch.empty((), dtype=torch.int64).random_()  # it draws a seed, too
            batches = (_collate_once(self.dataset.__getitems__(keys)) for keys in self.batch_sampler)
        else:
            if self._loader is None:
                self._loader = DataLoader(
                    self.dataset,
                    batch_sampler=self.batch_sampler,
                    collate_fn=_collate_once,
                    num_workers=self.num_workers,
                    persistent_workers=self.num_workers > 0,
                    worker_init_fn=_start_worker,
                    pin_memory=torch.cuda.is_available(),
                )
            batches = self._loader
        try:
            for batch in batches:
                self.batches_done += 1
                yield batch
        except DataError as error:  # torch prepends the worker's traceback to the message
            raise DataError(str(error).rpartition(f"{DataError.__module__}.DataError: ")[2].strip()) from None
        self._first = 0

    def close(self) -> None:
        """Ends the workers; the next iteration starts others. A loader that the garbage collector finds in a cycle of references
        has its queues closed before the workers are told to end, and waits five seconds for each."""
        self._loader = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the position for a checkpoint."""
        return {"epoch": self.epoch, "batches_done": self.batches_done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the position from `state_dict`."""
        self.epoch, self._first = state["epoch"], state["batches_done"]
        self.batches_done = self._first


class Picked(Dataset[dict[str, Any]]):
    """A subset of a data set."""

    def __init__(self, dataset: KeyedDataset, chosen: NDArray[np.int64]) -> None:
        self.dataset, self.chosen = dataset, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitems__(self, keys: Sequence[Key]) -> Any:
        return self.dataset.__getitems__([(int(self.chosen[index]), epoch) for index, epoch in keys])


class _Batches:
    """Batch sampler of the DataLoader, with the keys of a `KeyedLoader`."""

    def __init__(self, loader: KeyedLoader) -> None:
        # Lightning calls its set_epoch. For why it is no cycle of references, see `KeyedLoader.close`.
        self.sampler: KeyedLoader = weakref.proxy(loader)

    def __iter__(self) -> Iterator[list[Key]]:
        return self.sampler.keys()

    def __len__(self) -> int:
        return len(self.sampler)
