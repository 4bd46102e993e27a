"""Square tiles of pictures: positions, and sources of tiles."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.cache import Cache
from datamodules.loading import Sample
from datamodules.paths import Paths

KEPT = 256 << 20  # bytes of images that are cached while their tiles are used
Place = tuple[int, int]  # left and top edge, in pixels


def pieces(height: int, width: int, side: int) -> list[Place]:
    """Squares that cover a picture with at least a fifth of overlap, evenly spaced, so that an object cut by one is
    whole in another.

    Args:
        height: height of the image, in pixels.
        width: width of the image.
        side: side of the squares; an image that is not larger is one tile.

    Returns:
        Their positions, row by row.
    """

    def spread(length: int) -> list[int]:
        count = 1 + -(-max(0, length - side) // max(1, round(0.8 * side)))
        return [int(start) for start in np.linspace(0, max(0, length - side), count).round()]

    return [(x, y) for y in spread(height) for x in spread(width)]


def tile_starts(length: int, side: int | None) -> list[int]:
    """Start positions of adjacent tiles that cover a length; the last one ends with it. Without a side, a single
    tile."""
    return [0] if side is None or length <= side else [*range(0, length - side, side), length - side]


class TiledSource:
    """Tiles of pictures as samples. The picture is cached for its next tile.

    Args:
        sizes: int64 N×2, height and width of the pictures.
        files: files of the images, if they are files.
        layout: returns the positions of an image's tiles, for its height and width.

    Attributes:
        places: int64 M×3: the image of each sample, left and top edge.
    """

    def __init__(
        self,
        sizes: NDArray[np.int64],
        files: Paths | None,
        layout: Callable[[int, int], list[Place]],
    ) -> None:
        self.sizes, self._files = sizes, files
        places = [(i, *place) for i, (height, width) in enumerate(sizes.tolist()) for place in layout(height, width)]
        self.places = np.array(places, np.int64).reshape(-1, 3)
        self._several = np.bincount(self.places[:, 0], minlength=len(sizes)) > 1
        self._cache: Cache[dict[str, Any]] = Cache(KEPT)

    def __len__(self) -> int:
        return len(self.places)

    @property
    def paths(self) -> Paths | None:
        """File of each sample, if pictures are files."""
        return None if self._files is None else self._files[self.places[:, 0]]

    def read(self, which: int) -> Sample:
        """Reads a whole picture as a sample."""
        raise NotImplementedError

    def whole(self, which: int) -> Sample:
        """A whole picture as a sample, cached while further tiles of it are needed."""
        return self._cache.get(which, self.read) if self._several[which] else self.read(which)
