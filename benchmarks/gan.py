"""What generators are worth, all by the same extractor: python -m benchmarks.gan --models models:/NAME/1 …

Beside them stand real training images (the floor), a Gaussian in the space of principal components, and, where an
autoencoder is among the models, the samples of its prior.
"""

import argparse

import numpy as np
import PIL.Image
import torch
from sklearn.decomposition import PCA
from torch import Tensor

import datamodules
from modules import AutoencodingModule, GANModule
from modules.gan.module import nearest_distances
from modules.measures.extractors import named_extractor, own_extractor
from modules.measures.sets import compare_sets
from modules.pictures.sheets import sheet, stacked
from pipelines.serving import registry


def gaussian(images: Tensor, count: int, components: int = 64) -> Tensor:
    """Draws from the Gaussian that principal components of images have, uint8 count×C×S×S."""
    pixels = images.flatten(1).numpy() / 255
    pca = PCA(components, random_state=0).fit(pixels)
    codes = np.random.default_rng(0).normal(size=(count, components)) * np.sqrt(pca.explained_variance_)
    return torch.from_numpy(pca.inverse_transform(codes)).view(count, *images.shape[1:]).mul(255).clamp(0, 255).byte()


def samples(address: str, count: int) -> Tensor:
    """Images of a registered generator or variational autoencoder, uint8 count×C×S×S."""
    module = registry.load(address).module
    if isinstance(module, GANModule):
        return module.sample(count)
    if isinstance(module, AutoencodingModule):
        with torch.no_grad():
            return module.sample(count).mul(255).round().clamp(0, 255).byte()
    raise SystemExit(f"error: {address} is a {type(module).__name__}, which makes no images.")


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", default="Digits", help="a data module; its test split is what samples are compared with"
    )
    parser.add_argument("--root", help="folder of the data, where it takes one")
    parser.add_argument(
        "--models", nargs="*", default=[], help="registered models, models:/NAME/VERSION or TITLE=models:/…"
    )
    parser.add_argument("--extractor", help="a registered classifier; by default LeNet-5 trained on the training split")
    parser.add_argument("--count", type=int, default=1000, help="images of each")
    parser.add_argument("--picture", help="a file for some images of each")
    options = parser.parse_args()
    folder = {"root": options.root} if options.root else {}
    data = getattr(datamodules, options.data)(augmentation="none", **folder)
    training, real = data.samples("train", 10_000), data.samples("test", options.count)["image"]
    if options.extractor:
        look = named_extractor(options.extractor, data.in_chans, data.image_size)
    else:
        look = own_extractor(training["image"], training["label"], data.num_classes, None)
    seen, test = look(real), data.samples("test", 10_000)
    assert seen.probabilities is not None
    right = (look(test["image"]).probabilities.argmax(1) == test["label"]).double().mean()  # type: ignore[union-attr]
    print(f"{options.data}, {len(real)} test images, {options.count} of each; extractor {look.name} {look.digest}, "
          f"accuracy {right:.4f}\n")  # fmt: skip
    known = look(training["image"]).features
    reach = nearest_distances(seen.features, known).median()
    even = torch.linspace(0, len(training["image"]) - 1, options.count).long()
    rows = {"real training images (the floor)": training["image"][even]}
    rows["a Gaussian in PCA space"] = gaussian(training["image"], options.count)
    for name, _, address in (given.rpartition("=") for given in options.models):
        rows[name or address] = samples(address, options.count)
    names = ("fd", "kd", "precision", "recall", "density", "coverage", "classes", "classifier_score")
    print(f"| images | {' | '.join(names)} | novelty |\n|{'---|' * (len(names) + 2)}")
    for name, images in rows.items():
        fake = look(images)
        figures = compare_sets(seen.features, fake.features, seen.probabilities, fake.probabilities)
        novelty = nearest_distances(fake.features, known).median() / reach
        print(f"| {name} | {' | '.join(f'{figures[key]:.3f}' for key in names)} | {novelty:.2f} |")
    if options.picture:
        few = torch.linspace(0, options.count - 1, 16).long()
        shown = stacked(sheet(images[few], 16, heading=name, side=56) for name, images in rows.items())
        PIL.Image.fromarray(shown).save(options.picture)


if __name__ == "__main__":
    main()
