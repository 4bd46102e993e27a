"""Images made by a registered network: samples of a generator, its dissection, synthetic training images, translated
pictures."""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from copy import copy
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.labelled.base import ClassificationDataModule
from datamodules.labelled.sources import JoinedSource, LabelledSource, few
from datamodules.videos import is_video
from modules import Backbone, ClassificationModule, DataSpec, GANModule, SegmentationModule, TranslationModule
from modules.adversarial.base import as_uint8
from modules.inspection import dissection
from modules.pictures.sheets import Image as Picture
from modules.pictures.sheets import sheet, stacked
from pipelines.engine.disk import write_image, write_text
from pipelines.serving import registry
from pipelines.serving import store as storage
from pipelines.serving.files import find

BATCH = 64  # pictures that are translated together


def _generator(model: str, device: str) -> GANModule:
    return registry.load_as(GANModule, model, ": this is a command for GANs.", device)[1]


def sample(
    model: str, out: str = "samples", count: int = 64, seed: int = 0, label: str | None = None, device: str = "auto"
) -> str:
    """Makes images with a registered generator: single files, in a folder for each class where it is conditional, and
    a sheet of the first ones.

    Args:
        model: ``models:/name@alias`` or ``models:/name/version``.
        out: output folder.
        count: number of images.
        seed: random seed; the same one gives the same images.
        label: the class, by name or number, for a conditional generator; by default all in turn.
        device: where the model runs, such as ``cuda``; ``auto`` is the GPU if there is one.

    Raises:
        ValueError: there is no such model or class.
    """
    module = _generator(model, device)
    if count < 1:
        raise ValueError(f"--count must be at least 1, not {count}.")
    names = list(module.label_names or []) if module.conditional else []
    number = None
    if label is not None:
        if not names:
            raise ValueError(
                f"{model} makes images of no class in particular: leave --label {label} out, or train with --model.conditional true."
            )
        if label not in names and not (label.isdigit() and int(label) < len(names)):
            raise ValueError(f"{model} knows no class {label!r}; it knows {', '.join(names[:20])}.")
        number = names.index(label) if label in names else int(label)
    images = module.sample(count, seed, number).cpu()
    folder = Path(out)
    for k, image in enumerate(images):
        place = folder / (names[k % len(names) if number is None else number].replace("/", "-") if names else "")
        write_image(place / f"{k:05}.png", image.permute(1, 2, 0).numpy())
    columns = len(names) if names and number is None and len(names) <= 16 else 8
    shown = folder.with_name(f"{folder.name}.png")
    write_image(shown, sheet(images[:64], columns))
    return f"{count} images of {registry.pinned(model)} are in {folder}; {shown} shows the first."


