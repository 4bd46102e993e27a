"""What networks are put together from: exchangeable parts that describe themselves as data; keyed random numbers."""

import inspect
import math
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from modules.networks import BackboneError

Shape = tuple[int, ...]


def within(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Checks an argument of a part.

    Raises:
        BackboneError: it is out of its range.
    """
    if not low <= value <= high:
        bounds = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise BackboneError(f"{name} of a part must be {bounds}, not {value}.")


class Part(nn.Module):
    """An exchangeable part. It keeps each of its arguments under the argument's own name, so that `recipe` finds them."""


def recipe(part: nn.Module | None) -> dict[str, Any] | None:
    """Class and arguments of a part, as plain data."""
    if part is None:
        return None
    named = (p.name for p in inspect.signature(type(part)).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD)
    values = {name: getattr(part, name) for name in named}
    return {"class": type(part).__name__} | {
        name: recipe(value) if isinstance(value, nn.Module) else list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
    }


def rebuild(description: dict[str, Any] | None) -> Any:
    """The part that `recipe` described: a `Part`, or an activation of torch; nothing else is made.

    Raises:
        ValueError: there is no such part.
    """
    if description is None:
        return None
    options = {
        name: rebuild(value) if isinstance(value, dict) and "class" in value else value
        for name, value in description.items()
    }
    name = options.pop("class")
    known = {part.__name__: part for part in _parts(Part)}
    activation = getattr(nn.modules.activation, name, None)
    if name in known:
        return known[name](**options)
    if isinstance(activation, type) and issubclass(activation, nn.Module):
        return activation(**options)
    raise ValueError(f"There is no part {name!r}; known are {', '.join(sorted(known))}.")


def _parts(kind: type[Part]) -> Iterator[type[Part]]:
    for part in kind.__subclasses__():
        yield part
        yield from _parts(part)


class Draws:
    """Random numbers for a batch.

    In training they are torch's own. In evaluation those of an image depend on nothing but the image, so that figures
    and pictures do not change with the size of the batch or the number of processes.

    Args:
        image: uint8 B×C×H×W.
        training: which of the two.
    """

    def __init__(self, image: Tensor, training: bool) -> None:
        self.image, self.training = image, training
        self._generators: list[torch.Generator] = []

    def normal(self, *shape: int) -> Tensor:
        """float32 B×shape from N(0, 1)."""
        return self._draw(torch.randn, shape)

    def uniform(self, *shape: int) -> Tensor:
        """float32 B×shape, uniform in [0, 1)."""
        return self._draw(torch.rand, shape)

    def _draw(self, draw: Callable[..., Tensor], shape: Shape) -> Tensor:
        device = self.image.device
        if self.training:
            return draw(len(self.image), *shape, device=device)
        if not self._generators:  # not before: most evaluations draw nothing
            images = self.image.cpu().contiguous().numpy()
            self._generators = [torch.Generator().manual_seed(zlib.crc32(one.tobytes())) for one in images]
        return torch.stack([draw(*shape, generator=generator) for generator in self._generators]).to(device)
