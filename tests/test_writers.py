"""What is written for other tools: data with boxes, and what a model found."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from faster_coco_eval.core import mask as rle
from numpy.typing import NDArray
from pycocotools.coco import COCO

from datamodules import COCODetection, CSVDetection, DataError, VOCDetection, YOLODetection
from datamodules.annotated.boxes import BoxFiles
from datamodules.annotated.writers import AnswerWriter, outline

READERS: dict[str, Any] = {"coco": COCODetection, "voc": VOCDetection, "yolo": YOLODetection, "csv": CSVDetection}


def shape_of(generator: np.random.Generator, height: int = 48, width: int = 64) -> NDArray[np.uint8]:
    """A mask in one or two parts, with a hole or none, its pixels touching at corners here and there."""
    mask = np.zeros((height, width), np.uint8)
    for _ in range(int(generator.integers(1, 3))):
        y, x = generator.integers(0, 30, 2)
        h, w = generator.integers(1, 18, 2)
        mask[y : y + h, x : x + w] = 1
        mask[y + h // 2, x + w // 2] = int(generator.integers(2))
        mask[min(y + h, height - 1), min(x + w, width - 1)] = 1
    mask[generator.integers(0, height), generator.integers(0, width)] = 1
    return mask


def extent(mask: NDArray[np.uint8]) -> list[int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def coco_of(folder: Path, names: dict[str, list[str]], seed: int = 0) -> None:
    """COCO's files with JPEG images of these names, each with two objects of two classes, the second of some a crowd."""
    generator = np.random.default_rng(seed)
    for split, files in names.items():
        images, entries = [], []
        for i, name in enumerate(files, 1):
            place = folder / split / name
            place.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(generator.integers(0, 256, (48, 64, 3)).astype(np.uint8)).save(place)
            images.append({"id": i, "file_name": name, "height": 48, "width": 64})
            for k in range(2):
                mask = shape_of(generator)
                code = rle.encode(np.asfortranarray(mask))
                x1, y1, x2, y2 = extent(mask)
                crowd = int(k == 1 and i % 2 == 0)
                entries.append({"id": len(entries) + 1, "image_id": i, "category_id": k + 1, "iscrowd": crowd,
                                "bbox": [x1, y1, x2 - x1, y2 - y1], "area": int(mask.sum()),
                                "segmentation": code | {"counts": code["counts"].decode()}})  # fmt: skip
        categories = [{"id": 1, "name": "ant"}, {"id": 2, "name": "bee"}]
        content = {"images": images, "annotations": entries, "categories": categories}
        (folder / f"{split}.json").write_text(json.dumps(content))


NAMES = {"train": ["a.jpg", "b 1.jpg", "c.jpg", "d.jpg"], "val": ["v.jpg", "w.jpg"], "test": ["t.png", "u.jpg"]}


def samples_of(data: BoxFiles) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (split, Path(source.paths[i]).name): source[i]  # type: ignore[attr-defined]
        for split, source in data.sources.items()
        for i in range(len(source))
    }


@pytest.mark.parametrize("form", READERS)
def test_boxes_masks_crowds_and_names_come_back(form: str, recwarn: pytest.WarningsRecorder) -> None:
    coco_of(Path("from"), NAMES)
    data = COCODetection("from", masks=True)
    data.write("to", form)  # type: ignore[arg-type]
    masks = form in ("coco", "yolo")
    root = "to/boxes.csv" if form == "csv" else "to"
    read = READERS[form](root, **({"masks": True} if masks else {}))
    assert read.label_names == ["ant", "bee"]
    before, after = samples_of(data), samples_of(read)
    assert before.keys() == after.keys()
    crowds = 0
    for key, expected in before.items():
        sample, rows = after[key], np.ones(2, bool)
        if form == "yolo":  # which has no crowds
            rows = ~expected["ignore"]
        crowds += int(expected["ignore"].sum())
        assert np.array_equal(sample["image"], expected["image"])
        for name in ("boxes", "labels", "ignore", *(["masks"] if masks else [])):
            assert np.array_equal(sample[name], expected[name][rows]), (key, name)
    assert crowds == 4
    warned = " ".join(str(warning.message) for warning in recwarn)
    assert ("Left out" in warned) == (form != "coco")
    assert ("4 crowds" in warned) == (form == "yolo")
    assert ("16 outlines" in warned) == (form in ("voc", "csv"))
    written = {file.name: file.read_bytes() for file in Path("to").rglob("*") if file.suffix in (".jpg", ".png")}
    assert written == {name: Path("from", split, name).read_bytes() for split, name in before}


