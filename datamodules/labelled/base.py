"""Base classes of data with one label per image: preprocessing, augmentation, class weights."""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar, Literal, TypeVar

import albumentations as A
import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from datamodules.augmentations import LABELLED, VIEWED, evaluation, sides, training, viewing
from datamodules.augmenting import Augmentation, Augmenter
from datamodules.base import Crop, VisionDataModule
from datamodules.errors import DataError, listed
from datamodules.labelled.balance import BalancedDataset, Sampling, Weighting, class_weights, warn_of_rare
from datamodules.labelled.sources import LabelledSource, LabelSetSource, few
from datamodules.loading import KeyedDataset
from datamodules.options import OWN, ImageSize, Own, PositiveInt, Preprocessing, Share

S = TypeVar("S", bound=LabelledSource)


@dataclass(kw_only=True, eq=False, repr=False)
class LabelledDataModule(VisionDataModule[S]):
    """Base class of data with one label per image: a class, a domain or a person.

    Args:
        augmentation: strength of the augmentation of training images: none, light, standard or strong; or a list of
            albumentations' transforms with their settings, such as ``[light, {RandomGamma: {p: 0.5}}]``.
        image_size: size of the network's input: side of a square in pixels, or ``HEIGHTxWIDTH`` such as ``240x320``.
        crop_pct: fraction of the shorter side that evaluation keeps, in (0, 1]; 1 only crops to the aspect ratio. None
            for 0.875, or 1 for images of up to 64 pixels.
        flip: mirror training images at random; for labels that do not change by mirroring.
        fit: how images of another aspect ratio are resized: ``crop`` crops them, ``pad`` pads them with grey,
            ``extend`` with the colours of their border, ``stretch`` changes their proportions.
    """

    augmentation: Augmentation = "standard"
    image_size: Own[ImageSize] = 224
    crop_pct: Own[Share] = OWN
    flip: Own[bool] = True
    fit: Literal["crop", "pad", "extend", "stretch"] = "crop"
    one_size = True  # whether all images have the default size

    def __post_init__(self) -> None:
        super().__post_init__()
        self.crop_pct = self.crop_pct or (0.875 if min(self.size) > 64 else 1.0)

    @property
    @override
    def preprocessing(self) -> Preprocessing:
        crop_pct = self.crop_pct if self.fit in ("crop", "extend") else Preprocessing.crop_pct
        return self.fitted(self.fit, crop_pct)

    @override
    def transform(self, training_split: bool) -> A.Compose | None:
        if training_split and self.view_crops:
            return self._view(self.view_crops[0])
        if training_split and self.augmentation != "none":
            crops, deep = self.fit == "crop", self.reading.deep
            fit = evaluation(self.image_size, self.crop_pct if crops else 1, self.fit, deep=deep).transforms
            # Objects mostly fill small images: a strong crop would cut them off.
            strengths = LABELLED if min(self.size) > 64 else {key: {**n, "crop": 0.75} for key, n in LABELLED.items()}
            points = self.preprocessing.keypoints or ()
            build = partial(training, size=self.size, flip=self.flip, equalize=self.in_chans in (1, 3))
            augmenter = Augmenter(
                self.size, self.in_chans, fit, strengths, build, keep=not crops, deep=deep, points=points
            )
            return augmenter.compose(self.augmentation)
        fits = self.one_size and self.image_size == type(self).image_size and self.crop_pct == 1
        return None if fits else self.preprocessing.transform()

    @override
    def views(self, training: bool) -> list[A.Compose]:
        return [self._view(crop) for crop in self.view_crops[1:]] if training else []

    def _view(self, crop: Crop) -> A.Compose:
        """Returns the pipeline of one view of an image: crops differ in size between views, and ``augmentation`` is a
        strength of `VIEWED`, or a list."""
        size, *scale = crop
        fit = evaluation(size, 1, self.fit).transforms
        build = partial(viewing, size=sides(size), scale=scale, flip=self.flip, colour=self.in_chans == 3)
        augmenter = Augmenter(sides(size), self.in_chans, fit, VIEWED, build, keep=self.fit != "crop")
        return augmenter.compose([{"light": {"jitter": 0}}] if self.augmentation == "none" else self.augmentation)


