"""Exact receptive fields."""

from bisect import bisect_left
from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from modules.base import VisionModule
from modules.inspection.taps import tapped
from modules.spec import sides

CANVASES = (256, 1024, 4096)  # widths of the inputs that receptive fields are measured on


class Field(NamedTuple):
    """Receptive field of a layer's units.

    Attributes:
        size: side of the receptive field, in pixels; None for the whole image.
        stride: pixels between neighbouring units.
        start: first pixel of the first unit's field, negative in the padding.
    """

    size: int | None
    stride: int
    start: int

    def box(self, y: int, x: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Returns the receptive field of the unit at row y and column x: left, top, right, bottom in pixels."""
        if self.size is None:
            return 0, 0, width, height
        left, top = (self.start + self.stride * place for place in (x, y))
        return max(0, left), max(0, top), min(width, left + self.size), min(height, top + self.size)


class _Spread(TorchFunctionMode):
    """Propagates NaN through convolutions and linear layers as they would, without their arithmetic."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear:
            return args[0].sum(-1, keepdim=True).expand(*args[0].shape[:-1], len(args[1]))
        if func is not F.conv2d:
            return func(*args, **(kwargs or {}))
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = (
            {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
            | dict(zip(names, args, strict=False))
            | (kwargs or {})
        )
        image, kernel = given["input"], given["weight"].shape[2:]
        reach = [d * (k - 1) for d, k in zip(_pair(given["dilation"]), kernel, strict=True)]
        rim = [(r // 2, r - r // 2) for r in reach] if given["padding"] == "same" else []
        rim = rim or [(0, 0) if given["padding"] == "valid" else (p, p) for p in _pair(given["padding"])]
        groups = F.pad(image.unflatten(1, (given["groups"], -1)).sum(2), (*rim[1], *rim[0]))
        spread = F.max_pool2d(groups, kernel, given["stride"], 0, given["dilation"])
        return spread.repeat_interleave(len(given["weight"]) // given["groups"], 1)


def _pair(value: Any) -> tuple[Any, Any]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def receptive_fields(module: VisionModule, layers: Sequence[str]) -> dict[str, Field]:
    """Measures the receptive field of a unit in the middle of each layer, exactly.

    NaN propagates from a pixel to every unit that depends on it, whatever the weights: the edges of the field are found
    by bisection over the columns that are set to NaN. Convolutional networks get a strip, so wide that fields larger
    than the image are measured, too; networks for a fixed size get an image of that size.

    Returns:
        Receptive field of each layer. (Theory: Araujo et al. 2019, doi:10.23915/distill.00021.)
    """
    size, channels = sides(module.architecture["image_size"]), module.architecture["in_chans"]
    twin = deepcopy(module).cpu().float()
    fields: dict[str, Field] = {}
    with torch.no_grad(), tapped(twin, layers) as taps, _Spread():
        twin.backbone(torch.zeros(1, channels, *size))
    strips = CANVASES if all(tap.as_it_is for tap in taps.values()) else ()
    for height, width in [*((min(size[0], 64), columns) for columns in strips), size]:

        @cache
        def reached(first: int, last: int, height: int = height, width: int = width) -> dict[str, tuple[bool, int]]:
            """Whether columns reach the middle unit of each layer, and the layer's number of columns."""
            canvas = torch.zeros(1, channels, height, width)
            canvas[..., first:last] = torch.nan
            with torch.no_grad(), tapped(twin, layers, (height, width) == size) as taps, _Spread():
                try:
                    twin.backbone(canvas)
                except (RuntimeError, AssertionError, ValueError):  # fully connected layers for another size
                    if not all(hasattr(tap, "maps") for tap in taps.values()):
                        return {}
            units = {name: tap.maps[0, :, tap.maps.shape[2] // 2] for name, tap in taps.items()}
            return {name: (bool(u[:, u.shape[1] // 2].isnan().any()), u.shape[1]) for name, u in units.items()}

        for name in layers if reached(0, 0) else ():
            if name in fields:
                continue
            first = bisect_left(range(width), True, key=lambda x, name=name: reached(0, x + 1)[name][0])  # type: ignore[misc]
            last = bisect_left(range(width), True, key=lambda x, name=name: not reached(x, width)[name][0])  # type: ignore[misc]
            stride = round(width / reached(0, 0)[name][1])
            whole = (first, last) == (0, width)
            if (first > 0 and last < width) or width == size[1]:
                fields[name] = Field(
                    None if whole else last - first, stride, first - reached(0, 0)[name][1] // 2 * stride
                )
    return {name: fields.get(name, Field(None, 1, 0)) for name in layers}