def test_files_of_one_name_or_turned_by_a_tag_get_files_of_their_own() -> None:
    coco_of(Path("from"), {"train": ["one/a.jpg", "two/a.jpg", "A.png", "b.jpg"], "val": ["a.jpg"]})
    exif = PIL.Image.Exif()
    exif[0x0112] = 3
    PIL.Image.open("from/train/b.jpg").save("from/train/b.jpg", exif=exif)
    data = COCODetection("from")
    for form in ("voc", "yolo"):
        data.write(form, form)  # type: ignore[arg-type]
        read = READERS[form](form)
        images = [read.sources["train"][i]["image"] for i in range(4)]
        for i in range(4):
            same = [np.array_equal(image, data.sources["train"][i]["image"]) for image in images]
            assert same.count(True) == 1, (form, i)
        stems = {file.stem.casefold() for file in Path(form).rglob("*") if file.suffix in (".jpg", ".png")}
        assert {"a", "two_a", "b"} <= stems
        assert len(list(Path(form).rglob("b.png"))) == 1


def test_tiles_are_written_as_pictures_of_their_own() -> None:
    coco_of(Path("from"), {"train": ["a.jpg", "b.jpg"], "val": ["v.jpg"]})
    data = COCODetection("from", tile=32)
    data.write("to", "yolo")
    read = YOLODetection("to")
    assert len(read.sources["train"]) == len(data.sources["train"]) > 4
    found = samples_of(read)
    for i, name in enumerate(["a.png", "a_2.png", "a_3.png"]):
        assert np.array_equal(found["train", name]["image"], data.sources["train"][i]["image"])


def test_what_cannot_be_written_to_its_end_leaves_nothing() -> None:
    coco_of(Path("from"), NAMES)
    data = COCODetection("from")
    assert len(data.sources["test"]) == 2
    Path("from/test/u.jpg").write_bytes(b"no longer an image")
    with pytest.raises(DataError, match=r"u.jpg"):
        data.write("to", "voc")
    assert sorted(file.name for file in Path.cwd().iterdir()) == ["from"]


def test_an_outline_filled_is_the_mask_again() -> None:
    generator = np.random.default_rng(0)
    for k in range(200):
        mask = shape_of(generator) if k % 2 else (generator.random((12, 15)) < 0.5).astype(np.uint8)
        mask[0, 0] |= not mask.any()
        height, width = mask.shape
        shares = [float(f"{value:.8g}") for value in (outline(mask) / (width, height)).ravel()]
        points = (np.array(shares).reshape(-1, 2) * (width, height)).ravel().tolist()
        again = rle.decode(rle.merge(rle.frPyObjects([points], height, width)))
        assert np.array_equal(again, mask)


ANSWERS: dict[str, dict[str, Any]] = {
    "x/a.png": {"size": [48, 64], "boxes": [[10, 5, 30.5, 25]], "labels": ["bee"], "scores": [0.9]},
    "x/a.jpg": {"size": [48, 64], "boxes": [], "labels": [], "scores": []},
    "x/b.jpg": {
        "size": [48, 64],
        "boxes": [[0, 0, 64, 48], [1, 2, 3, 4]],
        "labels": ["ant", "bee"],
        "scores": [0.5, 0.25],
    },
}


def write_answers(form: Any, answers: dict[str, dict[str, Any]] = ANSWERS, truth: str | None = None) -> None:
    with AnswerWriter("out", form, ["ant", "bee"], truth) as writer:
        for file, answer in answers.items():
            writer.add(file, answer)