def dissect(
    model: str,
    segmenter: str,
    out: str = "dissection",
    count: int = 512,
    units: int = 4,
    seed: int = 0,
    device: str = "auto",
) -> str:
    """Finds what the units of a generator make, by what a segmentation model sees in its images: ``units.csv``, each
    unit's best class; ``effects.csv``, what becomes of each class when its units are switched off and on; and a sheet.

    Args:
        model: the generator, ``models:/name@alias`` or ``models:/name/version``.
        segmenter: a registered segmentation model, trained on the same kind of images.
        out: output folder.
        count: number of images.
        units: number of units that are switched together for each class.
        seed: random seed of the images.
        device: where both models run, such as ``cuda``; ``auto`` is the GPU if there is one.

    Raises:
        ValueError: there is no such model, it is of another kind, or the generator has no feature maps.
    """
    otherwise = ": a segmentation model says what is in the images."
    module, (_, seeing) = _generator(model, device), registry.load_as(SegmentationModule, segmenter, otherwise, device)
    if count < 1 or units < 1:
        raise ValueError(f"--count and --units must be at least 1, not {count} and {units}.")
    noise = torch.randn(count, module.latent_size, generator=torch.Generator().manual_seed(seed)).to(module.device)
    labels = torch.arange(count, device=module.device) % max(1, module.num_classes) if module.conditional else None
    batches = [(noise[k : k + 64], None if labels is None else labels[k : k + 64]) for k in range(0, count, 64)]

    def segment(image: Tensor) -> Tensor:
        seen = F.interpolate(image, seeing.size, mode="bilinear", align_corners=False, antialias=True)
        return seeing(
            as_uint8(seen.mean(1, keepdim=True) if seeing.in_chans == 1 else seen.expand(-1, 3, -1, -1))
        ).argmax(1)

    average, classes = module.average, range(seeing.num_classes)
    names = dissection.dissectible_layers(average, noise[:1], None if labels is None else labels[:1])
    layers = [dissection.dissect_layer(average, name, batches, segment, len(classes)) for name in names]
    found = pd.DataFrame(
        [(layer.name, k, seeing.label_names[row.argmax()], float(row.max())) for layer in layers for k, row in enumerate(layer.iou)],
        columns=["layer", "unit", "class", "iou"],
    )  # fmt: skip
    effects, rows = [], []
    for label in classes:
        layer = max(layers, key=lambda layer: float(layer.iou[:, label].topk(min(units, len(layer.iou))).values.mean()))
        chosen = layer.best(label, units)
        effect = dissection.effect(average, layer, label, chosen, batches, segment, seed)
        iou = float(layer.iou[chosen[0], label])
        spelt = " ".join(map(str, chosen))
        effects.append((seeing.label_names[label], layer.name, spelt, iou, *vars(effect).values(), effect.causal))
        heading = f"{seeing.label_names[label]}: units {spelt} of {layer.name}, IoU {iou:.2f}, causal effect {effect.causal:+.3f}"
        rows.append(_switched(average, layer, label, chosen, batches[0], heading))
    folder = Path(out)
    columns = ["class", "layer", "units", "iou", "plain", "off", "on", "control", "causal"]
    table = pd.DataFrame(effects, columns=columns)
    files = [folder / "units.csv", folder / "effects.csv", folder / "dissection.png"]
    write_text(files[0], found.sort_values("iou", ascending=False).to_csv(index=False, float_format="%.4f"))
    write_text(files[1], table.to_csv(index=False, float_format="%.4f"))
    write_image(files[2], stacked(rows))
    shown = table.drop(columns=["layer", "units"]).to_string(index=False, float_format="{:.3f}".format)
    return f"{shown}\nShares of pixels. Units, effects and pictures are in {folder}; {registry.add_files(model, files, 'dissection')}."


@torch.no_grad()
def _switched(
    generator: torch.nn.Module,
    layer: dissection.Layer,
    label: int,
    units: Sequence[int],
    batch: tuple[Tensor, Tensor | None],
    heading: str,
) -> Picture:
    """Images as they are made, with the units off, and with them on, a row each."""
    noise, of = batch[0][:8], None if batch[1] is None else batch[1][:8]
    part = generator.get_submodule(layer.name)
    rows: list[Tensor] = []
    values = {"as made": None, "off": torch.zeros(len(units)), "on": layer.on[list(units), label]}
    for value in values.values():
        with nullcontext() if value is None else dissection.switched(part, units, value):
            rows.append(as_uint8(generator(noise, of)))
    captions = [name for name in values for _ in noise]
    return sheet(torch.cat(rows), len(noise), captions, heading, side=84)


