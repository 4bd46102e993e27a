"""What only a GPU can tell, in one table and in under twenty minutes on one card.

- **Training** ResNet-50, ConvNeXt and Swin at 224 pixels by the command line's own ``fit``, compiled, channels-last, in bfloat16: images
  that lie on the card, and JPEG files of 500×375 pixels with light augmentation, both beside a bare loop of PyTorch in the same process
  that has its images on the card. The note has the share of the card's peak in bfloat16, the share of the time in which the card
  computes nothing (of the last steps of the first epoch, by torch's profiler), and the most memory that tensors took.
- **Answering**: ConvNeXt against Swin, as in the lectures' table.
- **A step's cost on the host**: LeNet-5 and ResNet-18 against a bare loop, where the card is never the slower part.
- **CIFAR-10** by a recipe, ``--recipe``, if it and the data (``--data``) are there: how long it takes, and how far it comes.

The peak is NVIDIA's for dense products that are summed in float32, or measured by a product of matrices on cards that are not listed.
timm's figures are of its repository (``results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv``: another card, PyTorch 1.12,
not compiled). The parts come in the order of their importance; what does not fit into ``--minutes`` is left out and named. Without
a GPU everything is the same, but slow: ``--networks resnet10t --side 32 --batch_size 8 --batches 2`` is a trial.

    python -m benchmarks.gpu [--minutes 19] [--networks resnet50 …] [--batch_size 256]
"""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import Row, machine, networks, now, overhead, table, workshop
from benchmarks.input_pipeline import make_files
from benchmarks.overhead import Case, train_bare, train_fovea
from datamodules import CIFAR10, ClassificationDataModule, ImageFolder
from datamodules.labelled.sources import LabelledSource
from datamodules.loading import KeyedDataset
from datamodules.options import Own, PositiveInt
from modules import create_backbone
from pipelines.classification import classification

PEAKS = {  # 10¹² operations a second; the first name that a card's has in it
    "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip
NETWORKS = {  # in the order in which they are measured; whether from files too; timm's images a second on an RTX 3090
    "resnet50": ("ResNet-50", True, 1218),
    "convnext_tiny": ("ConvNeXt-T", True, 819),
    "swin_tiny_patch4_window7_224": ("Swin-T", True, 649),
    "convnext_base": ("ConvNeXt-B", False, 339),
    "swin_base_patch4_window7_224": ("Swin-B", False, 281),
    "convnext_small": ("ConvNeXt-S", False, 487),
    "swin_small_patch4_window7_224": ("Swin-S", False, 400),
}
RECIPE = Path(__file__).parents[1] / "configs" / "classification" / "airbench_cifar10.yaml"
PUBLISHED = [  # the recipe is for processors: narrower and shorter
    "--model.backbone.options.channels", "[64, 256, 256]", "--trainer.max_epochs", "16", "--trainer.precision", "bf16-mixed",
]  # fmt: skip
STEPS = 8  # that are looked at by the profiler
CUDA = torch.cuda.is_available()


@cache
def noise(count: int, side: int) -> LabelledSource:
    """Images that nothing can be learned from."""
    generator = np.random.default_rng(0)
    images = np.frombuffer(generator.bytes(count * side * side * 3), np.uint8).reshape(count, side, side, 3)
    return LabelledSource(images.copy(), generator.integers(10, size=count))


class Places(LabelledSource):
    """The places of images and their labels, in the stead of images."""

    def batch(self, indices: Any) -> dict[str, Any]:
        return {
            "image": np.zeros((len(indices), 1, 1, 3), np.uint8),
            "label": self.labels[indices],
            "place": np.asarray(indices),
        }


@dataclass(kw_only=True, eq=False, repr=False)
class Noise(ClassificationDataModule):
    """Noise whose training images lie on the device: a batch brings their places, so that nothing is read or copied.

    Args:
        count: images to train on.
    """

    image_size: Own[PositiveInt] = 224
    count: PositiveInt = 4096

    in_chans = 3
    label_names: ClassVar[list[str]] = [str(number) for number in range(10)]

    def load(self) -> dict[str, LabelledSource]:
        images, rest = (
            noise(self.count + 2 * self.batch_size, int(self.image_size)),
            np.arange(2 * self.batch_size) + self.count,
        )
        parts = np.arange(self.count), rest[: self.batch_size], rest[self.batch_size :]
        return {name: images.subset(part) for name, part in zip(("train", "val", "test"), parts, strict=True)}

    def dataset(self, split: str, augmented: bool) -> KeyedDataset:
        if split == "train" and augmented:
            source = self.sources[split]
            return KeyedDataset(Places(source.images, source.labels), None, self.seed)
        return super().dataset(split, augmented)

    @cached_property
    def stored(self) -> torch.Tensor:
        assert self.trainer is not None
        return torch.from_numpy(self.sources["train"].images).to(self.trainer.strategy.root_device)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if "place" in batch:
            batch["image"] = self.stored[batch.pop("place")].permute(0, 3, 1, 2)
        return batch


class Watch(L.Callback):
    """Sees how busy the device is in the last steps of the first epoch, and the most memory that is taken.

    Args:
        batches: that an epoch has.
    """

    def __init__(self, batches: int) -> None:
        self.first, self.last = max(batches - STEPS, 1), batches - 1
        self.idle = float("nan")
        self.profile = profile(activities=[ProfilerActivity.CUDA if CUDA else ProfilerActivity.CPU])

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if CUDA:
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.current_epoch == 0 and batch_idx == self.first:
            now()
            self.profile.start()
            self.start = now()[0]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.current_epoch == 0 and batch_idx == self.last:
            seconds = now()[0] - self.start
            self.profile.stop()
            self.idle = max(0.0, 1 - busy(self.profile) / seconds)

    @property
    def note(self) -> str:
        memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if CUDA else ""
        return f"idle {self.idle:.1%}{memory}"


def busy(seen: profile) -> float:
    """Seconds in which at least one operation ran on the GPU; without one, on the processor."""
    wanted = DeviceType.CUDA if CUDA else DeviceType.CPU
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in seen.events() or []
        if event.device_type == wanted and not getattr(event, "is_user_annotation", False)
    ]
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total / 1e6


