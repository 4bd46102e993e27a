"""How well unseen people are told apart, and how fast a large gallery is searched.

    python -m benchmarks.faces orl [--draws 0 1 2 3 4]         30 people to train, 10 unseen ones to test
    python -m benchmarks.faces published [--draws 0 1 2 3 4]   the same people, by dlib and by its network in Fovea
    python -m benchmarks.faces glyphs [--seeds 0 1 2]          miners at the same number of steps, unseen characters
    python -m benchmarks.faces search [--size 1000000]         a gallery of many embeddings

Each training's figures are appended to ``--results``, so that an interrupted command goes on where it was; the tables
are printed as mean ± standard deviation. No choice is made on the people who are tested: trainings have a fixed length,
and their last weights are measured.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import faiss
import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import ArcFaceLoss
from pytorch_metric_learning.miners import BatchHardMiner
from sklearn.decomposition import PCA
from torch import Tensor, nn

from datamodules import ORL, Glyphs
from datamodules.labelled.alignment import FaceDetector, faces_of
from datamodules.labelled.people import FaceDataModule
from datamodules.labelled.sources import PeopleSource
from modules import FaceNetModule, Optimization
from modules.facenet import HardMiner, ProgressiveMiner, SemiHardMiner, TripletLoss
from modules.facenet.metrics import Roc, all_pairs, drawn_pairs, retrieval, ten_fold
from modules.networks.faces import DLIB_FILE
from modules.spec import Backbone, DataSpec
from pipelines.serving.gallery import Gallery

Row = dict[str, Any]


class RandomMiner(nn.Module):
    """For each pair of one person any stranger."""

    def forward(self, embedding: Tensor, identity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        same = identity[:, None] == identity
        anchor, positive = (same & ~torch.eye(len(same), dtype=torch.bool)).nonzero(as_tuple=True)
        return anchor, positive, (~same[anchor]).float().multinomial(1)[:, 0]


def figures(vectors: NDArray[np.float32], identity: NDArray[np.int64]) -> Row:
    """Verification by squared distance between any vectors, N×D."""

    def apart(pairs: Any) -> NDArray[np.float32]:
        pieces = (np.array_split(places, 1 + len(places) // 50_000) for places in (pairs.first, pairs.second))
        return np.concatenate([np.square(vectors[a] - vectors[b]).sum(1) for a, b in zip(*pieces, strict=True)])

    pairs, drawn = all_pairs(identity), drawn_pairs(identity)
    roc, distance = Roc.of(pairs.same, apart(pairs)), apart(drawn)
    scale = 4 / max(4.0, float(distance.max()))  # the grid of thresholds ends at 4
    return {
        "AUC": roc.area,
        "EER": roc.equal_error_rate,
        "TAR at FAR 1 %": roc.at(0.01)[0],
        "10 folds": float(ten_fold(drawn, distance * scale).accuracy.mean()),
        "recall@1": retrieval(vectors, identity)["recall_at_1"],
    }


@torch.inference_mode()
def embed(network: Callable[[Tensor], Tensor], data: FaceDataModule, split: str) -> NDArray[np.float32]:
    return torch.cat([network(batch["image"]) for batch in data.loader(split)]).numpy()


def train(module: FaceNetModule, data: FaceDataModule, epochs: int) -> float:
    """Trains, and returns the seconds of processor time."""
    start = time.process_time()
    L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, limit_val_batches=0,
    ).fit(module, datamodule=data)  # fmt: skip
    return time.process_time() - start


MINING: dict[str, Callable[[], Row]] = {
    "semi-hard, then hard": lambda: {"loss": TripletLoss(), "miner": ProgressiveMiner()},
    "semi-hard": lambda: {"loss": TripletLoss(), "miner": SemiHardMiner()},
    "hard": lambda: {"loss": TripletLoss(), "miner": HardMiner()},
    "batch-hard": lambda: {"loss": TripletLoss(), "miner": BatchHardMiner(distance=LpDistance(power=2))},
    "batch-all": lambda: {"loss": TripletLoss()},
    "random": lambda: {"loss": TripletLoss(), "miner": RandomMiner()},
    "ArcFace, untuned": lambda: {"loss": ArcFaceLoss},
}


class ORL30(ORL):
    """All thirty people to train on: none are needed for choices, since there are none."""

    def load(self) -> dict[str, Any]:
        parts: Any = super().load()
        images, people = (
            np.concatenate([getattr(parts[p], key) for p in ("train", "val")]) for key in ("images", "people")
        )
        return parts | {"train": PeopleSource(images, people)}


def orl(method: str, draw: int) -> Row:
    """Measures a method on ten people whom it has never seen."""
    L.seed_everything(0, verbose=False)
    size = 64 if method == "from scratch" else 96
    data = ORL30(draw=draw, image_size=size, augmentation="light", num_workers=0)
    parts: Any = data.sources
    identity, seconds = parts["test"].labels, 0.0
    if method == "raw pixels":
        vectors = parts["test"].images.reshape(len(identity), -1) / np.float32(255)
    elif method == "eigenfaces":
        flat = {name: parts[name].images.reshape(len(parts[name]), -1) / np.float32(255) for name in parts}
        vectors = PCA(EMBEDDING, random_state=0).fit(flat["train"]).transform(flat["test"])
    elif method == "frozen features":
        module = FaceNetModule(
            DataSpec(num_classes=0, in_chans=1, image_size=size), Backbone(BACKBONE, pretrained=True)
        ).eval()
        vectors = embed(lambda image: F.normalize(module.features(image)), data, "test")
    elif method == "from scratch":
        plan = Optimization(optimizer=partial(torch.optim.AdamW, lr=0.001, weight_decay=0.05), ema_decay=0.95)
        module = FaceNetModule(DataSpec(num_classes=0, in_chans=1, image_size=size), Backbone("resnet18", options={"channels": [16, 32, 64, 128], "small_stem": False}), optimization=plan, mirror=True)  # fmt: skip
        seconds = train(module, data, 25)
        vectors = embed(module.eval(), data, "test")
    else:
        if method == "whitened features":  # whose triplets are all satisfied: nothing is left to learn
            data.augmentation = "none"
        plan = Optimization(optimizer=partial(torch.optim.AdamW, lr=1e-4, weight_decay=0.01), frozen_epochs=-1)
        module = FaceNetModule(DataSpec(num_classes=0, in_chans=1, image_size=size), Backbone(BACKBONE, pretrained=True), embedding_size=EMBEDDING, levels=2, mirror=True, whiten=True, optimization=plan)  # fmt: skip
        seconds = train(module, data, 1 if method == "whitened features" else 5)
        vectors = embed(module.eval(), data, "test")
    return {**figures(vectors, identity), "seconds": seconds}


class AlignedORL30(ORL30):
    """The same pictures, aligned as dlib's network wants them, and in colour."""

    def load(self) -> dict[str, Any]:
        """See `ORL.load`."""
        parts: Any = super().load()
        return {
            name: PeopleSource(np.stack([cut_out(image.tobytes()) for image in part.images]), part.people)
            for name, part in parts.items()
        }


