"""How many images a second one core reads, augments and puts into batches: Fovea against torchvision.

Both sides read the same JPEG files, of 500×375 pixels as ImageNet's and of 4000×3000 as a telephone's, and make batches of
224×224, in one process with one thread:

- *decode*: the file's bytes to RGB pixels with OpenCV, all of them, and nothing else: what no input pipeline that does so can
  exceed;
- *Fovea*: what `datamodules.ImageFolder` trains on with ``augmentation: light``, to the uint8 batch (the network
  normalises it on the device);
- *Fovea, cached*: the same with ``cache: memory``, from the second epoch on;
- *Fovea, normalised*: the same and the normalisation to float, on this core, as training without a GPU has it;
- *torchvision*: `torchvision.datasets.ImageFolder` with RandomResizedCrop(224), RandomHorizontalFlip, PILToTensor,
  conversion to float and Normalize, and DataLoader's own collation, as torchvision's training reference has it;
- *torchvision, same crop*: the same with the crop's scale and aspect that Fovea's light augmentation draws from.

The files are random crops of the two photographs that come with scikit-learn, with a fixed seed, and a sensor's noise on the
large ones, which are a tenth as many. Rounds are interleaved.

    python -m benchmarks.input_pipeline [--rounds 7] [--files 200] [--sizes 500x375 4000x3000]
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
import torchvision
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from benchmarks import Row, Seconds, machine, now, table, workshop
from datamodules import ImageFolder
from datamodules.decoded import Caching

SIDE, BATCH_SIZE = 224, 50
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make_files(root: Path, count: int, size: tuple[int, int] = (500, 375), val: int = 2) -> None:
    """Writes JPEG files in a folder for each of two photographs.

    Args:
        root: folder of the folders.
        count: images to train on.
        size: width and height in pixels.
        val: images of each photograph to validate with.
    """
    generator = np.random.default_rng(0)
    for label, picture in enumerate(load_sample_images().images):
        height, width = picture.shape[:2]
        for split, files in (("train", count // 2), ("val", val)):
            folder = root / split / str(label)
            folder.mkdir(parents=True)
            for number in range(files):
                h = int(generator.integers(height // 2, height + 1))
                w = min(width, h * size[0] // size[1])
                y, x = generator.integers(height - h + 1), generator.integers(width - w + 1)
                crop = cv2.resize(picture[y : y + h, x : x + w], size, interpolation=cv2.INTER_CUBIC)
                if size[0] > width:
                    crop = (crop + generator.normal(0, 4, crop.shape)).clip(0, 255).astype(np.uint8)
                file = str(folder / f"{number}.jpg")
                cv2.imwrite(file, cv2.cvtColor(crop, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 90])


def decode(root: Path) -> Callable[[], int]:
    files = sorted((root / "train").rglob("*.jpg"))

    def run() -> int:
        for file in files:
            cv2.imdecode(np.frombuffer(file.read_bytes(), np.uint8), cv2.IMREAD_COLOR_RGB)
        return len(files)

    return run


def fovea(root: Path, batch_size: int, normalise: bool = False, cache: Caching = "none") -> Callable[[], int]:
    data = ImageFolder(
        str(root), augmentation="light", image_size=SIDE, batch_size=batch_size, num_workers=0, cache=cache
    )
    loader = data.loader("train")
    scale, shift = (
        torch.tensor(values).view(-1, 1, 1)
        for values in ([1 / (255 * s) for s in STD], [-m / s for m, s in zip(MEAN, STD, strict=True)])
    )

    def run() -> int:
        loader.set_epoch(loader.epoch + 1)
        images = 0
        for batch in loader:
            image = batch["image"]
            assert image.shape == (batch_size, 3, SIDE, SIDE)
            assert image.dtype == torch.uint8
            if normalise:
                image = image.float().mul_(scale).add_(shift)
            images += len(image)
        return images

    return run


def reference(root: Path, batch_size: int, crop: v2.Transform) -> Callable[[], int]:
    steps = [
        crop,
        v2.RandomHorizontalFlip(),
        v2.PILToTensor(),
        v2.ToDtype(torch.float, scale=True),
        v2.Normalize(MEAN, STD),
    ]
    data = torchvision.datasets.ImageFolder(str(root / "train"), v2.Compose(steps))
    loader = DataLoader(data, batch_size, shuffle=True, num_workers=0)

    def run() -> int:
        images = 0
        for image, _ in loader:
            assert image.shape == (batch_size, 3, SIDE, SIDE)
            assert image.dtype == torch.float32
            images += len(image)
        return images

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the input pipelines of Fovea and torchvision on one core.")
    parser.add_argument(
        "--rounds", type=int, default=7, help="passes of each over the files, after one that does not count"
    )
    parser.add_argument("--files", type=int, default=200, help=f"images, a multiple of {2 * BATCH_SIZE}")
    parser.add_argument("--sizes", nargs="+", default=["500x375", "4000x3000"], help="WIDTHxHEIGHT of the images")
    options = parser.parse_args()
    rows = []
    for size in options.sizes:
        width, height = map(int, size.split("x"))
        rows += compare((width, height), options.files if width < 1000 else options.files // 10, options.rounds)
    print(f"\n{machine()}\n\n{table(rows)}")


def compare(size: tuple[int, int], count: int, rounds: int) -> list[Row]:
    """Times all on images of one width and height."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    batch_size = min(BATCH_SIZE, count)
    with workshop() as folder:
        root = folder / "images"
        make_files(root, count, size)
        passes = {
            "decode": decode(root),
            "Fovea": fovea(root, batch_size),
            "Fovea, cached": fovea(root, batch_size, cache="memory"),
            "Fovea, normalised": fovea(root, batch_size, normalise=True),
            "torchvision": reference(root, batch_size, v2.RandomResizedCrop(SIDE)),
            "torchvision, same crop": reference(root, batch_size, v2.RandomResizedCrop(SIDE, (0.7, 1), (0.85, 1.18))),
        }
        seconds: dict[str, list[Seconds]] = {name: [] for name in passes}
        for number in range(rounds + 1):
            for name, run in passes.items():
                start = now()
                images = run()
                if number:
                    seconds[name].append(now() - start)
    theirs = f"torchvision {torchvision.__version__}"
    peers = {
        "torchvision": f"{theirs}, its reference",
        "torchvision, same crop": f"{theirs}, our crop's scale",
        "decode": f"OpenCV {cv2.__version__}, decoding all of it and no more",
    }
    what = f"input, JPEG {size[0]}×{size[1]} to {SIDE} px"
    large = size[0] > 1000
    rows = [
        (what, "Fovea", "torchvision", "≥ 5" if large else "≥ 2.8"),
        (what, "Fovea", "torchvision, same crop", ""),
        (what, "Fovea", "decode", "≥ 1" if large else ""),
        (f"{what}, normalised on the same core", "Fovea, normalised", "torchvision", ""),
        (f"{what}, from the second epoch on with `--data.cache memory`", "Fovea, cached", "torchvision", ""),
        (f"{what}, from the second epoch on with `--data.cache memory`", "Fovea, cached", "decode", "≥ 2"),
    ]
    return [Row(what, images, seconds[o], peers[t], seconds[t], wanted) for what, o, t, wanted in rows]


if __name__ == "__main__":
    main()
