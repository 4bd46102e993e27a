"""Base class of data modules: exact, resumable loading, splits, and the policy for bad input."""

import hashlib
import itertools
import operator
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Generic, Protocol, cast, get_args

import albumentations as A
import cv2
import lightning as L
import numpy as np
import torch
from annotated_types import GroupedMetadata
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from typing_extensions import TypeVar

from datamodules.augmentations import Fit, reduction, sides
from datamodules.options import OWN, BatchSize, NonNegativeInt, Own, Preprocessing, Reading

P = TypeVar("P")
S = TypeVar("S", bound="Source", default="Source")
T = TypeVar("T")
Key = tuple[int, int]  # (index of the sample, epoch)
Crop = tuple[
    int | str, float, float
]  # size of a view, and the least and the largest share of the image's area that it shows


class DataError(ValueError):
    """Error for unusable data; the message names the file or the value, and the way out."""


def listed(given: Iterable[str]) -> str:
    """Joins names for a message; of many, the first eight."""
    names = list(given)
    shown = ", ".join(map(str, names[:8]))
    return f"{shown}, … ({len(names)} in all)" if len(names) > 8 else shown


def repeated(values: Iterable[T]) -> tuple[T, int] | None:
    """Returns the most frequent value and its count; None if all values are unique."""
    found = Counter(values).most_common(1)
    return found[0] if found and found[0][1] > 1 else None


def digest_of(content: bytes) -> str:
    """Returns a hexadecimal hash of content, equal on every machine."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def digest_of_lines(lines: Iterable[bytes]) -> str:
    """Returns `digest_of` of lines joined by line breaks, without having all of them in memory."""
    found, rest = hashlib.blake2b(digest_size=16), iter(lines)
    mark = b""
    while part := list(itertools.islice(rest, 1 << 16)):
        found.update(mark + b"\n".join(part))
        mark = b"\n"
    return found.hexdigest()


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Yields the path of a new folder to write to, which is renamed to its final name once complete, and removed on errors.

    Raises:
        DataError: the folder exists.
    """
    if Path(folder).exists():
        raise DataError(f"{Path(folder).resolve()} already exists: name a new folder.")
    place = Path(folder).absolute()
    place.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{place.name}-", dir=place.parent) as part:
        made = Path(part, place.name)
        yield made
        made.rename(place)


def settle(settings: Any, option: str = "--data") -> None:
    """Replaces settings that are None with the class's default, and checks the ranges of numbers.

    Args:
        settings: a dataclass.
        option: prefix of its options on the command line.

    Raises:
        DataError: a number is out of range.
    """
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    for each in fields(settings):
        if getattr(settings, each.name) is None:
            made = each.default if each.default_factory is MISSING else each.default_factory()
            setattr(settings, each.name, made)
        given = [one for kind in (each.type, *get_args(each.type)) for one in getattr(kind, "__metadata__", ())]
        for limit in (one for some in given for one in (some if isinstance(some, GroupedMetadata) else [some])):
            word, value = type(limit).__name__.lower(), getattr(settings, each.name)
            bound = getattr(limit, word)
            if isinstance(value, int | float) and not getattr(operator, word)(value, bound):
                raise DataError(f"{option}.{each.name} must be {words[word]} {bound}, not {value}.")


