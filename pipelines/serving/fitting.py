"""Preprocessing as network layers, for exported files."""

import torch
from torch import Tensor, nn

from datamodules.augmentations import GREY, sides
from datamodules.options import Preprocessing


class Fitting(nn.Module):
    """Resizes pictures of any size to the network's input, as `augmentations.evaluation` does, within about one grey
    level: OpenCV computes with integers.

    Resizing is linear in the pixels of a row and in those of a column, so it is two matrix products; the matrices follow from
    the picture's size.

    Args:
        preprocessing: how pictures are fitted.

    Raises:
        ValueError: pictures are not resized to one size as a whole.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.fit, self.size = preprocessing.fit, sides(preprocessing.image_size)
        if preprocessing.reading.deep:
            raise ValueError("it takes images of more than 8 bits: leave --with_preprocessing out")
        if self.fit == "native" or preprocessing.frames or preprocessing.tile or preprocessing.numbers:
            raise ValueError("it does not take whole pictures of one size: leave --with_preprocessing out")
        covers = self.fit in ("crop", "extend")
        self.scaled = tuple(round(side / preprocessing.crop_pct) if covers else side for side in self.size)

    def forward(self, picture: Tensor) -> Tensor:
        """Converts uint8 B×C×H×W to B×C×S×S of integer values, as float32."""
        counts = picture.shape[2:]
        given = [torch.full((), count, dtype=torch.float32) for count in counts]
        resized = self._resized(given)
        shrinks = [new < old for new, old in zip(resized, given, strict=True)]
        down, across = (self._matrix(k, counts[k], given[k], resized[k], shrinks) for k in (0, 1))
        made = (down @ picture.float() @ across.mT).round().clamp(0, 255)
        if self.fit == "pad":
            rows, columns = (torch.arange(side) < new for side, new in zip(self.size, resized, strict=True))
            made = torch.where(rows[:, None] & columns, made, float(GREY))
        return made

    def factors(self, picture: Tensor) -> Tensor:
        """Scale factors from the resized to the original picture for boxes (x, y, x, y), float32 4."""
        down, across = (picture.shape[2 + k] / self.size[k] for k in (0, 1))
        both = torch.stack([torch.full((), across), torch.full((), down)])
        return (both.amax(0).expand(2) if self.fit == "pad" else both).repeat(2)

    def _resized(self, given: list[Tensor]) -> list[Tensor]:
        """Height and width of the whole picture after resizing."""
        wanted = [torch.full((), float(side)) for side in self.scaled]
        if self.fit == "stretch":
            return wanted
        scales = [side / old for side, old in zip(wanted, given, strict=True)]
        scale = torch.maximum(*scales) if self.fit == "crop" else torch.minimum(*scales)
        return [(old * scale).round().clamp(min=1) for old in given]

    def _matrix(self, k: int, count: int, old: Tensor, new: Tensor, shrinks: list[Tensor]) -> Tensor:
        """Interpolation weights of S output rows (k = 0) or columns (k = 1), float32 S×count."""
        place = torch.arange(self.size[k], dtype=torch.float32)
        if self.fit == "crop":
            place = place + ((new - self.size[k]) / 2).floor()
        if self.fit == "extend":  # by the colours of the border
            place = place + (self.scaled[k] - self.size[k]) // 2 - ((self.scaled[k] - new) / 2).floor()
        place = torch.minimum(place.clamp(min=0), new - 1)[:, None]
        pixel, ratio = torch.arange(count, dtype=torch.float32), old / new
        low, high = place * ratio, (place + 1) * ratio
        area = (torch.minimum(high, pixel + 1) - torch.maximum(low, pixel)).clamp(min=0) / ratio
        middle = (place + 0.5) * ratio - 0.5
        taps = (-1, 0, 1, 2) if self.fit in ("crop", "extend") else (0, 1)
        grown = self._taps(middle.floor(), taps, middle, pixel, old)
        if self.fit != "stretch":
            return torch.where(shrinks[0] | shrinks[1], area, grown)
        # Where one side grows and the other shrinks, OpenCV's area filter is a bilinear one with other places.
        first = low.floor()
        share = (place + 1 - (first + 1) / ratio).clamp(min=0)
        mixed = self._taps(first, (0, 1), first + share - share.floor(), pixel, old)
        return torch.where(shrinks[0] & shrinks[1], area, torch.where(shrinks[0] | shrinks[1], mixed, grown))

    def _taps(self, first: Tensor, taps: tuple[int, ...], at: Tensor, pixel: Tensor, old: Tensor) -> Tensor:
        """Interpolation weights around positions; pixels beyond the border repeat it."""
        kernel = cubic if len(taps) == 4 else linear
        parts = [
            (torch.minimum((first + tap).clamp(min=0), old - 1) == pixel) * kernel((at - (first + tap)).abs())
            for tap in taps
        ]
        return torch.stack(parts).sum(0)


def linear(far: Tensor) -> Tensor:
    """Linear interpolation weights by distance."""
    return 1 - far


def cubic(far: Tensor, a: float = -0.75) -> Tensor:
    """Cubic convolution weights (Keys 1981, doi:10.1109/TASSP.1981.1163711) with OpenCV's constant."""
    near = ((a + 2) * far - (a + 3)) * far * far + 1
    return torch.where(far <= 1, near, ((far - 5) * far + 8) * far * a - 4 * a)
