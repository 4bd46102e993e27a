"""What an encoder of the registry is worth to segmentation: mIoU against steps, beside the same network from scratch.

A small ResNet learns to classify single digits; another one learns scenes without labels, as a denoising autoencoder that
fills in masked patches. Then the same pyramid decoder learns the same few labelled scenes with the same settings three times:
from each of the two, and from random weights; each with several draws of the scenes. The test digits are new to all.

    python -m benchmarks.encoders [--picture docs/segmentation-encoders.png] [--scenes 200] [--steps 400] [--seeds 3]
"""

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from matplotlib.figure import Figure
from mlflow.tracking import MlflowClient

from modules.pictures.charts import rasterize
from pipelines.autoencoding import autoencoding
from pipelines.classification import classification
from pipelines.segmentation import segmentation
from pipelines.tracking.logger import run_id_of

NETWORK = [
    "--model.backbone",
    "resnet18",
    "--model.backbone.options",
    "{channels: [32, 64, 128, 256], small_stem: false}",
]
QUIET = ["--trainer.enable_progress_bar", "false"]


def curve(output: str) -> tuple[list[int], list[float]]:
    """Steps and mIoU of the validations of a training."""
    history = sorted(MlflowClient().get_metric_history(run_id_of(output), "val/miou"), key=lambda m: m.step)
    return [m.step + 1 for m in history], [m.value for m in history]


def main() -> None:
    """Prints the figures and draws the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--scenes", type=int, default=200, help="with labels")
    parser.add_argument("--unlabelled", type=int, default=4000, help="scenes for the autoencoder")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    figure = Figure((5, 3.5), dpi=100)
    axes = figure.add_subplot()
    with tempfile.TemporaryDirectory() as temporary:
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{temporary}/mlflow.db")
        classifier = classification(
            ["fit", "--data", "Digits", "--data.image_size", "40", *NETWORK, "--model.optimization.lr", "0.003",
             "--trainer.max_epochs", "8", "--output", f"{temporary}/classifier", "--register", "digits-encoder", *QUIET]
        )  # fmt: skip
        print("classifier:", classifier.rows["test/accuracy"], classifier.rows["training"])
        autoencoder = autoencoding(
            ["fit", "--data", "DigitMasks", "--data.train", str(given.unlabelled), "--data.augmentation", "none",
             "--data.scene_seed", "1", "--data.batch_size", "32", *NETWORK, "--model.bottleneck", "Plain",
             "--model.bottleneck.size", "32", "--model.bottleneck.spatial", "true", "--model.decoder", "UpsampledConvolutions",
             "--model.decoder.width", "8", "--model.noise", "Masking", "--model.noise.share", "0.5", "--model.noise.patch", "8",
             "--model.optimization.lr", "0.003", "--trainer.max_epochs", "3", "--trainer.limit_val_batches", "2",
             "--output", f"{temporary}/autoencoder", "--register", "scenes-encoder", *QUIET]
        )  # fmt: skip
        print("autoencoder:", autoencoder.rows["test/psnr"], autoencoder.rows["training"])
        starts = {
            "from a classifier": ["--model.backbone", classifier.rows["registered"]],
            "from an autoencoder": ["--model.backbone", autoencoder.rows["registered"]],
            "from scratch": NETWORK,
        }
        print("| encoder | test mIoU | each draw | validation mIoU by steps, mean |\n|---|---|---|---|")
        for name, network in starts.items():
            tests: list[float] = []
            curves: list[list[float]] = []
            steps: list[int] = []
            for seed in range(given.seeds):
                output = f"{temporary}/{name.replace(' ', '-')}-{seed}"
                segmentation(
                    ["fit", "--data", "DigitMasks", "--data.train", str(given.scenes), "--data.val", "100", "--data.test", "300",
                     "--data.scene_seed", str(10 + seed), "--seed_everything", str(seed), "--data.augmentation", "light",
                     "--data.batch_size", "8", *network, "--model.decoder", "FPN", "--model.decoder.width", "64",
                     "--model.decoder.dropout", "0", "--model.optimization.lr", "0.002", "--trainer.max_steps", str(given.steps),
                     "--trainer.max_epochs", "-1", "--output", output, *QUIET]
                )  # fmt: skip
                steps, values = curve(output)
                curves.append(values)
                tests.append(MlflowClient().get_run(run_id_of(output)).data.metrics["test/miou"])
            mean = np.mean(curves, 0)
            line = axes.plot(steps, mean, marker="o", label=name)[0]
            axes.fill_between(steps, np.min(curves, 0), np.max(curves, 0), alpha=0.2, color=line.get_color())
            points = ", ".join(f"{s}: {v:.3f}" for s, v in zip(steps, mean, strict=True))
            each = " ".join(f"{value:.3f}" for value in tests)
            print(f"| {name} | {np.mean(tests):.3f} ± {np.std(tests, ddof=1):.3f} | {each} | {points} |", flush=True)
    axes.set(xlabel="step", ylabel="validation mIoU")
    axes.legend()
    figure.tight_layout()
    if given.picture:
        PIL.Image.fromarray(rasterize(figure)).save(given.picture)


if __name__ == "__main__":
    main()
