"""Photographs at their own resolution, for super-resolution: random crops for training, squares for evaluation."""

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import albumentations as A
import cv2
from typing_extensions import override

from datamodules.augmenting import Augmentation
from datamodules.errors import DataError
from datamodules.labelled.balance import Sampling, Weighting
from datamodules.labelled.folders import UnlabelledFolder
from datamodules.labelled.rows import Rows
from datamodules.labelled.sources import LabelledSource
from datamodules.loading import KeyedDataset, Source
from datamodules.options import BatchSize, ImageSize, Own, PositiveInt, Preprocessing

IN_SCIKIT_IMAGE = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
IN_SCIKIT_LEARN = ("china.jpg", "flower.jpg")


class Crops(KeyedDataset):
    """Several random crops of each image per epoch: crop k is of image k modulo the number of images.

    Args:
        source: the images.
        transform: pipeline that crops them.
        seed: seed of the run.
        repeats: number of crops per image.
    """

    def __init__(self, source: Source, transform: A.Compose | None, seed: int, repeats: int) -> None:
        super().__init__(source, transform, seed)
        self.repeats = repeats

    @property
    @override
    def epoch_size(self) -> int:
        return len(self) * self.repeats


@dataclass(kw_only=True, eq=False, repr=False)
class PhotographFolder(UnlabelledFolder):
    """All images below a folder, or below ``train``, ``val`` and ``test`` in it, at their own resolution.

    In training, random crops are mirrored, squares in one of their eight orientations; in evaluation, a centre square
    of each image is used. Smaller images are padded by reflection.

    Batches: ``image`` uint8 B×C×H×W, of ``image_size`` in training and ``evaluation_size`` otherwise.

    Args:
        image_size: size of the training crops: the side of a square in pixels, or ``HEIGHTxWIDTH`` such as ``96x144``.
        evaluation_size: side of the squares in evaluation.
        crops: number of crops per image and epoch.
    """

    image_size: Own[ImageSize] = 96
    evaluation_size: PositiveInt = 256
    crops: PositiveInt = 32
    batch_size: BatchSize = 16
    # Other augmentations are no settings here.
    augmentation: Augmentation = field(default="none", init=False)
    crop_pct: float = field(default=1.0, init=False)
    flip: bool = field(default=False, init=False)
    train_per_class: None = field(default=None, init=False)
    sampling: Sampling = field(default="none", init=False)
    class_weighting: Weighting = field(default="none", init=False)
    fit: Literal["crop", "pad", "extend", "stretch"] = field(default="crop", init=False)

    @property
    @override
    def preprocessing(self) -> Preprocessing:
        return self.fitted("native")

    def _cut(self, size: tuple[int, int], middle: bool) -> A.Compose:
        kind: Any = A.CenterCrop if middle else A.RandomCrop
        cut = kind(*size, pad_if_needed=True, border_mode=cv2.BORDER_REFLECT_101, p=1)
        positions = [A.D4(p=1)] if size[0] == size[1] else [A.HorizontalFlip(), A.VerticalFlip()]
        return A.Compose([cut] if middle else [cut, *positions])

    @override
    def dataset(self, split: str, augmented: bool) -> KeyedDataset:
        if augmented:
            return Crops(self.sources[split], self._cut(self.size, False), self.seed, self.crops)
        size = self.size if split == "train" else (self.evaluation_size,) * 2
        return KeyedDataset(self.sources[split], self._cut(size, True), self.seed)


@dataclass(kw_only=True, eq=False, repr=False)
class Photographs(PhotographFolder):
    """27 real photographs from installed packages, no download. Foolbox's 20 are for training (16) and validation (4);
    five of scikit-image and two of scikit-learn are the test set: astronaut, cat, coffee, motorcycle, rocket, palace
    and flower.
    """

    root: str = field(default=".", init=False)
    in_chans: Literal[1, 3] = field(default=3, init=False)
    on_bad_file: Literal["error", "skip", "skip_all"] = field(default="error", init=False)

    @property
    @override
    def title(self) -> str:
        return "Photographs"

    @override
    def load(self) -> dict[str, LabelledSource]:
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
        return self._read(Rows.of((str(file), ".", name) for name, files in parts.items() for file in files))


def _packaged(package: str, folder: str) -> Path:
    """A folder in an installed package, found without importing the package."""
    spec = find_spec(package)
    return Path(spec.origin).parent / folder if spec and spec.origin else Path("nowhere")
