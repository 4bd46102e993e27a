"""Images with boxes: what is composed, read, written, mixed and changed, and what is said of mistakes."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import COCODetection, CSVDetection, DataError, DigitScenes, VOCDetection, YOLODetection
from datamodules.annotated.boxes import BoxFiles
from datamodules.annotated.mixing import Mixing, boxes_of, mosaic
from datamodules.annotated.rectangular import equal_shapes, padded_shapes
from datamodules.augmentations import evaluation
from modules import DetectionModule
from modules.spec import Backbone, DataSpec
from pipelines.convert import convert
from pipelines.detection import detection
from pipelines.engine.command import command
from pipelines.serving import store as storage
from pipelines.serving.model import VisionModel

READERS: dict[str, type[BoxFiles]] = {
    "coco": COCODetection,
    "voc": VOCDetection,
    "yolo": YOLODetection,
    "csv": CSVDetection,
}
SIZES = {"train": 24, "val": 4, "test": 4}


def scenes(size: int = 64, **options: Any) -> DigitScenes:
    return DigitScenes(**{"scene_size": size, **SIZES, "num_workers": 0, "batch_size": 4, **options})


def assert_same(sample: dict[str, Any], expected: dict[str, Any]) -> None:
    assert sample.keys() - {"area"} == expected.keys() - {"area"}  # which not all formats have
    for key, value in ((key, sample[key]) for key in expected if key != "area"):
        np.testing.assert_allclose(np.asarray(value), np.asarray(expected[key]), atol=1e-4, err_msg=key)


# Scenes


def test_scenes_are_a_function_of_their_seed_split_and_number() -> None:
    one, two, other = (scenes(masks=True, scene_seed=seed).sources for seed in (3, 3, 4))
    for name in SIZES:
        for i in (3, 0):  # in any order
            assert_same(one[name][i], two[name][i])
        assert one[name].digest == two[name].digest != other[name].digest
        assert not np.array_equal(one[name][0]["image"], other[name][0]["image"])
    assert not np.array_equal(one["train"][0]["image"], one["test"][0]["image"])
    split = {name: {picture.tobytes() for picture in one[name].sprites._pictures} for name in SIZES}
    assert len(split["train"]) > 3000
    assert not split["train"] & split["test"]
    assert not split["train"] & split["val"]


def test_boxes_masks_and_class_map_of_a_scene_agree_and_objects_can_be_seen() -> None:
    counts = set()
    source = scenes(masks=True, train=150).sources["train"]
    for i in range(150):
        sample = source[i]
        masks, boxes = sample["masks"].astype(bool), sample["boxes"]
        counts.add(len(masks))
        assert (masks.sum(0) <= 1).all()
        for mask, (x1, y1, x2, y2), label in zip(masks, boxes.astype(int), sample["labels"], strict=True):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) == (x1, y1, x2, y2)
            assert (sample["mask"][mask] == label + 1).all()
            ink = sample["image"][mask].astype(float).mean(0)
            ground = sample["image"][~masks.any(0)].astype(float).mean(0)
            assert np.abs(ink - ground).max() > 10
        assert (sample["mask"][~masks.any(0)] == 0).all()
    assert counts == set(range(1, 7))


# Formats


def opened(form: str, folder: str = "data", **options: Any) -> BoxFiles:
    root = f"{folder}/boxes.csv" if form == "csv" else folder
    return READERS[form](root, image_size=64, num_workers=0, **options)


@pytest.mark.parametrize("form", READERS)
def test_what_is_written_in_a_format_is_read_again(form: str) -> None:
    data = scenes(objects=(0, 5))
    assert any(len(data.sources["train"][i]["labels"]) == 0 for i in range(24))
    data.write("data", form)  # type: ignore[arg-type]
    read = opened(form)
    assert read.label_names == (data.label_names if form in ("coco", "yolo") else sorted(read.label_names))
    for name, count in SIZES.items():
        assert len(read.sources[name]) == count
        for i in range(count):
            sample, expected = read.sources[name][i], data.sources[name][i]
            names = np.array([data.label_names[k] for k in expected["labels"]])
            assert [read.label_names[k] for k in sample["labels"]] == names.tolist()
            assert_same(sample | {"labels": 0}, expected | {"labels": 0})
    assert sum(read.identity()["splits"]["train"]["boxes"].values()) == len(read.sources["train"].labels)


def test_masks_are_read_again_from_coco() -> None:
    data = scenes(masks=True)
    data.write("data")
    read = opened("coco", masks=True)
    for i in range(12):
        assert_same(read.sources["train"][i], data.sources["train"][i])


def test_flags_and_polygons_are_respected() -> None:
    Path("images").mkdir()
    Image.new("RGB", (40, 30)).save("images/a.png")
    Image.new("RGB", (40, 30), "red").save("images/b.png")
    entry = {"image_id": 1, "category_id": 5, "iscrowd": 0}
    boxes = [
        entry | {"id": 1, "bbox": [10, 5, 8, 6], "segmentation": [[10, 5, 18, 5, 18, 11, 10, 11]]},
        entry | {"id": 2, "bbox": [0, 0, 4, 30], "iscrowd": 1, "category_id": 2,
                 "segmentation": {"size": [30, 40], "counts": [0, 120, 1080]}},
    ]  # fmt: skip
    write_json(annotations=boxes)
    source = COCODetection("all.json", masks=True).sources["train"]
    sample = source[0] if len(source[0]["labels"]) else source[1]
    assert sample["ignore"].tolist() == [False, True]
    assert sample["labels"].tolist() == [1, 0]  # by the categories' ids
    assert sample["masks"].sum((1, 2)).tolist() == [48, 120]
    assert boxes_of(sample["masks"]).tolist() == sample["boxes"].tolist() == [[10, 5, 18, 11], [0, 0, 4, 30]]
    assert set(np.unique(sample["mask"])) == {0, 2, 255}

    Path("labels").mkdir()
    Path("labels/a.txt").write_text("1 0.25 0.5 0.5 0.5 0.5 1.0 0.25 1.0\n")
    Path("classes.txt").write_text("dog\ncat\n")
    source = YOLODetection(".", masks=True).sources["train"]
    sample = source[0] if len(source[0]["labels"]) else source[1]
    assert sample["boxes"].tolist() == [[10, 15, 20, 30]]
    assert sample["masks"].sum() == 150

    Path("v").mkdir()
    Image.new("RGB", (40, 30)).save("v/a.png")
    Image.new("RGB", (40, 30), "red").save("v/b.png")
    box = "<bndbox><xmin>11</xmin><ymin>6</ymin><xmax>18</xmax><ymax>11</ymax></bndbox>"
    Path("v/a.xml").write_text(
        f"<annotation><object><name>cat</name><difficult>1</difficult>{box}</object></annotation>"
    )
    Path("v/b.xml").write_text("<annotation><filename>b.png</filename></annotation>")
    source = VOCDetection("v").sources["train"]
    sample = source[0] if len(source[0]["labels"]) else source[1]
    assert sample["boxes"].tolist() == [[10, 5, 18, 11]]
    assert sample["ignore"].tolist() == [True]


def write_json(**changes: Any) -> None:
    """A COCO file all.json for images/a.png and images/b.png."""
    content = {
        "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
        "annotations": [],
        "categories": [{"id": 5, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    Path("all.json").write_text(json.dumps(content | changes))


# Mistakes


def coco(change: Callable[[dict[str, Any]], None]) -> Callable[[], BoxFiles]:
    def make() -> BoxFiles:
        scenes().write("data")
        file = Path("data/train.json")
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
        return opened("coco")

    return make


def box(*values: float) -> Callable[[], BoxFiles]:
    return coco(lambda content: content["annotations"][2].update(bbox=values))


def as_corners(content: dict[str, Any]) -> None:
    for entry in content["annotations"]:
        x, y, w, h = entry["bbox"]
        entry["bbox"] = [x, y, x + w, y + h]


def edited(form: str, name: str, change: Callable[[str], str], **options: Any) -> Callable[[], BoxFiles]:
    def make() -> BoxFiles:
        scenes().write("data", form)  # type: ignore[arg-type]
        file = Path("data", name)
        file.write_text(change(file.read_text()))
        return opened(form, **options)

    return make


def csv_as_sizes(text: str) -> str:
    first, *lines = text.splitlines()
    rows = [line.split(",") for line in lines]
    for row in rows:
        row[3], row[4] = (str(float(row[k + 2]) - float(row[k])) for k in (1, 2))
    return "\n".join([first, *map(",".join, rows)])


def yolo_in_pixels(text: str) -> str:
    rows = [line.split() for line in text.splitlines()]
    return "".join(" ".join([row[0], *(str(float(v) * 64) for v in row[1:])]) + "\n" for row in rows)


def removed() -> BoxFiles:
    scenes().write("data")
    Path("data/train/000003.png").unlink()
    return opened("coco")


def turned() -> BoxFiles:
    Path("images").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in "ab":
        Image.new("RGB", (40, 30)).save(f"images/{name}.png", exif=exif)
    write_json(
        images=[{"id": 1, "file_name": "a.png", "width": 40, "height": 30}, {"id": 2, "file_name": "b.png"}],
        annotations=[{"id": 1, "image_id": 1, "category_id": 5, "bbox": [1, 1, 4, 4]}],
    )
    return COCODetection("all.json")


MISTAKES: dict[str, tuple[Callable[[], BoxFiles], str]] = {
    "outside": (box(70, 10, 8, 8), r"train.json, annotation 3, image \d+.png: \[70, 10, 8, 8\] is outside \(64×64 pix"),
    "reaches outside": (box(60, 10, 8, 8), r"\[60, 10, 8, 8\] reaches outside"),
    "inverted": (box(10, 10, -3, 4), r"annotation 3.*\[10, 10, -3, 4\] is inverted"),
    "empty": (box(10, 10, 0, 4), r"annotation 3.*\[10, 10, 0, 4\] is empty"),
    "NaN": (box(10, float("nan"), 3, 4), r"annotation 3.*\[10, nan, 3, 4\] is not four numbers"),
    "three numbers": (box(10, 10, 3), r"annotation 3.*\[10, 10, 3\] is not four numbers"),
    "corners in COCO": (coco(as_corners), "All would be right if they were xmin, ymin, xmax, ymax, but they are read as x"),
    "unknown category": (coco(lambda c: c["annotations"][2].update(category_id=77)), "annotation 3.*unknown class, 77"),
    "image of an annotation": (coco(lambda c: c["annotations"][2].update(image_id=77)), "annotation 3 is of image 77"),
    "image twice": (coco(lambda c: c["images"][1].update(id=1)), "the id 1 is there 2 times among 'images'"),
    "annotation twice": (coco(lambda c: c["annotations"][1].update(id=1)), "the id 1 is there 2 times among 'annot"),
    "category twice": (coco(lambda c: c["categories"][1].update(name="0")), "2 categories have the name '0'"),
    "no lists": (coco(lambda c: c.pop("images")), "no lists 'images' and 'categories'"),
    "no boxes": (coco(lambda c: c.update(annotations=[])) and edited("csv", "boxes.csv", lambda t: t.splitlines()[0] + "\nimages/train/000001.png,,,,,,0,train"), "has no boxes"),
    "an image that is not there": (removed, r"1 of 32 images cannot be read: \S+000003.png \(No such file"),
    "a turned image": (turned, r"has 40×30 pixels, but it has 30×40. Its EXIF tag rotates it"),
    "sizes in CSV": (edited("csv", "boxes.csv", csv_as_sizes), "if they were x, y, width, height.*box_format xywh"),
    "a word in CSV": (edited("csv", "boxes.csv", lambda t: t.replace("images/train/000002.png,", "images/train/000002.png,x", 1)), r"boxes.csv, row \d+.*is not four numbers"),
    "columns of CSV": (edited("csv", "boxes.csv", lambda t: t.replace("xmin", "left", 1)), "no column 'xmin'"),
    "pixels in YOLO": (edited("yolo", "labels/train/000001.txt", yolo_in_pixels), "000001.txt, line 1.*outside"),
    "unknown class in YOLO": (edited("yolo", "labels/train/000001.txt", lambda t: "12" + t[1:]), "line 1.*unknown class, '12'"),
    "a word in YOLO": (edited("yolo", "labels/train/000001.txt", lambda t: "one" + t), "line 1: 'one.*is not a class"),
    "five numbers in YOLO": (edited("yolo", "labels/train/000001.txt", lambda t: t[:-1] + " 7\n"), "line 1.*not 5"),
    "broken XML": (edited("voc", "Annotations/train_000001.xml", lambda t: t[:50]), "train_000001.xml cannot be read as XML"),
    "other XML": (edited("voc", "Annotations/train_000001.xml", lambda t: "<a/>"), "its root is <a>"),
    "a class only in validation": (edited("voc", "Annotations/val_000001.xml", lambda t: t.replace("<name>", "<name>new", 1)), "val_000001.xml, object 1.*unknown class, 'new"),
    "two XML of an image": (edited("voc", "Annotations/train_000001.xml", lambda t: t.replace("000001", "000002", 1)), "both describe the image"),
    "no folder": (lambda: opened("coco", "nowhere"), "There is no .*nowhere"),
    "an empty folder": (lambda: opened("coco", str(Path("empty").mkdir() or "empty")), "neither train.json nor"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_with_its_file_its_place_and_its_value(name: str) -> None:
    make, message = MISTAKES[name]
    with pytest.raises(DataError, match=message) as error:
        _ = make().sources
    assert len(str(error.value)) < 900


def test_boxes_that_cannot_be_used_are_cut_off_or_dropped_and_counted() -> None:
    scenes(train=40).write("data")
    content = json.loads(Path("data/train.json").read_text())
    boxes = [entry["bbox"] for entry in content["annotations"]]
    boxes[0], boxes[1], boxes[2] = [60, 10, 8, 8], [10, 10, 0, 4], [10, 10, -3, 4]
    for entry, values in zip(content["annotations"], boxes, strict=True):
        entry["bbox"] = values
    Path("data/train.json").write_text(json.dumps(content))
    data = opened("coco", on_bad_box="drop")
    with pytest.warns(UserWarning, match="2 boxes that cannot be used were dropped, 1 were cut off"):
        source = data.sources["train"]
    assert len(source.labels) == len(boxes) - 2
    assert source.annotations.boxes[0].tolist() == [60, 10, 64, 18]
    assert sorted(data.bad_files.values()) == ["cut off", "dropped", "dropped"]
    for entry in content["annotations"][: len(boxes) // 5]:
        entry["bbox"] = [0, 0, 0, 0]
    Path("data/train.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="More than one in ten is too many"):
        _ = opened("coco", on_bad_box="drop").sources


def test_splits_that_are_not_there_are_drawn_and_keep_every_class() -> None:
    scenes(train=40).write("data", "voc")
    for file in Path("data/ImageSets/Main").iterdir():
        file.unlink()
    data = opened("voc")
    assert {name: len(source) for name, source in data.sources.items()} == {"train": 35, "val": 6, "test": 7}
    assert set(data.sources["train"].labels) == set(range(len(data.label_names)))
    paths = [path for source in data.sources.values() for path in source.paths]
    assert len(set(paths)) == len(paths) == 48
    again = opened("voc")
    assert again.identity() == data.identity()
    again.take_whole()  # as for measuring a model that has learned from other data
    assert {name: len(source) for name, source in again.sources.items()} == {"test": 48}


def test_tiles_cover_an_image_and_keep_what_can_be_seen_in_them() -> None:
    data = scenes(160, objects=(6, 6), masks=True)
    data.write("data")
    whole, tiles = (opened("coco", masks=True, tile=tile).sources["train"] for tile in (None, 64))
    assert len(tiles) == 24 * 9
    covered = np.zeros((160, 160), bool)
    labels: list[int] = []
    for i in range(9):
        _, x, y = tiles.places[i]
        piece = tiles[i]
        covered[y : y + 64, x : x + 64] = True
        assert np.array_equal(piece["image"], whole[0]["image"][y : y + 64, x : x + 64])
        assert np.array_equal(piece["mask"], whole[0]["mask"][y : y + 64, x : x + 64])
        for one, mask in zip(piece["boxes"], piece["masks"], strict=True):
            tight = boxes_of([mask])[0]
            assert (one[:2] <= tight[:2]).all()
            assert (one[2:] >= tight[2:]).all()
        labels += piece["labels"].tolist()
    assert covered.all()
    assert set(labels) == set(whole[0]["labels"].tolist())


# What the network is given


def test_a_model_that_learned_from_pieces_is_shown_pieces() -> None:
    module = DetectionModule(DataSpec(num_classes=2, label_names=["a", "b"], image_size=64), Backbone("resnet10t"))
    data = CSVDetection("boxes.csv", tile=64)
    storage.save_model(Path("model"), module, data.preprocessing, "detection")
    model = VisionModel().load(Path("model"), "cpu")
    image = np.zeros((100, 150, 3), np.uint8)
    image[40:60, 70:90] = 255  # in the overlap of four pieces, and cut off by some
    image[5:15, 5:15] = 200

    def answers(batch: dict[str, Any]) -> list[dict[str, Any]]:
        assert batch["image"].shape[1:] == (3, 64, 64)
        found = []
        for picture in batch["image"].numpy()[:, 0]:
            boxes = [boxes_of([(picture == grey).astype(np.uint8)])[0] for grey in (255, 200)]
            seen = [(box.tolist(), name) for box, name in zip(boxes, "ab", strict=True) if box[2] > box[0]]
            scores = [(b[2] - b[0]) * (b[3] - b[1]) / 401 for b, _ in seen]
            found.append({"boxes": [b for b, _ in seen], "labels": [n for _, n in seen], "scores": scores})
        return found

    model.module.predict = answers  # type: ignore[method-assign]
    (answer,) = model.stream([image])
    assert answer["boxes"] == [[70, 40, 90, 60], [5, 5, 15, 15]]
    assert answer["labels"] == ["a", "b"]
    assert scenes().preprocessing.tile is None


def test_a_picture_is_fitted_in_whole_and_coordinates_come_back_by_one_factor() -> None:
    image = np.zeros((50, 80, 3), np.uint8)
    image[20:40, 60:70] = 255
    Path("data").mkdir()
    for name in "ab":
        Image.fromarray(image - (image > 0) * np.uint8(name == "a")).save(f"data/{name}.png")
    Path("data/boxes.csv").write_text("image_path,xmin,ymin,xmax,ymax,label\n"
                                      "a.png,60,20,70,40,tree\nb.png,60,20,70,40,tree\n")  # fmt: skip
    data = CSVDetection("data/boxes.csv", image_size=160, augmentation="none", num_workers=0)
    batch = next(iter(data.val_dataloader()))
    assert batch["image"].shape == (1, 3, 160, 160)
    assert batch["size"].tolist() == [[50, 80]]
    assert batch["boxes"][0].tolist() == [[120, 40, 140, 80]]
    assert (batch["image"][0, :, 100:] == 114).all()
    seen = batch["image"][0, 0, :100] > 127
    assert seen.nonzero().min(0).values.tolist() == pytest.approx([40, 120], abs=1)
    assert seen.nonzero().max(0).values.tolist() == pytest.approx([79, 139], abs=1)
    sample = evaluation(160, fit="pad")(image=np.asarray(Image.open("data/a.png")))["image"]
    assert data.preprocessing.as_data() == {"image_size": 160, "in_chans": 3, "fit": "pad"}
    assert sample.shape == (160, 160, 3)

    module = DetectionModule(DataSpec(num_classes=2, image_size=64), Backbone("resnet10t"))
    module.threshold.fill_(0)
    storage.save_model(Path("model"), module, replace(data.preprocessing, image_size=64), "detection")
    model = VisionModel().load(Path("model"), "cpu")
    given: dict[str, Any] = {}
    model.module.predict = lambda batch: given.update(batch) or [{}]  # type: ignore[method-assign,func-returns-value]
    list(model.stream(["data/a.png"]))
    assert given["size"].tolist() == [[50, 80]]
    assert given["image"].shape == (1, 3, 64, 64)
    assert (given["image"][0, :, 41:] == 114).all()


@pytest.mark.parametrize("fit", ["pad", "stretch"])
@pytest.mark.parametrize("size", [64, "48x96", "96x48"])
@pytest.mark.parametrize("shape", [(120, 160), (400, 300)])
def test_what_is_found_comes_back_into_the_picture(fit: Any, size: int | str, shape: tuple[int, int]) -> None:
    height, width = shape
    Path("images").mkdir()
    for name in "ab":
        Image.fromarray(np.full((*shape, 3), ord(name), np.uint8)).save(f"images/{name}.png")
    boxes = [
        {"id": k, "image_id": k, "category_id": 2, "iscrowd": 0, "bbox": [width // 2, 10, width // 4, 50]}
        for k in (1, 2)
    ]
    images = [
        {"id": k, "file_name": f"images/{n}.png", "height": height, "width": width} for k, n in ((1, "a"), (2, "b"))
    ]
    write_json(annotations=boxes, images=images)
    data = COCODetection("all.json", image_size=size, fit=fit, augmentation="none", num_workers=0, batch_size=1)
    batch = next(iter(data.val_dataloader()))
    assert batch["image"].shape[2:] == data.size
    module = DetectionModule(DataSpec(num_classes=2, image_size=size, fit=fit), Backbone("resnet10t"))
    detections = {"boxes": batch["boxes"][0], "labels": batch["labels"][0], "scores": torch.ones(1)}
    module.detector.detect = lambda outputs: [detections]  # type: ignore[method-assign]
    (answer,) = module.eval().predict(batch)
    assert answer["size"] == [height, width]
    assert answer["boxes"][0] == pytest.approx([width // 2, 10, width // 2 + width // 4, 60], abs=2)

    storage.save_model(Path("model"), module, data.preprocessing, "detection")
    model = VisionModel().load(Path("model"), "cpu")
    assert model.module.fit == fit
    assert np.array_equal(model.prepare("images/a.png").shape[:2], data.size)


def test_boxes_masks_and_answers_fit_a_picture_that_is_decoded_smaller() -> None:
    Path("images").mkdir()
    picture = np.zeros((480, 640, 3), np.uint8)
    picture[80:160, 320:400] = 255
    for name in "ab":
        Image.fromarray(picture - (picture > 0) * np.uint8(name == "a")).save(f"images/{name}.jpg", quality=95)
    x1, y1, x2, y2 = 320, 80, 400, 160
    boxes = [{"id": k, "image_id": k, "category_id": 2, "iscrowd": 0, "bbox": [x1, y1, 80, 80],
              "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]]} for k in (1, 2)]  # fmt: skip
    images = [{"id": k, "file_name": f"images/{n}.jpg", "height": 480, "width": 640} for k, n in ((1, "a"), (2, "b"))]
    write_json(annotations=boxes, images=images)
    data = COCODetection("all.json", masks=True, image_size=64, augmentation="none", num_workers=0)
    dataset = data.dataset("val", augmented=False)
    assert dataset.source[0]["image"].shape == (60, 80, 3)
    assert data.sources["val"][0]["image"].shape == (480, 640, 3)
    sample = dataset[0, 0]
    assert sample["size"].tolist() == [480, 640]
    assert sample["boxes"].tolist() == [[32, 8, 40, 16]]
    assert sample["masks"].sum() == (sample["mask"] == sample["labels"].item() + 1).sum() == 64
    inside = sample["masks"][0].numpy().astype(bool)
    assert sample["image"][inside].min() > 200
    assert sample["image"][:48][~inside[:48]].mean() < 10
    for _ in range(2):
        again = replace(data, cache="memory").dataset("val", augmented=False)[0, 0]
        assert_same({key: again[key] for key in sample}, sample)
    cut = replace(data, tile=160, masks=False).dataset("val", augmented=False)
    assert cut.source[0]["image"].shape == (160, 160, 3)  # pieces keep their pixels

    module = DetectionModule(DataSpec(num_classes=2, image_size=64), Backbone("resnet10t"))
    storage.save_model(Path("model"), module, data.preprocessing, "detection")
    model = VisionModel().load(Path("model"), "cpu")
    given: dict[str, Any] = {}
    model.module.predict = lambda batch: given.update(batch) or [{}]  # type: ignore[method-assign,func-returns-value]
    list(model.stream([str(data.sources["val"].paths[0])]))
    assert given["size"].tolist() == [[480, 640]]
    assert np.array_equal(given["image"][0].permute(1, 2, 0), sample["image"])


def photographs(count: int) -> Path:
    """A table of pictures of all shapes, each with a box around the one bright thing in it."""
    rng, rows = np.random.default_rng(0), ["split,path,xmin,ymin,xmax,ymax,label"]
    for k in range(count):
        height, width = rng.integers(20, 90, 2).tolist()
        x, y = int(rng.integers(0, width - 12)), int(rng.integers(0, height - 12))
        image = np.zeros((height, width, 3), np.uint8)
        image[y : y + 12, x : x + 12] = 255
        Image.fromarray(image).save(f"{k}.png")
        rows.append(f"{('train', 'val', 'test')[k % 3]},{k}.png,{x},{y},{x + 12},{y + 12},thing")
    Path("things.csv").write_text("\n".join(rows))
    return Path("things.csv")


def test_batches_of_one_shape_have_every_picture_once_and_boxes_where_they_were() -> None:
    options = {"image_size": 64, "num_workers": 0, "batch_size": 4, "augmentation": "none"}
    data = CSVDetection(str(photographs(90)), pad_multiple=16, **options)
    whole = CSVDetection("things.csv", **options)
    module = DetectionModule(DataSpec(num_classes=1, image_size=64), Backbone("test_resnet"))
    pixels, seen = 0, []
    loader = data.test_dataloader()
    for batch, keys in zip(loader, loader.keys(), strict=True):
        shape = batch["image"].shape
        assert 1 <= shape[0] <= 4
        assert not any(side % 16 for side in shape[2:])
        pixels += batch["image"][:, 0].numel()
        truth = [{"boxes": boxes} for boxes in batch["boxes"]]
        for k, ((index, _), image, boxes) in enumerate(zip(keys, batch["image"], batch["boxes"], strict=True)):
            seen.append(index)
            alone = whole.dataset("test", False)[index, 0]
            assert torch.equal(boxes, alone["boxes"])
            height, width = image.shape[1:]
            assert np.array_equal(image.permute(1, 2, 0), alone["image"][:height, :width])
            assert (alone["image"][height:] == 114).all()
            there = module._original(truth, batch)[k]["boxes"][0].numpy()
            assert np.allclose(there, data.sources["test"][index]["boxes"], atol=0.6)
    assert sorted(seen) == list(range(30))
    assert pixels < 0.8 * 30 * 64**2
    assert data.predict_dataloader().dataset[0, 0]["image"].shape == (64, 64, 3)  # whose answers keep their order
    shapes = padded_shapes(data.sources["test"].shapes, (64, 64), 16)
    for processes in (2, 3):
        parts = equal_shapes(shapes, 4, processes)
        assert len(parts) % processes == 0
        assert sorted(np.concatenate(parts).tolist()) == list(range(30))
        assert all(len(np.unique(shapes[part], axis=0)) == 1 and len(part) <= 4 for part in parts)
    with pytest.raises(DataError, match="3 images of 3 different shapes cannot be divided evenly among 2 processes"):
        equal_shapes(np.array([[16, 64], [32, 64], [64, 64]]), 4, 2)
    with pytest.raises(DataError, match="does not pad"):
        CSVDetection("things.csv", pad_multiple=16, fit="stretch")


@pytest.mark.parametrize(("strength", "tolerance"), [("light", 1.6), ("standard", 1.6), ("strong", 6)])
def test_boxes_stay_tight_under_augmentation(strength: Any, tolerance: float) -> None:
    options = {"augmentation": strength, "flip": True, "train": 100, "objects": (1, 1)}  # none hides slivers of another
    plain, exact = (scenes(128, masks=masks, **options).dataset("train", True) for masks in (False, True))
    compared = []
    for i in range(100):
        one, other = plain[i, 0], exact[i, 0]
        assert np.array_equal(one["image"], other["image"])
        boxes, tight = one["boxes"].numpy(), other["boxes"].numpy()
        assert np.array_equal(tight, boxes_of(list(other["masks"].numpy())))
        if len(boxes) != len(tight):  # something is all but out
            continue
        assert torch.equal(one["labels"], other["labels"])
        inside = ((boxes > 1) & (boxes < 127)).all(1)  # what is cut off at the edge has a box up to the edge
        compared.append(np.abs(boxes - tight)[inside])
    errors = np.concatenate(compared)
    assert len(errors) > 60
    assert errors.max() < tolerance
    assert errors.mean() < tolerance / 3


def rectangle(k: int, shape: tuple[int, int]) -> dict[str, Any]:
    """A picture of its own red with a green rectangle that is its object."""
    image = np.full((*shape, 3), [60 * k, 0, 0], np.uint8)
    h, w = shape
    box = [w // 4, h // 4, w // 2, 3 * h // 4]
    image[box[1] : box[3], box[0] : box[2], 1] = 255
    return {"image": image, "boxes": np.array([box], np.float32), "labels": np.array([k]),
            "ignore": np.array([False]), "size": np.array(shape)}  # fmt: skip


def test_the_boxes_of_a_mosaic_are_where_its_objects_are() -> None:
    seen = 0
    for seed in range(30):
        parts = [rectangle(k, shape) for k, shape in enumerate([(60, 60), (40, 90), (120, 70), (64, 64)])]
        sample = mosaic(parts, (64, 64), np.random.default_rng(seed))
        assert sample["image"].shape == (64, 64, 3)
        for box, label in zip(sample["boxes"], sample["labels"], strict=True):
            red, green, _ = np.moveaxis(sample["image"].astype(int), 2, 0)
            inside = (green > 127) & (np.abs(red - 60 * label) < 20)
            rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
            assert [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] == pytest.approx(box.tolist(), abs=1.01)
            seen += 1
    assert 60 < seen < 120


@pytest.mark.parametrize("mixing", [Mixing(mosaic=1), Mixing(copy_paste=1), Mixing(mosaic=1, copy_paste=1)])
def test_masks_class_map_and_boxes_agree_after_mixing(mixing: Mixing) -> None:
    plain = scenes(masks=True, augmentation="none").dataset("train", True)
    dataset = scenes(masks=True, augmentation="none", mixing=mixing).dataset("train", True)
    more = 0
    for i in range(12):
        sample = dataset[i, 0]
        masks = sample["masks"].numpy().astype(bool)
        assert (masks.sum(0) <= 1).all()
        assert np.array_equal(sample["boxes"].numpy(), boxes_of(list(sample["masks"].numpy())))
        for mask, label in zip(masks, sample["labels"], strict=True):
            assert (sample["mask"][mask] == int(label) + 1).all()
        more += len(masks) - len(plain[i, 0]["masks"])
    assert more > 0


def test_objects_whose_areas_are_in_the_file_can_be_pasted() -> None:
    scenes(masks=True).write("out", "coco")
    dataset = COCODetection("out", masks=True, image_size=64, mixing=Mixing(copy_paste=1)).dataset("train", True)
    more = 0
    for i in range(8):
        sample = dataset[i, 0]
        assert len(sample["area"]) == len(sample["boxes"])
        more += len(sample["boxes"]) - len(dataset.source[i]["boxes"])
    assert more > 0


def test_mixup_shows_two_pictures_with_the_objects_of_both() -> None:
    plain = scenes(augmentation="none").dataset("train", True)
    mixed = scenes(augmentation="none", mixing={"mixup": 1}).dataset("train", True)
    for i in range(4):
        one, both = plain[i, 0], mixed[i, 0]
        count = len(one["labels"])
        assert torch.equal(both["boxes"][:count], one["boxes"])
        assert len(both["labels"]) > count
        correlation = np.corrcoef(one["image"].ravel(), both["image"].ravel())[0, 1]
        assert 0.2 < correlation < 0.99


def batches(loader: Any) -> list[dict[str, Any]]:
    return list(loader)


def assert_same_batches(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            for x, y in zip(a[key], b[key], strict=True):
                assert torch.equal(x, y), key


def test_batches_depend_on_seed_and_epoch_alone() -> None:
    options = {"augmentation": "strong", "mixing": Mixing(mosaic=0.5, mixup=0.3, copy_paste=0.3), "batch_size": 3}
    loader = scenes(**options).train_dataloader()
    loader.set_epoch(2)
    whole = batches(loader)
    helped = scenes(**options | {"num_workers": 2}).train_dataloader()
    helped.set_epoch(2)
    assert_same_batches(whole, batches(helped))
    resumed = scenes(**options).train_dataloader()
    iterator = iter(loader)
    next(iterator), next(iterator)
    resumed.load_state_dict(loader.state_dict())
    resumed.set_epoch(2)
    assert_same_batches(whole[2:], batches(resumed))
    loader.set_epoch(3)
    other = batches(loader)
    assert not all(torch.equal(a["image"], b["image"]) for a, b in zip(whole, other, strict=True))


def test_the_last_epochs_are_plain_where_that_is_asked_for() -> None:
    data = scenes(augmentation="none", mixing=Mixing(mosaic=1, plain_epochs=2))
    plain = data.sources["train"][0]["image"]
    for epochs, mixed in ((5, [True, True, True, False, False]), (-1, [True] * 5)):  # -1: nobody knows
        data.trainer = L.Trainer(max_epochs=epochs, logger=False, enable_checkpointing=False)
        dataset = data.dataset("train", True)
        assert [not np.array_equal(dataset[0, epoch]["image"], plain) for epoch in range(5)] == mixed


def test_a_sheet_of_samples_is_drawn() -> None:
    detection(["preview", "--data", "DigitScenes", "--data.scene_size", "64", "--data.train", "12", "--data.val", "2",
               "--data.test", "2", "--data.mixing.mosaic", "0.5", "--model.backbone", "resnet10t", "--output", "out",
               "--trainer.logger", "false"])  # fmt: skip
    sheet = np.asarray(Image.open("out/preview.png"))
    assert sheet.shape[1] > 8 * 150


def test_a_mistake_on_the_command_line_is_one_paragraph(capsys: pytest.CaptureFixture[str]) -> None:
    for args, message in [
        (["--data", "COCODetection", "--data.root", "nowhere"], "There is no"),
        (["--data", "DigitScenes", "--data.mixing.mosaic", "2"], "at most 1, not 2"),
        (["--data", "DigitScenes", "--data.masks", "true", "--data.mixing.mixup", "1"], "mixup cannot blend masks"),
    ]:
        with pytest.raises(SystemExit) as end:
            detection(["preview", *args, "--output", "out", "--trainer.logger", "false"])
        assert end.value.code == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error) < 500


def test_scenes_are_converted_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--data.scene_size", "32", "--data.train", "3", "--data.val", "1", "--data.test", "0"]
    command(convert, ["out", "--data", "DigitScenes", *small, "--form", "yolo"])
    assert "3 train, 1 val" in capsys.readouterr().out
    assert len(YOLODetection("out").sources["train"]) == 3
    with pytest.raises(SystemExit) as end:
        command(convert, ["out", "--data", "DigitScenes", *small])
    assert end.value.code == 2
    assert "already exists" in capsys.readouterr().err
