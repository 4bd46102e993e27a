"""Base class of data modules: splits, loaders, and the randomness of a training."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Generic, cast
from weakref import WeakSet

import albumentations as A
import lightning as L
import numpy as np
import torch
from typing_extensions import TypeVar

from datamodules.augmentations import Fit, sides
from datamodules.errors import DataError
from datamodules.loading import KeyedDataset, KeyedLoader, Picked, Source
from datamodules.options import OWN, BatchSize, NonNegativeInt, Own, Preprocessing, Reading, settle

P = TypeVar("P")
S = TypeVar("S", bound=Source, default=Source)
Crop = tuple[
    int | str, float, float
]  # size of a view, and the least and the largest share of the image's area that it shows


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
        self._loaders: WeakSet[KeyedLoader] = WeakSet()
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

    @property
    def extent(self) -> str:
        """The number of samples of each split, for people."""
        return ", ".join(f"{len(source):,} {split}" for split, source in self.sources.items())

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
            raise DataError(
                f"The task compares several augmented views of each image, and {self.title} makes one: give --data of labelled images, such as "
                "ImageFolder."
            )
        return []

    def samples(self, split: str, count: int) -> dict[str, Any]:
        """Returns a batch of samples without augmentation, evenly spread over a split."""
        dataset = self.dataset(split, False)
        chosen = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int).tolist()
        return dataset.load([(index, 0) for index in chosen])

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
            dataset = Picked(dataset, np.random.default_rng(0).permutation(len(dataset))[:most])
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
        loader = KeyedLoader(dataset, whole, training, self.seed, rank, size, self.num_workers, same_order)
        self._loaders.add(loader)
        return loader

    def teardown(self, stage: str) -> None:
        """Ends the workers of all loaders, after each command of a trainer."""
        for loader in self._loaders:
            loader.close()

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
