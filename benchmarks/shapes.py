"""Detection in pictures of different shapes: what padding costs, and what training at many sizes is worth.

Each picture is a grid of one to six scenes of real digits (see `DigitScenes`), up to three times as wide as high or the reverse. One
YOLO is trained at one size, one at many (``--model.multi_scale``); each is tested with images padded to a square, and only to multiples
of the largest stride (``--data.pad_multiple``).

    python -m benchmarks.shapes [--epochs 12] [--seeds 0]
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from rich.console import Console
from rich.table import Table

from datamodules import DigitScenes
from pipelines.detection import detection

SIDE = 64  # pixels of a scene
GRIDS = ((1, 1), (1, 2), (2, 1), (2, 3), (3, 2), (1, 3))  # scenes down and across
PICTURES = {"train": 400, "val": 60, "test": 240}


def write(folder: Path) -> Path:
    """Writes the pictures, and a table of their boxes."""
    need = {split: count * 6 for split, count in PICTURES.items()}
    data = DigitScenes(scene_size=SIDE, num_workers=0, **need)
    rows = ["split,path,xmin,ymin,xmax,ymax,label"]
    for split, count in PICTURES.items():
        for k in range(count):
            down, across = GRIDS[k % len(GRIDS)]
            canvas = np.zeros((down * SIDE, across * SIDE, 3), np.uint8)
            for n in range(down * across):
                sample, y, x = data.sources[split][6 * k + n], n // across * SIDE, n % across * SIDE
                canvas[y : y + SIDE, x : x + SIDE] = sample["image"]
                for box, label in zip(sample["boxes"] + [x, y, x, y], sample["labels"], strict=True):
                    rows.append(f"{split},{split}{k}.png,{','.join(f'{value:g}' for value in box)},{label}")
            PIL.Image.fromarray(canvas).save(folder / f"{split}{k}.png")
    table = folder / "boxes.csv"
    table.write_text("\n".join(rows))
    return table


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    table = Table("trained at", "seed", "padded to", "AP", "AP50", "pixels", "images a processor second")
    with tempfile.TemporaryDirectory() as temporary:
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{temporary}/mlflow.db")
        common = ["--data", "CSVDetection", "--data.root", str(write(Path(temporary))), "--data.batch_size", "16", "--data.flip", "false",
                  "--data.num_workers", "0", "--model.backbone", "resnet18", "--model.backbone.options",
                  "{channels: [16, 32, 64, 128], small_stem: false}", "--model.detector", "YOLO", "--model.detector.width", "32",
                  "--model.detector.depth", "1", "--model.detector.strides", "[4, 8, 16]",
                  "--trainer.enable_progress_bar", "false", "--trainer.logger", "false"]  # fmt: skip
        for seed in given.seeds:
            for name, scale in (("128", "0"), ("64 to 192", "0.5")):
                output, began = f"{temporary}/{scale}-{seed}", time.process_time()
                detection(["fit", *common, "--data.image_size", "128", "--model.multi_scale", scale, "--lr", "0.002",
                           "--model.optimization.ema_decay", "0.99", "--trainer.max_epochs", str(given.epochs),
                           "--trainer.check_val_every_n_epoch", str(given.epochs), "--seed", str(seed), "--output", output])  # fmt: skip
                print(
                    f"trained at {name}, seed {seed}: {time.process_time() - began:.0f} processor seconds", flush=True
                )
                for padded, padding in (("a square", "null"), ("multiples of 16", "16")):
                    cli = detection(["test", *common, "--data.image_size", "128", "--data.pad_multiple", padding,
                                     "--ckpt_path", f"{output}/best.ckpt", "--output", f"{output}-{padding}"])  # fmt: skip
                    metrics, model, loader = (
                        cli.trainer.callback_metrics,
                        cli.model.eval(),
                        cli.datamodule.test_dataloader(),
                    )
                    count, pixels, began = 0, 0, time.process_time()
                    with torch.inference_mode():
                        for batch in loader:
                            model.predict(batch)
                            count, pixels = count + len(batch["image"]), pixels + batch["image"][:, 0].numel()
                    speed = count / (time.process_time() - began)
                    figures = [f"{float(metrics[f'test/{key}']):.3f}" for key in ("ap", "ap50")]
                    table.add_row(name, str(seed), padded, *figures, f"{pixels / count:,.0f}", f"{speed:.0f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
