"""Pictures of people: batches that hold several of each, and splits in which nobody is twice."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import albumentations as A
import numpy as np
from numpy.typing import NDArray

from datamodules.augmentations import Strength, evaluation, training
from datamodules.base import DataError, KeyedDataset, VisionDataModule
from datamodules.images import read_image
from datamodules.options import Own, PositiveInt, Preprocessing, Share

SHARE = 0.15  # of the people, for the test, and of the rest, for validation


class FaceSource:
    """Pictures with the people on them.

    Args:
        images: uint8 N×H×W×C, or the paths of N files in one array.
        people: the name of the person on each, N.
        channels: 3 to read files as RGB, 1 as grey.
        digests: content digest of each file.
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
        self.images, self.people, self.channels, self.digests, self.pairs = images, people, channels, digests, pairs
        self.names, self.identities = np.unique(people, return_inverse=True)
        if images.dtype.kind == "U":
            self.paths = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.images[index]
        if self.images.dtype.kind == "U":
            image = read_image(str(image), self.channels)
        return {"image": image, "identity": self.identities[index], "index": np.int64(index)}

    def batch(self, indices: Sequence[int]) -> dict[str, NDArray[Any]]:
        """Several pictures in memory at once, stacked."""
        return {"image": self.images[indices], "identity": self.identities[indices], "index": np.asarray(indices)}

    def subset(self, chosen: NDArray[Any]) -> "FaceSource":
        """The pictures at these places; without the protocol, whose places they were."""
        digests = None if self.digests is None else self.digests[chosen]
        return FaceSource(self.images[chosen], self.people[chosen], self.channels, digests)

    @property
    def counts(self) -> NDArray[np.int64]:
        """Pictures of each of ``names``."""
        return np.bincount(self.identities, minlength=len(self.names))

    @cached_property
    def digest(self) -> str:
        """See `Source.digest`."""
        contents = self.images.tobytes() if self.digests is None else "\n".join(self.digests).encode()
        people = "\n".join(self.people).encode()
        return hashlib.blake2b(contents + people, digest_size=16).hexdigest()


class PeopleDataset(KeyedDataset):
    """Orders an epoch so that its pieces hold P people with K pictures each.

    An epoch is as many rounds as make its pictures as many as the split has. In each round every person comes once, in
    random order, with the next K of his pictures in a random order; who has few is seen several times, each time
    augmented anew. So all people weigh the same, however many pictures they have.

    Args:
        source: the pictures.
        transform: see `KeyedDataset`.
        seed: seed of the run.
        pictures: K.
    """

    source: FaceSource

    def __init__(self, source: FaceSource, transform: A.Compose | None, seed: int, pictures: int) -> None:
        super().__init__(source, transform, seed)
        self.pictures = pictures
        self.rounds = max(1, round(len(source) / (len(source.names) * pictures)))

    @property
    def epoch_size(self) -> int:
        """See `KeyedDataset.epoch_size`."""
        return self.rounds * len(self.source.names) * self.pictures

    def order(self, generator: np.random.Generator) -> NDArray[np.int64]:
        """See `KeyedDataset.order`."""
        ends = self.source.counts.cumsum()[:-1]
        own = np.split(np.argsort(self.source.identities, kind="stable"), ends)
        drawn = np.stack([np.resize(generator.permutation(mine), self.rounds * self.pictures) for mine in own]).reshape(
            len(own), self.rounds, self.pictures
        )
        return np.concatenate([drawn[generator.permutation(len(own)), r].ravel() for r in range(self.rounds)])