def enrich(
    model: str,
    data: ClassificationDataModule | None = None,
    real: Sequence[int] = (20, 100, 1000),
    generated: int = 1000,
    backbone: str = "lenet5",
    steps: int = 1000,
    seeds: int = 3,
    out: str = "enriched.csv",
    device: str = "auto",
) -> str:
    """Adds a conditional generator's images to a classifier's training set, and reports what that gains or loses: test
    accuracy after as many steps on the real images, on both, and on the generated ones alone.

    A generator that has learned from more real images than the classifier gets hands on what it has seen of them.

    Args:
        model: the generator, ``models:/name@alias`` or ``models:/name/version``.
        data: images of the same classes, such as Digits; by default the generator's training data.
        real: numbers of real images per class to try, at most the size of the smallest class.
        generated: number of generated images per class that are added.
        backbone: backbone of the classifier.
        steps: training steps of the classifier.
        seeds: number of repetitions, each with other real images and initial weights.
        out: a CSV file for the individual accuracies.
        device: where the generator runs; the classifier chooses its own.

    Raises:
        ValueError: there is no such model, it is not conditional, or has other classes.
        DataError: a number is under 1.
    """
    module = _generator(model, device)
    data = data or cast(ClassificationDataModule, storage.learned_from(registry.model_folder(model)))
    if not module.conditional or list(module.label_names or []) != list(data.label_names):
        known = ", ".join(module.label_names or []) if module.conditional else "none: it is not conditional"
        raise ValueError(
            f"{model} must make images of the classes of the data, {', '.join(data.label_names)}; its own are {known}. Choose a conditional "
            "model that was trained on these data."
        )
    images = module.sample(generated * data.num_classes).permute(0, 2, 3, 1).cpu().numpy()
    made = LabelledSource(images, np.arange(len(images)) % data.num_classes)
    rows, train = [], data.sources["train"]
    numbers = np.unique(np.minimum(real, np.bincount(train.labels, minlength=data.num_classes).min())).tolist()
    for seed in range(seeds):
        sets: list[tuple[int, str, Any]] = [(0, "generated", made)]
        for number in numbers:
            own = few(train, number, data.label_names, seed, "--real")
            sets += [(number, "real", own), (number, "both", JoinedSource(own, made))]
        for number, kind, source in sets:
            twin = copy(data)
            twin.seed, twin.sources = seed, {**data.sources, "train": source}
            rows.append((number, kind, seed, _accuracy(twin, backbone, steps, seed)))
    table = pd.DataFrame(rows, columns=["real", "images", "seed", "accuracy"])
    write_text(out, table.to_csv(index=False, float_format="%.4f"))
    shown = table.pivot_table("accuracy", "real", "images", ["mean", "std"]).map("{:.2%}".format).replace("nan%", "")
    note = registry.add_files(model, [Path(out)], "enriched")
    return f"{shown}\nTest accuracy after {steps} steps, {seeds} seeds; real images a class, and {generated} generated ones. {out} has all; {note}."


def _accuracy(data: ClassificationDataModule, backbone: str, steps: int, seed: int) -> float:
    """On the test split, after a training."""
    L.seed_everything(seed, verbose=False)
    module = ClassificationModule(DataSpec.of(data, ClassificationModule.takes), Backbone(backbone))
    trainer = L.Trainer(
        max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, num_sanity_val_steps=0, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, data)
    return float(trainer.test(module, datamodule=data, verbose=False)[0]["test/accuracy"])


def translate(model: str, pictures: str, to: str, out: str = "translations", device: str = "auto") -> str:
    """Translates pictures with a registered model, at the size that it works at.

    Args:
        model: ``models:/name@alias`` or ``models:/name/version``.
        pictures: a file, a folder with all below it, or a pattern.
        to: target domain by name, or values of several attributes, such as ``blue,thick``; other attributes are kept.
        out: output folder; the translations keep the sub-folders and names of the pictures, as PNG.
        device: where the model runs, such as ``cuda``; ``auto`` is the GPU if there is one.

    Raises:
        ValueError: there is no such model or domain, there are no pictures, or one cannot be read.
    """
    answering, module = registry.load_as(TranslationModule, model, ", which translates no pictures.", device)
    names = [name.strip() for name in to.split(",")]
    module.asked(torch.zeros(1, dtype=torch.long), names)  # unknown ones are told before anything is read
    found, _, root = find([pictures], out)
    files = [file for file in found if not is_video(file)]
    if not files:
        raise ValueError(f"There is no picture at {pictures}.")
    for start in range(0, len(files), BATCH):
        some = files[start : start + BATCH]
        pixels = np.stack([answering.prepare(Path(file)) for file in some]).transpose(0, 3, 1, 2)
        image = torch.from_numpy(np.ascontiguousarray(pixels)).to(module.device)
        made = module.translate(image, module.asked(module.domains(image), names)).cpu().numpy()
        for file, picture in zip(some, made, strict=True):
            place = Path(out, os.path.relpath(os.path.abspath(file), root)).with_suffix(".png")
            if os.path.realpath(place) == os.path.realpath(file):
                raise ValueError(f"The translation would replace {file}: choose another folder with --out.")
            write_image(place, picture.transpose(1, 2, 0))
    return f"{out} has the translations of {len(files)} picture{'s' * (len(files) != 1)} to {' and '.join(names)} by {registry.pinned(model)}."
