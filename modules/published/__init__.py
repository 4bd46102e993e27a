"""Networks that other libraries have published, as networks to start from."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Published:
    """A network of another library as one of ours that answers alike.

    Args:
        kind: class of the module.
        architecture: its `VisionModule.architecture`.
        weights: all but what is found in validation, such as a threshold.
        licence: of the weights.
    """

    kind: str
    architecture: dict[str, Any]
    weights: dict[str, Tensor]
    licence: str