def test_detections_as_results_of_coco() -> None:
    write_answers("coco")
    found = json.loads(Path("out/results.json").read_text())
    assert found[0] == {"image_id": 1, "category_id": 2, "score": 0.9, "bbox": [10, 5, 20.5, 20]}
    assert [entry["image_id"] for entry in found] == [1, 3, 3]
    images = [{"id": 70 + i, "file_name": name, "height": 48, "width": 64} for i, name in enumerate(ANSWERS)]
    categories = [{"id": 7, "name": "ant"}, {"id": 9, "name": "bee"}, {"id": 11, "name": "cat"}]
    truth = {"images": images, "annotations": [], "categories": categories}
    Path("truth.json").write_text(json.dumps(truth))
    write_answers("coco", {Path(name).name: answer for name, answer in ANSWERS.items()}, "truth.json")
    loaded = COCO("truth.json").loadRes("out/results.json")
    assert sorted((a["image_id"], a["category_id"]) for a in loaded.anns.values()) == [(70, 9), (72, 7), (72, 9)]
    with pytest.raises(DataError, match=r"truth.json has no image c.png"):
        write_answers("coco", {"c.png": ANSWERS["x/a.jpg"]}, "truth.json")
    truth["categories"] = categories[1:]
    Path("truth.json").write_text(json.dumps(truth))
    with pytest.raises(DataError, match=r"truth.json has no category 'ant'"):
        write_answers("coco", truth="truth.json")
    for content in ("", "[]", '{"images": 3}'):
        Path("truth.json").write_text(content)
        with pytest.raises(DataError, match=r"truth.json cannot be read"):
            write_answers("coco", truth="truth.json")


def test_detections_as_lines_of_yolo() -> None:
    mask = np.zeros((48, 64), np.uint8)
    mask[12:24, 16:32] = 1
    code = rle.encode(np.asfortranarray(mask))
    with AnswerWriter("out", "yolo", ["ant", "bee"]) as writer:
        for file, answer in ANSWERS.items():
            writer.add(file, answer)
        writer.add(
            "m.png",
            {"size": [48, 64], "boxes": [[16, 12, 32, 24]], "labels": ["ant"], "scores": [0.75], "masks": [code]},
        )
        writer.add("film.mp4", ANSWERS["x/a.png"], frame=4)
    found = {file.relative_to("out/labels").as_posix(): file.read_text() for file in Path("out").rglob("*.txt")}
    assert found.pop("m.txt").split()[0] == "0"
    assert found == {
        "x/a.txt": "1 0.31640625 0.3125 0.3203125 0.41666667 0.9\n",
        "x/a.jpg.txt": "",
        "x/b.txt": "0 0.5 0.5 1 1 0.5\n1 0.03125 0.0625 0.03125 0.041666667 0.25\n",
        "film_5.txt": "1 0.31640625 0.3125 0.3203125 0.41666667 0.9\n",
    }


def test_detections_as_lines_of_the_mot_challenge() -> None:
    with AnswerWriter("out", "mot", ["ant", "bee"]) as writer:
        for frame, (answer, ids) in enumerate(zip(ANSWERS.values(), ([3], [], [3, None]), strict=True)):
            writer.add("film.mp4", answer | {"ids": ids}, frame)
        writer.add("film.avi", ANSWERS["x/a.png"], 0)
        for file, answer in ANSWERS.items():
            writer.add(file, answer)
    assert Path("out/film.txt").read_text() == (
        "1,3,10,5,20.5,20,0.9,-1,-1,-1\n3,3,0,0,64,48,0.5,-1,-1,-1\n3,-1,1,2,2,2,0.25,-1,-1,-1\n"
    )
    assert Path("out/film.avi.txt").read_text() == "1,-1,10,5,20.5,20,0.9,-1,-1,-1\n"
    assert Path("out/x.txt").read_text().count("\n") == 3


def test_what_a_format_cannot_hold_is_said() -> None:
    with pytest.raises(DataError, match=r"film.mp4 is a video.*write mot or yolo"), AnswerWriter("out", "coco", ["ant"]) as writer:  # fmt: skip
        writer.add("film.mp4", ANSWERS["x/a.jpg"], frame=0)
    with pytest.raises(DataError, match="no boxes"), AnswerWriter("out", "yolo", ["ant"]) as writer:
        writer.add("a.png", {"label": "ant"})
