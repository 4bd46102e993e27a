"""What a whole training takes, from the command to its end: Fovea's against that of timm's own ``train.py``.

Both train ResNet-18 at 128 pixels on the same JPEG files, with the same batches, optimiser, schedule, random crops and mirroring,
one process that reads, validation and checkpoints after each epoch. Ours also records the run in MLflow and measures the best
checkpoint once more at the end. Everything counts: the imports, the start, processes that read. Trainings of one epoch and of three
take turns; the difference is what two further epochs take.

timm's package has no ``train.py``; it is in its repository:

    git clone --depth 1 https://github.com/huggingface/pytorch-image-models outputs/pytorch-image-models
    python -m benchmarks.whole_training [--timm outputs/pytorch-image-models] [--rounds 2] [--images 400]
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks import Row, Seconds, machine, table, workshop
from benchmarks.input_pipeline import make_files

ROOT = Path(__file__).parents[1]
TIMM = Path("outputs", "pytorch-image-models")
SIDE, BATCH_SIZE, RATE = 128, 32, 0.02


def timed(command: Sequence[str | Path]) -> Seconds:
    """Runs a command, and times it with all processes that it started.

    Raises:
        RuntimeError: it failed.
    """
    start = time.perf_counter()
    with open("log.txt", "w+") as log:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        _, process.returncode, usage = os.wait4(process.pid, 0)
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{log.read()[-2000:]}")
    return np.array([time.perf_counter() - start, usage.ru_utime + usage.ru_stime])


def measure(timm: Path, rounds: int, images: int = 400) -> list[Row]:
    """Of a whole training and of its last two epochs; nothing without timm's repository.

    Args:
        timm: folder of the repository.
        rounds: trainings of each side and length.
        images: to train on.
    """
    script = timm.resolve() / "train.py"
    if not script.is_file():
        print(
            f"No whole training against timm's: {timm} has no train.py, which is in timm's repository; see benchmarks.whole_training."
        )
        return []
    cuda = torch.cuda.is_available()
    with workshop() as folder:
        root = folder / "images"
        make_files(root, images, val=50)
        theirs = [
            script, "--data-dir", root, "--val-split", "val", "--model", "resnet18", "--num-classes", 2, "--input-size", 3, SIDE, SIDE,
            "--batch-size", BATCH_SIZE, "--workers", 1, "--opt", "momentum", "--lr", RATE, "--weight-decay", 0,
            "--sched", "cosine", "--sched-on-updates", "--warmup-epochs", 0, "--smoothing", 0, "--color-jitter", 0,
            "--scale", 0.7, 1, "--ratio", 0.85, 1.18, "--train-interpolation", "bilinear", "--channels-last",
            "--device", "cuda" if cuda else "cpu", *(["--amp", "--amp-dtype", "bfloat16"] if cuda else []), "--output", folder / "timm", "--epochs",
        ]  # fmt: skip
        optimizer = f"{{class_path: SGD, init_args: {{lr: {RATE}, momentum: 0.9}}}}"
        ours = [
            "-m", "pipelines.classification", "fit", "--data", "ImageFolder", "--data.root", root, "--data.image_size", SIDE,
            "--data.augmentation", "light", "--data.batch_size", BATCH_SIZE, "--data.num_workers", 1,
            "--model.backbone", "resnet18", "--model.backbone.options.small_stem", "false",
            "--model.optimization.optimizer", optimizer,
            "--trainer.precision", "bf16-mixed" if cuda else "32-true", "--trainer.enable_progress_bar", "false", "--trainer.max_epochs",
        ]  # fmt: skip
        version = re.findall(r"'(.+)'", (script.parent / "timm" / "version.py").read_text())[0]
        peer, what = f"timm {version}, its train.py", f"ResNet-18, {SIDE} px, JPEG files, a process that reads"
        whole = Row(f"a whole training, {what}, 3 epochs of {images} images", 3 * images, [], peer)
        further = Row("two further epochs of it", 2 * images, [], peer)
        for number in range(rounds):
            long, short = (
                (timed([*theirs, n]), timed([*ours, n, "--output", folder / f"{number}-{n}"])) for n in (3, 1)
            )
            for row, (their_time, our_time) in ((whole, long), (further, np.subtract(long, short))):
                row.theirs.append(their_time)
                row.ours.append(our_time)
        start = [
            np.median([w[1] - 1.5 * f[1] for w, f in zip(*both, strict=True)])
            for both in ((whole.ours, further.ours), (whole.theirs, further.theirs))
        ]
        whole.note = f"of the processor's seconds, {start[0]:.0f} and {start[1]:.0f} are not the epochs'"
    return [whole, further]


def main() -> None:
    parser = argparse.ArgumentParser(description="Times a whole training against timm's train.py.")
    parser.add_argument("--timm", type=Path, default=TIMM, help="folder of timm's repository")
    parser.add_argument("--rounds", type=int, default=2, help="trainings of each side")
    parser.add_argument("--images", type=int, default=400, help="to train on")
    options = parser.parse_args()
    rows = measure(options.timm, options.rounds, options.images)
    print(f"\n{machine()}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
