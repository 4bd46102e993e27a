"""Clips of classes: folders of videos, and digits that move."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import cv2
import numpy as np
from annotated_types import Ge
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from typing_extensions import override

from datamodules import videos
from datamodules.annotated.scenes import Scenes, SceneSource, painted, tint
from datamodules.checking import check_images
from datamodules.errors import DataError
from datamodules.labelled.base import ClassificationDataModule
from datamodules.labelled.folders import ImageFolder
from datamodules.labelled.rows import Named, named_files
from datamodules.labelled.sources import LabelledSource
from datamodules.options import OWN, NonNegativeInt, Own, PositiveInt, Preprocessing
from datamodules.paths import Paths
from datamodules.splits import SPLITS
from datamodules.videos import evenly

if TYPE_CHECKING:
    import pandas as pd

WAYS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # y, x
EXTENT = (0.35, 0.5)  # minimum and maximum length of a digit's longer side, relative to the frame


@dataclass(kw_only=True, eq=False, repr=False)
class ClipDataModule(ClassificationDataModule):
    """Base class of labelled clips. All frames of a clip are augmented alike.

    Batches: ``image`` uint8 B×T×C×S×S, ``length`` int64 B, the number of valid frames of each clip, ``label`` int64 B.

    Args:
        frames: maximum number of frames of a clip, evenly spread.
    """

    frames: PositiveInt = 16

    @property
    @override
    def preprocessing(self) -> Preprocessing:
        return replace(super().preprocessing, frames=self.frames)


@dataclass(kw_only=True, eq=False, repr=False)
class VideoFolder(ClipDataModule, ImageFolder):
    """A folder with one sub-folder of videos for each class.

    Splits are as in `ImageFolder`. Videos may have different lengths; each is decoded in every epoch.
    """

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cache != "none":
            raise DataError(
                f"--data.cache {self.cache} keeps decoded pictures, and {self.title} has videos: leave it out."
            )
        if self.bits == "auto" or not self.reading.seen:
            raise DataError(
                f"{self.title} has videos, of RGB or grey and 8 bits: leave --data.bands and --data.bits out."
            )

    @override
    def checked_files(self, paths: Paths) -> "pd.DataFrame":
        table, self.bad_files = check_images(paths, self.on_bad_file, videos.inspect_video, "videos", check=self.check)
        return table

    @override
    def opened(self, paths: Paths, digests: NDArray[np.bytes_], sizes: NDArray[np.int64]) -> videos.VideoFiles:
        return videos.VideoFiles(paths, digests, sizes, self.reading, most=self.frames)

    @override
    def _files(self, folder: Path, left_out: list[Path]) -> Named:
        others: list[Path] = []
        found = named_files(folder, others, videos.EXTENSIONS)
        if not len(found.paths):
            kinds = ", ".join(kind.removeprefix(".") for kind in videos.EXTENSIONS)
            raise DataError(f"{folder.resolve()} has no videos in folders of classes; those read are {kinds}.")
        if others:
            rank_zero_warn(f"Left out: {len(others)} files that are no videos; the first: {others[0]}.")
        return found


def moving(scenes: SceneSource, index: int, lengths: tuple[int, int], label: int) -> NDArray[np.uint8]:
    """Draws a clip with one moving digit, reproducibly from the scenes' seed, the split and the clip's index.

    Args:
        scenes: scenes that the clip is composed of.
        index: index of the clip.
        lengths: minimum and maximum number of frames.
        label: the moving digit, times four, plus the index in `WAYS`.

    Returns:
        uint8 T×S×S×C.
    """
    rng = np.random.default_rng([scenes.seed, SPLITS.index(scenes.split), index])
    canvas, paper = scenes.background(rng)
    count, still = int(rng.integers(*lengths, endpoint=True)), int(rng.integers(*scenes.objects, endpoint=True)) - 1
    for _ in range(still):
        picture, inside = scenes.resized(int(rng.integers(len(scenes.sprites))), rng)
        place = _place(rng.integers(scenes.size - np.array(picture.shape) + 1), picture)
        canvas[place] = painted(canvas[place], picture, inside, paper, tint(rng, paper))
    own = np.flatnonzero(scenes.sprites.labels == label // len(WAYS))
    picture, inside = scenes.resized(int(rng.choice(own)), rng)
    colour, way = tint(rng, paper), np.array(list(WAYS.values())[label % len(WAYS)])
    free = scenes.size - np.array(picture.shape)
    path = rng.uniform(0.5, 1) * free * np.abs(way)
    start = rng.uniform(0, 1, 2) * (free - path) + path * (way < 0)
    clip = canvas[None].repeat(count, 0)
    for frame, share in zip(clip, np.linspace(0, 1, count), strict=True):
        place = _place(np.rint(start + share * path * way).astype(int), picture)
        frame[place] = painted(frame[place], picture, inside, paper, colour)
    return clip if scenes.in_chans == 3 else np.stack([cv2.cvtColor(f, cv2.COLOR_RGB2GRAY)[..., None] for f in clip])


def _place(corner: NDArray[np.int64], picture: NDArray[np.uint8]) -> tuple[slice, ...]:
    return tuple(slice(at, at + side) for at, side in zip(corner.tolist(), picture.shape, strict=True))


@dataclass(kw_only=True, eq=False, repr=False)
class MovingDigits(Scenes, ClipDataModule):
    """Clips of real digits, one of which moves; the label is which digit and in which direction. See `Scenes`.

    A single frame shows neither which of its digits moves nor the direction.

    Args:
        objects: minimum and maximum number of digits in a clip, including the moving one.
        lengths: minimum and maximum number of frames in a clip.
        image_size: side of the square frames in pixels; None for ``scene_size``.
    """

    scene_size: Annotated[int, Ge(32)] = 32
    train: NonNegativeInt = 6000
    objects: tuple[int, int] = (1, 2)
    lengths: tuple[int, int] = (3, 5)
    frames: PositiveInt = 8
    in_chans: Literal[1, 3] = 1
    image_size: Own[PositiveInt] = OWN
    flip: Own[bool] = False  # it would change digits and ways
    label_names: ClassVar[list[str]] = [f"{digit} {way}" for digit in range(10) for way in WAYS]

    def __post_init__(self) -> None:
        self.image_size = self.image_size or self.scene_size
        super().__post_init__()
        least, most = self.lengths
        if not 2 <= least <= most:
            raise DataError(
                f"--data.lengths must be two numbers of frames from 2 on, the smaller first, such as [3, 5], not [{least}, {most}]."
            )
        if self.objects[0] < 1:
            raise DataError(f"--data.objects must begin with at least 1, the digit that moves, not {self.objects[0]}.")

    @override
    def load(self) -> dict[str, LabelledSource]:
        found = {}
        for name, scenes in self.scenes(masks=False).items():
            scenes = replace(scenes, extent=EXTENT)
            generator = np.random.default_rng([self.scene_seed, SPLITS.index(name)])
            labels = generator.permutation(np.arange(len(scenes)) % len(self.label_names))
            clips = [moving(scenes, k, self.lengths, label) for k, label in enumerate(labels.tolist())]
            found[name] = LabelledSource(as_objects([clip[evenly(len(clip), self.frames)] for clip in clips]), labels)
        return found


def as_objects(clips: Sequence[NDArray[np.uint8]]) -> NDArray[np.object_]:
    """Stacks clips of different lengths as an object array."""
    array = np.empty(len(clips), object)
    array[:] = [*clips]
    return array
