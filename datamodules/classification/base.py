"""What all data with one label an image share: sources in memory and of files, splits, batches."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import albumentations as A
import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split

from datamodules.augmentations import Strength, evaluation, training
from datamodules.base import DataError, Source, VisionDataModule
from datamodules.images import inspect_images, read_image
from datamodules.options import OWN, Own, PositiveInt, Preprocessing, Share


class ArraySource:
    """Labelled images in memory.

    Args:
        images: uint8 N×H×W×C.
        labels: int64 N.
    """

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": self.labels[index]}

    def batch(self, indices: Sequence[int]) -> dict[str, NDArray[Any]]:
        """Several samples at once, stacked."""
        return {"image": self.images[indices], "label": self.labels[indices]}

    def subset(self, indices: NDArray[np.intp]) -> "ArraySource":
        """The samples at these positions."""
        return ArraySource(self.images[indices], self.labels[indices])

    @cached_property
    def digest(self) -> str:
        """See `Source.digest`."""
        return hashlib.blake2b(self.images.tobytes() + self.labels.tobytes(), digest_size=16).hexdigest()


class FileSource:
    """Labelled image files.

    Args:
        paths: the files; kept as one array, since a list of Python strings grows in every worker process.
        labels: int64 N.
        channels: 3 to read RGB, 1 to read grey.
        digests: content digest of each file, once `inspect_images` has found them.
    """

    def __init__(
        self,
        paths: Sequence[str] | NDArray[np.str_],
        labels: NDArray[np.int64],
        channels: int = 3,
        digests: Sequence[str] | NDArray[np.str_] | None = None,
    ) -> None:
        self.paths, self.labels, self.channels = np.asarray(paths, dtype=np.str_), labels, channels
        self.digests = None if digests is None else np.asarray(digests, dtype=np.str_)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": read_image(str(self.paths[index]), self.channels), "label": self.labels[index]}

    def subset(self, indices: NDArray[np.intp]) -> "FileSource":
        """The samples at these positions."""
        digests = None if self.digests is None else self.digests[indices]
        return FileSource(self.paths[indices], self.labels[indices], self.channels, digests)

    @property
    def digest(self) -> str:
        """See `Source.digest`."""
        digests = inspect_images(self.paths)["digest"] if self.digests is None else self.digests
        lines = [f"{digest} {label}" for digest, label in zip(digests, self.labels, strict=True)]
        return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


class JoinedSource:
    """Labelled images of one source after those of another.

    Args:
        sources: they number their classes alike.
    """

    def __init__(self, *sources: "Images") -> None:
        self.sources = sources
        self.labels = np.concatenate([source.labels for source in sources])
        self._ends = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self.sources[which][index - int(self._ends[which]) + len(self.sources[which])]

    @cached_property
    def digest(self) -> str:
        """See `Source.digest`."""
        return hashlib.blake2b("".join(s.digest for s in self.sources).encode(), digest_size=16).hexdigest()


Images = ArraySource | FileSource


def split(
    source: Images, share: float, label_names: Sequence[str], purpose: str, least: int = 2
) -> tuple[Images, Images]:
    """Draws a stratified part with a fixed seed, so that every run of a data set has the same parts.

    Every class is in both, also a rare one.

    Args:
        source: what is shared out.
        share: share of the second part, in (0, 1).
        label_names: names for the message.
        purpose: what the second part is for, for the message.
        least: images that a class must have.

    Returns:
        The rest and the part.

    Raises:
        DataError: there are too few images of a class to be in both.
    """
    counts = np.bincount(source.labels, minlength=len(label_names))
    for name, count in zip(label_names, counts, strict=True):
        if count < least:
            raise DataError(
                f"Class {name!r} has {count} image{'' if count == 1 else 's'}, too few to spare one for {purpose}: "
                f"it takes {least}. Add images, leave the class out, or bring splits of your own."
            )
    size = max(round(share * len(source)), len(label_names))
    rest, part = train_test_split(np.arange(len(source)), test_size=size, stratify=source.labels, random_state=0)
    for label in np.setdiff1d(source.labels, source.labels[part]):
        moved = rest[source.labels[rest] == label][0]
        rest, part = rest[rest != moved], np.append(part, moved)
    return source.subset(np.sort(rest)), source.subset(np.sort(part))


def few(
    source: Images, number: int, label_names: Sequence[str], seed: int, option: str = "--data.train_per_class"
) -> Images:
    """So many images of each class.

    Args:
        source: what they are drawn from.
        number: of each class.
        label_names: names of the classes.
        seed: the same one draws the same images, and a smaller number a part of what a larger one does.
        option: what the number is called where it was given.

    Raises:
        DataError: a class has fewer.
    """
    generator, chosen = np.random.default_rng(seed), []
    for label, name in enumerate(label_names):
        own = np.flatnonzero(source.labels == label)
        if len(own) < number:
            raise DataError(
                f"Class {name!r} has {len(own)} images to train on, fewer than {option} {number}: give a smaller number."
            )
        chosen.append(generator.permutation(own)[:number])
    return source.subset(np.sort(np.concatenate(chosen)))


@dataclass(kw_only=True, eq=False, repr=False)
class ClassificationDataModule(VisionDataModule):
    """Images with one label each.

    Batches: ``image`` uint8 B×C×S×S with S = ``image_size``, ``label`` int64 B.

    Args:
        augmentation: strength of the changes made to training images.
        image_size: side of the square images that the network sees, in pixels.
        crop_pct: share of the shorter side that evaluation keeps, in (0, 1]; 1 keeps all but what makes it
            square. None takes 0.875, or 1 for images of up to 64 pixels.
        flip: mirror training images, where that does not change the label.
        train_per_class: learn from so many images of each class only, drawn by the seed; a smaller number draws a part
            of what a larger one does.
        fit: what becomes of images that are not square: ``crop`` cuts their ends off, ``extend`` fills them up with the
            colours of their border.
    """

    one_size = True  # all images have the size that is the default

    augmentation: Strength = "standard"
    image_size: Own[PositiveInt] = 224
    crop_pct: Own[Share] = OWN
    flip: Own[bool] = True
    train_per_class: PositiveInt | None = None
    fit: Literal["crop", "extend"] = "crop"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.crop_pct = self.crop_pct or (0.875 if self.image_size > 64 else 1.0)

    @property
    def label_names(self) -> list[str]:
        """The classes' names, in the order of their numbers."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """Number of classes.

        Raises:
            DataError: fewer than two.
        """
        if len(self.label_names) < 2:
            raise DataError(
                f"{self.title} has one class only, {self.label_names[0]!r}, so that nothing can be told apart: "
                "add images of another."
            )
        return len(self.label_names)

    @property
    def attributes(self) -> dict[str, list[str]]:
        """What the classes differ in, and the values that it can have; classes are all combinations, the last attribute
        changing fastest. By itself it is one: the class."""
        return {"domain": list(self.label_names)}

    @property
    def preprocessing(self) -> Preprocessing:
        """See `VisionDataModule.preprocessing`."""
        return Preprocessing(self.image_size, self.in_chans, self.fit, self.crop_pct)

    def transform(self, training_split: bool) -> A.Compose | None:
        """See `VisionDataModule.transform`; None where arrays already have the size and nothing is to change."""
        fits = self.one_size and self.image_size == type(self).image_size and self.crop_pct == 1
        if training_split and self.augmentation != "none":
            return training(self.augmentation, self.image_size, self.crop_pct, self.flip, self.fit)
        return None if fits else evaluation(self.image_size, self.crop_pct, self.fit)

    @cached_property
    def sources(self) -> dict[str, Source]:
        """See `VisionDataModule.sources`.

        Raises:
            DataError: a class has fewer images than ``train_per_class``.
        """
        sources = self.load()
        if self.train_per_class is not None and "train" in sources:
            sources["train"] = few(sources["train"], self.train_per_class, self.label_names, self.seed)  # type: ignore[arg-type]
        return sources

    def identity(self) -> dict[str, Any]:
        """Name, label names, and per split the size, the images of each class and the content digest."""
        identity = super().identity() | {"label_names": list(self.label_names)}
        for name, source in self.sources.items():
            counts = np.bincount(source.labels, minlength=len(self.label_names))  # type: ignore[attr-defined]
            identity["splits"][name]["classes"] = dict(zip(self.label_names, counts.tolist(), strict=True))
        return identity