@cache
def detector() -> FaceDetector:
    """The detector of `facenet align`."""
    return FaceDetector("cpu")


def colour(image: bytes) -> NDArray[np.uint8]:
    """A picture of ORL, uint8 112×92×3."""
    return np.frombuffer(image, np.uint8).reshape(112, 92, 1).repeat(3, 2)


@cache
def cut_out(image: bytes) -> NDArray[np.uint8]:
    """A picture of ORL as `facenet align --form dlib` writes it."""
    return faces_of(colour(image), detector(), "dlib")[0].pixels


@cache
def of_dlib(image: bytes) -> NDArray[np.float32]:
    """What dlib itself, with its own detector and its own five points, makes of a picture of ORL, enlarged as it needs it."""
    import dlib

    if not hasattr(of_dlib, "parts"):
        package: Any = find_spec("face_recognition_models")  # not imported: it asks for setuptools
        folder = Path(package.origin).parent / "models"
        of_dlib.parts = (  # type: ignore[attr-defined]
            dlib.get_frontal_face_detector(),
            dlib.shape_predictor(str(folder / "shape_predictor_5_face_landmarks.dat")),
            dlib.face_recognition_model_v1(str(folder / DLIB_FILE)),
        )
    found, points, network = of_dlib.parts  # type: ignore[attr-defined]
    picture = cv2.resize(colour(image), None, fx=2.5, fy=2.5, interpolation=cv2.INTER_CUBIC)
    faces = found(picture, 1) or [dlib.rectangle(0, 0, picture.shape[1], picture.shape[0])]
    return np.array(network.compute_face_descriptor(picture, points(picture, faces[0])), np.float32)


def published(method: str, draw: int) -> Row:
    """Measures dlib's published network on the same ten people, by dlib and by Fovea."""
    L.seed_everything(0, verbose=False)
    if method == "dlib itself":
        test: Any = ORL30(draw=draw).sources["test"]
        vectors = np.stack([of_dlib(image.tobytes()) for image in test.images])
        return {**figures(vectors, test.labels), "seconds": 0.0}
    tuned, triplets = method == "all layers, triplets", "triplets" in method
    augmentation = "light" if triplets else "none"
    data = AlignedORL30(draw=draw, image_size=150, augmentation=augmentation, num_workers=0, batch_size=64)
    plan = Optimization(
        optimizer=partial(torch.optim.AdamW, lr=1e-5 if tuned else 1e-4, weight_decay=0.01),
        frozen_epochs=0 if tuned else -1,
    )
    module = FaceNetModule(
        DataSpec(num_classes=0, in_chans=3, image_size=150), Backbone("dlib_face_resnet", pretrained=True), plan,
        embedding_size=0, mirror=True, whiten=method == "its network, whitened",
    )  # fmt: skip
    seconds = 0.0 if method.endswith("published") else train(module, data, 5 if triplets else 1)
    test = data.sources["test"]
    return {**figures(embed(module.eval(), data, "test"), test.labels), "seconds": seconds}


