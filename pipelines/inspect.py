"""Looks inside a registered model: ``python -m pipelines.inspect models:/NAME@ALIAS [IMAGE…]``."""

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from datamodules import VisionDataModule
from datamodules.base import collate
from modules import VisionModule
from modules import inspection as see
from modules.pictures.charts import heat, nested_squares, overlays, scatter
from modules.pictures.sheets import Image as Picture
from modules.pictures.sheets import rows_of_tiles
from pipelines.engine.command import command
from pipelines.engine.disk import write_image
from pipelines.engine.terminal import table
from pipelines.serving.files import find
from pipelines.serving.registry import add_files, load, model_folder
from pipelines.serving.store import learned_from


def draw_filters(module: VisionModule, most: int = 64) -> Picture:
    """The first layer's kernels; grey is zero, and each filter has its own scale.

    Raises:
        NotApplicableError: it has none.
    """
    name, kernels = see.filters(module)
    count, channels, height, width = kernels.shape
    heading = f"{name}: {count} filters of {height}×{width} on {channels} channel{'s' * (channels > 1)}"
    kernels = kernels[:most] / np.abs(kernels[:most]).max((1, 2, 3), keepdims=True)
    pixels = (127.5 + 127.5 * kernels).round().astype(np.uint8).transpose(0, 2, 3, 1)
    if channels in (1, 3):
        rows = [pixels[i : i + 8] for i in range(0, len(pixels), 8)]
        return rows_of_tiles([(heading if i == 0 else "", row, ()) for i, row in enumerate(rows)], side=64)
    shown = f"{heading}; a row is a filter, a picture one of its channels"
    return rows_of_tiles(
        [(shown if i == 0 else "", list(row.transpose(2, 0, 1)[:12]), ()) for i, row in enumerate(pixels[:12])], 64
    )


def draw_feature_maps(module: VisionModule, image: Tensor, columns: int = 8, most: int = 8) -> Picture:
    """What the blocks give out for an image, uint8 1×C×S×S: of each block the channels that differ most over the image.

    Raises:
        NotApplicableError: the network has no maps.
    """
    layers = see.stages(module)
    if not layers:
        raise see.NotApplicableError(f"The {type(module.backbone).__name__} has no feature maps.")
    layers = [layers[i] for i in np.unique(np.linspace(0, len(layers) - 1, most).round().astype(int))]
    rows: list[tuple[str, Sequence[Picture], Sequence[str]]] = [("the picture", [_hwc(image[0])], ())]
    for name, (maps,) in see.feature_maps(module, image, layers).items():
        channels = maps.flatten(1).std(1, correction=0).topk(min(columns, len(maps))).indices.sort().values.tolist()
        tiles = [heat(maps[channel].float().cpu().numpy()) for channel in channels]
        heading = f"{name}: {len(maps)} maps of {maps.shape[1]}×{maps.shape[2]}"
        rows.append((heading, tiles, [f"channel {channel}" for channel in channels]))
    return rows_of_tiles(rows)


def draw_explanation(
    module: VisionModule, image: Tensor, label: str | None = None, layer: str | None = None
) -> Picture:
    """Grad-CAM and occlusion of an image, uint8 1×C×S×S, for its predicted class or one that is named.

    Raises:
        NotApplicableError: the module does not tell classes apart.
        ValueError: there is no such class or layer.
    """
    names, target = see.class_names(module), see.chosen_class(module, image, label)
    with torch.no_grad(), see.tapped(module, []):
        probability = float(module(image.to(module.device)).float().softmax(1)[0, target])
    maps = []
    try:
        layer = layer or see.speaking_layer(module, image, target)
        cam = see.grad_cam(module, image, target, layer)
        if cam.shape[-1] > 1:
            maps = [(f"Grad-CAM at {layer}", _smooth(cam, image.shape[-1]), "inferno")]
    except see.NotApplicableError:
        pass  # an MLP can only be covered
    covered = see.occlusion(module, image, target)[0, 0].cpu().numpy()
    maps.append(("occlusion: score lost when covered", covered, "RdBu_r"))
    return overlays(_hwc(image[0]), f"{names[int(target)]} {probability:.2f}", maps)