@dataclass(kw_only=True, eq=False, repr=False)
class NamedDataModule(LabelledDataModule[S]):
    """Base class of data with named labels.

    Args:
        class_weighting: weight of each class in the loss: ``none``, equal weights; ``balanced``, the inverse of its
            number of training images; ``sqrt``, the square root of that; or a number per class, in the order of their
            names.
    """

    class_weighting: Weighting = "none"

    lone: ClassVar[str] = "add images of another"  # advice for data with a single class
    remedy: ClassVar[str] = "--data.class_weighting balanced lets rare classes weigh more in the loss."

    @property
    def label_names(self) -> list[str]:
        """Class names, by index."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """Number of classes.

        Raises:
            DataError: there are fewer than two.
        """
        if len(self.label_names) < 2:
            raise DataError(
                f"{self.title} has only one class, {self.label_names[0]!r}, so there is nothing to tell apart: "
                f"{self.lone}."
            )
        return len(self.label_names)

    @property
    @override
    def class_weights(self) -> list[float] | None:
        """See ``class_weighting``.

        Raises:
            DataError: the numbers do not match the classes, or one is negative.
        """
        given = self.class_weighting
        if isinstance(given, list):
            names = list(self.label_names)
            if len(given) != len(names) or not all(0 <= weight < float("inf") for weight in given) or not any(given):
                raise DataError(
                    f"--data.class_weighting {given} must have {len(names)} numbers, 0 or more each, one for each class of "
                    f"{self.title} in this order: {listed(names)}."
                )
            return given
        if given == "none" or "train" not in self.sources:
            return None
        return self._weights(self.sources["train"].labels)

    def _weights(self, labels: NDArray[np.int64]) -> list[float]:
        """Returns the weights of the classes for training labels."""
        return class_weights(self._images(labels), self.class_weighting)

    def _images(self, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """Counts the images of each class, int64 K, from labels."""
        return np.bincount(labels, minlength=len(self.label_names))

    @property
    @override
    def class_counts(self) -> list[int]:
        return self._images(self.sources["train"].labels).tolist() if "train" in self.sources else []

    @property
    def balances(self) -> bool:
        """Whether a setting compensates for rare classes."""
        return self.class_weighting != "none"

    @override
    def setup(self, stage: str) -> None:
        if stage == "fit" and (counts := self.class_counts) and not self.balances:
            warn_of_rare(self.label_names, np.array(counts), self.remedy)

    @override
    def identity(self) -> dict[str, Any]:
        """Returns name, label names, and for each split the size, the images of each class and the content digest."""
        identity = super().identity() | {"label_names": list(self.label_names)}
        for name, source in self.sources.items():
            counts = self._images(source.labels)
            identity["splits"][name]["classes"] = dict(zip(self.label_names, counts.tolist(), strict=True))
        return identity


@dataclass(kw_only=True, eq=False, repr=False)
class ClassificationDataModule(NamedDataModule[LabelledSource]):
    """Images with one class each.

    Batches: ``image`` uint8 B×C×S×S with S = ``image_size``, ``label`` int64 B.

    Args:
        train_per_class: number of training images per class, drawn by the seed; smaller sets are subsets of larger
            ones.
        sampling: how often images of each class are drawn: ``none``, each image once per epoch; ``balanced``, all
            classes equally often; ``sqrt``, in proportion to the square roots of their sizes. The length of an epoch
            does not change.
    """

    train_per_class: PositiveInt | None = None
    sampling: Sampling = "none"

    remedy = (
        "--data.sampling balanced lets the network see all classes equally often; --data.class_weighting balanced lets rare "
        "ones weigh more in a classifier's loss."
    )

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampling != "none" and self.class_weighting != "none":
            raise DataError(
                f"--data.sampling {self.sampling} and --data.class_weighting {self.class_weighting} would compensate "
                "for rare classes twice: choose one of them."
            )

    @property
    @override
    def balances(self) -> bool:
        return super().balances or self.sampling != "none"

    @override
    def dataset(self, split: str, augmented: bool) -> KeyedDataset:
        if split != "train" or not augmented or self.sampling == "none":
            return super().dataset(split, augmented)
        return BalancedDataset(
            self.sources[split], self.transform(augmented), self.seed, self.sampling, self.views(augmented)
        )

    @property
    def targets(self) -> dict[str, list[str]]:
        """The tasks that images have targets for, with the class names of each."""
        return {"classification": list(self.label_names)}

    @property
    def attributes(self) -> dict[str, list[str]]:
        """Attributes of the classes, and their values; classes are all combinations, the last attribute varying
        fastest. By default, a single attribute, the class."""
        return {"domain": list(self.label_names)}

    @cached_property
    def sources(self) -> dict[str, LabelledSource]:
        """See `VisionDataModule.sources`.

        Raises:
            DataError: a class has fewer images than ``train_per_class``.
        """
        sources = self.load()
        if self.train_per_class is not None and "train" in sources:
            sources["train"] = few(sources["train"], self.train_per_class, self.label_names, self.seed)
        return sources


@dataclass(kw_only=True, eq=False, repr=False)
class MultiLabelDataModule(NamedDataModule[LabelSetSource]):
    """Images with any number of labels each.

    Batches: ``image`` uint8 B×C×S×S with S = ``image_size``, ``labels`` int64 B×K of 0 and 1.
    """

    lone = "whether an image has it or not is two classes, of which `Manifest` takes one for each image"

    @override
    def _images(self, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        return labels.sum(0)

    @override
    def _weights(self, labels: NDArray[np.int64]) -> list[float]:
        present = labels.sum(0)
        weights = (len(labels) - present) / np.maximum(present, 1)
        return (weights**0.5 if self.class_weighting == "sqrt" else weights).tolist()
