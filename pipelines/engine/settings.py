"""Short names of settings, their names in earlier versions, which command lines and recipes may still use, and paths from
the home folder."""

import os
import re
from collections.abc import Sequence
from typing import Any

import yaml
from jsonargparse import set_loader
from jsonargparse._loaders_dumpers import yaml_load

import datamodules

SHORT = {
    "backbone": "model.backbone.name",
    "batch_size": "data.batch_size",
    "lr": "model.optimization.lr",
    "max_epochs": "trainer.max_epochs",
    "seed": "seed_everything",
}
OF_BACKBONE = {  # what was a setting of the module itself
    "pretrained": "pretrained",
    "backbone_options": "options",
    "compile": "compile",
    "channels_last": "channels_last",
    "transfer": "transfer",
}


def present(args: Sequence[str]) -> list[str]:
    """Replaces former setting names in a command line.

    >>> present(["fit", "--backbone", "resnet18", "--model.pretrained=true", "--model.backbone_options.width", "8"])
    ['fit', '--model.backbone.name', 'resnet18', '--model.backbone.pretrained=true', '--model.backbone.options.width', '8']

    Args:
        args: the command line. ``--model.backbone NAME`` is the short form of ``--model.backbone.name NAME``.
    """
    result = []
    for arg, following in zip(args, [*args, ""][1:], strict=True):
        option, is_set, value = arg.partition("=")
        if option.startswith("--"):
            option = f"--{current(option[2:], value if is_set else following)}"
        result.append(option + is_set + written(value) if is_set else written(option))
    return result


def written(value: Any) -> Any:
    """Replaces, in a value of a setting and in all below it, ``~/`` at the beginning of a path by the home folder, which
    a shell does only for some and a recipe never; and the file in the import path of a data class, which may have moved.

    >>> written({"class_path": "datamodules.labelled.files.ImageFolder"})
    {'class_path': 'datamodules.ImageFolder'}
    """
    if isinstance(value, dict):
        return {key: written(below) for key, below in value.items()}
    if isinstance(value, list):
        return [written(below) for below in value]
    if not isinstance(value, str):
        return value
    moved = re.fullmatch(r"datamodules\..+\.(\w+)", value)
    if moved and moved[1] in datamodules.__all__:
        return f"datamodules.{moved[1]}"
    return os.path.expanduser(value) if value.startswith("~/") else value


def current(name: str, value: str = "") -> str:
    """Current name of a setting; for ``model.backbone`` it depends on the value."""
    if name in SHORT:
        return SHORT[name]
    if name == "model.backbone" and not value.lstrip().startswith("{"):
        return SHORT["backbone"]
    place, _, rest = name.removeprefix("model.").partition(".")
    if name.startswith("model.") and place in OF_BACKBONE:
        return ".".join(filter(None, ("model.backbone", OF_BACKBONE[place], rest)))
    return name


def upgraded(settings: Any) -> Any:
    """Replaces former setting names in a recipe or in the saved settings of a training.

    >>> upgraded({"model": {"backbone": "lenet5", "transfer": "auto"}, "data": "Digits"})
    {'model': {'backbone': {'name': 'lenet5', 'transfer': 'auto'}}, 'data': 'Digits'}

    Args:
        settings: what stands in the file. ``backbone: NAME`` is the short form of ``backbone: {name: NAME}``.
    """
    settings = written(settings)
    model = settings.get("model") if isinstance(settings, dict) else None
    if not isinstance(model, dict):
        return settings
    backbone = model.get("backbone", {})
    backbone = dict(backbone) if isinstance(backbone, dict) else {"name": backbone}
    backbone |= {now: model[name] for name, now in OF_BACKBONE.items() if name in model}
    rest = {key: value for key, value in model.items() if key != "backbone" and key not in OF_BACKBONE}
    return settings | {"model": ({"backbone": backbone} if backbone else {}) | rest}


def read_former_names() -> None:
    """Makes the parser accept recipes with former names."""

    def load(text: str) -> Any:
        value = yaml_load(text)  # of which the folder "my: photos" is a mapping
        return text if isinstance(value, dict | list) and os.path.exists(text) else upgraded(value)

    set_loader("yaml", load, exceptions=(yaml.YAMLError,))