def draw_unit(
    module: VisionModule, images: Tensor, layer: str, channel: int, captions: Sequence[str] = (), steps: int = 150
) -> Picture:
    """What excites a unit: the image that gradient ascent makes, and the patches of images, uint8 N×C×S×S.

    Of units that see all of an image, the rest of it is darkened where the map is below half its highest value.

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
        left, top, right, bottom = field.box(patch.y, patch.x, len(pixels))
        if right - left == len(pixels):
            maps = see.feature_maps(module, images[patch.image][None], [layer])[layer][:, channel : channel + 1]
            mask = _smooth(maps, len(pixels)) if maps.shape[-1] > 1 else np.ones(pixels.shape[:2])
            pixels = (pixels * np.where(mask >= mask.max() / 2, 1, 0.3)[..., None]).astype(np.uint8)
        tiles.append(pixels[top:bottom, left:right])
        texts.append(" ".join([f"{patch.value:.3g}", *captions[patch.image : patch.image + 1]]))
    size = "all of the image" if field.size is None else f"{field.size} pixels"
    heading = f"{layer}, channel {channel}: what excites it most of {len(images)} images (it sees {size})"
    ascent = f"the image found by gradient ascent: its mean goes from {before:.3g} to {after:.3g}"
    half = -(-len(tiles) // 2)
    rows = [(heading, tiles[:half], texts[:half]), ("", tiles[half:], texts[half:]), (ascent, [made], [])]
    return rows_of_tiles([row for row in rows if row[1]], side=144)


def draw_embedding(
    module: VisionModule,
    images: Tensor,
    labels: Any,
    names: Sequence[str],
    method: Literal["pca", "tsne"] = "tsne",
) -> Picture:
    """The backbone's features of images, uint8 N×C×S×S, in the plane, coloured by class."""
    points = see.project(see.pooled_features(module, images), method)
    title = f"{len(images)} images as the network sees them ({'t-SNE' if method == 'tsne' else 'PCA'})"
    return scatter(points, labels, names, title)


def _smooth(maps: Tensor, side: int) -> Any:
    return torch.nn.functional.interpolate(maps, (side, side), mode="bilinear")[0, 0].float().cpu().numpy()


def _hwc(image: Tensor) -> Picture:
    return image.permute(1, 2, 0).cpu().numpy()


def take(data: VisionDataModule, count: int, prepare: Callable[[Any], Any] | None = None) -> tuple[Tensor, Any]:
    """Images spread evenly over the test split, or else the validation split, and their labels where they have one.

    Args:
        data: the data.
        count: how many at most.
        prepare: turns a picture into the network's input; None leaves it to the data.

    Returns:
        uint8 N×C×S×S, and int64 N or None.
    """
    dataset = data.dataset("test" if "test" in data.sources else "val", augmented=False)
    places = np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int)).tolist()
    taken = [dataset.source[i] if prepare else dataset[i, 0] for i in places]
    labels = np.array([s["label"] for s in taken]) if all("label" in s for s in taken) else None
    return collate([{"image": prepare(s["image"]) if prepare else s["image"]} for s in taken])["image"], labels


class InspectionCallback(L.Callback):
    """Shows during a training what the network has come to: filters, feature maps, Grad-CAM and occlusion, embedding.

    Args:
        every_n_epochs: epochs from one showing to the next.
        images: pictures that are explained.
        points: images in the embedding, by PCA.
    """

    def __init__(self, every_n_epochs: int = 1, images: int = 2, points: int = 500) -> None:
        self.every_n_epochs, self.images, self.points = every_n_epochs, images, points

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draws, where a logger takes pictures."""
        if (trainer.current_epoch + 1) % self.every_n_epochs or not isinstance(pl_module, VisionModule):
            return
        images, labels = take(trainer.datamodule, self.points)  # type: ignore[attr-defined]
        names = getattr(trainer.datamodule, "label_names", [])  # type: ignore[attr-defined]
        pictures: dict[str, Callable[[], Picture]] = {
            "filters": partial(draw_filters, pl_module),
            "feature_maps": partial(draw_feature_maps, pl_module, images[:1]),
            "embedding": partial(draw_embedding, pl_module, images, labels, names, "pca"),
        }
        for i in range(self.images):
            pictures[f"explanation_{i}"] = partial(draw_explanation, pl_module, images[i : i + 1])
        for key, draw in pictures.items():
            with suppress(see.NotApplicableError):
                pl_module.show(f"inspect/{key}", draw)


def default_unit(
    module: VisionModule, image: Tensor, label: str | None = None, layer: str | None = None
) -> tuple[str, int]:
    """Layer and channel that speak most for the class of an image, uint8 1×C×S×S; without classes, that answer most.

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


