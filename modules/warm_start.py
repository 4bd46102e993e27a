"""Warm start: initialises a network with the weights of a trained one, which may have other classes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modules.checkpoints import CHANGEABLE, classes_of, differences, shortened
from modules.networks import BackboneError

if TYPE_CHECKING:
    from modules.base import VisionModule


@dataclass(frozen=True)
class ClassRows:
    """Position of classes in the first axis of a layer's weights: groups of background rows followed by the classes'
    rows.

    Args:
        background: rows of each group before the first class.
        behind: rows of each group after the last class.
        inner: rows per class, such as 4 for the sides of its box.
    """

    background: int = 0
    inner: int = 1
    behind: int = 0

    def split(self, weight: Tensor, classes: int) -> Tensor | None:
        """Reshapes weights to G×(background + K + behind)×inner×…; returns None if they do not have this number of
        classes."""
        rows = self.background + classes + self.behind
        if not weight.ndim or len(weight) % (rows * self.inner):
            return None
        return weight.unflatten(0, (-1, rows, self.inner))


@dataclass
class Fit:
    """The weights that fit another network.

    Args:
        state: tensors by name, for all parameters except ``misfits``.
        misfits: names of tensors that are missing in the source, or have another shape there.
        values: number of elements of ``state`` that come from the source.
    """

    state: dict[str, Tensor] = field(default_factory=dict)
    misfits: list[str] = field(default_factory=list)
    values: int = 0


def fit(
    own: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    layers: Mapping[str, ClassRows],
    classes: tuple[Sequence[str], Sequence[str]],
    channels: tuple[int, int],
) -> Fit:
    """Fits the weights of a trained network to another.

    Rows of a class are matched by its name; rows of unknown classes keep their values. If the number of image channels
    differs, the first convolution becomes its mean over the channels, which keeps its response to grey images.

    Args:
        own: weights of the network to initialise.
        other: weights of the trained network.
        layers: layers with class rows, by name.
        classes: class names of both networks, by index.
        channels: number of image channels of both networks.
    """
    found = Fit()
    mine, theirs = classes
    known = [(i, theirs.index(name)) for i, name in enumerate(mine) if name in theirs]
    to, come = (
        torch.tensor(numbers, dtype=torch.long) for numbers in (zip(*known, strict=True) if known else ((), ()))
    )
    for key, value in own.items():
        there, rows, count = other.get(key), layers.get(_layer(key)), value.numel()
        if there is not None and rows is not None and value.ndim:
            new, old = rows.split(value.clone(), len(mine)), rows.split(there, len(theirs))
            if new is None or old is None or new.shape[2:] != old.shape[2:] or len(new) != len(old):
                there = None
            else:
                count = count // new.shape[1] * (rows.background + len(known) + rows.behind)
                new[:, : rows.background] = old[:, : rows.background]
                new[:, rows.background + len(mine) :] = old[:, rows.background + len(theirs) :]
                new[:, to + rows.background] = old[:, come + rows.background]
                there = new.flatten(0, 2)
        elif there is not None and _is_first(value, there, channels):
            there = there.sum(1, keepdim=True).expand_as(value) / channels[0]
        if there is None or there.shape != value.shape:
            found.misfits.append(key)
        else:
            found.state[key] = there
            found.values += count
    return found


def _layer(key: str) -> str:
    """Returns the name of the layer whose class rows apply to a tensor, from the tensor's name."""
    layer, inner, part = key.partition(".parametrizations.")
    if not inner:
        return key.rpartition(".")[0]
    return "" if part.endswith("_v") else layer  # the right singular vector of spectral normalisation


def _is_first(own: Tensor, other: Tensor, channels: tuple[int, int]) -> bool:
    """Whether weights are those of a first convolution and differ only in the number of image channels."""
    same = own.ndim == other.ndim == 4 and own.shape[:1] + own.shape[2:] == other.shape[:1] + other.shape[2:]
    return same and own.shape[1] != other.shape[1] and (own.shape[1], other.shape[1]) == channels


