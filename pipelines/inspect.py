"""Visualises what a registered model looks at: ``python -m pipelines.inspect models:/NAME@ALIAS [IMAGE…]``."""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from datamodules import VisionDataModule
from datamodules.loading import collate
from datamodules.videos import is_video
from modules.inspection import NotApplicableError, check_unit, feature_maps, receptive_fields, stages
from modules.inspection.pictures import (
    default_unit,
    draw_attention,
    draw_embedding,
    draw_explanation,
    draw_feature_maps,
    draw_fields,
    draw_filters,
    draw_unit,
)
from modules.pictures.sheets import Image as Picture
from pipelines.engine.command import command
from pipelines.engine.disk import write_image
from pipelines.engine.inspection import InspectionCallback, take
from pipelines.engine.terminal import say, table
from pipelines.serving.answers import readable
from pipelines.serving.files import find
from pipelines.serving.model import VisionModel
from pipelines.serving.registry import add_files, load, model_folder
from pipelines.serving.store import learned_from, prepared

__all__ = ["InspectionCallback", "inspect"]


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
    """Visualises a registered model's network as PNG files, and lists them.

    Args:
        model: ``models:/name@alias`` or ``models:/name/version``.
        paths: files, folders, patterns; by default four images of the data.
        out: folder for the pictures; a folder under ``outputs/inspect`` by default.
        layer: layer of the unit and of Grad-CAM; by default the deepest stage with spatial resolution.
        channel: channel of the unit; by default the one that contributes most to the class of the first image.
        label: class to explain; by default the predicted one.
        data: images for the patches and the embedding; by default those of its training.
        samples: number of these images.
        embedding: projection of the features to two dimensions.
        log: add the pictures to the run that trained the model, as artifacts in the folder ``inspect``.
        device: where the model runs, such as ``cuda``; ``auto`` is the GPU if there is one.

    Returns:
        The exit code: 0; 1 if some files could not be read; 2 if there was nothing to look at.

    Raises:
        ValueError: there is no such model, layer, channel, class or device.
    """
    bad: list[str] = []

    def tell(message: str) -> None:
        bad.append(message)
        say(message)

    folder = Path(out or Path("outputs", "inspect", re.sub(r"[^\w.-]+", "-", model.removeprefix("models:/"))))
    files, missing, _ = find(list(paths), str(folder))
    for path in missing:
        tell(f"{path}: there is no such file or folder.")
    for film in filter(is_video, files):
        tell(f"passed over: {film} is a video, and inspect looks at images; predict takes videos.")
    files = [file for file in files if not is_video(file)]
    if paths and not files:
        say("No images were found.")
        return 2
    answering: VisionModel = load(model, device)
    module = answering.module
    if files:
        answering.check_pictures(model)
    given = dict(readable(files, _prepared(answering, files), tell))
    if paths and not given:
        say("None of them could be read, so there is nothing to look at.")
        return 2
    labels, names, rows = None, list[str](), list[tuple[str, str]]()
    try:
        source = data or learned_from(model_folder(model))
        if answering.preprocessing.reading.seen:
            pool, labels = take(source, samples, answering.prepare)
        else:
            pool, labels = take(prepared(source, answering.preprocessing), samples)
        names = list(getattr(source, "label_names", []))
    except (ValueError, OSError) as error:
        if data is not None or not given:
            raise
        rows.append(("data", f"the given images are used instead of its training data: {error}"))
        pool = collate([{"image": image} for image in given.values()])["image"]
    if given:
        images = collate([{"image": image} for image in given.values()])["image"]
        stems = [f"-{Path(file).stem}" for file in given]
    else:
        images = pool[np.linspace(0, len(pool) - 1, min(4, len(pool))).astype(int)]
        stems = [""] * len(images)
    found = default_unit(module, images[:1], label, layer)
    unit = found[0], found[1] if channel is None else channel
    check_unit(feature_maps(module, images[:1], [unit[0]])[unit[0]], *unit)
    captions = [] if labels is None or not names else [names[k] for k in labels]
    fields = receptive_fields(module, stages(module))
    todo: dict[str, tuple[str, Callable[[], Picture]]] = {
        "filters": ("the first layer's kernels", partial(draw_filters, module)),
        "receptive_fields": ("how far a unit sees, stage by stage", partial(draw_fields, images[0], fields)),
        "unit": (f"what excites channel {unit[1]} of {unit[0]}", partial(draw_unit, module, pool, *unit, captions)),
        "embedding": (
            "images as the network groups them", partial(draw_embedding, module, pool, labels, names, embedding)
        ),
    }  # fmt: skip
    for i, stem in enumerate(stems):
        key, one = f"{i + 1:02d}{stem}", images[i : i + 1]
        todo[f"{key}-maps"] = "block by block", partial(draw_feature_maps, module, one)
        todo[f"{key}-attention"] = "what a transformer attends to, head by head", partial(draw_attention, module, one)
        todo[f"{key}-why"] = "Grad-CAM and occlusion", partial(draw_explanation, module, one, label, layer)
    for key, (what, draw) in todo.items():
        try:
            write_image(folder / f"{key}.png", draw())
        except NotApplicableError as error:
            rows.append((key, f"left out: {error}"))
        else:
            rows.append((str(folder / f"{key}.png"), what))
    if log:
        rows.append(("run", add_files(model, [folder / f"{key}.png" for key in todo], "inspect")))
    if fields:
        sizes = {n: "all of the image" if field.size is None else f"{field.size} px" for n, field in fields.items()}
        print(table({"stage": n, "sees": sizes[n], "stride": f"{field.stride} px"} for n, field in fields.items()))
    print(table({"file": file, "what it shows": what} for file, what in rows))
    return 1 if bad else 0


def _prepared(answering: VisionModel, files: Sequence[str]) -> Iterator[NDArray[np.uint8] | ValueError]:
    for file in files:
        try:
            yield answering.prepare(Path(file))
        except ValueError as error:
            yield error


if __name__ == "__main__":
    command(inspect)
