"""Labelled images, in memory or in files, with a class, a domain or a person as label."""

from collections.abc import Sequence
from copy import copy
from functools import cached_property
from typing import Any, ClassVar, Self, cast

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset
from typing_extensions import override

from datamodules.decoded import ImageFiles
from datamodules.digests import digest_of, digest_of_lines
from datamodules.errors import DataError
from datamodules.images import Reduction
from datamodules.loading import Sample
from datamodules.paths import Paths
from datamodules.splits import called

Images = NDArray[np.uint8] | NDArray[np.object_] | ImageFiles


class LabelledSource:
    """Labelled images.

    Args:
        images: uint8 N×H×W×C, or N files; or N clips, objects that are uint8 T×H×W×C.
        labels: int64 N.
    """

    key: ClassVar[str] = "label"  # key of the labels in samples

    def __init__(self, images: Images, labels: NDArray[Any]) -> None:
        self.images: Any = images
        self.labels = labels

    @property
    def paths(self) -> Paths | None:
        """Paths of the images, if they are files."""
        return self.images.paths if isinstance(self.images, ImageFiles) else None

    def __len__(self) -> int:
        return len(self.labels)

    def reduced(self, reduction: Reduction) -> Self:
        """Returns the same samples, decoded at reduced size if they are files."""
        same = copy(self)
        if isinstance(self.images, ImageFiles):
            same.images = self.images.reduced(reduction)
        return same

    def __getitem__(self, index: int) -> Sample:
        return {"image": self.images[index], self.key: self.labels[index]}

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """Returns several samples at once, for `collate`; their images must have the same size."""
        stacked = isinstance(self.images, np.ndarray) and self.images.dtype == np.uint8
        images = self.images[np.asarray(indices)] if stacked else [self.images[i] for i in indices]
        return {"image": images, self.key: self.labels[indices]}

    def subset(self, indices: NDArray[Any]) -> Self:
        """Returns the samples at the given indices."""
        return type(self)(self.images[indices], self.labels[indices])

    @cached_property
    def digest(self) -> str:
        """See `Source.digest`."""
        if isinstance(self.images, ImageFiles):
            pairs = zip(self.images.digests.tolist(), self.labels.tolist(), strict=True)
            return digest_of_lines(b"%s %s" % (digest, str(label).encode()) for digest, label in pairs)
        if self.images.dtype == object:
            content = b"".join(image.tobytes() for image in self.images) + self.labels.tobytes()
        else:
            content = self.images.tobytes() + self.labels.tobytes()
        return digest_of(content)


class TabularSource(LabelledSource):
    """Images with tabular inputs. Samples also have ``tabular``, float32 T, if T > 0, and ``keypoints``, float32 K×2 in pixels of the decoded
    image, if K > 0.

    Args:
        images: image files.
        labels: see `LabelledSource`.
        tabular: numbers of each image, float32 N×T.
        keypoints: keypoints of each image, float32 N×K×2, in pixels of the file.
    """

    def __init__(
        self, images: ImageFiles, labels: NDArray[Any], tabular: NDArray[np.float32], keypoints: NDArray[np.float32]
    ) -> None:
        super().__init__(images, labels)
        self.tabular, self.keypoints = tabular, keypoints

    @override
    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        if self.tabular.size:
            sample["tabular"] = self.tabular[index]
        if self.keypoints.size:
            height, width = self.images.sizes[index]
            shown = np.array(sample["image"].shape[1::-1]) / (width, height)
            sample["keypoints"] = (self.keypoints[index] * shown).astype(np.float32)
        return sample

    batch = None  # type: ignore[assignment]  # keypoints depend on the size of each image

    @override
    def subset(self, indices: NDArray[Any]) -> Self:
        return type(self)(self.images[indices], self.labels[indices], self.tabular[indices], self.keypoints[indices])

    @cached_property
    @override
    def digest(self) -> str:
        return digest_of(super().digest.encode() + self.tabular.tobytes() + self.keypoints.tobytes())


class ColumnSource(LabelledSource):
    """Images with K values each: labels or quantities.

    Args:
        images: see `LabelledSource`.
        labels: N×K.
    """

    unknown: ClassVar[float] = 0  # value of columns that the images have no data for

    def renumbered(self, numbers: NDArray[np.int64], names: list[str]) -> Self:
        """Returns the same images with permuted columns.

        Args:
            numbers: int64 K, the new index of each column.
            names: names of all columns; new ones have the value `unknown`.
        """
        same = copy(self)
        vars(same).pop("digest", None)
        same.labels = np.full((len(self), len(names)), self.unknown, self.labels.dtype)
        same.labels[:, numbers] = self.labels
        return same