def operations(name: str, side: int) -> float:
    """Operations of a training step for an image: two for each multiplication and addition, and three times those of the forward
    pass. (torch counts the backward pass of a depthwise convolution as if it were a full one.)"""
    network = create_backbone(name, image_size=side, num_classes=10).eval()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(torch.rand(1, 3, side, side))
    return 3 * counter.get_total_flops()


def peak() -> tuple[float, str]:
    """Operations a second in bfloat16 (without a GPU in float32), and where that is from."""
    size = 8192 if CUDA else 512
    a = torch.rand(size, size, device="cuda" if CUDA else "cpu", dtype=torch.bfloat16 if CUDA else torch.float32)
    seconds = []
    for _ in range(12):
        start = now()[0]
        a @ a
        seconds.append(now()[0] - start)
    measured = 2 * size**3 / float(np.median(seconds[2:]))
    listed = [value * 1e12 for name, value in PEAKS.items() if CUDA and name in torch.cuda.get_device_name()]
    source = "NVIDIA's" if listed else "measured"
    told = f"a product of {size}×{size} matrices reaches {measured / 1e12:.3g}·10¹² operations a second"
    return (listed or [measured])[
        0
    ], f"Peak ({source}): {(listed or [measured])[0] / 1e12:.3g}·10¹² operations a second; {told}."


def training(name: str, options: argparse.Namespace, folder: Path, most: float) -> Iterator[Row]:
    """Of one network: images on the card, and from files."""
    title, files, published = NETWORKS.get(name, (name, True, None))
    batches, size, side = options.batches, options.batch_size, options.side
    settings = {"image_size": side, "batch_size": size}
    case = Case(title, name, Noise, batches, 2, settings={**settings, "count": batches * size}, options={}, batch_size=size,
                on_device=True, bfloat16=CUDA, compile=options.compile)  # fmt: skip
    torch.compiler.reset()  # of other networks, or it would give up compiling after a few
    theirs, watch = train_bare(case), Watch(batches)
    ours = train_fovea(case, folder / name, callbacks=[watch]).epochs
    share = batches * size / float(np.median(ours, 0)[0]) * operations(name, side) / most
    beside = f"; timm: {published} on an RTX 3090" if published and side == 224 else ""
    what, peer = f"training, {title}, {side} px, batches of {size}", "a bare loop of PyTorch, images on the card"
    yield Row(
        f"{what}, images on the card",
        batches * size,
        ours,
        peer,
        theirs,
        note=f"{share:.1%} of the peak, {watch.note}{beside}",
    )
    if files:
        root = folder / "images"
        if not root.exists():
            make_files(root, batches * size)
        read, watch = replace(case, data=ImageFolder, settings={**settings, "root": str(root), "augmentation": "light",
                                                                "num_workers": options.workers}), Watch(batches)  # fmt: skip
        ours = train_fovea(read, folder / f"{name}-files", callbacks=[watch]).epochs
        yield Row(
            f"{what}, JPEG files, {options.workers} processes that read",
            batches * size,
            ours,
            peer,
            theirs,
            note=watch.note,
        )