def warm_start(module: "VisionModule", source: "VisionModule") -> str:
    """Loads all weights of a trained network of the same kind. Rows of classes are matched by name; new classes keep
    their initial values. Parts that only training needs, such as a loss, start anew.

    Returns:
        Summary of what was loaded and what starts anew, in a few sentences.

    Raises:
        BackboneError: the networks differ in more than their classes, or take other numbers beside the image.
    """
    mine, theirs = module.architecture, source.architecture
    names, known = classes_of(mine) or [], classes_of(theirs) or []
    there = source.state_dict()
    averages = {begins: module.averages[begins] for begins in module.training_only if begins in module.averages}
    for begins, average in averages.items():  # a registered model has only the average
        there |= {begins + key.removeprefix(average): v for key, v in there.items() if key.startswith(average)}
    anew = tuple(begins for begins in module.training_only if begins not in averages)
    own = {key: value for key, value in module.state_dict().items() if not key.startswith(anew)}
    found = fit(own, there, module.class_layers, (names, known), (mine["in_chans"], theirs["in_chans"]))
    more = [key for key in there if key not in own and not key.startswith(anew)]
    if found.misfits or more:
        raise BackboneError(_unlike(mine, theirs, own, there, [*found.misfits, *more]))
    if (beside := mine.get("tabular_names")) != (taught := theirs.get("tabular_names")):  # as many, but in other places
        raise BackboneError(
            f"It was trained with {', '.join(taught or ())} beside the image, and these data have {', '.join(beside or ())}: give "
            "--data.tabular and --data.keypoints the same names in the same order, or take its backbone alone, with --model.backbone."
        )
    module.load_state_dict(found.state, strict=False)
    module.learned, module.licence = True, source.licence
    total = sum(value.numel() for value in own.values())
    share = "all" if found.values == total else f"{found.values:,} of"
    said = [f"{share} {total:,} weights are loaded"]
    if module.class_layers and names != known:
        groups = (
            ("kept by name", [name for name in names if name in known]),
            ("new", [name for name in names if name not in known]),
            ("left out", [name for name in known if name not in names]),
        )
        said.append(f"Classes {'; '.join(f'{what}: {shortened(which)}' for what, which in groups if which)}")
    if rest := sorted({name.partition(".")[0] for name, _ in module.named_parameters() if name.startswith(anew)}):
        said.append(f"Parts that only training needs start anew: {', '.join(rest)}")
    if mine["image_size"] != theirs["image_size"]:
        said.append(
            f"It was trained on images of {theirs['image_size']} pixels, and these have {mine['image_size']} "
            f"(--data.image_size {theirs['image_size']} gives its own)"
        )
    return ". ".join(said) + "."


def _unlike(
    mine: dict[str, Any], theirs: dict[str, Any], own: dict[str, Tensor], there: dict[str, Tensor], names: list[str]
) -> str:
    """Explains why a network cannot be initialised from another, from both architectures and weights, and the names of
    the tensors that do not fit."""

    def shape(state: dict[str, Tensor]) -> str:
        return "×".join(map(str, state[names[0]].shape)) or "1" if names[0] in state else "not there"

    one, other = ({k: v for k, v in saved.items() if k not in CHANGEABLE} for saved in (mine, theirs))
    mended = [{k: v for k, v in saved.items() if k not in ("num_classes", "in_chans")} for saved in (one, other)]
    unlike = differences(*mended) or differences(one, other)  # `fit` handles these two
    return (
        f"It does not fit this network: {len(names)} of its parts differ, such as {names[0]} ({shape(own)} here, "
        f"{shape(there)} there). Different settings: {'; '.join(unlike) or 'nothing'}. Leave these as they were, "
        "or take its backbone alone, with --model.backbone."
    )
