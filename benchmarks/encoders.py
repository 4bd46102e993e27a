"""What an encoder that learned to classify is worth to segmentation: mIoU against steps, from the registry and from scratch.

A small ResNet learns to classify single digits and is registered. Then the same U-Net learns the same scenes of digits twice
with the same settings: with that encoder (``models:/digits-encoder/1``), and with random weights. The scenes' digits are
those of the same training split, so the test digits are new to both.

    python -m benchmarks.encoders [--picture docs/segmentation-encoders.png] [--scenes 1000] [--epochs 3]
"""

import argparse
import os
import tempfile
from pathlib import Path

import PIL.Image
import torch
from matplotlib.figure import Figure
from mlflow.tracking import MlflowClient
from rich.console import Console
from rich.table import Table

from modules.pictures import rasterize
from pipelines.classification import classification
from pipelines.segmentation import segmentation
from pipelines.tracking import run_id_of

CHANNELS = "[16, 32, 64, 128]"
QUIET = ["--trainer.enable_progress_bar", "false"]


def curve(output: str) -> tuple[list[int], list[float]]:
    """Steps and mIoU of the validations of a training."""
    history = sorted(MlflowClient().get_metric_history(run_id_of(output), "val/miou"), key=lambda m: m.step)
    return [m.step for m in history], [m.value for m in history]


def main() -> None:
    """Prints the figures and draws the curve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    table = Table("encoder", "steps", "val mIoU", "test mIoU", title="scenes of digits, 11 classes")
    figure = Figure((5, 3.5), dpi=100)
    axes = figure.add_subplot()
    with tempfile.TemporaryDirectory() as temporary:
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{temporary}/mlflow.db")
        cli = classification(
            ["fit", "--data", "Digits", "--data.image_size", "40", "--model.backbone", "resnet18",
             "--model.backbone_options", f"{{channels: {CHANNELS}, small_stem: false}}", "--model.optimization.lr", "0.003",
             "--trainer.max_epochs", "8", "--output", f"{temporary}/classifier", "--register", "digits-encoder", *QUIET]
        )  # fmt: skip
        print("classifier:", cli.rows["test/accuracy"], cli.rows["training"])
        scratch = ["--model.backbone", "resnet18", "--model.backbone_options", f"{{channels: {CHANNELS}}}"]
        learned = ["--model.backbone", cli.rows["registered"]]
        for name, backbone in (("from the registry", learned), ("from scratch", scratch)):
            output = f"{temporary}/{name.replace(' ', '-')}"
            cli = segmentation(
                ["fit", "--data", "DigitMasks", "--data.train", str(given.scenes), "--data.val", "100", "--data.test", "200",
                 "--data.augmentation", "light", *backbone, "--model.decoder", "UNet",
                 "--model.decoder.widths", "[64, 48, 32, 24, 16]", "--model.loss", "Mixture",
                 "--model.loss.parts", "[{class_path: CrossEntropy}, {class_path: Dice}]",
                 "--model.optimization.lr", "0.002", "--trainer.max_epochs", str(given.epochs),
                 "--trainer.val_check_interval", "0.5", "--output", output, *QUIET]
            )  # fmt: skip
            steps, values = curve(output)
            axes.plot(steps, values, marker="o", label=name)
            table.add_row(name, str(steps[-1]), f"{max(values):.3f}", cli.rows["test/miou"])
            print(name, [(s, round(v, 3)) for s, v in zip(steps, values, strict=True)])
    axes.set(xlabel="step", ylabel="validation mIoU")
    axes.legend()
    figure.tight_layout()
    if given.picture:
        PIL.Image.fromarray(rasterize(figure)).save(given.picture)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
