"""Drawings of filters, feature maps, explanations, units, receptive fields and embeddings."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from modules import inspection as see
from modules.base import VisionModule
from modules.multi_label import MultiLabelModule
from modules.pictures.charts import heat, nested_squares, overlays, project, scatter
from modules.pictures.sheets import Image as Picture
from modules.pictures.sheets import as_rgb, sheet, signed, stacked
from modules.regression import RegressionModule


def draw_filters(module: VisionModule, most: int = 64) -> Picture:
    """Draws the kernels of the first layer; grey is zero, and each filter has its own scale.

    Raises:
        NotApplicableError: it has none.
    """
    name, kernels = see.filters(module)
    count, channels, height, width = kernels.shape
    heading = f"{name}: {count} filters of {height}×{width} on {channels} channel{'s' * (channels > 1)}"
    pixels = signed(torch.from_numpy(kernels[:most]))
    if channels in (1, 3):
        return sheet(pixels, 8, heading=heading, side=64)
    heading = f"{heading}; a row is a filter, a picture one of its channels"
    return sheet(pixels[:12, :12].flatten(0, 1)[:, None], min(12, channels), heading=heading, side=64)


def draw_feature_maps(module: VisionModule, image: Tensor, columns: int = 8, most: int = 8) -> Picture:
    """Draws the feature maps of blocks for an image, uint8 1×C×H×W: of each block the channels that vary most over the
    image.

    Raises:
        NotApplicableError: the network has no maps.
    """
    layers = see.stages(module)
    if not layers:
        raise see.NotApplicableError(f"The {type(module.backbone).__name__} has no feature maps.")
    layers = [layers[i] for i in np.unique(np.linspace(0, len(layers) - 1, most).round().astype(int))]
    rows = [sheet(image, heading="the picture", side=96)]
    for name, (maps,) in see.feature_maps(module, image, layers).items():
        channels = maps.flatten(1).std(1, correction=0).topk(min(columns, len(maps))).indices.sort().values.tolist()
        tiles = [heat(maps[channel].float().cpu().numpy()) for channel in channels]
        heading = f"{name}: {len(maps)} maps of {maps.shape[1]}×{maps.shape[2]}"
        rows.append(sheet(tiles, columns, [f"channel {channel}" for channel in channels], heading, side=96))
    return stacked(rows)


def draw_attention(module: VisionModule, image: Tensor) -> Picture:
    """Draws the attention of each head in a vision transformer's last block for an image, uint8 1×C×H×W.

    Raises:
        NotApplicableError: it is not a vision transformer with a class token.
    """
    (heads,) = see.attention(module, image)
    maps = [heat(head.float().cpu().numpy()) for head in heads]
    captions = ["the picture", *(f"head {k}" for k in range(len(maps)))]
    return sheet(
        [_hwc(image[0]), *maps], min(7, len(captions)), captions, "the last block's class token attends to", side=96
    )


def draw_explanation(
    module: VisionModule, image: Tensor, label: str | None = None, layer: str | None = None
) -> Picture:
    """Draws Grad-CAM and occlusion of an image, uint8 1×C×H×W, for its predicted class or a given one, with its
    probability; of quantities, for the largest or a given one, with its value.

    Raises:
        NotApplicableError: the module is not a classifier.
        ValueError: there is no such class or layer.
    """
    names, target = see.class_names(module), see.chosen_class(module, image, label)
    with torch.no_grad(), see.tapped(module, []):
        scores = module(image.to(module.device)).float()[0]
    if isinstance(module, RegressionModule):
        said = f"{float(scores[target]):.4g}"
    else:
        said = f"{float((scores.sigmoid() if isinstance(module, MultiLabelModule) else scores.softmax(0))[target]):.2f}"
    maps = []
    try:
        layer = layer or see.speaking_layer(module, image, target)
        cam = see.grad_cam(module, image, target, layer)
        if cam.shape[-1] > 1:
            maps = [(f"Grad-CAM at {layer}", _smooth(cam, image.shape[-2:]), "inferno")]
    except see.NotApplicableError:
        pass  # an MLP only supports occlusion
    covered = see.occlusion(module, image, target)[0, 0].cpu().numpy()
    maps.append(("occlusion: score lost when covered", covered, "RdBu_r"))
    return overlays(_hwc(image[0]), f"{names[int(target)]} {said}", maps)


def draw_unit(
    module: VisionModule, images: Tensor, layer: str, channel: int, captions: Sequence[str] = (), steps: int = 150
) -> Picture:
    """Draws the images that activate a unit most: one found by gradient ascent, and patches of images, uint8 N×C×H×W.

    For units that see the whole image, it is darkened where the feature map is below half of its maximum.

    Raises:
        ValueError: there is no such unit.
    """
    patches = see.top_patches(module, images, layer, channel)
    made, before, after = see.gradient_ascent(module, layer, channel, steps)
    inner = layer in dict(module.backbone.named_modules())
    field = see.receptive_fields(module, [layer])[layer] if inner else see.Field(None, 1, 0)
    tiles, texts = [], []
    for patch in patches:
        pixels = _hwc(images[patch.image])
        height, width = pixels.shape[:2]
        left, top, right, bottom = field.box(patch.y, patch.x, height, width)
        if (bottom - top, right - left) == (height, width):
            maps = see.feature_maps(module, images[patch.image][None], [layer])[layer][:, channel : channel + 1]
            mask = _smooth(maps, (height, width)) if maps.shape[-1] > 1 else np.ones(pixels.shape[:2])
            pixels = (pixels * np.where(mask >= mask.max() / 2, 1, 0.3)[..., None]).astype(np.uint8)
        tiles.append(pixels[top:bottom, left:right])
        texts.append(" ".join([f"{patch.value:.3g}", *captions[patch.image : patch.image + 1]]))
    size = "all of the image" if field.size is None else f"{field.size} pixels"
    heading = f"{layer}, channel {channel}: what excites it most of {len(images)} images (it sees {size})"
    ascent = f"the image found by gradient ascent: its mean goes from {before:.3g} to {after:.3g}"
    patches_sheet = sheet(tiles, -(-len(tiles) // 2), texts, heading, side=144)
    return stacked((patches_sheet, sheet([made], heading=ascent, side=144)))


def draw_embedding(
    module: VisionModule,
    images: Tensor,
    labels: Any,
    names: Sequence[str],
    method: Literal["pca", "tsne"] = "tsne",
) -> Picture:
    """Draws the backbone's features of images, uint8 N×C×H×W, in the plane, coloured by class."""
    points = project(see.pooled_features(module, images), method)
    title = f"{len(images)} images as the network sees them ({'t-SNE' if method == 'tsne' else 'PCA'})"
    return scatter(points, labels, names, title)


