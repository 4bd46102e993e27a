"""A trained module as a folder of data: what the registry keeps, and what is made of it again."""

from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import datamodules
import modules
from datamodules import VisionDataModule
from modules import VisionModule


def save_model(
    folder: Path, module: VisionModule, preprocessing: dict[str, Any], task: str, data: dict[str, Any] | None = None
) -> None:
    """Writes a model as data: ``model.safetensors`` and ``architecture.yaml``. Nothing in it is code.

    Args:
        folder: where; it is made.
        module: the trained module.
        preprocessing: what turns a picture into its input.
        task: name of the task.
        data: class path and arguments of the data module that it learned from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        key: value.contiguous()
        for key, value in module.state_dict().items()
        if not key.startswith(module.training_only)
    }
    save_file(state, folder / "model.safetensors")
    description = {
        "task": task,
        "class": type(module).__name__,
        "module": module.architecture,
        "preprocessing": preprocessing,
        "data": data,
    }
    (folder / "architecture.yaml").write_text(yaml.safe_dump(description, sort_keys=False, allow_unicode=True))


def load_model(folder: Path) -> tuple[VisionModule, dict[str, Any]]:
    """Rebuilds what `save_model` wrote.

    Returns:
        The module in evaluation mode, and its preprocessing.

    Raises:
        ValueError: it is not, or no more, what `save_model` wrote.
    """
    try:
        description = yaml.safe_load((folder / "architecture.yaml").read_text())
        if description["class"] not in modules.__all__:
            raise ValueError(f"a {description['class']} is not known to this version of Fovea")
        module: VisionModule = getattr(modules, description["class"]).from_architecture(description["module"])
        learning = {key: v for key, v in module.state_dict().items() if key.startswith(module.training_only)}
        module.load_state_dict(learning | load_file(folder / "model.safetensors"))
        return module.eval(), description["preprocessing"]
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, yaml.YAMLError, SafetensorError) as error:
        raise ValueError(f"{folder} is not a model that Fovea saved: {error}") from error


def learned_from(folder: Path) -> VisionDataModule:
    """The data that a saved model learned from.

    Args:
        folder: what `save_model` wrote.

    Raises:
        ValueError: the model does not say.
    """
    saved = yaml.safe_load((folder / "architecture.yaml").read_text()).get("data")
    name = saved["class_path"].rsplit(".", 1)[-1] if saved else None
    if name not in datamodules.__all__:
        raise ValueError(f"{folder} does not say which data it learned from.")
    return getattr(datamodules, name)(**saved.get("init_args", {}))
