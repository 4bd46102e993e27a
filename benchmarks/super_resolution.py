"""Registered super-resolution models beside the bicubic enlargement, on whole pictures that none of them has seen.

``python -m benchmarks.super_resolution MODEL… [--out SHEET.png]``, each model as ``models:/name@alias``. The pictures are the
test split of `datamodules.Photographs`; measured as `SuperResolutionModule` does, over whole pictures instead of squares.
"""

import argparse
import time

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules import Photographs
from modules import SuperResolutionModule
from modules.measures.images import FixedFeatures, perceptual_distance
from modules.pictures.sheets import sheet, stacked
from modules.super_resolution import quality, resized
from pipelines.serving import registry

SHOWN = {"astronaut.png": (60, 170), "chelsea.png": (80, 120), "coffee.png": (120, 150)}  # top and left of a detail
SIDE = 96
NETWORK = "tf_efficientnet_lite1"  # of the perceptual figure


def compare(models: list[str], out: str | None = None) -> None:
    """Prints a table, and draws details of some pictures.

    Args:
        models: ``models:/name@alias`` each.
        out: file of the sheet.
    """
    loaded = {address: registry.load(address).module for address in models}
    features, sums = FixedFeatures(NETWORK, True), dict[str, dict[str, list[float]]]()
    rows, seconds = [], dict.fromkeys(["bicubic", *models], 0.0)
    source = Photographs().sources["test"]
    for i in range(len(source)):
        name = str(source.paths[i]).rsplit("/", 1)[-1]  # type: ignore[attr-defined]
        truth = torch.from_numpy(source[i]["image"]).permute(2, 0, 1)[None]
        truth = truth[..., : truth.shape[2] // 4 * 4, : truth.shape[3] // 4 * 4]
        low, made = resized(truth, 1 / 4), dict[str, Tensor]()
        for model in seconds:
            start = time.process_time()
            module = loaded.get(model)
            assert module is None or isinstance(module, SuperResolutionModule)
            made[model] = resized(low, 4) if module is None else module.enlarge(low)
            seconds[model] += time.process_time() - start
        with torch.inference_mode():
            wanted = features(truth.float() / 255)
            for model, image in made.items():
                figures = quality(image, truth, 4)
                figures["perceptual"] = perceptual_distance(features(image.float() / 255), wanted)
                for key, value in figures.items():
                    sums.setdefault(model, {}).setdefault(key, []).append(float(value))
                print(
                    f"{name:20} {model:40} " + " ".join(f"{k} {float(v):.4f}" for k, v in figures.items()), flush=True
                )
        if name in SHOWN:
            top, left = SHOWN[name]
            tiles = [low[0, :, top // 4 : (top + SIDE) // 4, left // 4 : (left + SIDE) // 4]]
            tiles += [x[0, :, top : top + SIDE, left : left + SIDE] for x in (*made.values(), truth)]
            titles = ["small", *(model.removeprefix("models:/").partition("@")[0] for model in seconds), "true"]
            rows.append(sheet(tiles, len(tiles), titles, side=2 * SIDE))
    for model, figures in sums.items():
        means = " ".join(f"{key} {np.mean(values):.4f}" for key, values in figures.items())
        print(f"{'mean':20} {model:40} {means}; {seconds[model]:.1f} s of processor time")
    if out:
        page = Image.fromarray(stacked(rows)).quantize(224, dither=Image.Dither.FLOYDSTEINBERG)
        page.save(out, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", help="registered models, models:/NAME@ALIAS")
    parser.add_argument("--out", help="file of a sheet with details")
    compare(**vars(parser.parse_args()))
