"""What the pipeline costs: the time of a training epoch against a bare loop of PyTorch.

Both sides train the same network with the same data, batch size, precision (float32), optimiser (AdamW), schedule
(stepped with every batch) and memory order (channels-last). The bare loop holds uint8 images in memory, takes batches
by shuffled index, normalises them on the device and keeps nothing but the loss. The pipeline is the command line's own
``fit`` with all that it does by default: metrics, pictures and the machine's load in an MLflow store (SQLite), the mean
accuracy, learning rates, and checkpoints; only the progress bar is off.

Each round trains with one side, then with the other. The process's start, the first epoch of every training, validation
and the writing of checkpoints do not count; the last column says what the latter take. The ratios are those of the
medians over all epochs: of the time that passed, and of the processor time of all threads, which other work on the
machine disturbs less and in which the threads that send to MLflow count in full.

On the processor, torch gets one thread by default: several wait for each other in every layer, which makes the times
meaningless as soon as anything else runs.

ResNet-18 keeps the stride of its stem (``small_stem: false``): at 64 pixels it would otherwise be ten times as much
work, in which any overhead is lost.

    python -m benchmarks.overhead [--rounds 3] [--cases resnet18 lenet5] [--threads 1]
"""

import argparse
import os
import platform
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from datamodules import Digits
from datamodules.options import Own, PositiveInt
from modules import WarmupCosine, create_backbone
from pipelines.classification import classification

BATCH_SIZE = 64


