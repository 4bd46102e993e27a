"""Explanations of predictions: Grad-CAM, occlusion, and the attention of vision transformers."""

import difflib
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from modules.adversarial import AdversarialModule
from modules.base import VisionModule
from modules.inspection.taps import NotApplicableError, _pixels, stages, tapped

PLACES = 4  # minimum side of an informative map


def class_names(module: VisionModule) -> list[str]:
    """Returns the class names of a classifier; of several labels or quantities, the names of these.

    Raises:
        NotApplicableError: it does not score each image.
    """
    names = module.architecture.get("label_names")
    if not names or not hasattr(module, "head") or isinstance(module, AdversarialModule):
        raise NotApplicableError(
            f"{type(module).__name__} does not score classes of images: there is nothing to explain."
        )
    return list(names)


def chosen_class(module: VisionModule, image: Tensor, label: str | None = None) -> Tensor:
    """Returns the class to explain for each image, the named or else the predicted one; int64 B.

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
    """Returns the deepest layer with at least 4×4 positions on which the class score depends spatially.

    It is a stage, or, in a transformer, the normalised input of a stage's last block: the residual stream has channels
    of very different scales, and only the class token of a ViT's last block is used.

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
    raise NotApplicableError(
        f"The {type(module.backbone).__name__} has no feature maps of at least {PLACES}×{PLACES}, over which an explanation could be drawn."
    )


def grad_cam(module: VisionModule, image: Tensor, target: Tensor, layer: str, whole: bool = True) -> Tensor:
    """Computes Grad-CAM: the maps of a layer, weighted by the mean gradient of the score (arXiv:1610.02391, equations 1
    and 2).

    Args:
        module: a classifier.
        image: uint8 B×C×S×S.
        target: classes, int64 B.
        layer: the layer, such as the result of `speaking_layer`.
        whole: sum over the maps and apply ReLU.

    Returns:
        float B×1×H×W, non-negative; or the contribution of each map, float B×K×H×W.
    """
    from captum.attr import LayerGradCam  # imported here: it is slow

    with torch.enable_grad(), tapped(module, [layer]) as taps:
        method = LayerGradCam(lambda pixels: module(pixels * module.full), taps[layer])
        pixels = _pixels(module, image).requires_grad_()
        result = method.attribute(pixels, target, relu_attributions=whole, attr_dim_summation=whole)
    return result.detach()


@torch.no_grad()
def occlusion(module: VisionModule, image: Tensor, target: Tensor, windows: int = 5) -> Tensor:
    """Computes the drop of a class score when parts of the image are occluded (Zeiler & Fergus 2014, arXiv:1311.2901).

    Args:
        module: a classifier.
        image: uint8 B×C×H×W; occluded with the median colour of its border, which is mostly background.
        target: classes, int64 B.
        windows: number of windows side by side; they overlap by two thirds.

    Returns:
        float B×1×H×W: the mean over the windows that cover a pixel; negative where the score rises.
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
    """Returns the attention of the class token in a vision transformer's last block (as in Caron et al. 2021,
    arXiv:2104.14294).

    Args:
        module: a module with a timm transformer as its backbone.
        image: uint8 B×C×S×S.

    Returns:
        Attention weights of the patches, float B×heads×h×w; together with those of the other tokens they sum to 1.

    Raises:
        NotApplicableError: it is no vision transformer, or has no class token.
    """
    if not isinstance(module.backbone, VisionTransformer) or module.backbone.cls_token is None:
        raise NotApplicableError(f"The {type(module.backbone).__name__} has no class token that attends to patches.")
    seen: list[Tensor] = []
    layer: Any = module.backbone.blocks[-1].attn
    fused, layer.fused_attn = layer.fused_attn, False  # fused attention does not return its weights
    hook = layer.attn_drop.register_forward_hook(lambda part, given, result: seen.append(result))
    try:
        with tapped(module, []):
            module.backbone(module.normalize(image.to(module.device)))
    finally:
        hook.remove()
        layer.fused_attn = fused
    return seen[0][:, :, 0, module.backbone.num_prefix_tokens :].unflatten(2, module.backbone.patch_embed.grid_size)
