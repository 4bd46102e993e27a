"""Train image translation, ``python -m pipelines.translation fit|validate|test|predict|preview``, and ``translate`` with it."""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from modules import TranslationModule
from pipelines.engine.disk import write_image
from pipelines.engine.task import Task
from pipelines.serving import registry, video
from pipelines.serving.files import find

BATCH = 64


def translate(model: str, pictures: str, to: str, out: str = "translations", device: str = "auto") -> str:
    """Translates pictures with a registered model, at the size that it works at.

    Args:
        model: ``models:/name@alias`` or ``models:/name/version``.
        pictures: a file, a folder with all below it, or a pattern.
        to: the domain by name, or values of several attributes, such as ``blue,thick``; what is not named stays.
        out: a folder, in which the translations have the sub-folders and names of the pictures, as PNG.
        device: where the model runs, such as ``cuda``; ``auto`` is the GPU if there is one.

    Returns:
        What was done.

    Raises:
        ValueError: there is no such model or domain, there are no pictures, or one cannot be read.
    """
    answering = registry.load(model, device)
    module = answering.module
    if not isinstance(module, TranslationModule):
        raise ValueError(f"{model} is a {type(module).__name__}, which translates no pictures.")
    names = [name.strip() for name in to.split(",")]
    module.asked(torch.zeros(1, dtype=torch.long), names)  # unknown ones are told before anything is read
    found, _, root = find([pictures], out)
    files = [file for file in found if not file.lower().endswith(video.EXTENSIONS)]
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
            place.parent.mkdir(parents=True, exist_ok=True)
            write_image(place, Image.fromarray(picture[0] if len(picture) == 1 else picture.transpose(1, 2, 0)))
    return f"{len(files)} pictures, translated to {' and '.join(names)} by {registry.pinned(model)}, are in {out}."


translation = Task("translation", TranslationModule, "datamodules.DigitTextures", {"translate": translate})

if __name__ == "__main__":
    translation.main()