def inspect(
    model: str,
    paths: Sequence[str] = (),
    out: str | None = None,
    layer: str | None = None,
    channel: int | None = None,
    label: str | None = None,
    data: VisionDataModule | None = None,
    samples: int = 1000,
    embedding: Literal["tsne", "pca"] = "tsne",
    log: bool = True,
    device: str = "auto",
) -> int:
    """Draws what a registered model's network looks at, as PNG files, and lists them.

    Args:
        model: ``models:/name@alias`` or ``models:/name/version``.
        paths: files, folders, patterns; none takes four images of the data.
        out: folder for the pictures; a folder under ``outputs/inspect`` by default.
        layer: layer of the unit and of Grad-CAM; the deepest stage that still says where, by default.
        channel: channel of the unit; by default the one that speaks most for the class of the first image.
        label: class to explain; by default the one that is predicted.
        data: images for the patches and the embedding; those that the model learned from, by default.
        samples: how many of them.
        embedding: how features are laid out in the plane.
        log: add the pictures to the run that trained the model, as artifacts in the folder ``inspect``.
        device: where the model runs, such as ``cuda``; ``auto`` is the GPU if there is one.

    Returns:
        The exit code: 0; 1 if some files could not be read; 2 if nothing was found.

    Raises:
        ValueError: there is no such model, layer, channel, class or device.
    """
    screen = Console(stderr=True, highlight=False, soft_wrap=True)
    folder = Path(out or Path("outputs", "inspect", re.sub(r"[^\w.-]+", "-", model.removeprefix("models:/"))))
    files, missing, _ = find(list(paths), str(folder))
    for path in missing:
        screen.print(f"{path}: there is no such file or folder.", markup=False)
    if paths and not files:
        screen.print("No images were found.")
        return 2
    answering: Any = load(model, device)
    module, bad = answering.module, len(missing)
    stems, pictures = [], []
    for file in files:
        try:
            pictures.append({"image": answering.prepare(Path(file))})
            stems.append(f"-{Path(file).stem}")
        except ValueError as error:
            bad += 1
            screen.print(f"passed over: {error}", markup=False)
    labels, names, rows = None, list[str](), list[tuple[str, str]]()
    try:
        source = data or learned_from(model_folder(model))
        pool, labels = take(source, samples, answering.prepare)
        names = list(getattr(source, "label_names", []))
    except (ValueError, OSError) as error:
        if data is not None or not pictures:
            raise
        rows.append(("data", f"the given images are taken instead of what it learned from: {error}"))
        pool = collate(pictures)["image"]
    if pictures:
        images = collate(pictures)["image"]
    else:
        images = pool[np.linspace(0, len(pool) - 1, min(4, len(pool))).astype(int)]
        stems = [""] * len(images)
    found = default_unit(module, images[:1], label, layer)
    unit = found[0], found[1] if channel is None else channel
    see.check_unit(see.feature_maps(module, images[:1], [unit[0]])[unit[0]], *unit)
    captions = [] if labels is None or not names else [names[k] for k in labels]
    fields = see.receptive_fields(module, see.stages(module))
    todo: list[tuple[str, str, Callable[[], Picture]]] = [
        ("filters", "the first layer's kernels", lambda: draw_filters(module)),
        ("receptive_fields", "how far a unit sees, stage by stage", lambda: draw_fields(images[0], fields)),
        ("unit", f"what excites channel {unit[1]} of {unit[0]}", lambda: draw_unit(module, pool, *unit, captions)),
        (
            "embedding",
            "images as the network groups them",
            lambda: draw_embedding(module, pool, labels, names, embedding),
        ),
    ]
    for i, stem in enumerate(stems):
        key, one = f"{i + 1:02d}{stem}", images[i : i + 1]
        todo.append((f"{key}-maps", "block by block", partial(draw_feature_maps, module, one)))
        todo.append((f"{key}-why", "Grad-CAM and occlusion", partial(draw_explanation, module, one, label, layer)))
    folder.mkdir(parents=True, exist_ok=True)
    for key, what, draw in todo:
        try:
            write_image(folder / f"{key}.png", Image.fromarray(draw()))
        except see.NotApplicableError as error:
            rows.append((key, f"left out: {error}"))
        else:
            rows.append((str(folder / f"{key}.png"), what))
    if log:
        rows.append(("run", add_files(model, [folder / f"{key}.png" for key, *_ in todo], "inspect")))
    if fields:
        print(
            table(
                {
                    "stage": name,
                    "sees": "all of the image" if field.size is None else f"{field.size} px",
                    "stride": f"{field.stride} px",
                }
                for name, field in fields.items()
            )
        )
    print(table({"file": file, "what it shows": what} for file, what in rows))
    return 1 if bad else 0


def draw_fields(image: Tensor, fields: dict[str, see.Field]) -> Picture:
    """Receptive fields over an image, uint8 C×S×S.

    Raises:
        NotApplicableError: there are none.
    """
    if not fields:
        raise see.NotApplicableError("It has no stages with maps: every unit sees all of the image.")
    squares = [
        (
            f"{name}: {'all of the image' if field.size is None else f'{field.size} px'}, stride {field.stride}",
            field.size,
        )
        for name, field in fields.items()
    ]
    return nested_squares(_hwc(image), squares, "what a unit in the middle sees")


if __name__ == "__main__":
    command(inspect)
