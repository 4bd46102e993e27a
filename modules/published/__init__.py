"""Conversion of pretrained networks of other libraries."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Published:
    """A network of another library, converted to a module of Fovea with equal predictions.

    Args:
        kind: class name of the module.
        architecture: `VisionModule.architecture` of the module.
        weights: all weights except those measured on validation data, such as a threshold.
        licence: licence of the weights.
    """

    kind: str
    architecture: dict[str, Any]
    weights: dict[str, Tensor]
    licence: str
