"""What the commands wrote to disk, measured by programs of others and by hand, gives the figures that they tell."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from mlflow import MlflowClient
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipelines.convert import convert
from pipelines.detection import detection
from pipelines.engine.command import command
from pipelines.predict import predict
from pipelines.segmentation import segmentation

SIDE = 64
COLOURS = np.array([(40, 40, 40), (230, 60, 60), (60, 60, 230)], np.uint8)  # ground, and two classes
SPLITS = {"train": 16, "val": 6, "test": 10}
QUICK = ["--trainer.enable_progress_bar", "false", "--data.num_workers", "0", "--data.augmentation", "none"]


def scene(generator: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8], list[list[float]]]:
    """A picture with up to three rectangles that do not overlap, its class map, and its objects as lines of YOLO."""
    mask, lines = np.zeros((SIDE, SIDE), np.uint8), []
    for quarter in generator.permutation(4)[: generator.integers(1, 4)]:
        label = int(generator.integers(2))
        (y, x), (h, w) = (
            generator.integers(1, 10, 2) + np.array(divmod(int(quarter), 2)) * 32,
            generator.integers(10, 21, 2),
        )
        mask[y : y + h, x : x + w] = label + 1
        lines.append([label, *(float(v) / SIDE for v in (x + w / 2, y + h / 2, w, h))])
    noise = generator.integers(-25, 26, (SIDE, SIDE, 3))
    return (COLOURS[mask] + noise).clip(0, 255).astype(np.uint8), mask, lines


def draw(folder: Path) -> None:
    """Pictures with labels as YOLO has them and with masks."""
    generator = np.random.default_rng(0)
    for split, count in SPLITS.items():
        for kind in ("images", "labels", "masks"):
            (folder / kind / split).mkdir(parents=True)
        for i in range(count):
            picture, mask, lines = scene(generator)
            PIL.Image.fromarray(picture).save(folder / "images" / split / f"{split}{i}.png")
            PIL.Image.fromarray(mask).save(folder / "masks" / split / f"{split}{i}.png")
            text = "".join(" ".join(map(str, line)) + "\n" for line in lines)
            (folder / "labels" / split / f"{split}{i}.txt").write_text(text)
    (folder / "classes.txt").write_text("red\nblue\n")


def ask(*args: str) -> None:
    with pytest.raises(SystemExit) as end:
        command(predict, list(args))
    assert not end.value.code


def told(model: str) -> dict[str, float]:
    """The figures of the run that registered a model."""
    client = MlflowClient()
    return client.get_run(client.get_model_version(model, "1").run_id).data.metrics


def overlap(box: list[float], other: list[float]) -> float:
    """IoU of two boxes x, y, width, height."""
    width = max(0.0, min(box[0] + box[2], other[0] + other[2]) - max(box[0], other[0]))
    height = max(0.0, min(box[1] + box[3], other[1] + other[3]) - max(box[1], other[1]))
    return width * height / (box[2] * box[3] + other[2] * other[3] - width * height)


def precision_by_hand(truth: dict[str, Any], found: list[dict[str, Any]]) -> list[float]:
    """Average precision at overlaps of 0.5, 0.55, … 0.95, a mean over classes each, as COCO defines it."""
    figures = []
    for limit in np.linspace(0.5, 0.95, 10):
        classes = []
        for category in truth["categories"]:
            hits: list[tuple[float, bool]] = []
            wanted = 0
            for image in truth["images"]:
                key = (image["id"], category["id"])
                objects = [a["bbox"] for a in truth["annotations"] if (a["image_id"], a["category_id"]) == key]
                wanted += len(objects)
                boxes = [a for a in found if (a["image_id"], a["category_id"]) == key]
                for box in sorted(boxes, key=lambda a: -a["score"]):
                    best = max(objects, key=lambda other: overlap(box["bbox"], other), default=None)
                    hit = best is not None and overlap(box["bbox"], best) >= limit
                    if hit:
                        objects.remove(best)  # type: ignore[arg-type]
                    hits.append((box["score"], hit))
            hits.sort(key=lambda pair: -pair[0])
            right = np.cumsum([hit for _, hit in hits])
            precision = np.array([max(right[k:] / np.arange(k + 1, len(hits) + 1)) for k in range(len(hits))])
            reached = [np.flatnonzero(right / wanted >= recall) for recall in np.linspace(0, 1, 101)]
            classes.append(np.mean([precision[places[0]] if len(places) else 0.0 for places in reached]))
        figures.append(float(np.mean(classes)))
    return figures


def test_average_precision_of_files_is_the_same_by_hand_and_by_pycocotools() -> None:
    draw(Path("drawn"))
    command(convert, ["truth", "--data", "YOLODetection", "--data.root", "drawn", "--form", "coco"])
    detection(
        ["fit", "--data", "COCODetection", "--data.root", "truth", "--data.image_size", str(SIDE), *QUICK,
         "--model.backbone", "resnet18", "--model.backbone.options", "{channels: [16, 24, 32, 48]}",
         "--model.detector", "YOLO", "--model.detector.strides", "[8, 16]", "--model.detector.width", "24",
         "--model.detector.depth", "1", "--model.optimization.lr", "0.004", "--model.optimization.ema_decay", "0.9",
         "--data.batch_size", "4", "--trainer.max_epochs", "14", "--trainer.check_val_every_n_epoch", "14", "--register", "boxes", "--output", "run"]
    )  # fmt: skip
    ask(
        "models:/boxes/1",
        "truth/test",
        "--out",
        "answers",
        "--form",
        "coco",
        "--truth",
        "truth/test.json",
        "--threshold",
        "0",
    )
    truth = json.loads(Path("truth/test.json").read_text())
    found = json.loads(Path("answers/results.json").read_text())
    rows = [json.loads(line) for line in Path("answers/predictions.jsonl").read_text().splitlines()]
    assert [entry["score"] for entry in found] == [score for row in rows for score in row["scores"]]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO("truth/test.json")
        measure = COCOeval(coco, coco.loadRes("answers/results.json"), "bbox")
        measure.evaluate()
        measure.accumulate()
        measure.summarize()
    figures = precision_by_hand(truth, found)
    assert figures[0] > 0.2
    assert 0.02 < np.mean(figures) < 0.999
    assert [np.mean(figures), figures[0], figures[5]] == pytest.approx(measure.stats[:3].tolist(), abs=1e-6)
    assert told("boxes")["test/ap"] == pytest.approx(np.mean(figures), abs=1e-3)  # boxes in files have two decimals


def test_the_miou_that_a_training_tells_is_that_of_the_masks_that_predict_writes() -> None:
    draw(Path("drawn"))
    segmentation(
        ["fit", "--data", "MaskFolder", "--data.root", "drawn", "--data.image_size", str(SIDE), *QUICK,
         "--model.backbone", "resnet18", "--model.backbone.options", "{channels: [16, 24, 32, 48], out_indices: [0, 1, 2]}",
         "--model.decoder", "FPN", "--model.decoder.width", "64", "--model.decoder.dropout", "0",
         "--model.optimization.lr", "0.003", "--trainer.max_epochs", "3", "--register", "areas", "--output", "run"]
    )  # fmt: skip
    ask("models:/areas/1", "drawn/images/test", "--out", "answers")
    counts = np.zeros((3, 3), np.int64)  # true classes in rows, answered ones in columns
    for i in range(SPLITS["test"]):
        right = np.asarray(PIL.Image.open(f"drawn/masks/test/test{i}.png"))
        answer = np.asarray(PIL.Image.open(f"answers/test{i}.mask.png"))
        np.add.at(counts, (right, answer), 1)
    shares = counts.diagonal() / (counts.sum(0) + counts.sum(1) - counts.diagonal())
    assert 0.1 < shares.mean() < 0.9999
    assert told("areas")["test/miou"] == pytest.approx(shares.mean(), abs=1e-6)
