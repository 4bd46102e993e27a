"""Pictures of people, split by person. Batches hold several pictures of each person, and nobody is in two splits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import albumentations as A
import numpy as np
from annotated_types import Ge
from numpy.typing import NDArray
from typing_extensions import override

from datamodules.errors import DataError
from datamodules.labelled.base import LabelledDataModule
from datamodules.labelled.sources import PeopleSource
from datamodules.loading import KeyedDataset
from datamodules.options import ImageSize, Own, Share

SHARE = 0.15  # fraction of the people for testing, and of the rest for validation


class PeopleDataset(KeyedDataset):
    """Orders an epoch so that batches hold P people with K pictures each.

    An epoch consists of as many rounds as are needed to have as many images as the split. In each round every person
    occurs once, in random order, with the next K images in a random order; people with few images have them repeated,
    each time with another augmentation. So all people have the same weight, regardless of their number of images.

    Args:
        source: the pictures.
        transform: see `KeyedDataset`.
        seed: seed of the run.
        pictures: K.
    """

    source: PeopleSource

    def __init__(self, source: PeopleSource, transform: A.Compose | None, seed: int, pictures: int) -> None:
        super().__init__(source, transform, seed)
        self.pictures = pictures
        self.rounds = max(1, round(len(source) / (len(source.names) * pictures)))

    @property
    @override
    def epoch_size(self) -> int:
        return self.rounds * len(self.source.names) * self.pictures

    @override
    def order(self, generator: np.random.Generator) -> NDArray[np.int64]:
        ends = self.source.counts.cumsum()[:-1]
        own = np.split(np.argsort(self.source.labels, kind="stable"), ends)
        drawn = np.stack([self.taken(generator, mine, self.rounds * self.pictures) for mine in own]).reshape(
            len(own), self.rounds, self.pictures
        )
        return np.concatenate([drawn[generator.permutation(len(own)), r].ravel() for r in range(self.rounds)])


@dataclass(kw_only=True, eq=False, repr=False)
class FaceDataModule(LabelledDataModule[PeopleSource]):
    """Pictures of people, split by person: nobody in the test split was seen in training.

    Training batches hold P people with K images each, over all processes together. Batches: ``image`` uint8 B×C×S×S
    with S = ``image_size``, ``identity`` int64 B, ``index`` int64 B (the index in the split).

    Args:
        pictures_per_person: K, images of each person in a training batch; P is ``batch_size`` divided by it.
    """

    pictures_per_person: Annotated[int, Ge(2)] = 4
    image_size: Own[ImageSize] = 112
    crop_pct: Own[Share] = 1.0

    @property
    def num_classes(self) -> int:
        """Number of people in the training split."""
        return len(self.sources["train"].names)

    @override
    def identity(self) -> dict[str, Any]:
        """Returns name, and for each split the size, the number of people and the content digest."""
        identity = super().identity()
        for name, source in self.sources.items():
            identity["splits"][name]["people"] = len(source.names)
        return identity

    @override
    def dataset(self, split: str, augmented: bool) -> KeyedDataset:
        """See `VisionDataModule.dataset`; the training set is ordered in groups of K images of a person.

        Raises:
            DataError: there are too few people or images for the requested batches.
        """
        if split != "train":
            return super().dataset(split, augmented)
        source, pictures = self.sources["train"], self.pictures_per_person
        if lone := source.names[source.counts < 2].tolist():
            raise DataError(
                f"{self.title}: {lone[0]} has only one picture, and training compares two pictures of each person "
                f"({len(lone)} of {len(source.names)} people are affected). Add pictures, or leave these people out: "
                "--data.on_lone_picture skip."
            )
        batch: Any = self.batch_size  # ``auto`` is not known yet: the least is two people
        batch = 2 * pictures if batch == "auto" else batch
        whole = batch * (self.trainer.world_size if self.trainer else 1)
        if batch % pictures and whole % pictures:
            raise DataError(
                f"--data.batch_size {batch} is no multiple of --data.pictures_per_person {pictures}: give {max(2, round(batch / pictures)) * pictures}."
            )
        people = whole // pictures
        if people < 2:
            raise DataError(
                f"A batch of {whole} pictures, {pictures} of each person, has {people}, and two people are compared at least: raise "
                "--data.batch_size, or lower --data.pictures_per_person."
            )
        if len(source.names) < people:
            raise DataError(
                f"{self.title} has {len(source.names)} people to train on, fewer than the {people} of a batch: choose a "
                f"--data.batch_size of {len(source.names) * pictures} at most, or more --data.pictures_per_person."
            )
        return PeopleDataset(source, self.transform(augmented), self.seed, pictures)

    def divide_people(
        self,
        parts: Mapping[str, PeopleSource],
        test: Callable[[PeopleSource], tuple[PeopleSource, PeopleSource]] | None = None,
    ) -> dict[str, PeopleSource]:
        """Splits by person; missing ones are drawn with a fixed seed.

        Args:
            parts: see `VisionDataModule.divide`. Missing validation splits are drawn from four people or more.
            test: draws the test split; by default, `by_person`.

        Raises:
            DataError: there are too few people, or a person is in two splits.
        """
        if "train" in parts or "all" in parts:
            self._check_owners(parts)
        divided = self.divide(
            parts, test or by_person, lambda train: by_person(train) if len(train.names) > 3 else None
        )
        if "train" not in divided:  # a set that is only for the test
            return divided
        for name in ("train", "val"):
            if name not in divided or len(divided[name].names) < 2:
                people = np.unique(np.concatenate([part.names for part in parts.values()]))
                raise DataError(
                    f"{self.title} has {len(people)} people, too few for splits by person: at least two are needed "
                    "to train on, two "
                    "for validation and, without a test set, two for the test."
                )
        if not (divided["val"].counts > 1).any():
            raise DataError(
                f"{self.title}: nobody in the validation split has two pictures, so nothing can be measured."
            )
        return divided

    def _check_owners(self, parts: Mapping[str, PeopleSource]) -> None:
        owners: dict[str, str] = {}
        for part in sorted(parts):
            for person in parts[part].names.tolist():
                if owners.setdefault(person, part) != part:
                    raise DataError(
                        f"{self.title}: {person} is in the split {owners[person]} and in {part}. The test is about "
                        "people who were not seen in training: keep all pictures of a person in one split."
                    )


def by_person(source: PeopleSource, folds: int | None = None, fold: int = 0) -> tuple[PeopleSource, PeopleSource]:
    """Splits off the images of 15 % of the people (at least two), drawn with a fixed seed; returns the rest and these.

    Args:
        source: the images.
        folds: use one of this many equal folds of the people instead.
        fold: index of the fold, from 0.

    Raises:
        DataError: a part has fewer than two people.
    """
    count = len(source.names)
    order = np.random.default_rng(0).permutation(count)
    if folds is not None and count < 2 * folds:
        raise DataError(
            f"{count} people are too few for --data.folds {folds}: each fold takes two. Give {count // 2} folds at most, or "
            "add people."
        )
    chosen = order[: max(2, round(SHARE * count))] if folds is None else np.array_split(order, folds)[fold]
    drawn = np.isin(source.labels, chosen)
    return source.subset(~drawn), source.subset(drawn)
