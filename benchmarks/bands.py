"""What bands beyond the third and bits beyond the eighth tell a classifier, where they decide.

Pictures of 28×28 pixels, four bands, 12 bits in files of 16. Bands 1 to 3 show a digit that says nothing, bright; band 4 shows the
one that is asked for, three values of 4,095 brighter than its ground, whose level is a random number from 1,980 to 2,020.
Eight bits have one step for 16 values.

    python -m benchmarks.bands [--folder outputs/bands] [--epochs 8]
"""

import argparse
from pathlib import Path

import lightning as L
import numpy as np
import tifffile

from datamodules import Digits, ImageFolder
from modules import ClassificationModule
from modules.spec import Backbone, DataSpec

SETTINGS = {
    "bands 1 to 3, 8 bits": {"bands": [1, 2, 3], "bits": 8},
    "bands 1 to 3, 12 bits": {"bands": [1, 2, 3]},
    "all bands, 8 bits": {"in_chans": 4, "bits": 8},
    "all bands, 12 bits": {"in_chans": 4},
}


def make(folder: Path) -> None:
    """Writes the pictures, below the splits of `Digits`."""
    rng = np.random.default_rng(0)
    for split, source in Digits().sources.items():
        images, labels = source.images[..., 0], source.labels
        others = rng.permutation(len(images))
        for k, (label, other) in enumerate(zip(labels.tolist(), others.tolist(), strict=True)):
            pixels = np.empty((28, 28, 4))
            pixels[..., :3] = 400 + images[other][..., None] * rng.uniform(4, 14, 3) + rng.normal(0, 20, (28, 28, 3))
            pixels[..., 3] = rng.uniform(1980, 2020) + 3 * (images[k] / 255) + rng.normal(0, 0.5, (28, 28))
            file = folder / split / str(label) / f"{k}.tif"
            file.parent.mkdir(parents=True, exist_ok=True)
            values = np.moveaxis(pixels.round().clip(0, 4095).astype(np.uint16), 2, 0)
            tifffile.imwrite(file, values, photometric="minisblack", compression="zlib")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("outputs", "bands"))
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    if not options.folder.exists():
        make(options.folder)
    for name, settings in SETTINGS.items():
        for seed in (0, 1, 2):
            L.seed_everything(seed, verbose=False)
            how = {"image_size": 28, "flip": False, "augmentation": "none", "seed": seed, "num_workers": 0}
            data = ImageFolder(str(options.folder), **how, **settings)
            module = ClassificationModule(DataSpec.of(data, ClassificationModule.takes), Backbone("convnet"))
            quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
            trainer = L.Trainer(max_epochs=options.epochs, limit_val_batches=0, enable_model_summary=False, **quiet)
            trainer.fit(module, data)
            figures = trainer.test(module, data, verbose=False)[0]
            print(f"{name}, seed {seed}: {data.bit_depth} bits, accuracy {figures['test/accuracy']:.4f}", flush=True)


if __name__ == "__main__":
    main()
