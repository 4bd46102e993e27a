"""Exchangeable parts of networks that describe themselves as plain data, and random numbers with a seed per image."""

import importlib
import inspect
import math
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import modules
from modules.networks import BackboneError, MissingCodeError

Shape = tuple[int, ...]


def within(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Checks the range of a part's argument.

    Raises:
        BackboneError: it is out of range.
    """
    if not low <= value <= high:
        bounds = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise BackboneError(f"{name} of a part must be {bounds}, not {value}.")


class Part(nn.Module):
    """Base class of exchangeable parts. Each argument is stored as an attribute of the same name, for `describe`."""


def describe(part: Any, **options: Any) -> dict[str, Any] | None:
    """Describes a part as plain data: the import path of its class, and its arguments.

    Args:
        part: a `Part`, an activation, or another module that stores each argument as an attribute of the same name.
        options: the arguments, if they are not stored so; parts among them are described, too.

    Returns:
        ``{"class_path": …, "init_args": {…}}``, from which `build` recreates it; None for None.

    Raises:
        BackboneError: the part does not store an argument.
    """
    if part is None:
        return None
    if not options:
        named = [p.name for p in inspect.signature(type(part)).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        if lacking := [name for name in named if not hasattr(part, name)]:
            raise BackboneError(
                f"{path_of(type(part))} cannot be saved with a model: let its __init__ keep the argument "
                f"{lacking[0]!r} as self.{lacking[0]}."
            )
        options = {name: getattr(part, name) for name in named}
    return {"class_path": path_of(type(part)), "init_args": {name: _plain(value) for name, value in options.items()}}


def _plain(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return describe(value)
    return list(value) if isinstance(value, tuple) else value


def path_of(kind: type) -> str:
    """Returns the shortest import path of a class, such as ``modules.detection.YOLO``: it remains valid if a file
    moves."""
    names = kind.__module__.split(".")
    for count in range(1, len(names)):
        package = ".".join(names[:count])
        if getattr(sys.modules.get(package), kind.__name__, None) is kind:
            return f"{package}.{kind.__name__}"
    return f"{kind.__module__}.{kind.__qualname__}"


def find_class(path: str, base: type) -> type:
    """Finds the class of an import path.

    Args:
        path: in the format of `path_of`. A bare name, from models saved by earlier versions, is looked up among Fovea's
            own classes, as is the last part of a path into Fovea that no longer exists.
        base: required base class; no other class is returned.

    Raises:
        ValueError: there is no such class.
    """
    place, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(place), name, None) if place else None
    except ImportError:
        found = None
    if found is None and (not place or place.split(".")[0] == __name__.split(".")[0]):
        for own in modules.__all__:  # a class is known once its file has been imported
            getattr(modules, own)
        known = (kind for family in (Part, base) for kind in _kinds(family) if kind.__name__ == name)
        found = next(known, None) or getattr(nn.modules.activation, name, None)
    if found is None and place.split(".")[0] in ("modules", "datamodules"):
        raise ValueError(
            f"there is no {path} in this version of Fovea: use the one that saved the model, or a later one"
        )
    if found is None and place:
        raise MissingCodeError(
            f"There is no {path} here. A class of your own must be importable where its model is loaded: put the folder of "
            f"{place.split('.')[0]} on PYTHONPATH."
        )
    if found is None:
        raise ValueError(f"there is no part {path!r} in this version of Fovea")
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"{path} is not a {base.__name__}")
    return found


def build(description: Any, *given: Any, base: type = nn.Module) -> Any:
    """Recreates a part from its description.

    Args:
        description: a result of `describe`, of this or an earlier version; None returns None.
        given: further positional arguments, which come first.
        base: required base class.

    Raises:
        ValueError: there is no such class; see `find_class`.
    """
    if description is None:
        return None
    described = upgrade(description)
    options = {name: build(value) if is_description(value) else value for name, value in described["init_args"].items()}
    return find_class(described["class_path"], base)(*given, **options)


def is_description(value: object) -> bool:
    """Whether a value is the description of a part."""
    return isinstance(value, dict) and (value.keys() == {"class_path", "init_args"} or "class" in value)


def upgrade(saved: Any) -> Any:
    """Converts the description of a network from earlier versions, in which a part was ``{"class": NAME, …}``, or, on
    feature maps, ``NAME`` with ``…_options``, to the current format."""
    if not isinstance(saved, dict):
        return saved
    if "class" in saved:
        options = {key: value for key, value in saved.items() if key != "class"}
        return upgrade({"class_path": _whole(saved["class"]), "init_args": options})
    result = {key: upgrade(value) for key, value in saved.items()}
    if result.keys() == {"class_path", "init_args"}:  # the file of the class may have moved
        result["class_path"] = _whole(result["class_path"])
    for key in ("detector", "decoder"):
        if isinstance(name := saved.get(key), str) and f"{key}_options" in saved:
            result[key] = {"class_path": _whole(name), "init_args": result.pop(f"{key}_options")}
    return result


def _whole(name: str) -> str:
    try:
        return path_of(find_class(name, nn.Module))
    except ValueError:  # `build` raises the error
        return name


def _kinds(base: type) -> Iterator[type]:
    kind: type
    for kind in base.__subclasses__():
        if kind.__module__.startswith(f"{__name__.split('.')[0]}."):
            yield kind
        yield from _kinds(kind)


class Draws:
    """Random numbers for the images of a batch.

    In training they are torch's own. In evaluation they are seeded by the content of each image, so that metrics and
    images do not depend on the batch size or the number of processes.

    Args:
        image: uint8 B×C×H×W.
        training: whether to use torch's own random numbers.
    """

    def __init__(self, image: Tensor, training: bool) -> None:
        self.image, self.training = image, training
        self._generators: list[torch.Generator] = []

    def normal(self, *shape: int) -> Tensor:
        """Draws float32 B×shape from N(0, 1)."""
        return self._draw(torch.randn, shape)

    def uniform(self, *shape: int) -> Tensor:
        """Draws float32 B×shape, uniform in [0, 1)."""
        return self._draw(torch.rand, shape)

    def _draw(self, draw: Callable[..., Tensor], shape: Shape) -> Tensor:
        device = self.image.device
        if self.training:
            return draw(len(self.image), *shape, device=device)
        if not self._generators:  # created lazily: most evaluations draw nothing
            images = self.image.cpu().contiguous().numpy()
            self._generators = [torch.Generator().manual_seed(zlib.crc32(one.tobytes())) for one in images]
        return torch.stack([draw(*shape, generator=generator) for generator in self._generators]).to(device)
