"""Where a network looks: Grad-CAM and occlusion for a class; the attention of a transformer."""

import difflib
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from modules.base import VisionModule
from modules.inspection.taps import NotApplicableError, _pixels, stages, tapped

PLACES = 4  # a map of fewer places a side says little about where


def class_names(module: VisionModule) -> list[str]:
    """The classes that the module tells apart.

    Raises:
        NotApplicableError: it does not give one score to each class for an image.
    """
    names = module.architecture.get("label_names")
    if not names or not hasattr(module, "head"):
        raise NotApplicableError(
            f"A {type(module).__name__} does not give each image one class: there is no score to explain."
        )
    return list(names)


def chosen_class(module: VisionModule, image: Tensor, label: str | None = None) -> Tensor:
    """The class to explain for each image: the one that is named, or else the one that is predicted; int64 B.

    Raises:
        ValueError: there is no such class.
    """
    names = class_names(module)
    if label is not None and label not in names:
        near = difflib.get_close_matches(label, names, 3, 0.4) or names[:10]
        raise ValueError(f"There is no class {label!r} among the {len(names)}; there is {', '.join(near)}.")
    with torch.no_grad(), tapped(module, []):
        guess = module(image.to(module.device)).argmax(1)
    return guess if label is None else torch.full_like(guess, names.index(label))


def speaking_layer(module: VisionModule, image: Tensor, target: Tensor) -> str:
    """The deepest layer with at least 4×4 places on which the score of a class depends place by place.

    It is a stage, or, in a transformer, the normalised input of a stage's last block: the sum that the blocks add to has
    channels of all sizes, and what a ViT's last block gives out is read at its class token only.

    Args:
        module: a classifier.
        image: uint8 B×C×S×S.
        target: classes, int64 B.

    Raises:
        NotApplicableError: there is none.
    """
    norms = [name for name, part in module.backbone.named_modules()
             if isinstance(part, nn.LayerNorm) and name.endswith(".norm1")]  # fmt: skip
    within = {stage: [name for name in norms if name.startswith(f"{stage}.")] for stage in stages(module)}
    layers = [names[-1] if names else stage for stage, names in within.items()]
    with torch.enable_grad(), tapped(module, layers) as taps:
        scores = module(_pixels(module, image).requires_grad_() * module.full)
        score = scores.gather(1, target[:, None]).sum()
        slopes = torch.autograd.grad(score, [tap.maps for tap in taps.values()], allow_unused=True) if layers else ()
    for name, slope in reversed(list(zip(layers, slopes, strict=True))):
        if slope is not None and slope.shape[-1] >= PLACES and slope.any():
            return name
    raise NotApplicableError(f"The {type(module.backbone).__name__} has no maps of at least {PLACES}×{PLACES} places.")


def grad_cam(module: VisionModule, image: Tensor, target: Tensor, layer: str, whole: bool = True) -> Tensor:
    """Where a class is seen: the maps of a layer, each weighted by the mean slope of the score (arXiv:1610.02391, eq. 1, 2).

    Args:
        module: a classifier.
        image: uint8 B×C×S×S.
        target: classes, int64 B.
        layer: the layer whose maps are used, such as `speaking_layer`.
        whole: sum over the maps, and keep what is positive.

    Returns:
        float B×1×H×W, at least 0; or what each map adds, float B×K×H×W.
    """
    from captum.attr import LayerGradCam  # only here: its import takes time

    with torch.enable_grad(), tapped(module, [layer]) as taps:
        method = LayerGradCam(lambda pixels: module(pixels * module.full), taps[layer])
        pixels = _pixels(module, image).requires_grad_()
        result = method.attribute(pixels, target, relu_attributions=whole, attr_dim_summation=whole)
    return result.detach()


@torch.no_grad()
def occlusion(module: VisionModule, image: Tensor, target: Tensor, windows: int = 5) -> Tensor:
    """How much the score of a class falls when a part of the image is covered (Zeiler & Fergus 2014, arXiv:1311.2901).

    Args:
        module: a classifier.
        image: uint8 B×C×S×S; it is covered with the median colour of its rim, which most often is background.
        target: classes, int64 B.
        windows: covering windows side by side; they overlap by two thirds.

    Returns:
        float B×1×S×S: the mean over the windows that cover a pixel; negative where the score rises.
    """
    from captum.attr import Occlusion

    pixels = _pixels(module, image)
    rim = torch.cat([pixels[..., (0, -1), :].flatten(2), pixels[..., (0, -1)].flatten(2)], 2).median(2).values
    window = max(2, min(image.shape[-2:]) // windows)
    with tapped(module, []):
        result = Occlusion(lambda pixels: module(pixels * module.full)).attribute(
            pixels,
            (image.shape[1], window, window),
            (image.shape[1], max(1, window // 3), max(1, window // 3)),
            rim[..., None, None].expand_as(pixels),
            target,
            perturbations_per_eval=max(1, 32 // len(image)),
        )
    return result[:, :1]


@torch.no_grad()
def attention(module: VisionModule, image: Tensor) -> Tensor:
    """What the class token of a vision transformer attends to in its last block (as in Caron et al. 2021, arXiv:2104.14294).

    Args:
        module: has a transformer of timm's as its backbone.
        image: uint8 B×C×S×S.

    Returns:
        Shares, float B×heads×h×w, one for each patch; together with those of the other tokens they add up to 1.

    Raises:
        NotApplicableError: it is none, or has no class token.
    """
    if not isinstance(module.backbone, VisionTransformer) or module.backbone.cls_token is None:
        raise NotApplicableError(f"The {type(module.backbone).__name__} has no class token that attends to patches.")
    seen: list[Tensor] = []
    layer: Any = module.backbone.blocks[-1].attn
    fused, layer.fused_attn = layer.fused_attn, False  # else the shares are never there as numbers
    hook = layer.attn_drop.register_forward_hook(lambda part, given, result: seen.append(result))
    try:
        with tapped(module, []):
            module.backbone(module.normalize(image.to(module.device)))
    finally:
        hook.remove()
        layer.fused_attn = fused
    return seen[0][:, :, 0, module.backbone.num_prefix_tokens :].unflatten(2, module.backbone.patch_embed.grid_size)