def cifar(recipe: Path, root: str, folder: Path) -> Iterator[Row]:
    """How long a recipe's training takes, and what it reaches."""
    if not recipe.is_file() or not CIFAR10(root).there():
        print(f"No CIFAR-10: there is no {recipe if not recipe.is_file() else f'CIFAR-10 in {root}'}.")
        return
    start = now()
    given = ["--config", str(recipe), "--data.root", root, "--output", str(folder / "cifar10"), "--register", "null",
             "--trainer.enable_progress_bar", "false", *(PUBLISHED if CUDA and recipe == RECIPE else [])]  # fmt: skip
    run = classification(["fit", *given])
    seconds, accuracy = now() - start, float(run.trainer.callback_metrics["test/accuracy"])
    images = run.trainer.global_step * run.datamodule.batch_size
    yield Row(f"CIFAR-10, {recipe.stem}, from the command to the test", images, [seconds], wanted="94 %",
              note=f"test accuracy {accuracy:.2%} after {seconds[0]:.0f} s")  # fmt: skip


def measure(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """All rows, one after the other, until the time is up. A part that fails is told of, and the others go on."""
    until = time.monotonic() + 60 * options.minutes
    most, told = peak()
    print(told)

    def trainings(names: Iterable[str]) -> list[tuple[str, Callable[[], Iterable[Row]]]]:
        return [(f"training {name}", partial(training, name, options, folder, most)) for name in names]

    soon = [name for name in options.networks if name not in NETWORKS or NETWORKS[name][1]]
    parts = [
        *trainings(soon),
        ("answering", partial(networks.speed, options.batch_size, 5, options.side)),
        ("the host's part", partial(overhead.measure_all, options.rounds, folder)),
        ("CIFAR-10", partial(cifar, options.recipe, options.data, folder)),
        *trainings(name for name in options.networks if name not in soon),
    ]
    for part, make in parts:
        if time.monotonic() > until:
            print(f"The time was up before {part}.")
            continue
        try:
            yield from make()
        except (Exception, SystemExit):  # such as too little memory for one of the networks
            print(f"{part} failed:\n{traceback.format_exc()}")


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    large = CUDA and torch.cuda.get_device_properties(0).total_memory > 60e9
    parser = argparse.ArgumentParser(description="Measures what only a GPU can tell.")
    parser.add_argument("--minutes", type=float, default=17, help="after which nothing new is begun")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), help="any of timm's, too")
    parser.add_argument("--side", type=int, default=224, help="of the images in pixels")
    parser.add_argument("--batch_size", type=int, default=256 if large else 64)
    parser.add_argument(
        "--batches", type=int, default=20, help="that an epoch has; three are trained, the first does not count"
    )
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes that read JPEG files"
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=CUDA)
    parser.add_argument("--rounds", type=int, default=2, help="of the trainings that show the host's part")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="of CIFAR-10")
    parser.add_argument("--data", default="data", help="folder of CIFAR-10, as --data.root names it")
    return parser.parse_args(given)


def main() -> None:
    options = arguments()
    options.recipe, options.data = options.recipe.resolve(), str(Path(options.data).resolve())
    rows = []
    with workshop() as folder:
        for row in measure(options, folder):
            rows.append(row)
            print(row.cells, flush=True)  # should the rest not come to its end
    print(f"\n{machine()}\n\n{table(rows)}")


if __name__ == "__main__":
    from benchmarks import gpu  # under its own name, by which the command line finds the data

    sys.exit(gpu.main())