@dataclass(kw_only=True, eq=False, repr=False)
class Digits64(Digits):
    """Digits whose arrays are enlarged to 64 pixels beforehand, so that neither side resizes while it trains."""

    image_size: Own[PositiveInt] = 64

    def _arrays(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        images, labels = super()._arrays()
        return np.stack(
            [cv2.resize(image, (64, 64), interpolation=cv2.INTER_CUBIC)[..., None] for image in images]
        ), labels


@dataclass
class Case:
    """A network and its data."""

    title: str
    backbone: str
    data: type[Digits]
    options: dict[str, Any]
    batches: int
    epochs: int  # without the first


CASES = {
    "resnet18": Case("ResNet-18, 64 px", "resnet18", Digits64, {"small_stem": False}, batches=8, epochs=3),
    "lenet5": Case("LeNet-5, 28 px", "lenet5", Digits, {}, batches=54, epochs=10),
}


def now() -> NDArray[np.float64]:
    """Seconds passed, and seconds of processor time of all threads; once the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return np.array([time.perf_counter(), time.process_time()])


class EpochTimer(L.Callback):
    """Times each epoch from its start to the next one's, less validation and the writing of checkpoints."""

    def __init__(self) -> None:
        self.epochs: list[NDArray[np.float64]] = []
        self.saving: list[NDArray[np.float64]] = []
        self._start: NDArray[np.float64] | None = None
        self._validation = self._validated = self._saved = np.zeros(2)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        save = trainer.save_checkpoint

        def timed(*args: Any, **kwargs: Any) -> None:
            start = now()
            save(*args, **kwargs)
            self._saved = self._saved + now() - start

        trainer.save_checkpoint = timed  # type: ignore[method-assign]

    def _note(self) -> None:
        end = now()
        if self._start is not None:
            self.epochs.append(end - self._start - self._validated - self._saved)
            self.saving.append(self._saved)
        self._start, self._validated, self._saved = end, np.zeros(2), np.zeros(2)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._note()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validation = now()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validated = self._validated + now() - self._validation

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._note()


def train_bare(case: Case) -> list[NDArray[np.float64]]:
    """The times of each epoch of the bare loop."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = case.data()
    source = data.sources["train"]
    images = torch.from_numpy(source.images).permute(0, 3, 1, 2)  # type: ignore[attr-defined]
    labels = torch.from_numpy(source.labels)  # type: ignore[attr-defined]
    network = create_backbone(
        case.backbone, in_chans=data.in_chans, image_size=data.image_size, num_classes=data.num_classes, **case.options
    ).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    mean, std = 127.5, 127.5
    optimizer = torch.optim.AdamW(network.parameters())
    schedule = WarmupCosine(optimizer, total_steps=case.batches * (case.epochs + 1))
    network.train()
    seconds = []
    for _ in range(case.epochs + 1):
        start = now()
        total = torch.zeros((), device=device)
        for chosen in torch.randperm(len(labels))[: case.batches * BATCH_SIZE].split(BATCH_SIZE):
            image = images[chosen].to(device, non_blocking=True)
            label = labels[chosen].to(device, non_blocking=True)
            loss = F.cross_entropy(network(image.float().sub_(mean).div_(std)), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        float(total / case.batches)
        seconds.append(now() - start)
    return seconds[1:]


def train_fovea(case: Case, output: Path, *further: str) -> tuple[list[NDArray[np.float64]], list[NDArray[np.float64]]]:
    """The times of each epoch of the pipeline, and those of writing its checkpoints."""
    arguments = {
        "--data": f"benchmarks.overhead.{case.data.__name__}" if case.data is Digits64 else case.data.__name__,
        "--data.augmentation": "none",
        "--data.batch_size": BATCH_SIZE,
        "--data.num_workers": 0,
        "--model.backbone": case.backbone,
        **{f"--model.backbone.options.{key}": str(value).lower() for key, value in case.options.items()},
        "--trainer.max_epochs": case.epochs + 1,
        "--trainer.limit_train_batches": case.batches,
        "--trainer.limit_val_batches": 1,
        "--trainer.limit_test_batches": 1,
        "--trainer.enable_progress_bar": "false",
        "--trainer.callbacks+": "benchmarks.overhead.EpochTimer",
        "--output": output,
    }
    pipeline = classification(["fit", *(f"{key}={value}" for key, value in arguments.items()), *further])
    (timer,) = (callback for callback in pipeline.trainer.callbacks if isinstance(callback, EpochTimer))
    return timer.epochs[1:], timer.saving[1:]


def measure(case: Case, rounds: int, folder: Path) -> str:
    """A line of the table."""
    bare, fovea, saving, ratios = [], [], [], []
    for number in range(rounds):
        theirs = train_bare(case)
        ours, saved = train_fovea(case, folder / f"{case.backbone}-{number}")
        bare, fovea, saving = bare + theirs, fovea + ours, saving + saved
        ratios.append(np.median(ours, 0)[0] / np.median(theirs, 0)[0])
    before, after = np.median(bare, 0), np.median(fovea, 0)
    wall, processor = after / before
    return (
        f"{case.title:18}{before[0]:9.4f}{after[0]:9.4f}{wall:8.3f}{f'{min(ratios):.3f} … {max(ratios):.3f}':>17}"
        f"{processor:11.3f}{np.median(saving, 0)[0]:13.4f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Times a training epoch of Fovea against a bare loop.")
    parser.add_argument("--rounds", type=int, default=3, help="trainings of each side and case")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        os.environ["XDG_CACHE_HOME"] = folder
        back = os.getcwd()
        os.chdir(folder)  # MLflow puts artifacts into the current folder
        try:
            lines = [measure(CASES[name], options.rounds, Path(folder)) for name in options.cases]
        finally:
            os.chdir(back)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores"
    print(
        f"\n{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"
    )
    print(f"median of {options.rounds} rounds; batches of {BATCH_SIZE}; seconds an epoch")
    print(f"{'':18}{'bare':>9}{'Fovea':>9}{'ratio':>8}{'of the rounds':>17}{'processor':>11}{'checkpoints':>13}")
    print("\n".join(lines))


if __name__ == "__main__":
    from benchmarks import overhead  # under its own name, by which the command line finds the callback and the data

    sys.exit(overhead.main())
