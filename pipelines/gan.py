"""Train GANs, ``python -m pipelines.gan fit|validate|test|predict|preview``, and ``sample`` from them."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from modules import GANModule
from modules.pictures import image_grid
from pipelines import registry
from pipelines.cli import VisionCLI, main, task_command


def gan(args: Sequence[str] | None = None) -> VisionCLI:
    """Runs the command line of GANs; see `pipelines.cli.main`."""
    return main("gan", GANModule, "datamodules.Digits", args)


def sample(
    model: str, out: str = "samples", count: int = 64, seed: int = 0, label: str | None = None, device: str = "auto"
) -> str:
    """Makes images with a registered generator: single files, in a folder for each class where it is conditional, and
    a sheet of the first ones.

    Args:
        model: ``models:/name@alias`` or ``models:/name/version``.
        out: a folder.
        count: images.
        seed: the same one gives the same images.
        label: the class, by name or number, where the generator is conditional; by default all in turn.
        device: where the model runs, such as ``cuda``; ``auto`` is the GPU if there is one.

    Returns:
        What was done.

    Raises:
        ValueError: there is no such model or class.
    """
    module = registry.load(model, device).module
    if not isinstance(module, GANModule):
        raise ValueError(f"{model} is a {type(module).__name__}: samples are made by a GAN.")
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}.")
    names = list(module.label_names or []) if module.conditional else []
    number = None
    if label is not None:
        if not names:
            raise ValueError(f"{model} is not conditional: it cannot be asked for {label!r}.")
        if label not in names and not (label.isdigit() and int(label) < len(names)):
            raise ValueError(f"{model} knows no class {label!r}; it knows {', '.join(names[:20])}.")
        number = names.index(label) if label in names else int(label)
    images = module.sample(count, seed, number).cpu().numpy()
    folder = Path(out)
    for k, image in enumerate(images):
        place = folder / (names[k % len(names) if number is None else number].replace("/", "-") if names else "")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(place / f"{k:05}.png")
    columns = len(names) if names and number is None and len(names) <= 16 else 8
    sheet = folder.with_name(f"{folder.name}.png")
    Image.fromarray(image_grid(np.ascontiguousarray(images[:64]), columns)).save(sheet)
    return f"{count} images of {registry.pinned(model)} are in {folder}; {sheet} shows the first."


command = partial(task_command, gan, {"sample": sample})


if __name__ == "__main__":
    command()
