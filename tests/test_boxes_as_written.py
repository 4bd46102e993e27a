"""Small data sets with boxes as annotation tools, exporters and people write them: read rightly, or refused in a paragraph."""

import contextlib
import copy
import json
import math
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
import yaml

from datamodules import COCODetection, CSVDetection, DataError, VOCDetection, YOLODetection
from datamodules.annotated.boxes import BoxFiles

WIDTH, HEIGHT = 40, 30
SPLITS = {"train": "abc", "val": "d", "test": "e"}
Truth = dict[str, list[tuple[str, list[float]]]]
TRUTH: Truth = {
    "a": [("red", [10, 5, 18, 11]), ("blue", [0, 0, 4, 30])],
    "b": [("red", [20, 10, 30, 20])],
    "c": [("blue", [5, 6, 25, 26])],
    "d": [("red", [1, 2, 11, 12])],
    "e": [("blue", [8, 9, 16, 17])],
}
PIXELS = {
    name: cv2.imencode(".png", np.full((HEIGHT, WIDTH, 3), 20 * k, np.uint8))[1].tobytes()
    for k, name in enumerate("abcde", 1)
}


@dataclass
class Case:
    """A data set, and what becomes of it.

    Attributes:
        make: writes it into the working folder and opens it.
        refused: what the refusal says; None where it is read.
        told: what a warning says; None where there is none.
        truth: the objects of each image.
        splits: the images of each split; None where splits are drawn.
        areas: pixels of the masks of the image a.
        crowds: number of objects that are ignored.
    """

    make: Callable[[], BoxFiles]
    refused: str | None = None
    told: str | None = None
    truth: Truth | None = None
    splits: dict[str, str] | None = None
    areas: list[int] | None = None
    crowds: int = 0


CASES: dict[str, Case] = {}


def case(name: str, make: Callable[[], BoxFiles], refused: str | None = None, drawn: bool = False, **more: Any) -> None:
    assert name not in CASES
    CASES[name] = Case(make, refused, splits=None if drawn else more.pop("splits", SPLITS), **more)


def named(*names: str) -> Truth:
    """The truth with other names for red and blue."""
    known = dict(zip(("red", "blue"), names, strict=True))
    return {image: [(known[label], box) for label, box in boxes] for image, boxes in TRUTH.items()}


def pictures(place: str, suffix: str = ".png", names: str = "abcde") -> None:
    """Writes images; ``{}`` in the place stands for the split."""
    for split, those in SPLITS.items():
        for name in set(those) & set(names):
            file = Path(place.format(split), f"{name}{suffix}")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(PIXELS[name])


def write(file: str, text: str | bytes) -> None:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_bytes(text.encode() if isinstance(text, str) else text)


# COCO

Content = dict[str, Any]


