"""Answers for overlapping pieces of a picture become one answer for the picture."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from faster_coco_eval.core import mask as rle
from pycocotools.coco import COCO

from datamodules.options import Preprocessing
from datamodules.tiles import pieces
from modules import InstanceSegmentationModule
from modules.detection.masks import pixels, placed, union
from modules.detection.metrics import overlaps
from modules.detection.tiles import joined
from modules.instance_segmentation import MaskRCNN
from modules.spec import Backbone, DataSpec
from pipelines.detection import detection
from pipelines.predict import predict
from pipelines.serving import registry
from pipelines.serving import store as storage

SIDE = 100


def scattered(seed: int, height: int, width: int, largest: int = 60, count: int = 400) -> np.ndarray:
    """Boxes of which none covers half of another."""
    generator = np.random.default_rng(seed)
    boxes = np.zeros((0, 4))
    for _ in range(count):
        size = generator.integers(8, largest, 2)
        corner = generator.integers(0, np.array([width, height]) - size)
        box = np.concatenate((corner, corner + size)).astype(float)
        if not (overlaps(box[None], boxes) > 0.05).any():
            boxes = np.concatenate((boxes, box[None]))
    return boxes


def seen(boxes: np.ndarray, height: int, width: int, noise: float = 0.0, share: float = 0.3) -> list[Any]:
    """What a detector answers for each piece: all of which a share is in it, what is cut off the more certainly."""
    generator, parts = np.random.default_rng(0), []
    for x, y in pieces(height, width, SIDE):
        part = np.clip(boxes - [x, y, x, y], 0, [min(SIDE, width - x), min(SIDE, height - y)] * 2)
        part = np.concatenate((part[:, :2], np.maximum(part[:, 2:], part[:, :2])), 1)
        whole, left = ((b[:, 2:] - b[:, :2]).prod(1) for b in (boxes, part))
        there = np.flatnonzero(left > share * whole)
        moved = part[there] + generator.normal(0, noise, (len(there), 4)) * (left[there] == whole[there])[:, None]
        scores = np.where(left[there] < whole[there], 0.95, 0.6) + generator.uniform(0, 0.04, len(there))
        masks = []
        for k in there:
            mask = np.zeros((min(SIDE, height - y), min(SIDE, width - x)), np.uint8, order="F")
            x1, y1, x2, y2 = part[k].astype(int)
            mask[y1:y2, x1:x2] = 1
            code = rle.encode(mask)
            masks.append({"size": code["size"], "counts": code["counts"].decode()})
        parts.append(((x, y), {"boxes": moved.tolist(), "labels": ["ab"[k % 2] for k in there],
                               "scores": scores.tolist(), "masks": masks}))  # fmt: skip
    return parts


@pytest.mark.parametrize("seed", range(3))
def test_every_object_is_told_once_and_whole(seed: int) -> None:
    height, width = 330, 470
    boxes = scattered(seed, height, width)
    answer = joined(seen(boxes, height, width), height, width, SIDE)
    found = np.array(answer["boxes"])
    assert len(found) == len(boxes)
    order, true = np.lexsort(found.T), np.lexsort(boxes.T)
    assert found[order] == pytest.approx(boxes[true])
    assert [answer["labels"][k] for k in order] == ["ab"[k % 2] for k in true]
    assert answer["scores"] == sorted(answer["scores"], reverse=True)
    for (x1, y1, x2, y2), code in zip(found.astype(int), answer["masks"], strict=True):
        mask = rle.decode(code)
        assert mask.shape == (height, width)
        assert mask[y1:y2, x1:x2].all()
        assert mask.sum() == (y2 - y1) * (x2 - x1)


def test_what_no_piece_shows_whole_is_put_together() -> None:
    boxes = np.array([[20.0, 30, 290, 60], [5, 90, 25, 280], [120, 120, 280, 260]])
    answer = joined(seen(boxes, 330, 470, share=0.0), 330, 470, SIDE)
    assert sorted(answer["boxes"]) == sorted(boxes.tolist())
    assert [rle.area(code) for code in answer["masks"]] == [
        round((x2 - x1) * (y2 - y1)) for x1, y1, x2, y2 in answer["boxes"]
    ]


def test_boxes_that_differ_a_little_from_piece_to_piece_are_one() -> None:
    boxes = scattered(7, 330, 470, largest=30, count=150)
    answer = joined(seen(boxes, 330, 470, noise=0.7), 330, 470, SIDE)
    assert len(answer["boxes"]) == len(boxes)
    assert overlaps(np.array(answer["boxes"]), boxes).max(0).min() > 0.5
    crowd = [[10.0, 10, 50, 50], [14, 12, 54, 52]]  # the detector says that they are two
    both = [((0, 0), {"boxes": crowd, "labels": ["a", "a"], "scores": [0.9, 0.8]}),
            ((80, 0), {"boxes": [], "labels": [], "scores": []})]  # fmt: skip
    assert joined(both, 100, 180, SIDE)["boxes"] == crowd


def test_classes_meet_only_where_that_is_asked_for() -> None:
    parts = [((0, 0), {"boxes": [[85.0, 10, 99, 30]], "labels": ["a"], "scores": [0.9]}),
             ((80, 0), {"boxes": [[5.0, 10, 19, 30]], "labels": ["b"], "scores": [0.8]})]  # fmt: skip
    assert joined(parts, 100, 180, SIDE)["labels"] == ["a", "b"]
    assert joined(parts, 100, 180, SIDE, across_classes=True)["labels"] == ["b"], "which was seen whole"


def test_codes_of_masks_are_placed_without_drawing_them() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        small = (generator.random((13, 17)) < generator.random()).astype(np.uint8)
        large = np.zeros((40, 50), np.uint8)
        left, top = int(generator.integers(34)), int(generator.integers(28))
        large[top : top + 13, left : left + 17] = small
        one, other = (rle.encode(np.asfortranarray(mask)) for mask in (small, large))
        code = placed({"size": one["size"], "counts": one["counts"].decode()}, left, top, 40, 50)
        assert code == {"size": [40, 50], "counts": other["counts"].decode()}
        again = np.zeros_like(large)
        again[pixels(code)] = 1
        assert np.array_equal(again, large)
        assert np.array_equal(rle.decode(union([code, placed(code, 0, 0, 40, 50)])), large)


@pytest.fixture
def masker(tmp_path: Path) -> str:
    """Mask R-CNN that has learned nothing, but from pieces."""
    torch.manual_seed(0)
    detector = partial(MaskRCNN, width=16, hidden=16, mask_width=16, strides=[8, 16], proposals=40)
    module = InstanceSegmentationModule(
        DataSpec(num_classes=2, label_names=["a", "b"], image_size=64), Backbone("test_resnet"), detector=detector
    )
    module.threshold.fill_(0.3)
    storage.save_model(tmp_path / "model", module, Preprocessing(64, 3, "pad", tile=64), "x")
    return str(tmp_path / "model")


def test_a_model_of_masks_that_learned_from_pieces_answers_large_pictures(masker: str) -> None:
    Path("in").mkdir()
    generator = np.random.default_rng(0)
    for name, size in (("large", (150, 200)), ("small", (50, 60))):
        PIL.Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8)).save(f"in/{name}.png")
    assert predict(masker, ["in"], "out", json=True) == 0
    rows = [json.loads(line) for line in Path("out/predictions.jsonl").read_text().splitlines()]
    for row, size in zip(rows, ([150, 200], [50, 60]), strict=True):
        assert row["size"] == size
        assert len(row["masks"]) == len(row["boxes"]) == len(row["labels"]) > 0
        assert all(code["size"] == size for code in row["masks"])
    assert any(box[0] > 64 and box[1] > 64 for box in rows[0]["boxes"])
    (one,) = registry.load(masker).predict(None, ["in/large.png"]).to_dict("records")
    assert one["boxes"] == rows[0]["boxes"]
    coco = COCO("out/coco.json")
    assert [(image["height"], image["width"]) for image in coco.loadImgs(coco.getImgIds())] == [(150, 200), (50, 60)]
    entry = coco.loadAnns(coco.getAnnIds())[0]
    assert coco.annToMask(entry).sum() == entry["area"]
    assert PIL.Image.open("out/large.png").size == (400, 300)


def test_any_detector_can_be_asked_tile_by_tile(masker: str, capsys: pytest.CaptureFixture[str]) -> None:
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (150, 200, 3), np.uint8)).save("large.png")

    def boxes(tile: int | None) -> list[list[float]]:
        assert predict(masker, ["large.png"], json=True, tile=tile) == 0
        found: list[list[float]] = json.loads(capsys.readouterr().out)["boxes"]
        return found

    trained, whole = boxes(None), boxes(0)
    assert boxes(64) == trained, "as it was trained"
    assert trained != whole
    assert boxes(200) == whole, "no picture is larger"
    assert len(boxes(32)) > len(trained)
    with pytest.raises(ValueError, match="--tile must be at least 32 pixels"):
        predict(masker, ["large.png"], tile=8)


def test_a_tasks_own_predict_tells_of_whole_pictures() -> None:
    generator = np.random.default_rng(0)
    for split, count in (("train", 2), ("test", 2)):
        Path("data", split).mkdir(parents=True)
        images = [{"id": k, "file_name": f"{split}{k}.png", "width": 150, "height": 90} for k in range(count)]
        for image in images:
            PIL.Image.fromarray(generator.integers(0, 256, (90, 150, 3), np.uint8)).save(
                f"data/{split}/{image['file_name']}"
            )
        entries = [{"id": k + 1, "image_id": k, "category_id": 1, "bbox": [100, 20, 30, 30]} for k in range(count)]
        content = {"images": images, "annotations": entries, "categories": [{"id": 1, "name": "it"}]}
        Path("data", split, "_annotations.coco.json").write_text(json.dumps(content))
    common = ["--data", "COCODetection", "--data.root", "data", "--data.tile", "64", "--model.backbone", "resnet10t",
              "--data.num_workers", "0", "--trainer.enable_progress_bar", "false", "--output", "out", "--trainer.logger", "false",
              "--model.detector.width", "16", "--model.detector.depth", "1"]  # fmt: skip
    detection(["fit", *common, "--trainer.max_epochs", "1", "--model.optimization.lr", "1e-9"])
    checkpoint = torch.load("out/best.ckpt", weights_only=True)
    checkpoint["state_dict"]["threshold"] = torch.tensor(0.0)
    torch.save(checkpoint, "out/best.ckpt")
    cli = detection(["predict", *common])
    rows = [json.loads(line) for line in Path(cli.output, "predictions.jsonl").read_text().splitlines()]
    assert [Path(row["path"]).name for row in rows] == ["test0.png", "test1.png"]
    assert all(row["size"] == [90, 150] for row in rows)
    assert max(box[0] for box in rows[0]["boxes"]) > 64
    assert "2 answers" in cli.rows["predictions"]
