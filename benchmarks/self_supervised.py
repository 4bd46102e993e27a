"""What features learned without labels are worth on CIFAR-10, where a recipe alone does not say it.

``features``: nearest neighbours and a linear probe on the features of registered models, against those on the pixels and on the
features of the first model's network with random weights. 5,000 training images (500 a class, of seed 0) vote; test images are
asked about.

``labels``: the network of the first model with a few labels a class, from scratch and from each model of the same architecture,
each with the rates that are best on 1,000 validation images for the first seed.

    python -m benchmarks.self_supervised features models:/cifar10-vicreg/1 models:/cifar10-dino/1
    python -m benchmarks.self_supervised labels models:/cifar10-vicreg/1 models:/cifar10-dino/1
"""

import argparse
import time
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from datamodules import CIFAR10
from modules import Backbone, ClassificationModule, DataSpec, MaskedAutoencodingModule, Optimization, VisionModule
from modules.callbacks.transfer import probe
from modules.measures.features import neighbours
from modules.networks.backbones import untrained
from modules.networks.features import extract
from pipelines.engine.terminal import quieten
from pipelines.serving import registry

QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
                         "enable_model_summary": False, "accelerator": "cpu", "use_distributed_sampler": False}  # fmt: skip
RATES = ((0.001, 1.0), (0.001, 0.1))  # of the head, and that of the backbone against it


class Tokens(nn.Module):
    """The mean of the tokens of an image's patches, which a masked autoencoder predicts with."""

    def __init__(self, module: MaskedAutoencodingModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, image: Tensor) -> Tensor:
        return self.module.last_features(image)[:, self.module.visible.prefix :].mean(1)


def features(root: str, models: list[VisionModule], names: list[str], count: int) -> None:
    data = CIFAR10(root, batch_size=250, num_workers=0, train_per_class=500)
    twin = untrained(models[0].backbone, 3, 32)
    networks: list[tuple[str, nn.Module, Any]] = [("pixels", nn.Flatten(), lambda image: image.float() / 255),
                                                  ("random weights", twin, models[0].normalize)]  # fmt: skip
    for name, module in zip(names, models, strict=True):
        own = Tokens(module) if isinstance(module, MaskedAutoencodingModule) else module.backbone
        networks.append((name, own, module.normalize))
    for name, network, normalize in networks:
        known, asked = (
            extract(network, data.plain_loader(split, most), normalize)
            for split, most in (("train", None), ("test", count))
        )
        print(f"  {name:28} nearest neighbours {neighbours(known, asked):.4f}  probe {probe(known, asked):.4f}", flush=True)  # fmt: skip


def labels(root: str, models: list[VisionModule], names: list[str], shots: list[int], seeds: int, steps: int) -> None:
    recipe = models[0].backbone.recipe
    starts = {"from scratch": Backbone(recipe["backbone"], options=recipe["backbone_options"])}
    starts |= {name: Backbone(name) for name in names}

    def measure(backbone: Backbone, shot: int, seed: int, lr: float, scale: float, stage: str) -> float:
        L.seed_everything(seed, verbose=False)
        few = CIFAR10(root, augmentation="light", batch_size=50, num_workers=0, seed=seed, train_per_class=shot)
        module = ClassificationModule(DataSpec(3, 32, 10), backbone, Optimization(lr=lr, backbone_lr_scale=scale))
        L.Trainer(max_steps=steps, max_epochs=-1, limit_val_batches=0, num_sanity_val_steps=0, **QUIET).fit(module, few)
        measured = L.Trainer(limit_val_batches=20, limit_test_batches=40, **QUIET)  # 1,000 and 2,000 images
        (figures,) = getattr(measured, "test" if stage == "test" else "validate")(module, datamodule=few, verbose=False)
        return float(figures[f"{stage}/accuracy"])

    for shot in shots:
        for name, start in starts.items():
            rates = RATES if start is not starts["from scratch"] else RATES[:1]
            tried = {pair: measure(start, shot, 0, *pair, "val") for pair in rates} if len(rates) > 1 else {rates[0]: 0}
            pair = max(tried, key=lambda one: tried[one])
            values = np.array([measure(start, shot, seed, *pair, "test") for seed in range(seeds)])
            each = " ".join(f"{value:.4f}" for value in values)
            print(f"  {shot:3} labels a class  {name:28} {values.mean():.4f} ± {values.std(ddof=1):.4f}  ({each}; "
                  f"lr {pair[0]}, of the backbone × {pair[1]})", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["features", "labels"])
    parser.add_argument("models", nargs="+", help="models:/name/version")
    parser.add_argument("--root", default="data", help="folder of CIFAR-10")
    parser.add_argument("--count", type=int, default=10_000, help="test images for features")
    parser.add_argument("--shots", type=int, nargs="+", default=[5, 50])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    given = parser.parse_args()
    quieten()
    torch.set_num_threads(1)
    begin, spent = time.perf_counter(), time.process_time()
    models = [registry.load(address).module for address in given.models]
    if given.what == "features":
        features(given.root, models, given.models, given.count)
    else:
        labels(given.root, models, given.models, given.shots, given.seeds, given.steps)
    print(f"{time.perf_counter() - begin:.0f} s, {time.process_time() - spent:.0f} s of processor time")


if __name__ == "__main__":
    main()
