"""What helps where classes are of unequal numbers: ``python -m benchmarks.imbalance``.

LeNet-5 learns the embedded digits, of which there are 350 zeros to train on, fewer of each further digit by the same factor, and
7 nines (as Cui et al. 2019, arXiv:1901.05555, make their sets); it is tested on a hundred of each.
"""

import argparse
import logging
import warnings
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import torch
from typing_extensions import override

from datamodules import Digits
from datamodules.labelled.sources import LabelledSource
from modules import ClassificationModule, DataSpec

WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # settings of the data and of the module
    "nothing": ({}, {}),
    "--data.class_weighting sqrt": ({"class_weighting": "sqrt"}, {}),
    "--data.class_weighting balanced": ({"class_weighting": "balanced"}, {}),
    "--data.sampling sqrt": ({"sampling": "sqrt"}, {}),
    "--data.sampling balanced": ({"sampling": "balanced"}, {}),
    "--model.focal_gamma 2": ({}, {"focal_gamma": 2.0}),
}


@dataclass(kw_only=True, eq=False, repr=False)
class LongTail(Digits):
    """`Digits` with ever fewer images of each class to train on."""

    @override
    def load(self) -> dict[str, LabelledSource]:
        sources = super().load()
        train = sources["train"]
        counts = np.rint(350 * (1 / 50) ** (np.arange(10) / 9)).astype(int)
        kept = [np.flatnonzero(train.labels == k)[:count] for k, count in enumerate(counts.tolist())]
        return sources | {"train": train.subset(np.concatenate(kept))}


def recalls(data_settings: dict[str, Any], settings: dict[str, Any], seed: int, epochs: int) -> tuple[float, float]:
    """The mean recall of all classes on the test split, and that of the three rarest."""
    torch.manual_seed(seed)
    data = LongTail(seed=seed, batch_size=64, num_workers=0, augmentation="light", **data_settings)
    spec = DataSpec.of(data, (*ClassificationModule.takes, *ClassificationModule.takes_for_training))
    module = ClassificationModule(spec, **settings)
    quiet: Any = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "use_distributed_sampler": False}
    L.Trainer(max_epochs=epochs, limit_val_batches=0, **quiet).fit(module, data)
    module.eval()
    with torch.inference_mode():
        pairs = [(module(batch["image"]).argmax(1), batch["label"]) for batch in data.test_dataloader()]
    found, label = (torch.cat(each).numpy() for each in zip(*pairs, strict=True))
    own = np.array([(found[label == k] == k).mean() for k in range(10)])
    return float(own.mean()), float(own[7:].mean())


def main() -> None:
    """Prints the recalls of each way, means over the seeds and their standard deviations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=40)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for name, (of_data, of_module) in WAYS.items():
        values = 100 * np.array([recalls(of_data, of_module, seed, given.epochs) for seed in range(given.seeds)])
        said = [f"{mean:.1f} ± {spread:.1f} %" for mean, spread in zip(values.mean(0), values.std(0), strict=True)]
        print(f"{name:34} all classes {said[0]}, the three rarest {said[1]}", flush=True)


if __name__ == "__main__":
    main()