PUBLISHED = (
    "dlib itself", "its network, as published", "its network, whitened", "last layer, triplets", "all layers, triplets",
)  # fmt: skip
FACES = (
    "raw pixels", "eigenfaces", "frozen features", "whitened features", "whitened, then triplets", "from scratch",
)  # fmt: skip
EMBEDDING = 256
BACKBONE = "tf_efficientnet_lite0"  # its ImageNet weights come with a package of the extra `samples`


def glyphs(method: str, seed: int, epochs: int) -> Row:
    """Trains on characters with a miner, and measures on others."""
    L.seed_everything(seed, verbose=False)
    data = Glyphs(augmentation="light", batch_size=128, num_workers=0, seed=seed)
    plan = Optimization(optimizer=partial(torch.optim.AdamW, lr=0.002, weight_decay=0.01))
    module = FaceNetModule(DataSpec(1, 32, data.num_classes), optimization=plan, **MINING[method]())
    seconds = train(module, data, epochs)
    test = data.sources["test"]
    state = getattr(module.miner, "state", None)
    return {
        **figures(embed(module.eval(), data, "test"), test.labels),  # type: ignore[attr-defined]
        "seconds": seconds,
        "hard at the end": None if state is None else bool(state),
    }


def search(size: int, asked: int = 500) -> Row:
    """A gallery of random people with ten pictures each, asked for new pictures of them, one at a time, on one thread.

    Times are of the processor, which other work on the machine disturbs less than those that pass.
    """
    generator = np.random.default_rng(0)
    people = generator.standard_normal((size // 10, 128), np.float32)

    def pictures(who: NDArray[np.int64]) -> NDArray[np.float32]:
        rows = people[who] + np.float32(0.6) * generator.standard_normal((len(who), 128), np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    who = np.arange(size) // 10
    names = [""] * size
    gallery = Gallery("models:/random/1", names, names, pictures(who))
    wanted = generator.integers(size // 10, size=asked)
    queries = pictures(wanted)
    faiss.omp_set_num_threads(1)
    start = time.process_time()
    _ = gallery.index
    built = time.process_time() - start
    times, found = [], []
    for query in queries:
        start = time.process_time()
        found.append(int(gallery.search(query[None])[1][0]))
        times.append(1000 * (time.process_time() - start))
    start = time.process_time()
    best, nearest = np.full(asked, -2, np.float32), np.zeros(asked, np.int64)
    for first in range(0, size, 50_000):
        products = queries @ gallery.embeddings[first : first + 50_000].T
        top = products.argmax(1)
        value = products[np.arange(asked), top]
        nearest, best = np.where(value > best, top + first, nearest), np.maximum(value, best)
    exact = 1000 * (time.process_time() - start) / asked
    places = np.array(found)
    return {
        "embeddings": size,
        "index built, s of processor time": built,
        "ms a search, median": float(np.median(times)),
        "ms, 95th percentile": float(np.percentile(times, 95)),
        "recall@1 of the exact nearest": float((places == nearest).mean()),
        "right person": float((who[places] == wanted).mean()),
        "right person, exact": float((who[nearest] == wanted).mean()),
        "ms exact, in a batch": exact,
    }


def table(rows: list[Row]) -> str:
    """Markdown, one line for each method, in the order of first appearance."""
    names = [key for key in rows[0] if key not in ("case", "method", "number", "hard at the end")]
    lines = [f"| method (trainings) | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        cells = [f"{np.mean(v := [r[n] for r in own]):.4g} ± {np.std(v):.2g}" for n in names]
        lines.append(f"| {method} ({len(own)}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=("orl", "published", "glyphs", "search"))
    parser.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--size", type=int, default=1_000_000)
    parser.add_argument("--results", type=Path, default=Path("outputs/benchmarks/faces.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    known = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    if args.case == "orl":
        work = [(m, d, partial(orl, m, d)) for m in args.methods or FACES for d in args.draws]
    elif args.case == "published":
        work = [(m, d, partial(published, m, d)) for m in args.methods or PUBLISHED for d in args.draws]
    elif args.case == "search":
        work = [("IVF", args.size, partial(search, args.size))]
    else:
        work = [(m, seed, partial(glyphs, m, seed, args.epochs)) for seed in args.seeds for m in args.methods or MINING]
    for method, number, run in work:
        if not any((row["case"], row["method"], row["number"]) == (args.case, method, number) for row in known):
            known.append({"case": args.case, "method": method, "number": number, **run()})
            with args.results.open("a") as file:
                file.write(json.dumps(known[-1]) + "\n")
            print(known[-1], flush=True)
    print(table([row for row in known if row["case"] == args.case]))


if __name__ == "__main__":
    main()
