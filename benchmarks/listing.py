"""What listing and checking millions of image files costs, and whether memory stays flat over epochs.

    python -m benchmarks.listing [--files 1000000] [--classes 1000] [--place FOLDER]
    python -m benchmarks.listing --soak [--files 100000] [--epochs 20] [--workers 4]

The files are hard links to a few JPEGs of 16×16 pixels, in a folder for each class (`ImageFolder`), and in a CSV beside it
(`Manifest`). Each line is a process of its own: its processor time, and how much more memory it has than after its imports, at
the end and at most. *first*: each file is decoded once; *again*: what was found is known; *none*: ``--data.check none``.

The soak trains nothing: it takes the batches of a training loader with several workers, epoch after epoch, and adds up, in the
middle of each, the anonymous memory of this process and its workers, in which what several share counts once. (Libraries are left
out: other programs that use them would change their share.)
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from datamodules import ImageFolder, Manifest

LINKS = 50_000  # to one file; file systems allow some 65,000
KINDS = {"folder": ImageFolder, "table": Manifest}


def make(root: Path, count: int, classes: int) -> None:
    """Makes ``count`` files in folders of classes below ``root``/images, and a table of them."""
    generator = np.random.default_rng(0)
    sources = [root / f"{number}.jpg" for number in range(count // LINKS + 1)]
    for source in sources:
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), np.uint8)).save(source)
    with (root / "images.csv").open("w") as table:
        table.write("path,label\n")
        for number in range(count):
            name = f"images/class_{number % classes:04}/image_{number:07}.jpg"
            if number < classes:
                (root / name).parent.mkdir(parents=True)
            os.link(sources[number % len(sources)], root / name)
            table.write(f"{name},class_{number % classes:04}\n")


def measure(kind: str, place: str, check: str) -> None:
    """Reads the splits, and prints what that took."""
    warnings.simplefilter("ignore")  # of copies
    process = psutil.Process()
    before, start, wall = process.memory_info().rss, time.process_time(), time.perf_counter()
    data = KINDS[kind](place, check=check)
    data.identity()
    took, waited = time.process_time() - start, time.perf_counter() - wall
    kept = process.memory_info().rss - before
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    print(
        f"{sum(map(len, data.sources.values())):>9,} files{took:8.1f} s of CPU{waited:8.1f} s"
        f"{kept / 1e6:8.0f} MB more{most / 1e6:8.0f} MB at most",
        flush=True,
    )


def anonymous(process: psutil.Process) -> int:
    """Anonymous memory of a process in bytes; pages that several processes share count in proportion."""
    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss_Anon:"))


def soak(place: Path, workers: int, epochs: int) -> None:
    """Prints the memory of all processes in the middle of each epoch."""
    warnings.simplefilter("ignore")
    data = ImageFolder(str(place), image_size=16, augmentation="none", batch_size=100, num_workers=workers)
    loader = data.loader("train")
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        for number, _ in enumerate(loader):
            if number == len(loader) // 2:
                family = [psutil.Process(), *psutil.Process().children(recursive=True)]
                sizes = [anonymous(each) / 1e6 for each in family]
        print(
            f"epoch {epoch + 1:3}: {sum(sizes):7.0f} MB in {len(sizes)} processes, the first {sizes[0]:.0f}", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the listing of many files.")
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--place", help="where the files are made; by default the system's temporary folder")
    parser.add_argument("--soak", action="store_true")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(*options.measure)
    root = Path(tempfile.mkdtemp(dir=options.place))
    try:
        make(root, options.files, options.classes)
        os.environ["XDG_CACHE_HOME"] = str(root / "cache")
        if options.soak:
            return soak(root / "images", options.workers, options.epochs)
        for kind, place in (("folder", root / "images"), ("table", root / "images.csv")):
            for name, check in (("none", "none"), ("first", "all"), ("again", "all")):
                print(f"{kind:7}{name:6}", end="", flush=True)
                subprocess.run(
                    [sys.executable, "-m", "benchmarks.listing", "--measure", kind, str(place), check], check=True
                )
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
