"""Crowns of trees in five real aerial photographs: a detector that starts from ImageNet, and the same from scratch.

The photographs come with the package deepforest (MIT; National Ecological Observatory Network). A large one of Yellowstone
(574 crowns) is for training, its lowest fifth for validation; the test is another photograph of Yellowstone (279 crowns),
and, by itself, one each of Florida and California (98 crowns), which look unlike anything that was trained on. All are cut into
tiles that overlap by a fifth, in training and in tests; a crown in two tiles counts twice.

    pip download --no-deps deepforest && unzip deepforest*.whl 'deepforest/data/*'
    python -m benchmarks.crowns deepforest/data [--epochs 40] [--seeds 0] [--out FOLDER]
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import PIL.Image
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from pipelines.detection import detection

NEAR, LARGE = "2019_YELL_2_541000_4977000_image_crop", "2019_YELL_2_528000_4978000_image_crop2"
FAR = ("OSBS_029", "SOAP_061")
CUT = 0.8  # share of the large photograph's height that is for training
VISIBLE = 0.4  # a crown that the cut leaves less of is left out
COLUMNS = ["xmin", "ymin", "xmax", "ymax"]


def crowns(source: Path, name: str) -> tuple[PIL.Image.Image, NDArray[np.float64]]:
    """A photograph and its boxes, N×4, corners in pixels."""
    boxes = [
        [float(box.findtext(column, "nan")) for column in COLUMNS]
        for box in ElementTree.parse(source / f"{name}.xml").getroot().iter("bndbox")
    ]
    return PIL.Image.open(source / f"{name}.png").convert("RGB"), np.array(boxes)


def write(source: Path, folder: Path) -> None:
    """Writes the parts, and the tables ``near.csv`` and ``far.csv``, which differ in their test."""
    rows: list[tuple[object, ...]] = []

    def add(kind: str, name: str, image: PIL.Image.Image, boxes: NDArray[np.float64]) -> None:
        image.save(folder / f"{name}.png")
        low, high = np.zeros(4), np.array(image.size * 2, float)
        cut = boxes.clip(low, high)
        area, left = ((b[:, 2:] - b[:, :2]).prod(1) for b in (boxes, cut))
        rows.extend((kind, f"{name}.png", *box, "tree") for box in cut[left > VISIBLE * area].tolist())

    image, boxes = crowns(source, LARGE)
    edge = round(CUT * image.height)
    add("train", "train", image.crop((0, 0, image.width, edge)), boxes)
    add("val", "val", image.crop((0, edge, image.width, image.height)), boxes - np.array([0, edge, 0, edge]))
    for name in (NEAR, *FAR):
        add("far" if name in FAR else "near", name, *crowns(source, name))
    table = pd.DataFrame(rows, columns=["split", "path", *COLUMNS, "label"])
    for test in ("near", "far"):
        chosen = table[table.split.isin(["train", "val", test])]
        chosen.assign(split=chosen.split.replace(test, "test")).to_csv(folder / f"{test}.csv", index=False)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, help="keeps the runs' folders, with their pictures")
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    table = Table("start", "seed", "test", "AP", "AP50", "best F1", "processor s", title="crowns of trees")
    with tempfile.TemporaryDirectory() as temporary:
        out = given.out or Path(temporary)
        write(given.folder, Path(temporary))
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{temporary}/mlflow.db")
        common = ["--data", "CSVDetection", "--data.tile", "256", "--data.batch_size", "8",
                  "--data.augmentation", "standard", "--trainer.enable_progress_bar", "false"]  # fmt: skip
        for seed in given.seeds:
            for start, pretrained in (("ImageNet", "true"), ("scratch", "false")):
                began = time.process_time()
                output = out / f"{start}{seed}"
                model = ["--model.backbone", "tf_efficientnet_lite0", "--model.backbone.pretrained", pretrained,
                         "--model.detector", "YOLO", "--model.detector.width", "64",
                         "--model.detector.strides", "[8, 16, 32]"]  # fmt: skip
                tests = {}
                cli = detection(
                    ["fit", *common, *model, "--data.root", f"{temporary}/near.csv", "--model.optimization.lr", "0.001",
                     "--model.optimization.ema_decay", "0.99", "--trainer.max_epochs", str(given.epochs),
                     "--trainer.check_val_every_n_epoch", str(max(1, given.epochs // 6)),
                     "--seed_everything", str(seed), "--output", str(output)]
                )  # fmt: skip
                seconds = time.process_time() - began
                tests["Yellowstone"] = dict(cli.trainer.callback_metrics)
                cli = detection(
                    ["test", *common, *model, "--data.root", f"{temporary}/far.csv", "--ckpt_path", f"{output}/best.ckpt",
                     "--output", f"{output}-far"]
                )  # fmt: skip
                tests["Florida, California"] = dict(cli.trainer.callback_metrics)
                for name, metrics in tests.items():
                    figures = (f"{float(metrics[f'test/{key}']):.3f}" for key in ("ap", "ap50", "f1"))
                    table.add_row(start, str(seed), name, *figures, f"{seconds:.0f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