@dataclass(kw_only=True, eq=False, repr=False)
class FaceDataModule(VisionDataModule):
    """Pictures of people, split by person: nobody who is tested was seen in training.

    Training batches hold P people with K pictures each, over all processes together. Batches: ``image`` uint8 B×C×S×S
    with S = ``image_size``, ``identity`` int64 B, ``index`` int64 B (the place in the split).

    Args:
        pictures_per_person: K; P is ``batch_size`` divided by it.
        augmentation: strength of the changes made to training images.
        image_size: side of the square images that the network sees, in pixels.
        crop_pct: share of the shorter side that evaluation keeps, in (0, 1].
        fit: what becomes of pictures that are not square: ``crop`` cuts their ends off, ``extend`` fills them up with the
            colours of their border.
        flip: mirror training images, as faces may be.
    """

    pictures_per_person: int = 4
    augmentation: Strength = "standard"
    image_size: Own[PositiveInt] = 112
    crop_pct: Share = 1.0
    fit: Literal["crop", "extend"] = "crop"
    flip: Own[bool] = True

    @property
    def num_classes(self) -> int:
        """People to train on."""
        return len(self.sources["train"].names)  # type: ignore[attr-defined]

    @property
    def preprocessing(self) -> Preprocessing:
        """See `VisionDataModule.preprocessing`."""
        return Preprocessing(self.image_size, self.in_chans, self.fit, self.crop_pct)

    def transform(self, training_split: bool) -> A.Compose | None:
        """See `VisionDataModule.transform`."""
        if training_split and self.augmentation != "none":
            return training(self.augmentation, self.image_size, self.crop_pct, self.flip, self.fit)
        return evaluation(self.image_size, self.crop_pct, self.fit)

    def identity(self) -> dict[str, Any]:
        """Name, and per split the size, the number of people and the content digest."""
        identity = super().identity()
        for name, source in self.sources.items():
            identity["splits"][name]["people"] = len(source.names)  # type: ignore[attr-defined]
        return identity

    def dataset(self, split: str, augmented: bool) -> KeyedDataset:
        """See `VisionDataModule.dataset`; training's is ordered in groups of K pictures of a person.

        Raises:
            DataError: the people and pictures do not suffice for the batches that are asked for.
        """
        if split != "train":
            return super().dataset(split, augmented)
        source, pictures = self.sources["train"], self.pictures_per_person
        assert isinstance(source, FaceSource)
        if pictures < 2:
            raise DataError(f"--data.pictures_per_person must be at least 2, not {pictures}: a person needs a mate.")
        if lone := source.names[source.counts < 2].tolist():
            raise DataError(
                f"{self.title}: {lone[0]} has one picture only, and training compares two of a person "
                f"({len(lone)} of {len(source.names)} people are so). Add pictures, or leave these people out: "
                "--data.on_lone_picture skip."
            )
        whole = self.batch_size * (self.trainer.world_size if self.trainer else 1)
        if self.batch_size % pictures and whole % pictures:
            raise DataError(
                f"--data.batch_size {self.batch_size} is no multiple of --data.pictures_per_person {pictures}."
            )
        people = whole // pictures
        if people < 2:
            raise DataError(f"A batch of {whole} has {people} people with {pictures} pictures: it takes two people.")
        if len(source.names) < people:
            raise DataError(
                f"{self.title} has {len(source.names)} people to train on, fewer than the {people} of a batch: choose a "
                f"--data.batch_size of {len(source.names) * pictures} at most, or more --data.pictures_per_person."
            )
        return PeopleDataset(source, self.transform(augmented), self.seed, pictures)


def draw_people(names: Sequence[str], share: float = SHARE) -> set[str]:
    """Some of the people, at least two, always the same."""
    ordered = sorted(names)
    chosen = np.random.default_rng(0).permutation(len(ordered))[: max(2, round(share * len(ordered)))]
    return {ordered[i] for i in chosen}


def split_by_person(source: FaceSource, name: str, splits: NDArray[np.str_] | None = None) -> dict[str, FaceSource]:
    """Shares pictures out so that nobody is in two splits, always in the same way.

    Args:
        source: all pictures.
        name: of the data, for messages.
        splits: ``train``, ``val`` or ``test`` for each picture; without ``val`` some people of ``train`` are drawn for it;
            None draws both.

    Raises:
        DataError: there are too few people, or somebody is in two splits.
    """
    if splits is not None and "train" not in splits:  # a set that is only for the test
        return {part: source.subset(splits == part) for part in ("val", "test") if (splits == part).any()}
    if splits is None:
        splits = np.where(np.isin(source.people, list(draw_people(source.names.tolist()))), "test", "train")
    owners: dict[str, str] = {}
    for part in np.unique(splits):
        for person in np.unique(source.people[splits == part]):
            if owners.setdefault(str(person), str(part)) != part:
                raise DataError(
                    f"{name}: {person} is in the split {owners[str(person)]} and in {part}. People are tested who were "
                    "not seen in training: keep all pictures of a person in one split."
                )
    if "val" not in splits:
        learned = np.unique(source.people[splits == "train"]).tolist()
        if len(learned) > 3:
            drawn = draw_people(learned)
            splits = np.where(np.isin(source.people, list(drawn)), "val", splits)
    parts = {part: source.subset(splits == part) for part in ("train", "val", "test") if (splits == part).any()}
    for part in ("train", "val"):
        if part not in parts or len(parts[part].names) < 2:
            raise DataError(
                f"{name} has {len(source.names)} people, too few for splits by person: it takes two to train on, two for "
                "validation and, without a test set, two for the test."
            )
    if not (parts["val"].counts > 1).any():
        raise DataError(f"{name}: nobody in the validation split has two pictures, so that nothing can be measured.")
    return parts