class Source(Protocol):
    """Interface of a split before augmentation: sample i is a dictionary with ``image`` (uint8 H×W×C, for more than 8
    bits float32 in [0, 1]; for clips T×H×W×C) and the task's own keys.

    A source of files may have ``paths``, the file of each sample, and ``reduced(reduction)``, which returns the same
    samples decoded at reduced size; a source in memory may have ``batch(indices)``, which returns several samples
    stacked.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

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

    def __getitem__(self, key: Key) -> dict[str, Any]:
        index, epoch = key
        given = sample = self.source[index % len(self.source)]
        if self.transform is not None:
            sample = self.augment(given, np.random.default_rng((self.seed, epoch, index)))
        if self.views:
            draws = (np.random.default_rng((self.seed, epoch, index, n)) for n in range(1, len(self.views) + 1))
            views = [_augmented(given, *each)["image"] for each in zip(self.views, draws, strict=True)]
            sample = {**sample, "views": views}
        return sample

    def augment(self, sample: dict[str, Any], generator: np.random.Generator) -> dict[str, Any]:
        """Applies `transform` with the given random generator; all frames of a clip are transformed alike."""
        assert self.transform is not None
        return _augmented(sample, self.transform, generator)

    def __getitems__(self, keys: Sequence[Key]) -> dict[str, torch.Tensor] | list[dict[str, Any]]:
        """Loads a whole batch: sources in memory are indexed at once if there is no transform."""
        batch = getattr(self.source, "batch", None) if self.transform is None else None
        if batch is not None:
            return collate(batch([index % len(self.source) for index, _ in keys]))
        return [self[key] for key in keys]


def _augmented(sample: dict[str, Any], transform: A.Compose, generator: np.random.Generator) -> dict[str, Any]:
    """Applies a pipeline to a sample; see `KeyedDataset.augment`."""
    transform.set_random_state(generator, random.Random(int(generator.integers(2**63))))
    if sample["image"].ndim == 3:
        augmented: dict[str, Any] = transform(**sample)
    else:  # albumentations' key of clips
        augmented = transform(images=sample["image"], **{k: v for k, v in sample.items() if k != "image"})
        augmented["image"] = augmented.pop("images")
    return augmented


def _least_reduction(transforms: Sequence[A.Compose | None], height: int, width: int) -> int:
    """Returns the smallest `augmentations.reduction` of several pipelines."""
    return min(reduction(transform, height, width) for transform in transforms)


def collate(samples: Mapping[str, NDArray[Any]] | Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stacks samples to a batch.

    Args:
        samples: dictionaries of arrays and numbers of the same shapes, or one dictionary of stacked arrays; ``image``
            is uint8 H×W×C, or for clips T×H×W×C. Tensors, such as the boxes of an image, are not stacked.

    Returns:
        The same keys as tensors, or as lists of tensors; ``image`` is uint8 B×C×H×W in channels-last memory format. For
        clips it is B×T×C×H×W, with black frames after the end of shorter ones, and ``length``, int64 B, is the number
        of valid frames. ``views`` is a list of uint8 B×C×H×W.
    """
    batch: dict[str, Any] = {}
    for key in samples if isinstance(samples, Mapping) else samples[0]:
        values = samples[key] if isinstance(samples, Mapping) else [sample[key] for sample in samples]
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
                raise DataError("--data.batch_size auto is found out by the command fit: give a number here.")
            batch_size = 64
        if len(dataset) < world_size:
            raise DataError(f"{len(dataset)} samples cannot be divided among {world_size} processes: use fewer.")
        self.dataset, self.batch_size, self.training, self.seed = dataset, batch_size, training, seed
        self.rank, self.world_size, self.same_order = rank, world_size, same_order
        self.epoch = self.batches_done = self._first = 0
        self.batch_sampler = _Batches(self)
        self._loader: DataLoader[dict[str, torch.Tensor]] = DataLoader(
            dataset,
            batch_sampler=self.batch_sampler,
            collate_fn=_collate_once,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            worker_init_fn=_start_worker,
            pin_memory=torch.cuda.is_available(),
        )

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
        """Yields the remaining batches of this epoch and process as lists of (index, epoch)."""
        for batch in self.split()[self._first :]:
            yield [(int(index), self.epoch) for index in batch]

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
        try:
            for batch in self._loader:
                self.batches_done += 1
                yield batch
        except DataError as error:  # torch prepends the worker's traceback to the message
            raise DataError(str(error).rpartition(f"{DataError.__module__}.DataError: ")[2].strip()) from None
        self._first = 0

    def state_dict(self) -> dict[str, Any]:
        """Returns the position for a checkpoint."""
        return {"epoch": self.epoch, "batches_done": self.batches_done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the position from `state_dict`."""
        self.epoch, self._first = state["epoch"], state["batches_done"]
        self.batches_done = self._first


class _Picked(Dataset[dict[str, Any]]):
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
        self.sampler = loader  # Lightning calls its set_epoch

    def __iter__(self) -> Iterator[list[Key]]:
        return self.sampler.keys()

    def __len__(self) -> int:
        return len(self.sampler)


@dataclass(kw_only=True, eq=False, repr=False)
class VisionDataModule(L.LightningDataModule, Generic[S]):
    """Base class of data modules: a subclass loads the splits and defines their transforms.

    Equal seeds give equal order, augmentation and randomness inside the network (dropout, mixup), for any number of
    workers, and after a resume in mid-epoch.

    Args:
        batch_size: samples per batch and process. With ``auto``, ``fit`` finds the largest power of two that fits into
            the device's memory, or into 4 GiB per process on a CPU; other commands use their default.
        num_workers: worker processes that read and augment; None for the cores available to this process, up to eight,
            or no workers for two or fewer cores.
        seed: seed of order and augmentation. The command line sets it to ``seed_everything``.
    """

    batch_size: BatchSize = 64
    num_workers: Own[NonNegativeInt] = OWN
    seed: int = 0

    labels_are: ClassVar[str] = "classes"

    def __post_init__(self) -> None:
        super().__init__()
        settle(self)
        _ = self.size
        if self.num_workers is None:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            cores //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            self.num_workers = 0 if cores <= 2 else min(cores - 1, 8)
        self.bad_files: dict[str, str] = {}
        self.drawn = False  # whether the splits were drawn from one set, so that earlier splits are unknown
        self.undivided = False  # whether such a set is used as the test split as a whole
        self.view_crops: Sequence[Crop] = ()  # of a training image, for self-supervised learning
        self._training: KeyedLoader | None = None
        self._position: dict[str, Any] = {}

    def __str__(self) -> str:
        return self.title  # Lightning's own creates loaders

    def load(self) -> dict[str, S]:
        """Loads the splits: ``train`` and ``val`` always, ``test`` if there is one, and checks them."""
        raise NotImplementedError

    def transform(self, training: bool) -> A.Compose | None:
        """Returns the albumentations pipeline of a split; None for no transform."""
        raise NotImplementedError

    @property
    def preprocessing(self) -> Preprocessing:
        """Preprocessing from an image to the network's input."""
        raise NotImplementedError

    @property
    def title(self) -> str:
        """Name of the data set in a tracked run."""
        return type(self).__name__

    @property
    def in_chans(self) -> int:
        """Number of image channels, 3 for RGB or 1 for grey."""
        return 3

    @property
    def reading(self) -> Reading:
        """How files are decoded."""
        return Reading(self.in_chans)

    @property
    def bit_depth(self) -> int:
        """Bits per value; images with more than 8 bits are float32 in [0, 1] instead of uint8."""
        return self.reading.bits

    @property
    def channel_mean(self) -> list[float] | None:
        """Mean of each channel, relative to the largest value; None for that of the network."""
        return None

    @property
    def channel_std(self) -> list[float] | None:
        """Standard deviation of each channel, relative to the largest value; None for that of the network."""
        return None

    def fitted(self, fit: Fit, crop_pct: float = Preprocessing.crop_pct) -> Preprocessing:
        """Returns the `preprocessing` of images that are decoded by ``reading`` and resized to ``image_size``."""
        how, size = self.reading, getattr(self, "image_size", 0)
        return Preprocessing(
            size, how.channels, fit, crop_pct, bands=list(how.bands) if how.bands else None, bits=how.bits
        )

    @property
    def class_counts(self) -> list[int]:
        """Number of training images of each class; empty if images have no class."""
        return []

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the network's input, if that is a setting; otherwise zeros."""
        given = getattr(self, "image_size", None)
        try:
            return sides(given) if given else (0, 0)
        except ValueError:
            raise DataError(
                f"--data.image_size must be a whole number of pixels, at least 1, or HEIGHTxWIDTH such as 240x320, not {given}."
            ) from None

    @property
    def class_weights(self) -> list[float] | None:
        """Weight of each class in the loss; None for equal weights."""
        return None

    @cached_property
    def sources(self) -> dict[str, S]:
        """The splits by name."""
        return self.load()

    def identity(self) -> dict[str, Any]:
        """Identifies the data set: its name, and the size and content digest of each split."""
        splits = {name: {"samples": len(source), "digest": source.digest} for name, source in self.sources.items()}
        return {"name": self.title, "splits": splits}

    def shares_place_with(self, settings: Mapping[str, Any]) -> bool:
        """Whether the data are read from the same folder or table as data with the given arguments."""
        places = [(settings.get(key), getattr(self, key, None)) for key in ("root", "file")]
        return any(one and other and os.path.realpath(one) == os.path.realpath(other) for one, other in places)

    def take_whole(self) -> None:
        """Makes the whole set the test split, instead of drawing splits, for a network that was trained on other
        data."""
        self.undivided, self.drawn = True, False
        found = {
            name
            for kind in type(self).__mro__
            for name, value in vars(kind).items()
            if isinstance(value, cached_property)
        }
        for name in found & vars(self).keys():
            del vars(self)[name]

    def divide(
        self,
        parts: Mapping[str, P],
        test: Callable[[P], tuple[P, P] | None],
        val: Callable[[P], tuple[P, P] | None],
    ) -> dict[str, P]:
        """Divides data into splits, and draws missing ones; a set with only a test split stays so.

        Args:
            parts: existing splits, ``train``, ``val`` and ``test``; or ``all`` for data without splits.
            test: splits data into the rest and a test split; returns None if that is impossible.
            val: splits the training data into the rest and a validation split; returns None if that is impossible.
        """
        if "all" in parts and self.undivided:
            return {"test": parts["all"]}
        self.drawn = "all" in parts
        found = {"train" if name == "all" else name: part for name, part in parts.items()}
        for name, missing, draw in (("test", self.drawn, test), ("val", "val" not in found and "train" in found, val)):
            if missing and (two := draw(found["train"])):
                found["train"], found[name] = two
        return {name: found[name] for name in ("train", "val", "test") if name in found}

    def prepare_data(self) -> None:
        """Downloads and checks the data in one process before the others."""
        _ = self.sources

    def dataset(self, split: str, augmented: bool) -> KeyedDataset:
        """Returns the samples of a split, with the transform of training or of evaluation."""
        return KeyedDataset(self.sources[split], self.transform(augmented), self.seed, self.views(augmented))

    def views(self, training: bool) -> list[A.Compose]:
        """Returns the pipelines of the additional views in ``view_crops``; the first view is that of `transform`.

        Raises:
            DataError: the data only support one view of an image.
        """
        if training and self.view_crops:
            raise DataError(f"{self.title} has one view of an image only, and several are to be learned from.")
        return []

    def samples(self, split: str, count: int) -> dict[str, Any]:
        """Returns a batch of samples without augmentation, evenly spread over a split.

        Args:
            split: name of the split.
            count: maximum number of samples.
        """
        dataset = self.dataset(split, False)
        chosen = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int).tolist()
        return _collate_once(dataset.__getitems__([(index, 0) for index in chosen]))

    def loader(self, split: str) -> KeyedLoader:
        """Returns the loader of a split.

        Raises:
            DataError: there is no such split.
        """
        if split not in self.sources:
            remedy = "there is nothing to train on" if split == "train" else "provide one, or evaluate on another"
            raise DataError(f"{self.title} has no {split} split; it has {', '.join(self.sources)}: {remedy}.")
        training, trainer = split == "train", cast(Any, self.trainer)
        overfit = trainer is not None and trainer.overfit_batches > 0
        return self._loader(self.dataset(split, training and not overfit), training=training, same_order=overfit)

    def plain_loader(self, split: str, most: int | None = None, shared: bool = True) -> KeyedLoader:
        """Returns a loader of each sample of a split once, without augmentation.

        Args:
            split: name of the split.
            most: maximum number of samples, a fixed random subset; None for all.
            shared: whether each process loads its share, or all samples.
        """
        dataset: Any = self.dataset(split, False)
        if most is not None and most < len(dataset):
            dataset = _Picked(dataset, np.random.default_rng(0).permutation(len(dataset))[:most])
        return self._loader(dataset, shared=shared)

    def _loader(
        self,
        dataset: KeyedDataset,
        batch_size: int | None = None,
        training: bool = False,
        shared: bool = True,
        same_order: bool = False,
    ) -> KeyedLoader:
        trainer = self.trainer if shared else None
        rank, size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        whole = batch_size or self.batch_size
        return KeyedLoader(dataset, whole, training, self.seed, rank, size, self.num_workers, same_order)

    def train_dataloader(self) -> KeyedLoader:
        """Returns augmented training batches."""
        self._training = self.loader("train")
        self.load_state_dict(self._position)
        return self._training

    def state_dict(self) -> dict[str, Any]:
        """Returns the position of the training, for a checkpoint."""
        return self._training.state_dict() if self._training else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the position from `state_dict`, also if the loader is created later."""
        self._position = state_dict
        if self._training and state_dict:
            self._training.load_state_dict(state_dict)
            self._position = {}

    def val_dataloader(self) -> KeyedLoader:
        """Returns validation batches."""
        return self.loader("val")

    def test_dataloader(self) -> KeyedLoader:
        """Returns test batches."""
        return self.loader("test")

    def predict_dataloader(self) -> KeyedLoader:
        """Returns batches for prediction: the test split, or the validation split without one."""
        return self.loader("test" if "test" in self.sources else "val")

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Reseeds torch for each training batch by (seed, epoch, batch, rank), so that a resumed run draws the same."""
        trainer = self.trainer
        if trainer is not None and trainer.training and not trainer.sanity_checking:
            position = trainer.fit_loop.epoch_loop.batch_idx + 1
            entropy = (self.seed, trainer.current_epoch, position, trainer.global_rank)
            seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
            device = trainer.strategy.root_device
            # Not torch.manual_seed: for each unused kind of device it would store a stack trace, without limit.
            torch.default_generator.manual_seed(seed)
            if device.type != "cpu":
                torch.get_device_module(device).manual_seed(seed)
        return batch