class LabelSetSource(ColumnSource):
    """Multi-label images. Samples have ``image`` and ``labels``, int64 K of 0 and 1.

    Args:
        images: see `LabelledSource`.
        labels: int64 N×K of 0 and 1.
    """

    key = "labels"


class QuantitySource(ColumnSource):
    """Images with numeric targets. Samples have ``image`` and ``target``, float32 K, NaN if unknown.

    Args:
        images: see `LabelledSource`.
        labels: float32 N×K.
    """

    key = "target"
    unknown = float("nan")


class TabularLabelSetSource(TabularSource, LabelSetSource):
    """Multi-label images with tabular inputs; see `TabularSource` and `LabelSetSource`."""


class TabularQuantitySource(TabularSource, QuantitySource):
    """Images with numeric targets and tabular inputs; see `TabularSource` and `QuantitySource`."""


class PeopleSource(LabelledSource):
    """Pictures of people. Samples have ``image``, ``identity`` (the label) and ``index`` (the position).

    Args:
        images: see `LabelledSource`.
        people: name of the person in each image, str N.
        pairs: a verification protocol, int64 M×4: the indices of two images, whether they are of the same person, and
            the fold.
    """

    def __init__(self, images: Images, people: NDArray[np.str_], pairs: NDArray[np.int64] | None = None) -> None:
        self.people, self.pairs = people, pairs
        self.names, labels = np.unique(people, return_inverse=True)
        super().__init__(images, labels)

    @override
    def __getitem__(self, index: int) -> Sample:
        return {"image": self.images[index], "identity": self.labels[index], "index": np.int64(index)}

    @override
    def batch(self, indices: Sequence[int]) -> dict[str, NDArray[Any]]:
        batch = super().batch(indices)
        return {"image": batch["image"], "identity": batch["label"], "index": np.asarray(indices)}

    @override
    def subset(self, indices: NDArray[Any]) -> "PeopleSource":  # without the protocol, whose indices become invalid
        return PeopleSource(self.images[indices], self.people[indices])

    @property
    def counts(self) -> NDArray[np.int64]:
        """Number of pictures of each of ``names``."""
        return np.bincount(self.labels, minlength=len(self.names))

    @cached_property
    @override
    def digest(self) -> str:
        files = isinstance(self.images, ImageFiles)
        content = b"\n".join(self.images.digests.tolist()) if files else self.images.tobytes()
        return digest_of(content + "\n".join(self.people).encode())


class JoinedSource(ConcatDataset[Any]):
    """Concatenation of two labelled sources.

    Args:
        sources: sources with the same class indices.
    """

    def __init__(self, *sources: LabelledSource) -> None:
        super().__init__(cast(Any, sources))
        self.sources = sources
        self.labels = np.concatenate([source.labels for source in sources])

    def reduced(self, reduction: Reduction) -> "JoinedSource":
        """See `LabelledSource.reduced`."""
        return JoinedSource(*(source.reduced(reduction) for source in self.sources))

    @cached_property
    def digest(self) -> str:
        """See `Source.digest`."""
        return digest_of("".join(source.digest for source in self.sources).encode())


def few(
    source: LabelledSource, number: int, label_names: Sequence[str], seed: int, option: str = "--data.train_per_class"
) -> LabelledSource:
    """Selects a number of images of each class.

    Args:
        source: the images to draw from.
        number: number of images per class.
        label_names: names of the classes.
        seed: seed of the selection; smaller selections are subsets of larger ones.
        option: name of the option, for messages.

    Raises:
        DataError: a class has fewer images, or the number is below 1.
    """
    if number < 1:
        raise DataError(f"{option} must be at least 1, not {number}.")
    generator, chosen = np.random.default_rng(seed), []
    for label, name in enumerate(label_names):
        own = np.flatnonzero(source.labels == label)
        if len(own) < number:
            raise DataError(
                f"{called(name, label_names)} has {len(own)} images to train on, fewer than {option} {number}: give a smaller number."
            )
        chosen.append(generator.permutation(own)[:number])
    return source.subset(np.sort(np.concatenate(chosen)))
