"""Photographs at their own resolution, for super-resolution: crops to learn from, squares to be measured on."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import albumentations as A
import cv2
import numpy as np
from numpy.typing import NDArray

from datamodules.base import DataError, Key, KeyedDataset, Source
from datamodules.classification import FileSource, UnlabelledFolder

IN_SCIKIT_IMAGE = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
IN_SCIKIT_LEARN = ("china.jpg", "flower.jpg")


class Crops(KeyedDataset):
    """Several random crops of each picture in an epoch.

    Args:
        source: the pictures.
        transform: cuts them.
        seed: seed of the run.
        repeats: crops of each picture.
    """

    def __init__(self, source: Source, transform: A.Compose | None, seed: int, repeats: int) -> None:
        super().__init__(source, transform, seed)
        self.repeats = repeats

    @property
    def epoch_size(self) -> int:
        """How many indices `order` gives."""
        return len(self) * self.repeats

    def order(self, generator: np.random.Generator) -> NDArray[np.int64]:
        """The crops of one epoch: number k is of picture k modulo their number."""
        return generator.permutation(self.epoch_size)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        index, epoch = key
        return self.augment(self.source[index % len(self)], np.random.default_rng((self.seed, epoch, index)))


class PhotographFolder(UnlabelledFolder):
    """All photographs in a folder and in those below; or below ``train``, ``val`` and ``test`` in it.

    They keep their resolution. In training random squares are cut out, in one of the eight positions of a square; in
    evaluation one from the middle of each. A smaller picture is continued by its mirror image.

    Batches: ``image`` uint8 B×C×S×S, S being ``image_size`` in training and ``evaluation_size`` else.

    Args:
        root: the folder.
        in_chans: 3 to read the images as RGB, 1 as grey.
        on_bad_file: what an unreadable image means: stop and name it, or go on without it, counted and listed.
        image_size: side of the squares in training, in pixels.
        evaluation_size: side of the squares in evaluation.
        crops: squares of each picture in an epoch.
        batch_size: samples in a batch, for each process.
        num_workers: processes that read and augment; None chooses by the cores at hand.
        seed: seed of order and crops.
    """

    def __init__(
        self,
        root: str,
        in_chans: Literal[1, 3] = 3,
        on_bad_file: Literal["error", "skip"] = "error",
        image_size: int = 96,
        evaluation_size: int = 256,
        crops: int = 32,
        batch_size: int = 16,
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(root, in_chans, on_bad_file, "none", image_size, 1.0, False, batch_size, num_workers, seed)
        self.evaluation_size, self.crops = evaluation_size, crops
        for name, value in (("image_size", image_size), ("evaluation_size", evaluation_size), ("crops", crops)):
            if value < 1:
                raise DataError(f"--data.{name} must be at least 1, not {value}.")

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What turns a picture into the network's input, as data: nothing."""
        return {"image_size": self.image_size, "in_chans": self.in_chans, "fit": "native"}

    def _cut(self, side: int, middle: bool) -> A.Compose:
        kind: Any = A.CenterCrop if middle else A.RandomCrop
        cut = kind(side, side, pad_if_needed=True, border_mode=cv2.BORDER_REFLECT_101, p=1)
        return A.Compose([cut] if middle else [cut, A.D4(p=1)])

    def dataset(self, split: str, augmented: bool) -> KeyedDataset:
        """See `VisionDataModule.dataset`."""
        if augmented:
            return Crops(self.sources[split], self._cut(self.image_size, False), self.seed, self.crops)
        side = self.image_size if split == "train" else self.evaluation_size
        return KeyedDataset(self.sources[split], self._cut(side, True), self.seed)


class Photographs(PhotographFolder):
    """27 real photographs that come with packages: no download. The 20 of foolbox are for training (16) and validation
    (4); five of scikit-image and two of scikit-learn are the test: astronaut, cat, coffee, motorcycle, rocket, palace and
    flower.

    Args:
        image_size: side of the squares in training, in pixels.
        evaluation_size: side of the squares in evaluation.
        crops: squares of each picture in an epoch.
        batch_size: samples in a batch, for each process.
        num_workers: processes that read and augment; None chooses by the cores at hand.
        seed: seed of order and crops.
    """

    def __init__(
        self,
        image_size: int = 96,
        evaluation_size: int = 256,
        crops: int = 32,
        batch_size: int = 16,
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(".", 3, "error", image_size, evaluation_size, crops, batch_size, num_workers, seed)

    @property
    def name(self) -> str:  # type: ignore[override]
        """What the data set is called in a tracked run."""
        return "Photographs"

    def load(self) -> dict[str, Source]:
        """See `VisionDataModule.load`.

        Raises:
            DataError: a package is not installed.
        """
        known = sorted(_packaged("foolbox", "data").glob("imagenet_*.jpg"))
        unseen = [_packaged("skimage", "data") / name for name in IN_SCIKIT_IMAGE]
        unseen += [_packaged("sklearn", "datasets/images") / name for name in IN_SCIKIT_LEARN]
        if len(known) != 20 or not all(file.is_file() for file in unseen):
            raise DataError(
                "The photographs come with packages: pip install --no-deps foolbox scikit-image. For your own: "
                "--data PhotographFolder --data.root FOLDER."
            )
        parts = {"train": known[:16], "val": known[16:], "test": sorted(unseen, key=lambda file: file.name)}
        return self._check(
            {name: FileSource([str(f) for f in files], np.zeros(len(files), np.int64)) for name, files in parts.items()}
        )


def _packaged(package: str, folder: str) -> Path:
    """A folder in a package, which is not imported: only its files are wanted."""
    spec = find_spec(package)
    return Path(spec.origin).parent / folder if spec and spec.origin else Path("nowhere")
