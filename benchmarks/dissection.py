"""Which units of a generator of digits make which digit: ``python -m benchmarks.dissection models:/NAME@ALIAS``.

A segmentation model learns the pixels of the embedded digits, each pixel with the class of its digit, and is registered as
``digits-strokes``; then `pipelines.samples.dissect` looks at the generator with it.
"""

import argparse
import tempfile
from pathlib import Path

import pandas as pd
from mlflow.tracking import MlflowClient
from PIL import Image

from datamodules import Digits
from datamodules.annotated.scenes import INK
from pipelines.samples import dissect
from pipelines.segmentation import segmentation


def draw(root: Path) -> None:
    """Digits and their masks as folders of files."""
    data = Digits(augmentation="none")
    for split, source in data.sources.items():
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for i in range(len(source)):
            sample = source[i]
            picture = sample["image"][..., 0]
            Image.fromarray(picture).save(root / split / "images" / f"{i}.png")
            mask = (picture > INK) * (sample["label"] + 1)
            Image.fromarray(mask.astype("uint8")).save(root / split / "masks" / f"{i}.png")
    pd.DataFrame({"name": ["background", *data.label_names]}).to_csv(root / "classes.csv", index=False)


def main() -> None:
    """Trains the segmentation model, if it is not registered yet, and dissects."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the generator, models:/NAME@ALIAS")
    parser.add_argument("--out", default="dissection")
    parser.add_argument("--units", type=int, default=4)
    given = parser.parse_args()
    if not MlflowClient().search_registered_models("name = 'digits-strokes'"):
        with tempfile.TemporaryDirectory() as temporary:
            root = Path(temporary, "strokes")
            draw(root)
            cli = segmentation(
                ["fit", "--data", "MaskFolder", "--data.root", str(root), "--data.in_chans", "1", "--data.image_size", "28",
                 "--data.flip", "false", "--data.augmentation", "none", "--model.backbone", "resnet18",
                 "--model.backbone.options", "{channels: [24, 48, 96, 192], out_indices: [0, 1, 2, 3], small_stem: false}",
                 "--model.decoder", "FPN", "--model.decoder.width", "64", "--model.decoder.dropout", "0",
                 "--model.optimization.lr", "0.003", "--trainer.max_epochs", "8", "--trainer.enable_progress_bar", "false",
                 "--output", f"{temporary}/out", "--register", "digits-strokes"]
            )  # fmt: skip
            print("segmentation of digits:", cli.rows["test/miou"], cli.rows["training"])
    print(dissect(given.model, "models:/digits-strokes/1", given.out, units=given.units))


if __name__ == "__main__":
    main()
