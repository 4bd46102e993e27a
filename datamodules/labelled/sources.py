"""Images with a label each, in memory or in files: of a class, a domain or a person."""

from collections.abc import Sequence
from copy import copy
from functools import cached_property
from typing import Any, ClassVar, Self, cast

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset
from typing_extensions import override

from datamodules.base import DataError, digest_of
from datamodules.images import Reduction, inspect_images, read_reduced


class LabelledSource:
    """Labelled images.

    Args:
        images: uint8 N×H×W×C; or the paths of N files, as one array, since a list of Python strings grows in every worker
            process.
        labels: int64 N.
        channels: 3 to read files as RGB, 1 as grey.
        digests: content digest of each file, once `inspect_images` has found them.
    """

    key: ClassVar[str] = "label"  # of the labels in samples

    def __init__(
        self,
        images: NDArray[Any],
        labels: NDArray[np.int64],
        channels: int = 3,
        digests: NDArray[np.str_] | None = None,
    ) -> None:
        self.images, self.labels, self.channels, self._digests = images, labels, channels, digests
        self.paths: NDArray[np.str_] | None = images if images.dtype.kind == "U" else None
        self.reduction: Reduction | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def reduced(self, reduction: Reduction) -> Self:
        """The same samples; images of files are decoded smaller."""
        same = copy(self)
        same.reduction = reduction
        return same

    def image(self, index: int) -> NDArray[np.uint8]:
        """An image, uint8 H×W×C."""
        if self.paths is None:
            return self.images[index]
        return read_reduced(str(self.paths[index]), self.channels, self.reduction)[0]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.image(index), self.key: self.labels[index]}

    def batch(self, indices: Sequence[int]) -> dict[str, NDArray[Any]]:
        """Several samples at once, stacked; their images have one size."""
        images = self.images[indices] if self.paths is None else np.stack([self.image(i) for i in indices])
        return {"image": images, self.key: self.labels[indices]}

    def _parts(self, indices: NDArray[Any]) -> tuple[Any, ...]:
        digests = None if self._digests is None else self._digests[indices]
        return self.images[indices], self.labels[indices], self.channels, digests

    def subset(self, indices: NDArray[Any]) -> Self:
        """The samples at these positions."""
        return type(self)(*self._parts(indices))

    def images_of_classes(self, classes: int) -> NDArray[np.int64]:
        """How many images there are of each class, by its number."""
        return np.bincount(self.labels, minlength=classes)

    @property
    def digests(self) -> NDArray[np.str_]:
        """Content digest of each file."""
        assert self.paths is not None
        return inspect_images(self.paths)["digest"].to_numpy(np.str_) if self._digests is None else self._digests

    @cached_property
    def digest(self) -> str:
        """See `Source.digest`."""
        if self.paths is None:
            content = self.images.tobytes() + self.labels.tobytes()
        else:
            lines = [f"{digest} {label}" for digest, label in zip(self.digests, self.labels.tolist(), strict=True)]
            content = "\n".join(lines).encode()
        return digest_of(content)


class LabelSetSource(LabelledSource):
    """Images with any number of labels each. Samples have ``image`` and ``labels``, int64 K of 0 and 1.

    Args:
        images: see `LabelledSource`.
        labels: int64 N×K of 0 and 1.
        channels: see `LabelledSource`.
        digests: see `LabelledSource`.
    """

    key = "labels"

    @override
    def images_of_classes(self, classes: int) -> NDArray[np.int64]:
        return self.labels.sum(0)


class PeopleSource(LabelledSource):
    """Pictures with the people on them. Samples have ``image``, ``identity`` (the label) and ``index`` (the place).

    Args:
        images: see `LabelledSource`.
        people: the name of the person on each, str N.
        channels: see `LabelledSource`.
        digests: see `LabelledSource`.
        pairs: a verification protocol on them, int64 M×4: the places of two pictures, whether they are of one person, and
            the fold.
    """

    def __init__(
        self,
        images: NDArray[Any],
        people: NDArray[np.str_],
        channels: int = 3,
        digests: NDArray[np.str_] | None = None,
        pairs: NDArray[np.int64] | None = None,
    ) -> None:
        self.people, self.pairs = people, pairs
        self.names, labels = np.unique(people, return_inverse=True)
        super().__init__(images, labels, channels, digests)

    @override
    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.image(index), "identity": self.labels[index], "index": np.int64(index)}

    @override
    def batch(self, indices: Sequence[int]) -> dict[str, NDArray[Any]]:
        batch = super().batch(indices)
        return {"image": batch["image"], "identity": batch["label"], "index": np.asarray(indices)}

    @override
    def subset(self, indices: NDArray[Any]) -> "PeopleSource":  # without the protocol, whose places they were
        images, _, *rest = self._parts(indices)
        return PeopleSource(images, self.people[indices], *rest)

    @property
    def counts(self) -> NDArray[np.int64]:
        """Pictures of each of ``names``."""
        return np.bincount(self.labels, minlength=len(self.names))

    @cached_property
    @override
    def digest(self) -> str:
        content = self.images.tobytes() if self.paths is None else "\n".join(self.digests).encode()
        return digest_of(content + "\n".join(self.people).encode())


class JoinedSource(ConcatDataset[Any]):
    """Labelled images of one source after those of another.

    Args:
        sources: they number their classes alike.
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
    """So many images of each class.

    Args:
        source: what they are drawn from.
        number: of each class.
        label_names: names of the classes.
        seed: the same one draws the same images, and a smaller number a part of what a larger one does.
        option: what the number is called where it was given.

    Raises:
        DataError: a class has fewer, or the number is under 1.
    """
    if number < 1:
        raise DataError(f"{option} must be at least 1, not {number}.")
    generator, chosen = np.random.default_rng(seed), []
    for label, name in enumerate(label_names):
        own = np.flatnonzero(source.labels == label)
        if len(own) < number:
            raise DataError(
                f"Class {name!r} has {len(own)} images to train on, fewer than {option} {number}: give a smaller number."
            )
        chosen.append(generator.permutation(own)[:number])
    return source.subset(np.sort(np.concatenate(chosen)))
