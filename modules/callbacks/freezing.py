"""Which layers of a backbone learn, and from when on."""

from typing import Any

from timm.models._manipulate import flatten_modules, group_parameters
from torch import nn

FIRST_LAYER = 0.1  # rate of the layer nearest to the image, as a share of the head's, where a strategy sets the decay


def layers(backbone: nn.Module, coarse: bool = False) -> dict[str, int]:
    """The layer of each parameter of a backbone by its name; 0 is nearest to the image.

    Args:
        backbone: what `create_backbone` makes, also with ``features_only``.
        coarse: count stages, where the architecture has them, instead of blocks.
    """
    inner: Any = getattr(backbone, "model", None) if not hasattr(backbone, "group_matcher") else backbone
    if hasattr(inner, "group_matcher"):
        prefix = "" if inner is backbone else "model."
        found = group_parameters(inner, inner.group_matcher(coarse=coarse), reverse=True)
        return {prefix + name: int(layer) for name, layer in found.items()}
    parts = flatten_modules(backbone.named_children(), depth=1, module_types="container")
    named = {name: [f"{name}.{key}" for key, _ in part.named_parameters()] for name, part in parts}
    filled = [keys for keys in named.values() if keys]
    return {key: layer for layer, keys in enumerate(filled) for key in keys}


def unfreezing(count: int, head_epochs: int, epochs: int) -> list[int]:
    """The epoch in which each layer starts to learn: the last one after the head had its time, then one after the other
    from the top down, the last of them before the training is half over (Howard & Ruder 2018, arXiv:1801.06146).

    Args:
        count: layers.
        head_epochs: epochs in which only the head learns.
        epochs: epochs of the whole training; 0 if it is not known, which opens a layer each epoch.

    Returns:
        An epoch, counted from 0, for each layer; the first is the layer nearest to the image.
    """
    span = max(0, -(-epochs // 2) - head_epochs) if epochs else count
    return [head_epochs + span * (count - 1 - layer) // count for layer in range(count)]
