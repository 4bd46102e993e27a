"""Detection by its commands, from files to answers, where data are rare, small or large."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient
from PIL import Image

from datamodules import COCODetection
from modules.pictures.boxes import draw_boxes
from pipelines.detection import detection
from pipelines.tracking.logger import run_id_of

SMALL = ["--model.backbone", "resnet10t", "--model.detector.width", "16", "--model.detector.depth", "1",
         "--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false", "--data.num_workers", "0",
         "--data.augmentation", "none", "--output", "out"]  # fmt: skip


def write_coco(folder: str, side: int, boxes: dict[str, Sequence[Sequence[list[float]]]]) -> None:
    """Pictures with white boxes on grey, xywh of each of a split's images, as COCO's JSON of each split."""
    for split, images in boxes.items():
        Path(folder, split).mkdir(parents=True)
        content: dict[str, Any] = {"categories": [{"id": 1, "name": "spot"}], "images": [], "annotations": []}
        for k, found in enumerate(images):
            pixels = np.random.default_rng(k).integers(90, 100, (side, side, 3), np.uint8)
            for x, y, width, height in found:
                pixels[int(y) : int(y + height), int(x) : int(x + width)] = 255
                content["annotations"].append({"id": len(content["annotations"]) + 1, "image_id": k, "category_id": 1,
                                               "bbox": [x, y, width, height], "area": width * height, "iscrowd": 0})  # fmt: skip
            Image.fromarray(pixels).save(Path(folder, split, f"{split}{k}.png"))
            content["images"].append({"id": k, "file_name": f"{split}{k}.png", "width": side, "height": side})
        Path(folder, split, "_annotations.coco.json").write_text(json.dumps(content))


def test_objects_smaller_than_a_pixel_are_drawn_and_trained() -> None:
    spots = [[[100.0 * k, 500.0, 3.0, 3.0], [400.0, 100.0 * k, 2.0, 40.0]] for k in range(1, 5)]
    write_coco("data", 1000, {"train": spots, "val": spots[:2], "test": spots[2:]})
    data = ["--data", "COCODetection", "--data.root", "data", "--data.image_size", "64", "--data.batch_size", "2"]
    detection(["preview", *data, *SMALL])
    assert Path("out/preview.png").is_file()
    detection(["fit", *data, *SMALL])
    shown = {file.stem.rsplit("-", 1)[0] for file in Path("out/pictures").glob("*.png")}
    assert {"train_samples", "val_detections", "test_detections"} <= shown


def test_a_box_smaller_than_a_pixel_is_a_pixel() -> None:
    image = np.zeros((300, 300, 3), np.uint8)
    boxes = np.array([[100.2, 200.3, 100.5, 200.4], [10, 10, np.nan, 20], [30, 30, 20, 40]])
    drawn = draw_boxes(image, boxes, ["", "", ""])
    assert drawn[200, 100].all()
    assert not drawn[:180].any(), "neither what is no number nor what is inverted"


def test_without_objects_there_are_no_figures_and_the_loss_chooses(capsys: pytest.CaptureFixture[str]) -> None:
    spots = [[[10.0 * k, 20.0, 12.0, 9.0], [30.0, 10.0 * k, 10.0, 14.0]] for k in range(1, 5)]
    write_coco("data", 64, {"train": spots, "val": [[], []], "test": [[], [], []]})
    data = ["--data", "COCODetection", "--data.root", "data", "--data.image_size", "64", "--data.batch_size", "2"]
    with pytest.warns(UserWarning, match="The val split has no objects"):
        cli = detection(["fit", *data, *SMALL, "--trainer.max_epochs", "3", "--model.optimization.lr", "0.01"])
    assert "the best checkpoint is that with the lowest val/loss" in capsys.readouterr().err
    client, run = MlflowClient(), run_id_of("out")
    figures = client.get_run(run).data.metrics
    assert not [key for key in figures if "ap" in key or "f1" in key or "threshold" in key]
    assert all(np.isfinite(value) for value in figures.values())
    losses = [metric.value for metric in sorted(client.get_metric_history(run, "val/loss"), key=lambda m: m.step)]
    best = torch.load("out/best.ckpt", weights_only=True)
    assert best["global_step"] == 2 * (1 + int(np.argmin(losses)))
    assert float(best["state_dict"]["threshold"]) == pytest.approx(0.3)
    assert not any(key.endswith("ap") for key in cli.rows)


def test_small_and_large_go_by_the_area_of_the_file() -> None:
    write_coco("data", 128, {"train": [[[5.0, 5.0, 60.0, 50.0], [70.0, 80.0, 20.0, 20.0]]] * 2})
    file = Path("data/train/_annotations.coco.json")
    content = json.loads(file.read_text())
    content["annotations"][0]["area"] = 700.0  # of its outline; the box is medium
    del content["annotations"][1]["area"]
    file.write_text(json.dumps(content))
    data = COCODetection(str(file), image_size=64)
    for augmented in (False, True):
        samples = [data.dataset(split, augmented)[0, 0] for split in ("train", "val")]
        areas = sorted(area for sample in samples for area in sample["area"].tolist())
        assert (areas == [400.0, 400.0, 700.0, 3000.0]) == (not augmented), "in pixels of the file"
    tiled = COCODetection(str(file), tile=64).sources["train"]
    areas = [area for i in range(len(tiled)) for area in tiled[i]["area"].tolist()]  # type: ignore[attr-defined]
    assert areas
    assert max(areas) <= 3000
