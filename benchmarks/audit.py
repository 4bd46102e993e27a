"""What an audit finds of faults that were planted: precision and recall.

Images of CIFAR-10's training set become files in splits. Of 3 % the label is changed at random, 20 are copied exactly and 20 nearly
(JPEG, brighter, mirrored, cropped, five each) into another split, three files are broken. A linear head on ImageNet features
learns from them; then it audits them.

    python -m pipelines.datasets cifar10 --root data
    python -m benchmarks.audit data [--images 3000] [--seed 0] [--out FOLDER] [--transfer features]
"""

import argparse
import csv
import shutil
import tempfile
from itertools import combinations, groupby
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from datamodules import CIFAR10
from pipelines.audit import audit
from pipelines.classification import classification
from pipelines.engine.terminal import print_table

WRONG, COPIES = 0.03, 20
Pair = frozenset[str]


def plant(root: str, count: int, seed: int, out: Path) -> tuple[set[str], set[Pair], set[Pair]]:
    """Writes the files; returns those with a wrong label, and the pairs of exact and of near copies."""
    data, generator = CIFAR10(root), np.random.default_rng(seed)
    source, names = data.sources["train"], data.label_names
    chosen = generator.permutation(len(source))[:count]
    splits = np.array(["train", "val", "test"])[
        np.searchsorted([0.7, 0.85], generator.permutation(count) / count, "right")
    ]
    wrong = generator.permutation(count)[: round(WRONG * count)]
    labels = np.array(source.labels)[chosen]
    labels[wrong] = (labels[wrong] + generator.integers(1, len(names), len(wrong))) % len(names)

    def place(k: int, split: str, name: str) -> Path:
        folder = out / split / names[labels[k]]
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name

    files = [place(k, splits[k], f"{k:05d}.png") for k in range(count)]
    for k, file in zip(chosen, files, strict=True):
        Image.fromarray(np.asarray(source.images[k])).save(file)
    right = generator.permutation(np.setdiff1d(np.flatnonzero(splits == "train"), wrong))
    pairs: list[Pair] = []
    for i, k in enumerate(right[: 2 * COPIES]):
        split, image = ("val", "test")[i % 2], Image.open(files[k])
        copy = place(k, split, f"copy{k:05d}.{'jpg' if i >= COPIES and i % 4 == 0 else 'png'}")
        if i < COPIES:
            shutil.copy(files[k], copy)
        elif i % 4 == 0:
            image.save(copy, quality=60)
        elif i % 4 == 1:
            ImageEnhance.Brightness(image).enhance(1.2).save(copy)
        elif i % 4 == 2:
            image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(copy)
        else:
            image.crop((2, 2, 32, 32)).resize((32, 32), Image.Resampling.BICUBIC).save(copy)
        pairs.append(frozenset((str(files[k]), str(copy))))
    for k, content in enumerate((files[0].read_bytes()[:900], b"", b"<html>404</html>")):
        place(k, "train", f"broken{k}.png").write_bytes(content)
    return {str(files[k]) for k in wrong}, set(pairs[:COPIES]), set(pairs[COPIES:])


def main() -> None:
    """Plants, trains, audits and tells."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root")
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--transfer", default="features")
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp())
    wrong, exact, near = plant(args.root, args.images, args.seed, out / "images")
    settings = ["--data.image_size=96", "--data.crop_pct=1", "--data.on_bad_file=skip_all", "--trainer.max_epochs=3",
                "--backbone=tf_efficientnet_lite0", "--model.backbone.pretrained=true", "--register=audited",
                f"--model.backbone.transfer={args.transfer}", f"--output={out / 'training'}"]  # fmt: skip
    training = classification(["fit", "--data=ImageFolder", f"--data.root={out / 'images'}", *settings])
    audit("models:/audited@latest", data=training.datamodule, output=out / "audit")
    with (out / "audit/findings.csv").open() as file:
        rows = list(csv.DictReader(file))
    listed = [row["path"] for row in rows if row["kind"] == "doubtful label"]
    told = {}
    for name, some in (("all listed", listed), *((f"first {k}", listed[:k]) for k in (50, len(wrong)))):
        hits = len(wrong & set(some))
        told[f"labels, {name} ({len(some)})"] = f"precision {hits / len(some):.2f}, recall {hits / len(wrong):.2f}"
    for kind, planted in (("exact copy", exact), ("near copy", near)):
        own = [row for row in rows if row["kind"] == kind]
        groups = [[row["path"] for row in group] for _, group in groupby(own, key=lambda row: row["group"])]
        pairs = {frozenset(pair) for group in groups for pair in combinations(group, 2)}
        told[kind] = f"{len(pairs & planted)} of {len(planted)} pairs; not planted: {len(pairs - planted)}"
        told |= {f"{kind}, not planted {k}": " ".join(sorted(pair)) for k, pair in enumerate(pairs - planted)}
    told["unreadable"] = f"{sum(row['kind'] == 'unreadable' for row in rows)} of 3"
    print_table(f"{args.images} images, seed {args.seed}, {args.transfer}", told)


if __name__ == "__main__":
    main()