def content(names: str, suffix: str = ".png", outlines: bool = False) -> Content:
    images = [{"id": ord(n), "file_name": f"{n}{suffix}", "width": WIDTH, "height": HEIGHT} for n in names]
    annotations: list[Content] = []
    for name in names:
        for label, (x1, y1, x2, y2) in TRUTH[name]:
            entry = {"id": len(annotations) + 1, "image_id": ord(name), "category_id": ("red", "blue").index(label) + 1,
                     "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}  # fmt: skip
            if outlines:
                entry["segmentation"] = [[x1, y1, x2, y1, x2, y2, x1, y2]]
            annotations.append(entry)
    categories = [{"id": 1, "name": "red"}, {"id": 2, "name": "blue"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def coco(
    edit: Callable[[Content], Any] = lambda _: None,
    file: str = "{}.json",
    images: str = "{}",
    encoding: str = "utf-8",
    masks: bool = False,
    only_train: bool = False,
    root: str = ".",
    suffix: str = ".png",
    **options: Any,
) -> Callable[[], BoxFiles]:
    """One file for each split, or for all where the file's name has no ``{}``; edited, in training alone or everywhere."""

    def make() -> BoxFiles:
        pictures(images, suffix)
        for split, names in SPLITS.items() if "{}" in file else [("all", "abcde")]:
            made = content(names, suffix, masks)
            if split in ("train", "all") or not only_train:
                edit(made)
            write(file.format(split), json.dumps(made).encode(encoding))
        return COCODetection(root, masks=masks, image_size=32, num_workers=0, **options)

    return make


def each(group: str, **changes: Any) -> Callable[[Content], None]:
    """Changes all entries of a group; functions get the entry."""

    def edit(made: Content) -> None:
        for entry in made[group]:
            entry.update({key: value(entry) if callable(value) else value for key, value in changes.items()})

    return edit


def first(group: str, **changes: Any) -> Callable[[Content], None]:
    return lambda made: made[group][0].update(changes)


def without(group: str, *keys: str) -> Callable[[Content], None]:
    return lambda made: [entry.pop(key) for entry in made[group] for key in keys] and None


def renamed(how: Callable[[str], str]) -> Callable[[Content], None]:
    return each("images", file_name=lambda entry: how(entry["file_name"]))


def twice(made: Content) -> None:
    made["annotations"] += [entry | {"id": 100 + entry["id"]} for entry in made["annotations"]]


def second_id(made: Content) -> None:
    made["images"].append(made["images"][0] | {"id": 7})
    made["annotations"].append(made["annotations"][0] | {"id": 70, "image_id": 7})


def headed(name: str, children: str) -> Callable[[Content], None]:
    def edit(made: Content) -> None:
        made["categories"] = [{"id": 0, "name": name, "supercategory": "none"},
                              *({**c, "supercategory": children} for c in made["categories"])]  # fmt: skip

    return edit


def one_class_headed_by_its_name(made: Content) -> None:
    made["categories"] = [
        {"id": 0, "name": "red", "supercategory": "none"},
        {"id": 1, "name": "red", "supercategory": "red"},
    ]
    each("annotations", category_id=1)(made)


def outline(segmentation: Any) -> Callable[[], BoxFiles]:
    return coco(first("annotations", segmentation=segmentation), masks=True, only_train=True)


def broken(text: str) -> Callable[[], BoxFiles]:
    def make() -> BoxFiles:
        pictures("{}")
        write("train.json", text)
        return COCODetection("train.json")

    return make


# fmt: off
case("coco", coco())
case("coco, byte-order mark", coco(encoding="utf-8-sig"))
case("coco, UTF-16", coco(encoding="utf-16"))
case("coco, annotations without ids", coco(without("annotations", "id")))
case("coco, category ids as text in annotations", coco(each("annotations", category_id=lambda e: str(e["category_id"]))))
case("coco, category ids as text in categories", coco(each("categories", id=lambda e: str(e["id"]))))
case("coco, category ids of mixed types", coco(first("categories", id="1")))
case("coco, category ids of words", coco(lambda m: [each("categories", id=lambda e: e["name"])(m), each("annotations", category_id=lambda e: ("", "red", "blue")[e["category_id"]])(m)]), truth=TRUTH)
case("coco, image ids as text", coco(each("images", id=lambda e: str(e["id"]))))
case("coco, ids as 1.0", coco(each("annotations", image_id=lambda e: float(e["image_id"]))))
case("coco, sizes as text", coco(each("images", width=str(WIDTH), height=str(HEIGHT))))
case("coco, sizes null", coco(each("images", width=None, height=None)))
case("coco, no sizes", coco(without("images", "width", "height")))
case("coco, sizes of words", coco(each("images", width="wide", height=[3])))
case("coco, boxes as text", coco(each("annotations", bbox=lambda e: [str(v) for v in e["bbox"]])))
case("coco, iscrowd as text", coco(each("annotations", iscrowd="0")))
case("coco, a crowd", coco(first("annotations", iscrowd=1), only_train=True), crowds=1)
case("coco, no iscrowd", coco(without("annotations", "iscrowd")))
case("coco, boxes in shares", coco(each("annotations", bbox=lambda e: [v / (WIDTH, HEIGHT)[k % 2] for k, v in enumerate(e["bbox"])])), told="read as fractions of the images")
case("coco, names without extensions", coco(renamed(lambda n: n[0])))
case("coco, names of another extension", coco(renamed(lambda n: f"{n[0]}.jpg")), told="another extension than is said")
case("coco, an umlaut in two letters", lambda: (coco(renamed(lambda n: f"u\u0308{n}"))(), [f.rename(f.with_name(f"ü{f.name}")) for f in list(Path().rglob("*.png"))])[0], truth={f"ü{n}": boxes for n, boxes in TRUTH.items()}, drawn=True)
case("coco, JSON", coco(file="{}.JSON"))
case("coco, no categories", coco(lambda m: m.update(categories=[])), "unknown class, 1.*The file names no classes")
case("coco, back-slashes", coco(renamed(lambda n: f"images\\{n}"), images="images"))
case("coco, a URL", coco(renamed(lambda n: f"https://host.org/sets/7/{n}?sig=x")), told="found by its name")
case("coco, Label Studio's local files", coco(renamed(lambda n: f"/data/local-files/?d=sets/7/{n}"), images="images/{}"), told="found by its name")
case("coco, Label Studio's uploads", coco(renamed(lambda n: f"/data/upload/7/1a2b3c4d-{n}"), images="images"), told="found by its name")
case("coco, another machine's path", coco(renamed(lambda n: f"/home/ann/sets/{n}"), images="pictures"), told="found by its name")
case("coco, another machine's drive", coco(renamed(lambda n: f"C:\\sets\\{n}"), images="pictures"), told="found by its name")
case("coco, a broken URL", coco(renamed(lambda n: f"http://[x/{n}")), told="found by its name")
case("coco, percent signs", coco(renamed(lambda n: f"my%20set/{n}"), images="my set"))
case("coco, upper case of extensions", coco(renamed(str.upper)))
case("coco, lower case of extensions", coco(renamed(str.lower), suffix=".PNG"))
case("coco, Roboflow's folders", coco(file="{}/_annotations.coco.json"))
case("coco, Roboflow's prefix folder", coco(renamed(lambda n: f"export/{n}"), file="{}/_annotations.coco.json"), told="found by its name")
case("coco, split before the name", coco(lambda m: [e.update(file_name=f"{s}/{e['file_name']}") for e in m["images"] for s, n in SPLITS.items() if e["file_name"][0] in n]))
case("coco, COCO's own folders", coco(file="annotations/instances_{}2017.json", images="{}2017"))
case("coco, images/train2017", coco(file="annotations/instances_{}2017.json", images="images/{}2017"))
case("coco, Ultralytics' folders", coco(file="annotations/{}.json", images="images/{}"))
case("coco, instances_train.json at the top", coco(file="instances_{}.json"))
case("coco, captions beside", lambda: (write("annotations/captions_train2017.json", "{}"), coco(file="annotations/instances_{}2017.json", images="{}2017")())[1])
case("coco, CVAT's instances_default.json", coco(file="annotations/instances_default.json", images="images"), drawn=True)
case("coco, CVAT's images/default", coco(file="annotations/instances_default.json", images="images/default"), drawn=True)
case("coco, LabelMe's annotations.json", coco(renamed(lambda n: f"JPEGImages/{n}"), file="annotations.json", images="JPEGImages"), drawn=True)
case("coco, Label Studio's result.json", coco(renamed(lambda n: f"images/{n}"), file="result.json", images="images"), drawn=True)
case("coco, a file as root", coco(file="all.json", images="images", root="all.json"), drawn=True)
case("coco, Train.json", lambda: (coco()(), [Path(f"{s}.json").rename(f"{s.title()}.json") for s in SPLITS])[0])
case("coco, several files and no train", lambda: (coco()(), Path("train.json").rename("one.json"))[0], "neither train.json nor")
case("coco, Roboflow's root category", coco(headed("things", "things")), told="'things' has no objects")
case("coco, Roboflow's root of the same name", coco(one_class_headed_by_its_name), told="'red' has no objects", truth=named("red", "red"))
case("coco, LabelMe's background", coco(lambda m: m["categories"].insert(0, {"id": 0, "name": "_background_"})), told="'_background_' has no objects")
case("coco, a supercategory with objects", coco(lambda m: [m["categories"][0].update(supercategory="none"), m["categories"][1].update(supercategory="red")]))
case("coco, a category without a name", coco(first("categories", name=None)), truth=named("1", "blue"))
case("coco, two categories of one name", coco(each("categories", name="red")), "2 categories have the name 'red'")
case("coco, a category without an id", coco(without("categories", "id")), "train.json: an entry of 'categories' has no id")
case("coco, a list as id", coco(first("images", id=[1])), "an entry of 'images' has no id")
case("coco, annotations twice", coco(twice), told="boxes are duplicates, and count once; the first: .*train.json, annotation 101")
case("coco, an image under two ids", coco(second_id, only_train=True), told="listed twice, and counted once|1 boxes are duplicates")
case("coco, no annotations in validation", coco(lambda m: m["annotations"].clear() if m["images"][0]["file_name"] == "d.png" else None), truth={**TRUTH, "d": []})
case("coco, no annotations in training", coco(lambda m: m["annotations"].clear(), only_train=True), "no boxes to train on, in 3 images")
case("coco, annotations null in validation", coco(lambda m: m.update(annotations=None) if m["images"][0]["file_name"] == "d.png" else None), truth={**TRUTH, "d": []})
case("coco, annotations as a dictionary", coco(lambda m: m.update(annotations={"1": {}})), "'annotations' is not a list")
case("coco, no name of a file", coco(first("images", file_name=None)), "train.json: image 97 has no 'file_name', but None")
case("coco, one image is not there", lambda: (coco()(), Path("train/b.png").unlink(), shutil.copy("val/d.png", "val/b.png"))[0], r"1 of 5 images cannot be read: .*b.png \(No such file")
case("coco, a name that two images have", lambda: (coco(renamed(lambda n: f"/home/{n}"), images="one")(), shutil.copytree("one", "two"))[0], r"a.png, which may be one/a.png or two/a.png")
case("coco, no image is there", coco(renamed(lambda n: f"x{n}")), "xa.png, which is in none of")
case("coco, sides interchanged", coco(each("images", width=HEIGHT, height=WIDTH)), "30×40 pixels, but it has 40×30. Width and height seem to be swapped")
case("coco, another size", coco(first("images", width=50)), "50×30 pixels, but it has 40×30. Its boxes seem to belong to another")
case("coco, a box of None", coco(first("annotations", bbox=None)), "annotation 1, image a.png: .* is not four numbers")
case("coco, a box of four digits", coco(first("annotations", bbox="1234")), "annotation 1, image a.png: .* is not four numbers")
case("coco, corners", coco(each("annotations", bbox=lambda e: [e["bbox"][0], e["bbox"][1], e["bbox"][0] + e["bbox"][2], e["bbox"][1] + e["bbox"][3]])), "All would be right if they were xmin, ymin, xmax, ymax")
case("coco, an unknown category", coco(first("annotations", category_id=9)), "annotation 1.*unknown class, 9. The classes are red, blue")
case("coco, a category like another's name", coco(lambda m: [each("categories", name=lambda e: str(e["id"] + 8))(m), first("annotations", category_id=9)(m)]), "unknown class, 9")
case("coco, an annotation of no image", coco(first("annotations", image_id=None)), "annotation 1 is of image None, which is not there")
case("coco, not JSON", broken("{"), "train.json cannot be read as JSON")
case("coco, nested without end", broken("[" * 100_000), "train.json cannot be read as JSON|train.json has no lists")
case("coco, a number", broken("3"), "has no lists 'images' and 'categories'. It is not in COCO's format")
case("coco, LabelMe's own", broken('{"version": "5.0", "shapes": [], "imagePath": "a.png"}'), "LabelMe's own format.*labelme2coco")
case("coco, a folder of LabelMe's own", lambda: [pictures("."), *(write(f"{n}.json", '{"shapes": [], "imagePath": "a.png"}') for n in "abc"), COCODetection(".")][-1], "a.json has no lists.*LabelMe's own format")
case("coco, VIA's project", broken('{"_via_settings": {}, "_via_img_metadata": {}}'), "VIA's.*COCO")
case("coco, VIA's annotations", broken('{"a.png123": {"filename": "a.png", "size": 123, "regions": []}}'), "VIA's.*COCO")
case("coco, VoTT's own", broken('{"asset": {}, "regions": [], "version": "2.2.0"}'), "VoTT's.*Pascal VOC")
case("coco, Label Studio's own", broken('[{"id": 1, "data": {"image": "a.png"}, "annotations": []}]'), "Label Studio's own format: export as COCO")
case("coco, results", broken('[{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]'), "what a model found")
# fmt: on

WHOLE = [48, 120]
# fmt: off
case("outline", coco(masks=True), areas=WHOLE)
case("outline, flat as VIA's", coco(each("annotations", segmentation=lambda e: e["segmentation"][0]), masks=True), areas=WHOLE)
case("outline, points", coco(each("annotations", segmentation=lambda e: [np.reshape(e["segmentation"][0], (-1, 2)).tolist()]), masks=True), areas=WHOLE)
case("outline, one polygon of points", coco(each("annotations", segmentation=lambda e: np.reshape(e["segmentation"][0], (-1, 2)).tolist()), masks=True), areas=WHOLE)
case("outline, numbers as text", outline([["10", "5", "18", "5", "18", "11", "10", "11"]]), areas=WHOLE)
case("outline, an empty polygon beside another", outline([[], [10, 5, 18, 5, 18, 11, 10, 11]]), areas=WHOLE)
case("outline, uncompressed", outline({"size": [30, 40], "counts": [300, 6, 24, 6, 864]}), areas=[12, 120])
case("outline, compressed", outline({"size": [30, 40], "counts": "\\95f0L:RS1".replace("\\9", "\\9")}), "annotation 1.*run-length code that is incomplete")
case("outline, compressed as COCO has it", outline({"size": [30, 40], "counts": "o25i0000000000ml0"}), areas=[30, 120])
case("outline, elsewhere", outline([[25, 20, 30, 20, 30, 25]]), "annotation 1.*has an outline that lies outside it")
case("outline, in shares", outline([[0.3, 0.2, 0.4, 0.2, 0.4, 0.3]]), "annotation 1.*outline that lies within the first pixel")
case("outlines of half the size", coco(each("annotations", segmentation=lambda e: [[v / 2 for v in e["segmentation"][0]]], bbox=lambda e: [0, 0, *e["bbox"][2:]]), masks=True), told="overlaps with less than half of their box", truth={n: [(label, [0, 0, x2 - x1, y2 - y1]) for label, (x1, y1, x2, y2) in boxes] for n, boxes in TRUTH.items()})
case("outline, size as text", outline({"size": ["30", "40"], "counts": [300, 120, 780]}), areas=[120, 120])
case("outline, of another size", outline({"size": [24, 24], "counts": [0, 576]}), r"annotation 1, image a.png.*run-length code of another size, \[24, 24\]")
case("outline, compressed and of another size", outline({"size": [48, 48], "counts": "0`Q2"}), "annotation 1, image a.png.*of another size")
case("outline, sides interchanged", outline({"size": [40, 30], "counts": [0, 120, 1080]}), "of another size")
case("outline, too short", outline({"size": [30, 40], "counts": [0, 120]}), "incomplete")
case("outline, too long", outline({"size": [30, 40], "counts": [0, 120, 99999]}), "incomplete")
case("outline, negative", outline({"size": [30, 40], "counts": [300, -6, 906]}), "incomplete")
case("outline, garbage", outline({"size": [30, 40], "counts": "~~~~~~~~"}), "incomplete")
case("outline, long garbage", outline({"size": [30, 40], "counts": "o" * 500 + "0"}), "incomplete")
case("outline, letters", outline({"size": [30, 40], "counts": "äöü€"}), "incomplete")
case("outline, counts null", outline({"size": [30, 40], "counts": None}), "incomplete")
case("outline, no size", outline({"counts": [0, 1200]}), "run-length code without a size")
case("outline, an empty polygon", outline([[]]), "annotation 1.*an empty outline")
case("outline, of one point", outline([[10, 10]]), "annotation 1.*fewer than three points")
case("outline, of two points", outline([[5, 5, 40, 30]]), "fewer than three points")
case("outline, five numbers", outline([[5, 5, 20, 20, 9]]), "annotation 1.*not a list of x and y")
case("outline, text", outline("abc"), "annotation 1.*neither polygons nor a run-length code")
case("outline, a number", outline(7), "neither polygons nor")
case("outline, a list of codes", outline([{"size": [30, 40], "counts": [0, 1200]}]), "neither polygons nor")
case("outline, not a number", outline([[10, 5, 18, float("nan"), 18, 11]]), "not a list of x and y")
case("outline, far outside", outline([[10, 5, 1e9, 5, 18, 11]]), "far outside")
case("outline, thinner than a pixel", outline([[10, 5, 10, 5, 10, 5]]), "covers no pixel")
case("outline, of nothing", outline({"size": [30, 40], "counts": [1200]}), "covers no pixel")
case("outline, dropped", coco(lambda m: [first("annotations", segmentation="x")(m)], masks=True, only_train=True, on_bad_box="drop"), told="1 boxes that cannot be used were dropped", truth={**TRUTH, "a": TRUTH["a"][1:]}, areas=[120])
case("outline, a box without one", outline([]), told="1 objects have a box but no outline", areas=WHOLE)
case("outline, nowhere", coco(without("annotations", "segmentation"), masks=True), "annotation 1.*has no outline")
case("outline, and no box", coco(without("annotations", "bbox"), masks=True), told="the box around its outline is used", areas=WHOLE)
case("outline, twice", coco(twice, masks=True), told="duplicates", areas=WHOLE)
# fmt: on

# Pascal VOC


def xml(name: str, size: str | None = None, first_only: str = "", filename: str | None = None) -> str:
    """An annotation; ``first_only`` is put in place of the first object's name and box."""
    objects = [
        f"<object><name>{label}</name><difficult>0</difficult><bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin>"
        f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for label, (x1, y1, x2, y2) in TRUTH[name]
    ]
    if first_only:
        objects[0] = f"<object>{first_only}</object>"
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>" if size is None else size
    filename = f"<filename>{name}.png</filename>" if filename is None else filename
    return f"<annotation>{filename}{size}{''.join(objects)}</annotation>"


def voc(
    edit: Callable[[str], str | bytes] = lambda text: text,
    annotations: str = "Annotations",
    images: str = "JPEGImages",
    lists: Callable[[str], str] | None = lambda name: name,
    file: str = "ImageSets/Main/{}.txt",
    only_a: bool = False,
    suffix: str = ".png",
    masks: bool = False,
    on_bad_box: Any = "error",
    **more: Any,
) -> Callable[[], BoxFiles]:
    """Files in one folder, or by split where there is a ``{}`` in its name."""

    def make() -> BoxFiles:
        pictures(images, suffix)
        for split, names in SPLITS.items():
            for name in names:
                text = xml(name, **{k: v for k, v in more.items() if k != "first_only" or name == "a"})
                write(f"{annotations.format(split)}/{name}.xml", edit(text) if name == "a" or not only_a else text)
            if lists:
                write(file.format(split), "".join(f"{lists(name)}\n" for name in names))
        return VOCDetection(".", masks=masks, on_bad_box=on_bad_box, image_size=32, num_workers=0)

    return make


def object_of(inner: str, label: str = "red") -> str:
    return f"<name>{label}</name>{inner}"


def from_zero(text: str) -> str:
    return re.sub(r"<([xy]min)>(\d+)", lambda m: f"<{m[1]}>{int(m[2]) - 1}", text)


ROTATED = "<robndbox><cx>14</cx><cy>8</cy><w>8</w><h>6</h><angle>{}</angle></robndbox>"
TURNED = math.sqrt(8) / 2 + math.sqrt(4.5)  # half the extent of 8×6 turned by an eighth: 4·cos 45° + 3·sin 45°
ABSENT = "<bndbox><xmin>11</xmin><ymin>6</ymin><xmax>18</xmax><ymax>11</ymax></bndbox>"

# fmt: off
case("voc", voc())
case("voc, XML", lambda: (voc()(), [f.rename(f.with_suffix(".XML")) for f in list(Path("Annotations").iterdir())])[0])
case("voc, files side by side", voc(annotations="all", images="all", lists=None), drawn=True)
case("voc, folders by split", voc(annotations="{}", images="{}", lists=None))
case("voc, folders Train, Val", lambda: (voc(annotations="{}", images="{}", lists=None)(), [Path(s).rename(s.title()) for s in SPLITS])[0])
case("voc, width None", voc(size="<size><width>None</width><height>None</height></size>"))
case("voc, no size", voc(size=""))
case("voc, size 0", voc(size="<size><width>0</width><height>0</height></size>"))
case("voc, a size of words", voc(size="<size><width>?</width><height>1e999</height></size>"))
case("voc, another size", voc(size="<size><width>50</width><height>30</height></size>"), "50×30 pixels, but it has 40×30")
case("voc, lists with extensions", voc(lists=lambda n: f"{n}.png"))
case("voc, lists with folders", voc(lists=lambda n: f"JPEGImages/{n}.png"))
case("voc, lists with back-slashes", voc(lists=lambda n: f"JPEGImages\\{n}.png"))
case("voc, lists with a column", voc(lists=lambda n: f"{n}  1"))
case("voc, lists Train.txt", voc(file="ImageSets/Main/{}.TXT"))
case("voc, lists with a byte-order mark", voc(lists=lambda n: f"\ufeff{n}" if n in "ade" else n))
case("voc, VoTT's lists by class", voc(lists=lambda n: f"{n}.png 1", file="ImageSets/Main/red_{}.txt"))
case("voc, trainval and test", lambda: (voc()(), write("ImageSets/Main/trainval.txt", "a\nb\nc\nd\n"), [Path(f"ImageSets/Main/{s}.txt").unlink() for s in ("train", "val")])[0], drawn=True)
case("voc, CVAT's default.txt", voc(file="ImageSets/Main/default_{}.txt"), splits=SPLITS)
case("voc, a list names an image twice", voc(lists=lambda n: f"{n}\n{n}" if n == "a" else n), told="listed twice")
case("voc, a list names what is not there", voc(lists=lambda n: f"x{n}"), "lists 'xa', but there is no xa.xml")
case("voc, byte-order mark", voc(lambda t: t.encode("utf-8-sig")))
case("voc, UTF-16", voc(lambda t: t.encode("utf-16")))
case("voc, UTF-16 only in its declaration", voc(lambda t: f'<?xml version="1.0" encoding="utf-16"?>{t}'))
case("voc, Chinese only in its declaration", voc(lambda t: f'<?xml version="1.0" encoding="gb2312"?>{t}'.replace(">red<", ">rōt<")), truth=named("rōt", "blue"))
case("voc, Latin-1 as declared", voc(lambda t: f'<?xml version="1.0" encoding="iso-8859-1"?>{t}'.replace(">red<", ">röd<").encode("latin-1")), truth=named("röd", "blue"))
case("voc, Chinese as declared", voc(lambda t: f'<?xml version="1.0" encoding="gb2312"?>{t}'.replace(">red<", ">红<").encode("gb2312")), truth=named("红", "blue"))
case("voc, Latin-1 and declared as UTF-8", voc(lambda t: f'<?xml version="1.0" encoding="utf-8"?>{t}'.replace(">red<", ">röd<").encode("latin-1")), truth=named("röd", "blue"), told="read as Windows-1252")
case("voc, an encoding that nobody knows", voc(lambda t: f'<?xml version="1.0" encoding="x-none"?>{t}'))
case("voc, blanks before the declaration", voc(lambda t: f'\n <?xml version="1.0"?>{t}'))
case("voc, a namespace", voc(lambda t: t.replace("<annotation>", '<annotation xmlns="http://host.org/voc">')))
case("voc, a polygon of Roboflow's", voc(first_only=object_of("<polygon><x1>10</x1><y1>5</y1><x2>18</x2><y2>5</y2><x3>18</x3><y3>11</y3><x4>10</x4><y4>11</y4></polygon>")), told="1 times.*a.xml, object 1|has a polygon; the box around it is used")
case("voc, a polygon of LabelMe's", voc(first_only=object_of("<polygon><pt><x>10</x><y>5</y></pt><pt><x>18</x><y>5</y></pt><pt><x>10</x><y>11</y></pt></polygon>")), told="has a polygon; the box")
case("voc, a polygon beside its box", voc(first_only=object_of(ABSENT + "<polygon><x1>10</x1><y1>5</y1><x2>18</x2><y2>5</y2><x3>18</x3><y3>11</y3></polygon>")))
case("voc, polygons as masks", voc(first_only=object_of("<polygon><x1>10</x1><y1>5</y1><x2>18</x2><y2>5</y2><x3>18</x3><y3>11</y3><x4>10</x4><y4>11</y4></polygon>"), masks=True), told="no outline, while others do|has a polygon; the box", areas=WHOLE)
case("voc, a polygon of two points", voc(first_only=object_of("<polygon><x1>10</x1><y1>5</y1><x2>18</x2><y2>5</y2></polygon>")), "a.xml, object 1.*is not four numbers")
case("voc, a rotated box", voc(first_only=object_of(ROTATED.format(0))), told="has a rotated box; the box")
case("voc, a box turned by a quarter", voc(first_only=object_of(ROTATED.format(math.pi / 2))), told="has a rotated box", truth={**TRUTH, "a": [("red", [11, 4, 17, 12]), TRUTH["a"][1]]})
case("voc, a box turned by an eighth", voc(first_only=object_of(ROTATED.format(math.pi / 4))), told="has a rotated box", truth={**TRUTH, "a": [("red", [14 - 7 / math.sqrt(2), 8 - 7 / math.sqrt(2), 14 + 7 / math.sqrt(2), 8 + 7 / math.sqrt(2)]), TRUTH["a"][1]]})
case("voc, a rotated box of words", voc(first_only=object_of(ROTATED.format("up"))), "a.xml, object 1.*is not four numbers")
case("voc, counted from 0", voc(from_zero), told="counted from 0, not from 1.*the first in .*a.xml, object 2")
case("voc, a stray 0", voc(lambda t: (t.replace("<ymin>1<", "<ymin>0<") .replace("<ymin>7<", "<ymin>1<") .replace("<xmin>6<", "<xmin>1<") .replace("<xmin>9<", "<xmin>1<"))), truth={**TRUTH, "c": [("blue", [0, 0, 25, 26])], "e": [("blue", [0, 9, 16, 17])]})
case("voc, no name", voc(first_only=ABSENT), "a.xml, object 1, image a.png: has no class")
case("voc, an empty name", voc(first_only=object_of(ABSENT, " ")), "object 1, image a.png: has no class")
case("voc, no name, dropped", voc(first_only=ABSENT, on_bad_box="drop"), told="1 boxes that cannot be used were dropped", truth={**TRUTH, "a": TRUTH["a"][1:]})
case("voc, no box", voc(first_only=object_of("")), "a.xml, object 1.*is not four numbers")
case("voc, a box of words", voc(first_only=object_of(ABSENT.replace("11<", "x<"))), "a.xml, object 1.*is not four numbers")
case("voc, coordinates with fractions", voc(lambda t: re.sub(r"(\d)</([xy]m)", r"\1.0</\2", t)))
case("voc, difficult as a word", voc(lambda t: t.replace("<difficult>0", "<difficult>True", 1), only_a=True), crowds=1)
case("voc, a filename without extension", voc(filename="<filename>{}</filename>".format("")))
case("voc, no filename", voc(filename=""))
case("voc, a filename of another machine", voc(lambda t: re.sub("<filename>", r"<filename>C:\\sets\\", t)))
case("voc, a filename of before", voc(lambda t: re.sub("<filename>.*</filename>", "<filename>IMG_1.JPG</filename>", t)))
case("voc, upper case of extensions", voc(suffix=".PNG"))
case("voc, images elsewhere", voc(images="pictures/raw"))
case("voc, annotations in folders", voc(annotations="Annotations/{}"))
case("voc, annotations of one name in folders", lambda: (voc(lists=lambda n: f"one/{n}")(), shutil.copytree("Annotations", "Annotations/one"), shutil.copytree("Annotations", "two/two", ignore=shutil.ignore_patterns("one")), shutil.move("two/two", "Annotations/two"), [Path(f"Annotations/{n}.xml").unlink() for n in "abcde"])[0])
case("voc, a list without the folders", lambda: (voc(annotations="Annotations/one")(), shutil.copytree("Annotations/one", "Annotations/two"))[0], "lists 'a', which may be Annotations/one/a.xml or Annotations/two/a.xml")
case("voc, names with dots and blanks", lambda: (voc(lists=lambda n: f"{n}.1 x" if n == "a" else n, filename="")(), Path("Annotations/a.xml").rename("Annotations/a.1 x.xml"), Path("JPEGImages/a.png").rename("JPEGImages/a.1 x.png"))[0], truth={**{n: TRUTH[n] for n in "bcde"}, "a.1 x": TRUTH["a"]}, splits=None)
case("voc, an object twice", voc(lambda t: t.replace("</annotation>", t[t.index("<object>") :]), only_a=True), told="2 boxes are duplicates")
case("voc, CVAT's own", voc(lambda t: t.replace("annotation>", "annotations>")), "root is <annotations>.*CVAT's own format: export as COCO or Pascal VOC")
case("voc, an empty file", voc(lambda t: "", only_a=True), "a.xml cannot be read as XML")
case("voc, half a file", voc(lambda t: t[:90], only_a=True), "a.xml cannot be read as XML")
# fmt: on

# YOLO


def share(box: list[float]) -> list[float]:
    x1, y1, x2, y2 = box
    return [(x1 + x2) / 2 / WIDTH, (y1 + y2) / 2 / HEIGHT, (x2 - x1) / WIDTH, (y2 - y1) / HEIGHT]


def around(box: list[float]) -> list[float]:
    x1, y1, x2, y2 = box
    return [x1 / WIDTH, y1 / HEIGHT, x2 / WIDTH, y1 / HEIGHT, x2 / WIDTH, y2 / HEIGHT, x1 / WIDTH, y2 / HEIGHT]


YAML = "train: images/train\nval: images/val\ntest: images/test\n"
NAMES = "names: [red, blue]\n"
Line = Callable[[int, list[float]], str]


def plain(label: int, box: list[float]) -> str:
    return " ".join(map(str, [label, *share(box)]))


def yolo(
    line: Line = plain,
    settings: str | None = YAML + NAMES,
    images: str = "images/{}",
    labels: str | None = None,
    file: str = "data.yaml",
    edit: Callable[[str], str | bytes] = lambda text: text,
    files: dict[str, str | bytes] | None = None,
    named: str = "{}",
    masks: bool = False,
    root: str = ".",
    **options: Any,
) -> Callable[[], BoxFiles]:
    """Images and labels by split; ``files`` are written too."""

    def make() -> BoxFiles:
        pictures(images)
        for split, names in SPLITS.items():
            place = (images.replace("images", "labels") if labels is None else labels).format(split)
            for name in names:
                lines = [line(("red", "blue").index(label), box) for label, box in TRUTH[name]]
                write(f"{place}/{named.format(name)}.txt", edit("".join(f"{line}\n" for line in lines)))
        if settings is not None:
            write(file, settings)
        for name, text in (files or {}).items():
            write(name, text)
        return YOLODetection(root, masks=masks, image_size=32, num_workers=0, **options)

    return make


def numbered(numbers: tuple[int, int]) -> Line:
    return lambda label, box: plain(numbers[label], box)


def longer(*more: float, base: Callable[[list[float]], list[float]] = share) -> Line:
    return lambda label, box: " ".join(map(str, [label, *base(box), *more]))


def keys(numbers: range | list[int], quote: str = "") -> str:
    return "names:\n" + "".join(f"  {quote}{k}{quote}: d{k}\n" for k in numbers)


def in_pixels(label: int, box: list[float]) -> str:
    return " ".join(map(str, [label, *np.multiply(share(box), [WIDTH, HEIGHT] * 2).tolist()]))


def pose(points: int, marks: bool) -> Line:
    """Keypoints on the box's diagonal."""

    def line(label: int, box: list[float]) -> str:
        x1, y1, x2, y2 = box
        found = []
        for k in range(points):
            part = (k + 0.5) / points
            found += [(x1 + part * (x2 - x1)) / WIDTH, (y1 + part * (y2 - y1)) / HEIGHT, *[k % 3] * marks]
        return " ".join(map(str, [label, *share(box), *found]))

    return line


def diamond(label: int, box: list[float]) -> str:
    x1, y1, x2, y2 = box
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    corners = [x, y1, x2, y, x, y2, x1, y]
    return " ".join(map(str, [label, *np.divide(corners, [WIDTH, HEIGHT] * 4).tolist()]))


def removed(make: Callable[[], BoxFiles], *places: str) -> Callable[[], BoxFiles]:
    def run() -> BoxFiles:
        data = make()
        for place in places:
            shutil.rmtree(place) if Path(place).is_dir() else Path(place).unlink()
        return data

    return run


def listing(prefix: str) -> dict[str, str | bytes]:
    return {f"{s}.txt": "".join(f"{prefix}{n}.png\n" for n in names) for s, names in SPLITS.items()}


def mixed(label: int, box: list[float]) -> str:
    return longer(base=around)(label, box) if label == 0 else plain(label, box)


# fmt: off
case("yolo", yolo())
case("yolo, names by number", yolo(settings=YAML + "names: {0: red, 1: blue}\n"))
case("yolo, names by quoted number", yolo(numbered((2, 10)), YAML + keys(range(12), "'")), truth=named("d2", "d10"), told="classes are empty")
case("yolo, names from 1", yolo(numbered((1, 2)), YAML + keys([1, 2])), truth=named("d1", "d2"))
case("yolo, names from 1 to 10", yolo(numbered((1, 10)), YAML + keys(range(1, 11))), truth=named("d1", "d10"), told="classes are empty")
case("yolo, names with gaps", yolo(numbered((3, 20)), YAML + keys([0, 1, *range(3, 21)])), truth=named("d3", "d20"), told="classes are empty")
case("yolo, a number in a gap", yolo(numbered((0, 1)), YAML + keys([0, 2])), "line 2.*unknown class, '1'. The classes are d0, d2")
case("yolo, names by negative number", yolo(settings=YAML + "names: {-1: red, 1: blue}\n"), "data.yaml: in 'names', '-1': 'red' is not a number and a name")
case("yolo, names that are numbers", yolo(settings=YAML + "names: [7, 8]\n"), truth=named("7", "8"))
case("yolo, names that are yes and no", yolo(settings=YAML + "names: [yes, no]\n"), truth=named("yes", "no"))
case("yolo, names that are 1.0 and null", yolo(settings=YAML + "names: [1.0, null]\n"), truth=named("1.0", "null"))
case("yolo, names as text", yolo(settings=YAML + "names: red, blue\n"), truth=TRUTH)
case("yolo, names as the text of a list", yolo(settings=YAML + "names: \"['red', 'blue']\"\n"))
case("yolo, labels in upper case", lambda: (yolo()(), [f.rename(f.with_name(f.name.upper())) for f in list(Path("labels").rglob("*.txt"))])[0])
case("yolo, one folder to train on and to validate", yolo(settings="train: images\nval: images\n" + NAMES, images="images", labels="labels"), told="are also in another one", splits={"train": "abcde", "val": "abcde"})
case("yolo, numbers by name", yolo(settings=YAML + "names: {red: 0, blue: 1}\n"))
case("yolo, names in a list of lists", yolo(settings=YAML + "names: [[red], [blue]]\n"), r"data.yaml: in 'names', 0: \['red'\]")
case("yolo, two classes of one name", yolo(settings=YAML + "names: [red, red]\n"), r"2 classes have the name 'red' \(the numbers 0, 1\)")
case("yolo, two numbers of one name", yolo(settings=YAML + "names: {0: red, 5: red}\n"), r"2 classes have the name 'red' \(the numbers 0, 5\)")
case("yolo, a name with blanks", yolo(settings=YAML + "names: [' red ', \"blue\"]\n"))
case("yolo, empty settings", yolo(settings=""), "data.yaml does not say what its classes are called")
case("yolo, empty settings and classes.txt", yolo(settings="", files={"classes.txt": "red\nblue\n"}))
case("yolo, settings as a list", yolo(settings="- a\n- b\n"), r"data.yaml holds no settings, but \['a', 'b'\]")
case("yolo, settings as text", yolo(settings="hello"), "data.yaml holds no settings, but 'hello'")
case("yolo, broken settings", yolo(settings="names: [a\n\t- b"), "data.yaml cannot be read as YAML")
case("yolo, settings with a byte-order mark", yolo(settings="\ufeff" + YAML + NAMES))
case("yolo, keys in upper case", yolo(settings=YAML.replace("train:", "Train:") + NAMES))
case("yolo, classes.txt", yolo(settings=None, files={"classes.txt": "red\nblue\n"}))
case("yolo, classes.txt of Windows", yolo(settings=None, files={"classes.txt": b"\xef\xbb\xbfred\r\nblue\r\n"}))
case("yolo, classes.txt with an empty line", yolo(numbered((0, 2)), None, files={"classes.txt": "red\n\nblue\n"}))
case("yolo, classes.txt in Latin-1", yolo(settings=None, files={"classes.txt": "röd\nblue\n".encode("latin-1")}), truth=named("röd", "blue"), told="read as Windows-1252")
case("yolo, labelImg's classes.txt", yolo(settings=None, files={"labels/train/classes.txt": "red\nblue\n"}))
case("yolo, no names", yolo(settings=None), "does not say what its classes are called")
case("yolo, classes.txt and train/images", yolo(settings=None, images="{}/images", files={"classes.txt": "red\nblue\n"}))
case("yolo, Roboflow", yolo(settings="train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnc: 2\n" + NAMES, images="{}/images", files={}), "valid/images, which data.yaml names")
case("yolo, Roboflow's paths", yolo(settings="train: ../train/images\nval: ../val/images\ntest: ../test/images\nnc: 2\n" + NAMES, images="{}/images"))
case("yolo, Roboflow without test:", yolo(settings="train: ../train/images\nval: ../val/images\n" + NAMES, images="{}/images"))
case("yolo, Roboflow's test that is not there", removed(yolo(settings="train: ../train/images\nval: ../val/images\ntest: ../test/images\n" + NAMES, images="{}/images"), "test"), told="test split has no folder", splits={"train": "abc", "val": "d"}, truth={n: boxes for n, boxes in TRUTH.items() if n != "e"})
case("yolo, another machine's folders", yolo(settings="path: /home/ann/sets/x\ntrain: /home/ann/sets/x/images/train\nval: D:\\x\\images\\val\n" + NAMES))
case("yolo, settings of another name", yolo(file="things.yaml"))
case("yolo, settings of two names", yolo(file="things.yaml", files={"others.yaml": NAMES}), "has others.yaml and things.yaml: say which")
case("yolo, settings of something else beside", yolo(settings=NAMES, file="things.yaml", files={"hyper.yaml": "lr0: 0.1\n"}))
case("yolo, labels of an image called test", lambda: (yolo(settings=NAMES, images="all", labels="all")(), [Path(f"all/e.{s}").rename(f"test.{s}") for s in ("png", "txt")])[0], drawn=True, truth={**{n: TRUTH[n] for n in "abcd"}, "test": TRUTH["e"]})
case("yolo, a folder further up", yolo(file="settings/x.yaml", settings="train: ../images/train\nval: ../images/val\ntest: ../images/test\n" + NAMES, root="settings/x.yaml"))
case("yolo, settings .yml", yolo(file="data.yml"))
case("yolo, settings given", yolo(file="sets/x.yaml", settings="path: ..\n" + YAML + NAMES, root="sets/x.yaml"))
case("yolo, folders Train, Val", lambda: (yolo(settings=NAMES)(), [Path(k, s).rename(f"{k}/{s.title()}") for k in ("images", "labels") for s in SPLITS])[0])
case("yolo, Images and Labels", lambda: (yolo(settings=NAMES)(), [Path(k).rename(k.title()) for k in ("images", "labels")])[0])
case("yolo, validation called valid", lambda: (yolo(settings=NAMES)(), [Path(k, "val").rename(f"{k}/valid") for k in ("images", "labels")])[0])
case("yolo, labels beside images", yolo(settings="train: pics/train\nval: pics/val\ntest: pics/test\n" + NAMES, images="pics/{}"))
case("yolo, one folder", yolo(settings=NAMES, images="images", labels="labels"), drawn=True)
case("yolo, lists", yolo(settings="train: train.txt\nval: val.txt\ntest: test.txt\n" + NAMES, images="images", labels="labels", files=listing("./images/")))
case("yolo, lists without settings", yolo(settings=NAMES, images="images", labels="labels", files=listing("images/")))
case("yolo, lists of another machine", yolo(settings=NAMES, images="images", labels="labels", files=listing("/home/ann/x/images/")), told="found by its name")
case("yolo, lists of Windows", yolo(settings=NAMES, images="images", labels="labels", files=listing("images\\")))
case("yolo, CVAT's lists", yolo(settings="classes = 2\ntrain = data/train.txt\nvalid = data/val.txt\ntest = data/test.txt\nnames = data/obj.names\nbackup = backup/\n", file="obj.data", images="obj_{}_data", labels="obj_{}_data", files={**{f"{s}.txt": "".join(f"data/obj_{s}_data/{n}.png\n" for n in names) for s, names in SPLITS.items()}, "obj.names": "red\nblue\n"}), told="found by its name")
case("yolo, CVAT's obj.names alone", yolo(settings=None, images="obj_train_data", labels="obj_train_data", files={"obj.names": "red\nblue\n"}), drawn=True)
case("yolo, a list names an image twice", yolo(settings=NAMES, images="images", labels="labels", files={**listing("images/"), "train.txt": "images/a.png\nimages/b.png\nimages/c.png\nimages/a.png\n"}), told="listed twice")
case("yolo, a folder that is not there", yolo(settings=YAML.replace("images/train", "images/trian") + NAMES), "no .*images/trian, which data.yaml names")
case("yolo, labels of other names", yolo(named="img_{}"), r"None of the 3 images to train on has labels: images/train/a.png should have its labels in labels/train/a.txt, which is not there, and img_a.txt there belongs to no image")
case("yolo, no labels of the training", removed(yolo(), "labels/train"), "None of the 3 images to train on has labels")
case("yolo, no labels of the test", removed(yolo(), "labels/test"), told="No image of the split 'test' has labels", truth={**TRUTH, "e": []})
case("yolo, no labels at all", removed(yolo(settings=NAMES, images="images", labels="labels"), "labels"), "None of the 5 images to train on has labels")
case("yolo, an image without labels", removed(yolo(), "labels/train/b.txt"), truth={**TRUTH, "b": []})
case("yolo, labels of most have other names", lambda: (yolo()(), [Path(f"labels/train/{n}.txt").rename(f"labels/train/x{n}.txt") for n in "ab"])[0], "2 of 3 images have no labels, while 2 label files belong to no image")
case("yolo, labels of no image", yolo(files={"labels/train/zzz.txt": ""}), told=None, splits=SPLITS)
case("yolo, an outline", yolo(longer(base=around), masks=True), areas=WHOLE)
case("yolo, an outline without masks", yolo(longer(base=around)))
case("yolo, an outline with a score", yolo(longer(0.7, base=around), masks=True), told="ends with a score", areas=WHOLE)
case("yolo, outlines and boxes", yolo(mixed, masks=True), told="no outline, while others do", areas=WHOLE)
case("yolo, boxes where masks are asked for", yolo(masks=True), "line 1.*has no outline")
case("yolo, a pose of two points", yolo(pose(2, False), "kpt_shape: [2, 2]\n" + YAML + NAMES), told="label is a pose")
case("yolo, a pose of marked points", yolo(pose(3, True), "kpt_shape: [3, 3]\n" + YAML + NAMES), told="label is a pose")
case("yolo, a pose of which nothing is said", yolo(pose(5, True)), told="label is a pose")
case("yolo, a pose of unmarked points", yolo(pose(5, False)), told="label is a pose")
case("yolo, rotated boxes", yolo(diamond), told="rotated box; the box around it is used")
case("yolo, byte-order marks", yolo(edit=lambda t: t.encode("utf-8-sig")))
case("yolo, commas", yolo(edit=lambda t: t.replace(" ", ",")))
case("yolo, commas and blanks", yolo(edit=lambda t: t.replace(" ", ", ")))
case("yolo, semicolons", yolo(edit=lambda t: t.replace(" ", ";")))
case("yolo, commas for points", yolo(edit=lambda t: t.replace(".", ",")))
case("yolo, tabs and empty lines", yolo(edit=lambda t: t.replace(" ", "\t").replace("\n", "\r\n\r\n")))
case("yolo, a score", yolo(longer(0.93)), told="ends with a score, which is dropped")
case("yolo, a sixth column that is no score", yolo(longer(12)), "line 1: write a class and 4 numbers, or 6 or more, not 5")
case("yolo, classes as 0.0", yolo(edit=lambda t: re.sub(r"(?m)^(\d) ", r"\1.0 ", t)))
case("yolo, classes by name", yolo(edit=lambda t: re.sub(r"(?m)^(\d) ", lambda m: ("red ", "blue ")[int(m[1])], t)))
case("yolo, an unknown name", yolo(edit=lambda t: "green" + t[1:]), "a.txt, line 1: 'green .* is not a class and numbers")
case("yolo, classes of a half", yolo(edit=lambda t: "0.5" + t[1:]), "line 1.*unknown class, '0.5'")
case("yolo, negative classes", yolo(edit=lambda t: "-1" + t[1:]), "line 1.*unknown class, '-1'")
case("yolo, a class without end", yolo(edit=lambda t: "1e300" + t[1:]), r"line 1.*unknown class, '1e\+300'")
case("yolo, no numbers", yolo(edit=lambda t: "nan" + t[1:]), "line 1: 'nan.* is not a class and numbers")
case("yolo, infinite numbers", yolo(edit=lambda t: t.replace("0.", "inf", 1)), "line 1: .* is not a class and numbers")
case("yolo, three numbers", yolo(edit=lambda t: t.rsplit(" ", 1)[0] + "\n"), "not 3")
case("yolo, pixels", yolo(in_pixels), "All would be right if they were centre x, centre y, width, height in pixels.*divide x and width by its width")
case("yolo, pixels in one file", lambda: (yolo()(), write("labels/train/c.txt", in_pixels(1, [5, 6, 25, 26])))[0], "c.txt, line 1.*1 of them would be right if they were centre x, centre y, width, height in pixels")
case("yolo, corners", yolo(lambda k, b: f"{k} {b[0] / 40} {b[1] / 30} {b[2] / 40} {b[3] / 30}"), "if they were corners as fractions")
case("yolo, lines twice", yolo(edit=lambda t: t * 2), told="boxes are duplicates, and count once; the first: labels/train/a.txt, line 3")
case("yolo, bytes", yolo(edit=lambda t: b"\xff\xfe\x00\xd8" + t.encode()), "a class and|is not a class")
# fmt: on

# Tables


def rows(
    box: Callable[[list[float]], list[Any]] = list, path: str = "{}.png", labels: tuple[Any, Any] = ("red", "blue")
) -> pd.DataFrame:
    made = [
        [path.format(name), *box(values), labels[("red", "blue").index(label)], split]
        for split, names in SPLITS.items()
        for name in names
        for label, values in TRUTH[name]
    ]
    return pd.DataFrame(made, columns=["path", "xmin", "ymin", "xmax", "ymax", "label", "split"])


def table(
    made: pd.DataFrame | Callable[[], pd.DataFrame], file: str = "boxes.csv", images: str = ".", suffix: str = ".png",
    write_options: dict[str, Any] | None = None, **options: Any,
) -> Callable[[], BoxFiles]:  # fmt: skip
    def make() -> BoxFiles:
        pictures(images, suffix)
        frame = made if isinstance(made, pd.DataFrame) else made()
        if file.endswith("parquet"):
            frame.to_parquet(file)
        else:
            frame.to_csv(file, index=False, **(write_options or {}))
        return CSVDetection(file, image_size=32, num_workers=0, **options)

    return make


def with_empty(labels: tuple[Any, Any] = (0, 1)) -> pd.DataFrame:
    """A table in which the image b has no objects."""
    made = rows(labels=labels)
    made.loc[made.path == "b.png", ["xmin", "ymin", "xmax", "ymax", "label"]] = None
    return made


EMPTY_B: Truth = {**named("0", "1"), "b": []}


# fmt: off
def as_csv(edit: Callable[[str], str] = str, encoding: str = "utf-8", **options: Any) -> Callable[[], BoxFiles]:
    """A table whose text is changed."""

    def make() -> BoxFiles:
        pictures(".")
        write("boxes.csv", edit(rows(labels=("röt", "blue")).to_csv(index=False)).encode(encoding))
        return CSVDetection("boxes.csv", image_size=32, num_workers=0, **options)

    return make


def shares(box: list[float]) -> list[float]:
    return [box[0] / WIDTH, box[1] / HEIGHT, box[2] / WIDTH, box[3] / HEIGHT]


IMAGES_OPEN = {"path": "ImageID", "label": "LabelName", "xmin": "XMin", "ymin": "YMin", "xmax": "XMax", "ymax": "YMax"}

case("csv, Windows-1252", as_csv(encoding="cp1252"), truth=named("röt", "blue"), told="read as Windows-1252")
case("csv, UTF-16", as_csv(lambda t: "\ufeff" + t, "utf-16-le"), truth=named("röt", "blue"))
case("csv, Excel's first line", as_csv(lambda t: "sep=;\r\n" + t.replace(",", ";")), truth=named("röt", "blue"))
case("csv, empty rows of Excel", as_csv(lambda t: t + ",,,,,,\n" * 3), truth=named("röt", "blue"))
case("csv, a workbook", as_csv(lambda t: "PK\3\4"), r"cannot be read as a table \(it is not text\)")
case("csv, Open Images", table(rows(shares, "{}").rename(columns=IMAGES_OPEN)), told="read as fractions of the images; the first is .0.25, 0.166667")
case("csv, x1", table(rows().rename(columns={"xmin": "x1", "ymin": "y1", "xmax": "x2", "ymax": "y2"})))
case("csv, one box in shares", table(lambda: pd.concat([rows(), rows(shares).iloc[2:3]])), told="1 boxes lie within the first pixel.*row 7, image b.png", truth={**TRUTH, "b": [*TRUTH["b"], ("red", [0.5, 1 / 3, 0.75, 2 / 3])]})
case("csv, no larger than a float tells", table(rows(lambda b: [b[0], b[1], b[0] + 1e-7, b[3]])), "row 1.*is empty")
case("csv", table(rows()))
case("csv, an image without objects", table(lambda: with_empty(("red", "blue"))), truth={**TRUTH, "b": []})
case("csv, classes 0 and 1", table(rows(labels=(0, 1))), truth=named("0", "1"))
case("csv, classes 0 and 1 with an empty cell", table(with_empty), truth=EMPTY_B)
case("parquet, classes 0 and 1 with an empty cell", table(lambda: with_empty().astype({"label": float}), "boxes.parquet"), truth=EMPTY_B)
case("parquet, classes 0 and 1", table(rows(labels=(0, 1)), "boxes.parquet"), truth=named("0", "1"))
case("csv, classes 007 and 1", table(rows(labels=("007", "1"))), truth=named("007", "1"))
case("csv, classes 1.0 and 2.0", table(rows(labels=("1.0", "2.0"))), truth=named("1.0", "2.0"))
case("csv, classes with blanks", table(rows(labels=(" red", "blue "))))
case("csv, a box without a class", table(rows(labels=("red", None))), "boxes.csv, row 2, image a.png: has no class")
case("csv, rows twice", table(pd.concat([rows(), rows()])), told="duplicates")
case("csv, back-slashes", table(rows(path="images\\{}.png"), images="images"))
case("csv, images/ left out", table(rows(), images="images"))
case("csv, another machine's paths", table(rows(path="/home/ann/{}.png"), images="pictures"), told="found by its name")
case("csv, URLs", table(rows(path="https://host.org/x/{}.png")), told="found by its name")
case("csv, upper case of extensions", table(rows(path="{}.PNG")))
case("csv, an image in two spellings", table(pd.concat([rows(), rows(path="./{}.png").head(1)])), told="listed twice|duplicates")
case("csv, VoTT's columns", table(rows().rename(columns={"path": "image"})))
case("csv, Roboflow's columns", table(rows().rename(columns={"path": "filename", "label": "class"}).assign(width=WIDTH, height=HEIGHT)))
case("csv, commas for points", table(rows(lambda b: [f"{v:.1f}".replace(".", ",") for v in b])))
case("csv, words", table(rows(lambda b: ["left", *b[1:]])), "boxes.csv, row 1.*is not four numbers")
case("csv, sizes", table(rows(lambda b: [b[0], b[1], b[2] - b[0], b[3] - b[1]])), "All would be right if they were x, y, width, height.*box_format xywh")
case("csv, sizes as told", table(rows(lambda b: [b[0], b[1], b[2] - b[0], b[3] - b[1]]), box_format="xywh"))
case("csv, difficult", table(rows().assign(difficult=["True", *["0"] * 5])), crowds=1)
case("csv, one image is not there", removed(table(rows()), "b.png"), r"1 of 5 images cannot be read: b.png \(No such file")
case("csv, byte-order mark", table(rows(), write_options={"encoding": "utf-8-sig"}))
# fmt: on


def read(data: BoxFiles) -> tuple[dict[str, str], Truth, list[int], int]:
    """All samples: images by split, objects by image, pixels of the masks of a, ignored objects."""
    splits, objects, areas, crowds = {}, {}, [], 0
    for split, source in data.sources.items():
        stems = [Path(path).stem.lower() for path in source.paths]
        splits[split] = "".join(stems)
        for k, stem in enumerate(stems):
            sample = source[k]
            names = [data.label_names[label] for label in sample["labels"]]
            objects[stem] = list(zip(names, sample["boxes"].tolist(), strict=True))
            crowds += int(sample["ignore"].sum())
            if stem == "a" and "masks" in sample:
                areas = sample["masks"].sum((1, 2), dtype=int).tolist()
    return splits, objects, areas, crowds


@pytest.mark.parametrize("name", CASES)
def test_a_small_set_is_read_rightly_or_refused_in_a_paragraph(name: str) -> None:
    expected = CASES[name]
    data = expected.make()
    if expected.refused is not None:
        with pytest.raises(DataError, match=expected.refused) as error:
            _ = data.sources
        assert len(str(error.value)) < 900
        return
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        splits, objects, areas, crowds = read(data)
    texts = [str(warning.message) for warning in told]
    assert [text for text in texts if not re.search(expected.told or "(?!)", text)] == []
    assert bool(texts) == bool(expected.told)
    if expected.splits is not None:
        assert splits == expected.splits
    truth = TRUTH if expected.truth is None else expected.truth
    assert objects.keys() == truth.keys()
    for image, those in truth.items():
        assert [label for label, _ in objects[image]] == [label for label, _ in those]
        np.testing.assert_allclose([b for _, b in objects[image]], [b for _, b in those], atol=1e-3)
    assert crowds == expected.crowds
    if expected.areas is not None:
        assert areas == expected.areas


# Whatever is in a file

ODD: list[Any] = [None, "", [], {}, "x", -1, 1.5, float("nan"), float("inf"), 10**400, [[1]], True, "\0", "9" * 5000]


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in a tree; of numbers in a row to the first."""
    row = isinstance(tree, list) and not any(isinstance(value, dict | list) for value in tree)
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree[:1] if row else tree):
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def changed(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value at a place, or without it where the value is ``...``."""
    tree = copy.deepcopy(tree)
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return tree


def refusal(data: BoxFiles) -> str:
    """What a set is refused with; empty where every sample of it can be read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read(data)
        except DataError as error:
            return str(error)
    return ""


def coco_set(made: Any, masks: bool) -> BoxFiles:
    write("all.json", json.dumps(made))
    return COCODetection("all.json", masks=masks, image_size=32, num_workers=0)


def assert_all_end_well(trees: Iterator[tuple[Any, Any]], make: Callable[[Any], BoxFiles], each: int) -> None:
    """Every set, or one of so many, is read or refused, and some are refused."""
    refused = 0
    for what, tree in islice(trees, 0, None, each):
        try:
            message = refusal(make(tree))
        except Exception as error:
            pytest.fail(f"{what}: {error!r}")
        assert not message or 20 < len(message) < 6000 or "999" in str(what)
        refused += bool(message)
    assert refused > 10


SHARES = pytest.mark.parametrize("each", [4, pytest.param(1, marks=pytest.mark.slow)])


def mutants(tree: Any) -> Iterator[tuple[Any, Any]]:
    """The tree with each of its values replaced and left out."""
    for path in places(tree):
        for value in (..., *ODD):
            yield (path, value), changed(tree, path, value)


@SHARES
def test_whatever_stands_in_a_field_of_coco_a_set_is_read_or_refused(each: int) -> None:
    pictures(".", names="ab")
    made = content("ab", outlines=True)
    made["annotations"][1]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": "o25i0000000000ml0"}
    made["annotations"][2]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": [0, 120, 1080]}
    assert_all_end_well(mutants(made), lambda tree: coco_set(tree, True), each)


@SHARES
def test_whatever_stands_in_a_field_of_voc_a_set_is_read_or_refused(each: int) -> None:
    pictures(".", names="ab")
    write("b.xml", xml("b"))
    text = xml(
        "a",
        first_only=object_of(
            ABSENT + "<polygon><x1>10</x1><y1>5</y1><x2>18</x2><y2>5</y2><x3>18</x3><y3>11</y3></polygon>"
        ),
    )
    text = text.replace("</annotation>", f"<object>{object_of(ROTATED.format(1))}</object></annotation>")
    fields = list(re.finditer(r"<(\w+)>([^<]*)</\1>", text))
    odd = [*map(str, ODD[:-2]), "1e400", "&#0;", "&amp;", "９", "\udcff", "9" * 5000]

    def trees() -> Iterator[tuple[Any, Any]]:
        for field in fields:
            for value in ("", *(f"<{field[1]}>{value}</{field[1]}>" for value in odd), "<x/>", "<x>"):
                yield (field[0], value), text[: field.start()] + value + text[field.end() :]

    def make(tree: str) -> BoxFiles:
        write("a.xml", tree.encode("utf-8", "surrogateescape"))
        return VOCDetection(".", image_size=32, num_workers=0)

    assert_all_end_well(trees(), make, each)


@SHARES
def test_whatever_stands_in_a_line_or_a_setting_of_yolo_a_set_is_read_or_refused(each: int) -> None:
    pictures("images", names="abc")
    lines = [longer(0.5)(0, [10, 5, 18, 11]), longer(base=around)(1, [0, 0, 4, 30])]
    odd = [*map(str, ODD), "1e400", "0,5", ",", ";", "１", "-"]
    settings = {"path": ".", "names": {"0": "red", "1": "blue"}, "kpt_shape": [2, 2], "nc": 2, "train": "images"}
    write("labels/b.txt", plain(0, [10, 5, 18, 11]))
    write("labels/c.txt", plain(1, [10, 5, 18, 11]))

    def trees() -> Iterator[tuple[Any, Any]]:
        for number, line in enumerate(lines):
            fields = line.split()
            for place in range(len(fields)):
                for value in ("", *odd):
                    changed_line = " ".join([*fields[:place], value, *fields[place + 1 :]])
                    yield (number, place, value), ("\n".join([*lines[:number], changed_line]), settings)
        for what, tree in mutants(settings):
            yield what, ("\n".join(lines), tree)

    def make(tree: tuple[str, Any]) -> BoxFiles:
        write("labels/a.txt", tree[0])
        try:
            write("data.yaml", yaml.safe_dump(tree[1]))
        except ValueError:
            write("data.yaml", "names: [red]")
        return YOLODetection(".", masks=True, image_size=32, num_workers=0)

    assert_all_end_well(trees(), make, each)


@SHARES
def test_whatever_stands_in_a_cell_of_a_table_a_set_is_read_or_refused(each: int) -> None:
    pictures(".")
    made = rows().assign(difficult="0")

    def trees() -> Iterator[tuple[Any, Any]]:
        for column in made.columns:
            for value in ODD:
                changed_table = made.astype(object)
                changed_table.at[0, column] = value
                yield (column, value), changed_table
            yield (column, ...), made.drop(columns=column)

    def make(frame: pd.DataFrame) -> BoxFiles:
        frame.to_csv("boxes.csv", index=False)
        return CSVDetection("boxes.csv", image_size=32, num_workers=0)

    assert_all_end_well(trees(), make, each)


@pytest.mark.parametrize(
    "data", [b"", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\x80" * 100, b"\x00\xff" * 500, b"[" * 100, b"\n"]
)
def test_whatever_bytes_a_file_holds_a_set_is_read_or_refused(data: bytes) -> None:
    readers: dict[str, Callable[[], BoxFiles]] = {
        "all.json": lambda: COCODetection("all.json"),
        "a.xml": lambda: VOCDetection("."),
        "labels/a.txt": lambda: YOLODetection(".", masks=True),
        "classes.txt": lambda: YOLODetection("."),
        "data.yaml": lambda: YOLODetection("."),
        "train.txt": lambda: YOLODetection("."),
        "boxes.csv": lambda: CSVDetection("boxes.csv"),
    }
    for number, (file, make) in enumerate(readers.items()):
        place = Path(f"set{number}")
        place.mkdir()
        with contextlib.chdir(place):
            pictures("images", names="ab")
            write("b.xml", xml("b"))
            write("labels/b.txt", plain(0, [10, 5, 18, 11]))
            write("classes.txt", "red")
            write(file, data)
            refusal(make())
