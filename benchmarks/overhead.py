"""What the pipeline costs: the time of a training epoch against a bare loop of PyTorch.

Both sides train the same network with the same data, batch size, precision, optimiser (AdamW), schedule (stepped with every
batch) and memory order (channels-last). The bare loop holds uint8 images in memory, takes batches by shuffled index,
normalises them on the device and keeps nothing but the loss. The pipeline is the command line's own ``fit`` with all that
it does by default: metrics, pictures and the machine's load in an MLflow store (SQLite), the mean accuracy, learning rates,
and checkpoints; only the progress bar is off.

Each round trains with one side, then with the other. The process's start, the first epoch of every training, validation
and the writing of checkpoints do not count; what the latter take is the note. A round is the median of its epochs, by the
time that passed, and by the processor time of all threads, which other work on the machine disturbs less and in which the
threads that send to MLflow count in full.

On the processor, torch gets one thread by default: several wait for each other in every layer, which makes the times
meaningless as soon as anything else runs.

ResNet-18 keeps the stride of its stem (``small_stem: false``): at 64 pixels it would otherwise be ten times as much
work, in which any overhead is lost.

    python -m benchmarks.overhead [--rounds 3] [--cases resnet18 lenet5] [--threads 1]
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from benchmarks import COUNTS, Row, Seconds, machine, now, table, workshop
from datamodules import ClassificationDataModule, Digits
from datamodules.options import Own, PositiveInt
from modules import WarmupCosine, create_backbone
from pipelines.classification import classification


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
    """A network and its data.

    Args:
        title: both in words.
        backbone: name of the network.
        data: kind of the data.
        batches: that an epoch has.
        epochs: that count; the first does not.
        settings: further ones of the data.
        options: of the network.
        batch_size: images a batch.
        on_device: the bare loop holds the images on the device.
        bfloat16: compute in it where that is safe.
        compile: compile the network.
    """

    title: str
    backbone: str
    data: type[ClassificationDataModule]
    batches: int
    epochs: int
    settings: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 64
    on_device: bool = False
    bfloat16: bool = False
    compile: bool = False


CASES = {
    "resnet18": Case("ResNet-18, 64 px", "resnet18", Digits64, 8, 3, options={"small_stem": False}),
    "lenet5": Case("LeNet-5, 28 px", "lenet5", Digits, 54, 10),
}
WANTED = {"resnet18": "≥ 0.95", "lenet5": ""}


class EpochTimer(L.Callback):
    """Times each epoch from its start to the next one's, less validation and the writing of checkpoints."""

    def __init__(self) -> None:
        self.epochs: list[Seconds] = []
        self.saving: list[Seconds] = []
        self._start: Seconds | None = None
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


def train_bare(case: Case) -> list[Seconds]:
    """The times of each epoch of the bare loop."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = case.data(**case.settings)
    source = data.sources["train"]
    place = device if case.on_device else torch.device("cpu")
    images, labels = torch.from_numpy(source.images).to(place), torch.from_numpy(source.labels).to(place)
    network: Any = create_backbone(
        case.backbone, in_chans=data.in_chans, image_size=data.image_size, num_classes=data.num_classes, **case.options
    ).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if case.compile:
        network.compile()
    mean, std = 127.5, 127.5
    optimizer = torch.optim.AdamW(network.parameters())
    schedule = WarmupCosine(optimizer, total_steps=case.batches * (case.epochs + 1))
    network.train()
    seconds = []
    for _ in range(case.epochs + 1):
        start = now()
        total = torch.zeros((), device=device)
        order = torch.randperm(len(labels), device=place)[: case.batches * case.batch_size]
        for chosen in order.split(case.batch_size):
            image = images[chosen].permute(0, 3, 1, 2).to(device, non_blocking=True)
            label = labels[chosen].to(device, non_blocking=True)
            with torch.autocast(device.type, torch.bfloat16, case.bfloat16):
                loss = F.cross_entropy(network(image.float().sub_(mean).div_(std)), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        float(total / case.batches)
        seconds.append(now() - start)
    return seconds[1:]


def train_fovea(case: Case, output: Path, *further: str, callbacks: Sequence[L.Callback] = ()) -> EpochTimer:
    """Trains by the command line, and times it; the first epoch does not count.

    Args:
        case: what is trained.
        output: folder of the training.
        further: arguments of the command.
        callbacks: of the trainer.
    """
    settings = {"augmentation": "none", "batch_size": case.batch_size, "num_workers": 0, **case.settings}
    arguments = {
        "--data": f"{case.data.__module__}.{case.data.__name__}",
        **{f"--data.{key}": value for key, value in settings.items()},
        "--model.backbone": case.backbone,
        **{f"--model.backbone.options.{key}": str(value).lower() for key, value in case.options.items()},
        "--model.backbone.compile": str(case.compile).lower(),
        "--trainer.precision": "bf16-mixed" if case.bfloat16 else "32-true",
        "--trainer.devices": 1,
        "--trainer.max_epochs": case.epochs + 1,
        "--trainer.limit_train_batches": case.batches,
        "--trainer.limit_val_batches": 1,
        "--trainer.limit_test_batches": 1,
        "--trainer.enable_progress_bar": "false",
        "--output": output,
    }
    timer = EpochTimer()
    classification(["fit", *(f"{key}={value}" for key, value in arguments.items()), *further], [timer, *callbacks])
    timer.epochs, timer.saving = timer.epochs[1:], timer.saving[1:]
    return timer


def median(seconds: list[Seconds]) -> Seconds:
    """Of some epochs."""
    return np.median(seconds, 0)


def measure(case: Case, rounds: int, folder: Path, wanted: str = "") -> Row:
    """The row of a case; a round is the median of a training's epochs."""
    row = Row(
        f"training, {case.title}, tracked", case.batches * case.batch_size, [], "a bare loop of PyTorch", [], wanted
    )
    saving: list[Seconds] = []
    for number in range(rounds):
        row.theirs.append(median(train_bare(case)))
        timer = train_fovea(case, folder / f"{case.backbone}-{number}")
        row.ours.append(median(timer.epochs))
        saving += timer.saving
    more, saved = (median(row.ours) - median(row.theirs))[COUNTS], median(saving)[COUNTS]
    row.note = f"{1e3 * more / case.batches:.2f} ms more a step; its checkpoints {saved:.2g} s an epoch, not counted"
    return row


def measure_all(rounds: int, folder: Path, cases: Iterable[str] = CASES) -> Iterator[Row]:
    """The rows of some cases."""
    for name in cases:
        yield measure(CASES[name], rounds, folder, WANTED[name])


def main() -> None:
    parser = argparse.ArgumentParser(description="Times a training epoch of Fovea against a bare loop.")
    parser.add_argument("--rounds", type=int, default=3, help="trainings of each side and case")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with workshop() as folder:
        rows = list(measure_all(options.rounds, folder, options.cases))
    print(f"\n{machine()}\n\n{table(rows)}")


if __name__ == "__main__":
    from benchmarks import overhead  # under its own name, by which the command line finds the data

    sys.exit(overhead.main())
