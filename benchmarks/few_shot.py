"""Few-shot recognition on frozen ImageNet features, and on pixels, of data that nothing was trained on.

Each image's features are computed once; an episode draws some of the ten classes, a few images of each for the prototypes
and 15 to recognise, all of the test split.

    python -m benchmarks.few_shot [--data CIFAR10 FashionMNIST] [--root data] [--sides 32 64] [--pictures 300]
"""

import argparse
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import datamodules
from modules.few_shot import EPISODES, episodes, prototypes, scores
from modules.networks.backbones import create_backbone

QUERIES = 15


def accuracy(embedding: Tensor, labels: np.ndarray, way: int, shots: int) -> tuple[float, float]:
    """Mean accuracy over episodes, and the half width of its 95 % confidence interval."""
    right = []
    for _, images in episodes(labels, way, shots + QUERIES):
        support, query = embedding[images[:, :shots].ravel()], embedding[images[:, shots:].ravel()]
        known = prototypes(support, torch.arange(way).repeat_interleave(shots))
        answers = scores(query, known).argmax(1)
        right.append(float((answers == torch.arange(way).repeat_interleave(QUERIES)).float().mean()))
    return float(np.mean(right)), float(1.96 * np.std(right, ddof=1) / EPISODES**0.5)


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["CIFAR10", "FashionMNIST"])
    parser.add_argument("--root", default="data", help="folder of the data")
    parser.add_argument("--sides", type=int, nargs="+", default=[32], help="sides of the images in pixels")
    parser.add_argument("--pictures", type=int, default=300, help="test images of each class")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = [(way, shots) for way in (5, 10) for shots in (1, 5)]
    print(f"| data | embedding | {' | '.join(f'{way}-way {shots}-shot' for way, shots in settings)} | seconds |")
    print("|---" * (len(settings) + 3) + "|")
    for name in options.data:
        for side in options.sides:
            data = getattr(datamodules, name)(options.root, augmentation="none", image_size=side, num_workers=0)
            batch = data.samples("test", len(data.sources["test"]))
            labels = batch["label"].numpy()
            few = np.concatenate([np.flatnonzero(labels == k)[: options.pictures] for k in range(data.num_classes)])
            image, labels = batch["image"][few].float() / 255, labels[few]
            network = (
                create_backbone("tf_efficientnet_lite0", True, 3, side).eval().to(memory_format=torch.channels_last)
            )
            start = time.process_time()
            with torch.inference_mode():  # mean and standard deviation of these weights are a half
                seen = torch.cat([network(part.expand(-1, 3, -1, -1) * 2 - 1) for part in image.split(50)])
            spent = time.process_time() - start
            for title, embedding in ((f"pixels, {side}", image.flatten(1)), (f"ImageNet features, {side} px", seen)):
                found = [accuracy(F.normalize(embedding), labels, *setting) for setting in settings]
                cells = " | ".join(f"{100 * mean:.1f} ± {100 * half:.1f}" for mean, half in found)
                print(f"| {name} | {title} | {cells} | {spent:.0f} |", flush=True)


if __name__ == "__main__":
    main()
