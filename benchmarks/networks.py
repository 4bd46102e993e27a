"""The lectures' networks against each other.

``line`` trains the historical line on Fashion-MNIST, from the perceptron to ConvNeXt and the transformers, with one
recipe (``configs/classification/historical_line_fashion_mnist.yaml``). From AlexNet on the networks are narrower than
published, so that each takes minutes on a processor; what distinguishes them is kept. A network that is trained already
(``outputs/historical_line/NAME``) is not trained again.

``mnist`` repeats the lectures' table of errors on MNIST: each network as published (its activations and subsampling, no
augmentation, the weights of the last steps) and as one would train it today, by several seeds, and a support vector machine.
A network that is trained already (``outputs/lectures_mnist/NAME-SEED``) is not trained again.

``speed`` repeats the lectures' table of ConvNeXt against Swin: images a second without gradients, 224 pixels; on a GPU in
bfloat16 and channels-last, on a processor in float32.

    python -m benchmarks.networks line [--only lenet5 resnet …]
    python -m benchmarks.networks mnist [--seeds 0 1 2 3 4] [--only lenet5 …] [--root data]
    python -m benchmarks.networks speed [--batch_size 256] [--rounds 5]
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from sklearn.svm import SVC
from torch import nn

import datamodules
from benchmarks import Row, Seconds, machine, now, table
from modules import ClassificationModule, create_backbone
from modules.spec import Backbone, DataSpec
from pipelines.classification import classification
from pipelines.tracking.logger import run_id_of

RECIPE = Path(__file__).parents[1] / "configs" / "classification" / "historical_line_fashion_mnist.yaml"
LINE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "MLP, 1980s": ("mlp", "mlp", {}),
    "LeNet-4, 1994": ("lenet4", "lenet4", {}),
    "LeNet-5 as published, 1998": ("lenet5_published", "lenet5", {"form": "published"}),
    "LeNet-5, ReLU and max pooling": ("lenet5", "lenet5", {}),
    "AlexNet, 2012, 1/8 of the width": ("alexnet", "alexnet", {"width": 0.125}),
    "VGG A-LRN, 2014, 1/8": ("vgg", "vgg11_lrn", {"width": 0.125}),
    "GoogLeNet, 2014, 0.15, batch norm": ("googlenet", "googlenet", {"width": 0.15, "norm": True}),
    "ResNet-18, 2015, 12 to 96 channels": ("resnet", "resnet18", {"channels": [12, 24, 48, 96]}),
    "DenseNet, 2016, growth 8, 8 layers": ("densenet", "densenet121", {"growth_rate": 8, "block_config": [2, 3, 3]}),
    "MobileNet v2, 2018, 0.35": ("mobilenet", "mobilenetv2_035", {}),
    "ViT, 2020, 4 layers of 96": (
        "vit",
        "vit_tiny_patch16_224",
        {"patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3},
    ),
    "Swin, 2021, 4 layers, 48 and 96": (
        "swin",
        "swin_tiny_patch4_window7_224",
        {"patch_size": 4, "embed_dim": 48, "depths": [2, 2], "num_heads": [2, 4], "window_size": 8},
    ),
    "ConvNeXt, 2022, 6 blocks, 16 to 128": (
        "convnext",
        "convnext_atto",
        {"dims": [16, 32, 64, 128], "depths": [1, 1, 3, 1]},
    ),
}
MNIST_RECIPE = RECIPE.with_name("lenet5_mnist.yaml")
# The settings of a recipe are chosen on validation images; the test images are asked once, at the end.
EPOCHS = "10"
PLAIN = ["--data.augmentation", "none", "--model.optimization.ema_decay", "0"]
MNIST: dict[str, tuple[str, str, str]] = {  # title, the lectures' error, settings
    "mlp": ("MLP, 1980s", "", "--model.backbone mlp"),
    "lenet1989": ("LeNet, 1989, 16 pixels", "1.70", "--model.backbone lenet1989 --data.image_size 16"),
    "lenet4": ("LeNet-4, 1994", "1.10", "--model.backbone lenet4"),
    "lenet5_published": (
        "LeNet-5, 1998, 32 pixels", "0.95", "--model.backbone lenet5 --model.backbone.options.form published --data.image_size 32",
    ),
    "lenet5": ("LeNet-5, ReLU and max pooling", "", "--model.backbone lenet5"),
}  # fmt: skip
LECTURES = {"tiny": 1.47, "small": 1.49, "base": 1.46}  # images a second of ConvNeXt over Swin's; tiny 1943.5 / 1325.6


def times(network: nn.Module, images: torch.Tensor, rounds: int, training: bool = False) -> list[Seconds]:
    """What each round takes, after two that do not count."""
    network.train(training)
    device, seconds = images.device, []
    for _ in range(rounds + 2):
        start = now()
        with torch.set_grad_enabled(training), torch.autocast(device.type, torch.bfloat16, device.type == "cuda"):
            result = network(images)
        if training:
            result.float().square().mean().backward()
            network.zero_grad()
        seconds.append(now() - start)
    return seconds[2:]


def line(only: list[str] | None, rounds: int) -> None:
    """Trains what is not trained yet, and prints the table."""
    rows = []
    for title, (name, backbone, options) in LINE.items():
        if only and name not in only:
            continue
        output = Path("outputs", "historical_line", name)
        args = ["--config", str(RECIPE), "--model.backbone", backbone, "--run_name", name, "--output", str(output),
                "--model.backbone.options", json.dumps(options), "--experiment", "historical_line"]  # fmt: skip
        if not (output / "best.ckpt").exists() or "test/accuracy" not in mlflow.get_run(run_id_of(output)).data.metrics:
            classification(["fit", *args, "--trainer.enable_progress_bar", "false"])
        metrics = mlflow.get_run(run_id_of(output)).data.metrics
        module = ClassificationModule(
            DataSpec(num_classes=10, in_chans=1, image_size=32), Backbone(backbone, options=options)
        )
        images = torch.randint(256, (128, 1, 32, 32), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
        speeds = [len(images) / np.median(times(module, images, rounds, training), 0)[0] for training in (True, False)]
        size = sum(p.numel() for p in module.parameters())
        accuracy = metrics["test/accuracy"]
        rows.append(f"| {title} | {size:,} | {speeds[0]:,.0f} | {speeds[1]:,.0f} | {accuracy:.2%} |")
    print("| network | parameters | training, images/s | answering, images/s | test accuracy |\n|---|---|---|---|---|")
    print("\n".join(rows))


def support_vector_machine(root: str) -> str:
    """The row of a support vector machine on pixels: its kernel chosen on a part, then trained on what the networks train on."""
    parts: Any = datamodules.MNIST(root=root).sources
    pixels, labels = ({split: getattr(parts[split], key) for split in parts} for key in ("images", "labels"))
    flat = {split: images.reshape(len(images), -1) / np.float32(255) for split, images in pixels.items()}
    kernels = [{"kernel": "rbf", "C": c, "gamma": g} for c in (5, 10) for g in (0.02, 0.05)]
    kernels += [{"kernel": "poly", "degree": d, "C": 10, "gamma": 0.02, "coef0": 1} for d in (2, 4)]

    def trained(kernel: dict[str, Any], count: int | None = None) -> SVC:
        return SVC(cache_size=2000, **kernel).fit(flat["train"][:count], labels["train"][:count])

    scores = [trained(kernel, 10_000).score(flat["val"], labels["val"]) for kernel in kernels]
    best = kernels[int(np.argmax(scores))]
    error = 100 * (1 - trained(best).score(flat["test"], labels["test"]))
    told = ", ".join(f"{key} {value}" for key, value in best.items())
    return f"| support vector machine, {told} | | 1.4 | {error:.2f} | |"


def mnist(only: list[str] | None, seeds: list[int], root: str) -> None:
    """Trains what is not trained yet, seed after seed, and prints the table of test errors."""
    errors: dict[tuple[str, bool], list[float]] = {}
    for seed in seeds:
        for name, (_, _, settings) in MNIST.items():
            for plain in (True, False) if not only or name in only else ():
                output = Path("outputs", "lectures_mnist", f"{name}-{'plain' if plain else 'today'}-{seed}")
                args = ["--config", str(MNIST_RECIPE), *settings.split(), "--data.root", root, "--seed_everything", str(seed),
                        "--output", str(output), "--experiment", "lectures_mnist", "--register", "null", "--trainer.max_epochs", EPOCHS]  # fmt: skip
                if (
                    not (output / "best.ckpt").exists()
                    or "test/accuracy" not in mlflow.get_run(run_id_of(output)).data.metrics
                ):
                    classification(["fit", *args, *(PLAIN if plain else []), "--trainer.enable_progress_bar", "false"])
                accuracy = mlflow.get_run(run_id_of(output)).data.metrics["test/accuracy"]
                errors.setdefault((name, plain), []).append(100 * (1 - accuracy))
    print("| network | parameters | the lectures, % | as published, % | as trained today, % |\n|---|---|---|---|---|")
    for name, (title, published, settings) in MNIST.items():
        if (name, True) in errors:
            own = dict(zip(settings.split()[::2], settings.split()[1::2], strict=True))
            side = int(own.get("--data.image_size", 28))
            options = {"form": "published"} if name == "lenet5_published" else {}
            module = ClassificationModule(DataSpec(num_classes=10, in_chans=1, image_size=side), Backbone(own["--model.backbone"], options=options))  # fmt: skip
            size = sum(p.numel() for p in module.parameters())
            cells = [f"{statistics.mean(e):.2f} ± {statistics.stdev(e) if len(e) > 1 else 0:.2f}" for e in (errors[name, True], errors[name, False])]  # fmt: skip
            print(f"| {title} | {size:,} | {published} | {cells[0]} | {cells[1]} |", flush=True)
    if not only or "svm" in only:
        print(support_vector_machine(root))


def speed(batch_size: int, rounds: int, side: int = 224) -> Iterator[Row]:
    """ConvNeXt against Swin, by size."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = torch.randn(batch_size, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)
    for size, ratio in LECTURES.items():
        names = (f"convnext_{size}", f"swin_{size}_patch4_window7_224")
        made = [create_backbone(name, image_size=side).to(device, memory_format=torch.channels_last) for name in names]
        convnext, swin = (times(network, images, rounds) for network in made)
        what = f"answering, ConvNeXt {size}, {side} px, batches of {batch_size}"
        yield Row(what, batch_size, convnext, f"Swin {size}", swin, f"the lectures: {ratio}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["line", "mnist", "speed"])
    parser.add_argument("--only", nargs="+", help="names of networks, such as lenet5, or svm")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--root", default="data", help="the folder of MNIST, as --data.root names it")
    parser.add_argument("--batch_size", type=int, default=256 if torch.cuda.is_available() else 4)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(torch.get_num_threads() if torch.cuda.is_available() else 1)
    if given.what == "line":
        line(given.only, given.rounds)
    elif given.what == "mnist":
        mnist(given.only, given.seeds, given.root)
    else:
        print(f"{machine()}\n\n{table(speed(given.batch_size, given.rounds))}")
