"""A trained module as a folder of data: saving, checking and loading."""

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import datamodules
from datamodules import VisionDataModule
from datamodules.errors import listed
from datamodules.options import Preprocessing
from modules import VisionModule
from modules.networks import MissingCodeError
from modules.networks.parts import find_class, path_of, upgrade
from pipelines.engine.disk import whole, write_text

CODE = "code"  # folder of a model with the code of its own parts, as far as it carries that


def save_model(
    folder: Path,
    module: VisionModule,
    preprocessing: Preprocessing,
    task: str,
    data: dict[str, Any] | None = None,
    code: Sequence[Path] = (),
) -> None:
    """Saves a model as data: ``model.safetensors`` and ``architecture.yaml``. Nothing in it is run, ``code`` neither.

    Args:
        folder: where; it is made.
        module: the trained module.
        preprocessing: what turns a picture into its input.
        task: name of the task.
        data: class path and arguments of the data module that it learned from.
        code: files that are copied to the folder ``code``, for people.
    """
    state = {
        key: value.contiguous()
        for key, value in module.state_dict().items()
        if not key.startswith(module.training_only)
    }
    with whole(folder / "model.safetensors") as part:
        save_file(state, part)
    description = {
        "task": task,
        "class_path": path_of(type(module)),
        "module": module.architecture,
        "preprocessing": preprocessing.as_data(),
        "data": data,
        "licence": module.licence,
    }
    write_text(folder / "architecture.yaml", yaml.safe_dump(description, sort_keys=False, allow_unicode=True))
    for file in code:
        write_text(folder / CODE / file.name, file.read_text())


def read_description(folder: Path) -> dict[str, Any]:
    """Reads a saved model's description, converted to this version's form; its classes must not be code in its own
    folder.

    Raises:
        ValueError: it is not, or no more, what `save_model` wrote.
    """
    try:
        description = yaml.safe_load((folder / "architecture.yaml").read_text())
        _check_classes(folder, description["module"] | {"class_path": description.get("class_path", "")})
        # Earlier versions wrote the bare name of one of Fovea's own classes, as ``class``.
        path = description.get("class_path") or description["class"]
        return description | {"class_path": path, "module": upgrade(description["module"])}
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise ValueError(f"{folder} is not a model that Fovea saved: {error}") from error


def load_model(folder: Path) -> tuple[VisionModule, Preprocessing]:
    """Loads a model that `save_model` wrote.

    Returns:
        The module in evaluation mode, and its preprocessing.

    Raises:
        ValueError: it is not, or no more, what `save_model` wrote.
    """
    description = read_description(folder)
    try:
        kind: Any = find_class(description["class_path"], VisionModule)
        module: VisionModule = kind.from_architecture(description["module"])
        learning = {key: v for key, v in module.state_dict().items() if key.startswith(module.training_only)}
        module.load_state_dict(learning | load_file(folder / "model.safetensors"))
        module.without_training_only = bool(learning)
        module.licence = description.get("licence")
        return module.eval(), Preprocessing(**description["preprocessing"])
    except MissingCodeError as error:
        carried = sorted(file.name for file in (folder / CODE).glob("*.py"))
        way = (
            f" The model carries {listed(carried)}, which is not run by itself: python -m pipelines.registry load MODEL COPY writes "
            f"it to COPY/{CODE}. Read it, and, if you trust it, put that folder on PYTHONPATH."
        )
        raise MissingCodeError(f"{error}{way if carried else ''}") from error
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, TypeError) and "unexpected keyword" in str(error):
            raise ValueError(
                f"{folder} has a setting that this version of Fovea does not know: use the one that saved the model, or a later one "
                f"({error})."
            ) from error
        raise ValueError(f"{folder} is not a model that Fovea saved: {error}") from error


def _check_classes(folder: Path, description: Any) -> None:
    """Checks where the classes named by a model are, before anything is imported: code in its own folder is never run.

    Raises:
        ValueError: one is in there.
    """
    if isinstance(description, list):
        description = dict(enumerate(description))
    if not isinstance(description, dict):
        return
    for value in description.values():
        _check_classes(folder, value)
    root = next(
        (place for place in reversed(folder.resolve().parents) if (place / "MLmodel").exists()), folder.resolve()
    )
    names = str(description.get("class_path", "")).split(".")[:-1]
    for count in range(1, len(names) + 1):
        name = ".".join(names[:count])
        if name in sys.modules:
            continue
        try:
            spec = importlib.util.find_spec(name)  # which imports what is around it, that was looked at before
        except ImportError:
            spec = None
        if spec is None:
            return
        places = [spec.origin, *(spec.submodule_search_locations or [])]
        if any(Path(place).resolve().is_relative_to(root) for place in places if place):
            raise ValueError(f"{name} is code in the model's own folder, which is not run")


def learned_from(folder: Path, model: Path | None = None) -> VisionDataModule:
    """The data set that a saved model was trained on.

    Args:
        folder: a folder that `save_model` wrote.
        model: the data are prepared for this one instead, which `save_model` wrote too.

    Raises:
        ValueError: the model does not say, or the data cannot be prepared so.
    """
    saved = yaml.safe_load((folder / "architecture.yaml").read_text()).get("data")
    if not saved:
        raise ValueError(f"{folder} does not say which data it learned from: name them with --data.")
    _check_classes(folder, saved)
    data = data_of(saved)
    return data if model is None else prepared(data, Preprocessing(**read_description(model)["preprocessing"]))


def data_of(settings: dict[str, Any]) -> VisionDataModule:
    """Builds the data module that settings describe.

    Raises:
        ValueError: there is no such class, or it does not accept the arguments.
    """
    package, _, name = settings["class_path"].rpartition(".")
    own = getattr(datamodules, name, None) if package.split(".")[0] in ("", "datamodules") else None
    kind: Any = own or find_class(settings["class_path"], VisionDataModule)
    data: VisionDataModule = kind(**settings.get("init_args", {}))
    return data


def lacking_in(data: VisionDataModule, module: VisionModule) -> str:
    """What a module needs and a data set's samples lack, such as ``boxes``; empty if they fit."""
    sample = data.samples(next(iter(data.sources)), 1) if module.needs else {}
    return next((name for name in module.needs if name not in sample), "")


def prepared(data: VisionDataModule, wanted: Preprocessing) -> VisionDataModule:
    """A data set whose preprocessing is set to a module's.

    Raises:
        ValueError: the data cannot be prepared so.
    """
    own = {field.name for field in fields(data) if field.init}
    data = replace(data, **{key: value for key, value in asdict(wanted).items() if key in own})
    if data.preprocessing != wanted:
        given, taken = asdict(data.preprocessing), asdict(wanted)
        if None in (frames := (given["frames"], taken["frames"])) and frames != (None, None):
            has, takes = ("pictures", "clips") if frames[0] is None else ("clips", "pictures")
            raise ValueError(f"{data.title} does not fit the model: it has {has}, and the model takes {takes}.")

        def value(settings: dict[str, Any], key: str) -> str:
            return (
                ", ".join(settings[key])
                if key in ("tabular", "keypoints") and settings[key]
                else str(settings[key] or "none")
            )

        differing = [
            f"{key} {value(given, key)} where it takes {value(taken, key)}" for key in taken if given[key] != taken[key]
        ]
        raise ValueError(
            f"{data.title} does not fit the model: its pictures have {' and '.join(differing)}. Give data as it has learned from."
        )
    return data