def draw_fields(image: Tensor, fields: dict[str, see.Field]) -> Picture:
    """Draws receptive fields over an image, uint8 C×H×W.

    Raises:
        NotApplicableError: there are none.
    """
    if not fields:
        raise see.NotApplicableError("The network has no feature maps: each of its units sees the whole image.")
    squares = [
        (
            f"{name}: {'all of the image' if field.size is None else f'{field.size} px'}, stride {field.stride}",
            field.size,
        )
        for name, field in fields.items()
    ]
    return nested_squares(_hwc(image), squares, "what a unit in the middle sees")


def default_unit(
    module: VisionModule, image: Tensor, label: str | None = None, layer: str | None = None
) -> tuple[str, int]:
    """Returns layer and channel that contribute most to the class of an image, uint8 1×C×H×W; without classes, the most
    active ones.

    Raises:
        ValueError: there is no such class or layer.
    """
    try:
        target = see.chosen_class(module, image, label)
        layer = layer or see.speaking_layer(module, image, target)
        shares = see.grad_cam(module, image, target, layer, whole=False)
    except see.NotApplicableError:
        dense = [name for name, part in module.backbone.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]
        layer = layer or (see.stages(module) or dense)[-1]
        shares = see.feature_maps(module, image, [layer])[layer]
    return layer, int(shares[0].flatten(1).sum(1).argmax())


def _smooth(maps: Tensor, size: Sequence[int]) -> Any:
    return torch.nn.functional.interpolate(maps, tuple(size), mode="bilinear")[0, 0].float().cpu().numpy()


def _hwc(image: Tensor) -> Picture:
    return (
        image.permute(1, 2, 0).cpu().numpy() if image.dtype == torch.uint8 and len(image) in (1, 3) else as_rgb(image)
    )
