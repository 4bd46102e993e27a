"""Types of settings: ranges of numbers, class defaults, and the preprocessing of images."""

import operator
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, TypeVar, get_args

import albumentations as A
from annotated_types import Ge, GroupedMetadata, Gt, Le

from datamodules.augmentations import Fit, evaluation
from datamodules.errors import DataError

PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
ImageSize = PositiveInt | str  # see `augmentations.sides`
Share = Annotated[float, Gt(0), Le(1)]  # e.g. of something of which a part must remain
Check = Literal["all", "sample", "none"]  # which files are decoded before a training
Probability = Annotated[float, Ge(0), Le(1)]

if TYPE_CHECKING:
    BatchSize = PositiveInt  # after `fit` has started
    T = TypeVar("T")
    Own = Annotated[T, "or None"]
else:
    BatchSize = PositiveInt | Literal["auto"]
    Own = Optional  # `VisionDataModule` replaces None (null in a recipe) with the class's default
OWN: Any = None  # default of a setting that depends on others


def settle(settings: Any, option: str = "--data") -> None:
    """Replaces settings that are None with the class's default, and checks the ranges of numbers.

    Raises:
        DataError: a number is out of range.
    """
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    for each in fields(settings):
        if getattr(settings, each.name) is None:
            made = each.default if each.default_factory is MISSING else each.default_factory()
            setattr(settings, each.name, made)
        given = [one for kind in (each.type, *get_args(each.type)) for one in getattr(kind, "__metadata__", ())]
        for limit in (one for some in given for one in (some if isinstance(some, GroupedMetadata) else [some])):
            word, value = type(limit).__name__.lower(), getattr(settings, each.name)
            bound = getattr(limit, word)
            if isinstance(value, int | float) and not getattr(operator, word)(value, bound):
                raise DataError(f"{option}.{each.name} must be {words[word]} {bound}, not {value}.")


@dataclass(frozen=True)
class Reading:
    """Decoding of files: as an image viewer would, or as bands.

    Args:
        channels: number of channels of the arrays.
        bands: bands to select, counted from 1 and in this order; None for all.
        bits: 8 for uint8; more for float32 in [0, 1], where 1 is the largest value of this bit depth.
    """

    channels: int = 3
    bands: tuple[int, ...] | None = None
    bits: int = 8

    @property
    def seen(self) -> bool:
        """Whether files are decoded as a viewer shows them: 8-bit RGB or grey."""
        return self.channels in (1, 3) and self.bands is None and not self.deep

    @property
    def deep(self) -> bool:
        """Whether arrays are float32 in [0, 1] instead of uint8."""
        return self.bits > 8

    @property
    def colour(self) -> bool:
        """Whether the channels are red, green and blue."""
        return self.channels == 3 and self.bands is None


RGB = Reading()


def point_columns(names: Sequence[str]) -> list[str]:
    """Returns the columns of a table with the coordinates of keypoints, in pixels.

    >>> point_columns(["nose"])
    ['nose_x', 'nose_y']
    """
    return [f"{name}_{axis}" for name in names for axis in "xy"]


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of an image to the network's input. Data modules define it, and a registered model stores it as
    plain data.

    Args:
        image_size: size of the input; see `augmentations.sides`.
        in_chans: channels of the input.
        fit: how an image is resized to this size; see `augmentations.evaluation`.
        crop_pct: fraction of the shorter side that is kept if ``fit`` is ``crop`` or ``extend``, in (0, 1].
        tile: side of the square tiles that larger images are cut into first, in pixels; None for no tiling.
        frames: maximum number of frames of a clip, see `videos.evenly`; None for images.
        numbers: the input is ``in_chans`` numbers, float32 1×1×C, instead of an image.
        bands: see `Reading`.
        bits: see `Reading`.
        tabular: names of the numbers that are a further input; None for none.
        keypoints: names of the keypoints that are a further input, see `augmentations.KeypointCompose`; None for none.
    """

    image_size: int | str
    in_chans: int
    fit: Fit = "crop"
    crop_pct: float = 0.875
    tile: int | None = None
    frames: int | None = None
    numbers: bool = False
    bands: list[int] | None = None
    bits: int = 8
    tabular: list[str] | None = None
    keypoints: list[str] | None = None

    @property
    def columns(self) -> list[str]:
        """Columns of a table with the tabular inputs, see `point_columns`."""
        return [*point_columns(self.keypoints or ()), *(self.tabular or ())]

    @property
    def reading(self) -> Reading:
        """How the file is decoded."""
        if self.numbers:
            return RGB
        return Reading(self.in_chans, tuple(self.bands) if self.bands else None, self.bits)

    def transform(self) -> A.Compose:
        """Creates the albumentations pipeline."""
        if self.numbers:
            return A.Compose([])
        return evaluation(self.image_size, self.crop_pct, self.fit, deep=self.reading.deep, points=self.keypoints)

    def as_data(self) -> dict[str, Any]:
        """Constructor arguments of an equal object, without defaults."""
        silent = {"crop": {"fit"}, "extend": set()}.get(self.fit, {"crop_pct"})
        silent |= {
            name for name in ("tile", "frames", "numbers", "bands", "tabular", "keypoints") if not getattr(self, name)
        }
        silent |= {"bits"} if self.bits == 8 else set()
        return {key: value for key, value in asdict(self).items() if key not in silent}
