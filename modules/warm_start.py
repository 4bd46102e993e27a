"""Weights of one trained network for another of the same architecture, which may have other classes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modules.checkpoints import CHANGEABLE, classes_of, shortened
from modules.networks import BackboneError

if TYPE_CHECKING:
    from modules.base import VisionModule


@dataclass(frozen=True)
class ClassRows:
    """How classes lie in the first axis of a layer's weights: group by group, of each the background, then class by class.

    Args:
        background: rows of each group before those of the first class.
        behind: rows of each group behind those of the last class.
        inner: values of each class, such as the four sides of its box.
    """

    background: int = 0
    inner: int = 1
    behind: int = 0

    def split(self, weight: Tensor, classes: int) -> Tensor | None:
        """Weights as G×(background + K + behind)×inner×…; None where there are other than so many classes."""
        rows = self.background + classes + self.behind
        if not weight.ndim or len(weight) % (rows * self.inner):
            return None
        return weight.unflatten(0, (-1, rows, self.inner))


@dataclass
class Fit:
    """What of a network can start from another.

    Args:
        state: tensors by name, for all that were asked for but ``misfits``.
        misfits: names of tensors that the other lacks, or has in another shape.
        values: how many numbers of ``state`` come from the other.
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

    Rows of a class go by its name: those of a class that the trained network does not know stay as they are. A first
    convolution for images of another number of channels becomes its mean over the channels, which sees grey as before.

    Args:
        own: the network that is to start.
        other: the trained one.
        layers: whose first axis is classes, by name.
        classes: names of both networks' classes, in the order of their numbers.
        channels: of both networks' images.
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
    """The layer with which a tensor shares its first axis, by the tensor's name."""
    layer, inner, part = key.partition(".parametrizations.")
    if not inner:
        return key.rpartition(".")[0]
    return "" if part.endswith("_v") else layer  # of spectral normalisation, the vector on the side of the inputs


def _is_first(own: Tensor, other: Tensor, channels: tuple[int, int]) -> bool:
    """Whether weights are those of a convolution over images, which have other numbers of channels."""
    same = own.ndim == other.ndim == 4 and own.shape[:1] + own.shape[2:] == other.shape[:1] + other.shape[2:]
    return same and own.shape[1] != other.shape[1] and (own.shape[1], other.shape[1]) == channels


def warm_start(module: "VisionModule", source: "VisionModule") -> str:
    """Takes over all weights of a trained network of this kind. Where classes differ, their rows go by their names:
    those of a class that it does not know stay as they are. What only training needs, such as a loss, starts anew.

    Args:
        module: that is to start.
        source: the trained one.

    Returns:
        What was taken over and what starts anew, in a few sentences.

    Raises:
        BackboneError: the networks differ in more than in their classes.
    """
    mine, theirs = module.architecture, source.architecture
    names, known = classes_of(mine) or [], classes_of(theirs) or []
    there = source.state_dict()
    averages = {begins: module.averages[begins] for begins in module.training_only if begins in module.averages}
    for begins, average in averages.items():  # a registered model has the average alone
        there |= {begins + key.removeprefix(average): v for key, v in there.items() if key.startswith(average)}
    anew = tuple(begins for begins in module.training_only if begins not in averages)
    own = {key: value for key, value in module.state_dict().items() if not key.startswith(anew)}
    found = fit(own, there, module.class_layers, (names, known), (mine["in_chans"], theirs["in_chans"]))
    more = [key for key in there if key not in own and not key.startswith(anew)]
    if found.misfits or more:
        raise BackboneError(_unlike(mine, theirs, own, there, [*found.misfits, *more]))
    module.load_state_dict(found.state, strict=False)
    module.learned, module.licence = True, source.licence
    total = sum(value.numel() for value in own.values())
    share = "all" if found.values == total else f"{found.values:,} of"
    said = [f"{share} {total:,} weights are taken over"]
    if module.class_layers and names != known:
        groups = (
            ("kept by name", [name for name in names if name in known]),
            ("new", [name for name in names if name not in known]),
            ("left out", [name for name in known if name not in names]),
        )
        said.append(f"Classes {'; '.join(f'{what}: {shortened(which)}' for what, which in groups if which)}")
    if rest := sorted({name.partition(".")[0] for name, _ in module.named_parameters() if name.startswith(anew)}):
        said.append(f"What only training needs starts anew: {', '.join(rest)}")
    if mine["image_size"] != theirs["image_size"]:
        said.append(
            f"It learned from images of {theirs['image_size']} pixels, and these have {mine['image_size']} "
            f"(--data.image_size {theirs['image_size']} gives its own)"
        )
    return ". ".join(said) + "."


def _unlike(
    mine: dict[str, Any], theirs: dict[str, Any], own: dict[str, Tensor], there: dict[str, Tensor], names: list[str]
) -> str:
    """Why a network cannot start from another as a whole, of both architectures, weights, and the names of those that do not
    fit."""

    def shape(state: dict[str, Tensor]) -> str:
        return "×".join(map(str, state[names[0]].shape)) or "1" if names[0] in state else "not there"

    one, other = (dict(_flat({k: v for k, v in saved.items() if k not in CHANGEABLE})) for saved in (mine, theirs))
    keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    keys = [key for key in keys if key not in ("num_classes", "in_chans")] or keys  # to which weights are fitted
    differences = [f"{key} is {one.get(key)} (was {other.get(key)})" for key in keys]
    return (
        f"It does not fit this network: {len(names)} of its parts differ, such as {names[0]} ({shape(own)} here, "
        f"{shape(there)} there). What differs in the settings: {'; '.join(differences) or 'nothing'}. Leave these as they were, "
        "or take its backbone alone, with --model.backbone."
    )


def _flat(saved: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in saved.items():
        if isinstance(value, Mapping):
            yield from _flat(value, prefix if key == "init_args" else f"{prefix}{key}.")
        else:
            yield prefix.removesuffix(".") if key == "class_path" else f"{prefix}{key}", value
