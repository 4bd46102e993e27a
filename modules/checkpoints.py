"""Reading of training checkpoints, and checks that they fit a network."""

from collections.abc import Iterator, Mapping, Sequence
from inspect import signature
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modules.networks import BackboneError
from modules.networks.parts import find_class, is_description, upgrade
from modules.networks.weights import read_weights

if TYPE_CHECKING:
    from modules.stored import StoredModule

# Entries in which the architectures of a checkpoint and a network may differ.
CHANGEABLE = (
    "pretrained",
    "label_names",
    "threshold",
    "max_detections",
    "nms",
    "across_classes",
    "way",
    "shots",
    "queries",
)

# The settings that parts of a description come from, where these are not its own in ``--model``.
SETTINGS = {
    "in_chans": "--data.in_chans or --data.bands",
    "bit_depth": "--data.bits",
    "channel_mean": "--data.mean and --data.std",
    "channel_std": "--data.mean and --data.std",
    "tabular_names": "--data.tabular and --data.keypoints",
    "image_size": "--data.image_size",
    "num_classes": "--data",
    "observation_mean": "--data",
    "observation_std": "--data",
    "targets": "--data and --model.tasks",
    "backbone_options": "--model.backbone.options",
}


def classes_of(architecture: Mapping[str, Any]) -> list[str] | None:
    """Returns the names of the classes that a network was trained on, by index.

    Returns:
        None if it has no classes, as an unconditional generator. For multi-task networks, those of detection, else of
        segmentation without the background, else of classification; those of several columns as COLUMN/CLASS.
    """
    targets = architecture.get("targets") or {}
    columns = {key.partition("/")[2]: own for key, own in targets.items() if "/" in key}
    names = (
        architecture.get("label_names")
        or targets.get("detection")
        or targets.get("segmentation", [])[1:]
        or targets.get("classification")
        or [f"{column}/{name}" for column, own in columns.items() for name in own]
    )
    return list(names) if names and architecture.get("conditional", True) else None


def read_checkpoint(path: str | Path, device: Any = "cpu") -> dict[str, Any]:
    """Reads a training checkpoint without executing code from the file.

    Args:
        path: ``last.ckpt``, ``best.ckpt``, or another checkpoint of a `VisionModule` saved by Lightning's trainer.
        device: device of the tensors.

    Raises:
        BackboneError: the file is missing or not a training checkpoint.
    """
    read_weights(path)
    found = None if Path(path).suffix == ".safetensors" else torch.load(path, device, weights_only=True)
    if not isinstance(found, dict) or not {"architecture", "state_dict"} <= found.keys():
        raise BackboneError(
            f"{path} contains only weights, and is not the checkpoint of a training. To start another training from "
            "them, name the file as --model.backbone; to use a registered model, start python -m pipelines.predict."
        )
    return found


def check_network(saved: dict[str, Any], own: dict[str, Any]) -> None:
    """Checks that weights belong to the same architecture and the same classes.

    Raises:
        BackboneError: they do not.
    """
    saved = {key: _completed(value, own.get(key)) for key, value in upgrade(saved).items()}
    learned, names = classes_of(saved), classes_of(own)
    if learned is not None and names is not None and learned != names:
        raise BackboneError(
            f"The checkpoint is of a network that has learned other labels, or in another order: "
            f"{shortened(learned)}; here they are {shortened(names)}. Give it data with these classes, or start a "
            "new training with another --output; to keep what it has learned, give the file as --start."
        )
    if unlike := [key for key, value in saved.items() if key not in CHANGEABLE and own.get(key) != value]:
        mine, theirs = ({key: network.get(key) for key in unlike} for network in (own, saved))
        options = (SETTINGS.get(key, f"--model.{key.removesuffix('_options')}") for key in unlike)
        settings = " and ".join(dict.fromkeys(name for option in options for name in option.split(" and ")))
        raise BackboneError(
            f"The checkpoint is of another network: {'; '.join(differences(mine, theirs))}. Give {settings} what it was "
            "trained with, or choose another checkpoint or --output."
        )


def _completed(saved: Any, own: Any) -> Any:
    """Adds to the description of a part the arguments that its class has got since, where the own part has their defaults."""
    if not (is_description(saved) and is_description(own)) or saved["class_path"] != own["class_path"]:
        return saved
    mine, parameters = own["init_args"], signature(find_class(own["class_path"], nn.Module)).parameters
    since = {
        name: value
        for name, value in mine.items()
        if name not in saved["init_args"] and name in parameters and parameters[name].default == value
    }
    known = {name: _completed(value, mine.get(name)) for name, value in saved["init_args"].items()}
    return {**saved, "init_args": {**since, **known}}


def shapes_of(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    """Returns the shape of each tensor by name."""
    return {name: value.shape for name, value in state.items()}


def at_size(saved: dict[str, Any], shapes: Mapping[str, torch.Size], network: "StoredModule") -> dict[str, Any]:
    """Returns the architecture of weights as that of a network for another image size, if the network takes images of both:
    all its weights have the same shapes, as those of convolutions and of a pooled head.

    Args:
        saved: the `VisionModule.architecture` of the weights.
        shapes: shape of each weight by name.
        network: the network that is to load them, built for its own size.

    Raises:
        BackboneError: nothing but the size differs, and the network takes only the one that it was trained with.
    """
    own = network.architecture
    trained, asked = saved.get("image_size"), own.get("image_size")
    if trained == asked or None in (trained, asked):
        return saved
    here = shapes_of(network.state_dict())
    unlike = next((name for name in {**here, **shapes} if here.get(name) != shapes.get(name)), None)
    resized = {**saved, "image_size": asked}
    if unlike and all(own.get(key) == value for key, value in upgrade(resized).items() if key not in CHANGEABLE):
        raise BackboneError(
            f"The network was trained with --data.image_size {trained} and takes no other: the number of values of {unlike} "
            f"depends on it. Give {trained} instead of {asked}; networks of convolutions with pooled features take any size."
        )
    return saved if unlike else resized


def differences(own: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """What differs between two architectures, setting by setting.

    >>> differences({"detector": {"class_path": "YOLO", "init_args": {"width": 64}}}, {"detector": {"class_path": "YOLO"}})
    ['detector.width is 64 (was None)']
    """
    mine, theirs = dict(_flat(own)), dict(_flat(saved))
    return [
        f"{key} is {shorten(str(mine.get(key)), 80)} (was {shorten(str(theirs.get(key)), 80)})"
        for key in {**mine, **theirs}
        if mine.get(key) != theirs.get(key)
    ]


def _flat(saved: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in saved.items():
        if isinstance(value, Mapping):
            yield from _flat(value, prefix if key == "init_args" else f"{prefix}{key}.")
        else:
            yield prefix.removesuffix(".") if key == "class_path" else f"{prefix}{key}", value


def shortened(names: Sequence[str]) -> str:
    """Joins names for a sentence; of many, the first 20."""
    return ", ".join(names[:20]) + (f", … ({len(names)} in all)" if len(names) > 20 else "")
