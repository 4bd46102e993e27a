"""Settings as types: ranges of numbers, what is left to the class, and how a picture becomes the network's input."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, TypeVar

import albumentations as A
from annotated_types import Ge, Gt, Le

from datamodules.augmentations import Fit, evaluation

PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
ImageSize = PositiveInt | str  # see `augmentations.sides`
Share = Annotated[float, Gt(0), Le(1)]  # one that leaves something
Probability = Annotated[float, Ge(0), Le(1)]

if TYPE_CHECKING:
    BatchSize = PositiveInt  # from `fit`'s start on
    T = TypeVar("T")
    Own = Annotated[T, "or None"]
else:
    BatchSize = PositiveInt | Literal["auto"]
    Own = Optional  # `VisionDataModule` puts the class's own value where None (in a recipe null) is given
OWN: Any = None  # the default of a setting that follows from others


@dataclass(kw_only=True, eq=False, repr=False)
class Files:
    """Settings of all data that are image files.

    Args:
        in_chans: 3 to read the images as RGB, 1 as grey.
        on_bad_file: what to do about an unreadable image: stop and name it, or continue without it, counted and listed;
            ``skip_all`` also where more than one in a hundred is unreadable.
        cache: keep images once they are decoded, as far as there is room: in ``memory``, for this training alone, or on the
            ``disk``, under ``$XDG_CACHE_HOME/fovea/decoded``, also for later ones. The images are the same as without.
    """

    in_chans: Literal[1, 3] = 3
    on_bad_file: Literal["error", "skip", "skip_all"] = "error"
    cache: Literal["none", "memory", "disk"] = "none"


@dataclass(eq=False, repr=False)
class Folder(Files):
    """Settings of data that are below a folder, or that a file there describes.

    Args:
        root: the folder.
    """

    root: str

    @property
    def title(self) -> str:
        """See `VisionDataModule.title`; the folder's or the file's name."""
        place = Path(self.root).resolve()
        return place.stem if place.is_file() else place.name


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the network's input. Data modules say it, and a registered model carries it along as plain data.

    Args:
        image_size: of the input; see `augmentations.sides`.
        in_chans: 3 to read pictures as RGB, 1 as grey.
        fit: how a picture is made one of this size; see `augmentations.evaluation`.
        crop_pct: share of the shorter side that is kept where ``fit`` is ``crop`` or ``extend``, in (0, 1].
        tile: side of the squares that a larger picture is cut into first, in pixels; None leaves it whole.
        frames: frames of a clip that the network is shown at most, see `videos.evenly`; None where it is shown pictures.
        numbers: the input is ``in_chans`` numbers, float32 1×1×C, and no picture.
    """

    image_size: int | str
    in_chans: int
    fit: Fit = "crop"
    crop_pct: float = 0.875
    tile: int | None = None
    frames: int | None = None
    numbers: bool = False

    def transform(self) -> A.Compose:
        """The albumentations pipeline."""
        return A.Compose([]) if self.numbers else evaluation(self.image_size, self.crop_pct, self.fit)

    def as_data(self) -> dict[str, Any]:
        """The arguments that make an equal one, without those that say nothing."""
        silent = {"crop": {"fit"}, "extend": set()}.get(self.fit, {"crop_pct"})
        silent |= {name for name in ("tile", "frames", "numbers") if not getattr(self, name)}
        return {key: value for key, value in asdict(self).items() if key not in silent}
