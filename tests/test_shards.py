"""Pictures in tar and Parquet files: the same as in folders, and what is wrong with a file is told."""

import gzip
import http.server
import io
import json
import os
import tarfile
import threading
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from datamodules import (
    COCODetection,
    COCOSegmentation,
    DataError,
    DigitMasks,
    DigitScenes,
    ImageFolder,
    LabelColumns,
    Manifest,
    MaskFolder,
    MultiLabelTable,
    PeopleTable,
    RegressionTable,
    Shards,
    UnlabelledShards,
    YOLODetection,
)
from datamodules.shards import ShardSet
from pipelines.classification import classification
from pipelines.convert import convert
from pipelines.engine.command import command

COUNTS = {"train": 12, "val": 4, "test": 4}  # of each class


@pytest.fixture
def forms() -> dict[str, str]:
    """The same pictures in a folder, in tar files and in Parquet files as Hugging Face's."""
    generator = np.random.default_rng(0)
    for split, count in COUNTS.items():
        for name in ("cat", "dog"):
            Path("folder", split, name).mkdir(parents=True)
            for k in range(count):
                pixels = generator.integers(0, 256, (20, 24, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(Path("folder", split, name, f"{k}.{'jpg' if k % 2 else 'png'}"))
    command(convert, ["tar", "--data", "ImageFolder", "--data.root", "folder", "--form", "webdataset"])
    Path("parquet").mkdir()
    features = {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}
    for split, source in ImageFolder("folder").sources.items():
        assert source.paths is not None
        images = [{"bytes": Path(path).read_bytes(), "path": Path(path).name} for path in source.paths]
        table = pa.table(
            {"image": images, "label": source.labels}, metadata={"huggingface": json.dumps({"info": features})}
        )
        pq.write_table(table, f"parquet/{split}-00000-of-00001.parquet", row_group_size=5)
    return {"folder": "folder", "tar": "tar", "parquet": "parquet", "pattern": "tar/*-000000.tar"}


def data_of(root: str, **settings: Any) -> ImageFolder | Shards:
    kind = ImageFolder if root == "folder" else Shards
    return kind(root, image_size=16, batch_size=8, seed=3, **{"num_workers": 0, **settings})


def test_a_folder_tar_and_parquet_files_give_the_same_batches_and_the_same_training(forms: dict[str, str]) -> None:
    expected = data_of("folder")
    loader = expected.loader("train")
    loader.set_epoch(1)
    batches = list(loader)
    for form, workers in (("tar", 2), ("parquet", 0), ("pattern", 0)):
        data = data_of(forms[form], num_workers=workers)
        assert data.label_names == ["cat", "dog"]
        assert data.identity()["splits"] == expected.identity()["splits"]
        loader = data.loader("train")
        loader.load_state_dict({"epoch": 1, "batches_done": 1})  # resumed in the middle
        for ours, theirs in zip(loader, batches[1:], strict=True):
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    weights = []
    for form in ("folder", "tar", "parquet"):
        args = [
            "fit",
            "--data",
            "ImageFolder" if form == "folder" else "Shards",
            "--data.root",
            form,
            "--data.image_size",
            "16",
        ]
        quiet = ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
        cli = classification(
            [*args, *quiet, "--data.num_workers", "0", "--trainer.max_epochs", "1", "--output", f"out-{form}"]
        )
        weights.append(cli.model.state_dict())
    for other in weights[1:]:
        assert all(torch.equal(value, other[key]) for key, value in weights[0].items())


def test_shards_at_an_address_are_read_in_parts_and_anew_when_they_change(forms: dict[str, str]) -> None:
    memory = fsspec.filesystem("memory")
    memory.put("tar/", "/bucket/", recursive=True)
    data, local = data_of("memory://bucket"), data_of("tar")
    assert data.title == "bucket"
    assert data.identity()["splits"] == local.identity()["splits"]
    for ours, theirs in zip(data.loader("val"), local.loader("val"), strict=True):
        assert torch.equal(ours["image"], theirs["image"])
    memory.put("tar/train-000000.tar", "/bucket/val-000000.tar")
    assert len(data_of("memory://bucket").sources["val"]) == 2 * COUNTS["train"]
    os.replace("tar/train-000000.tar", "tar/val-000000.tar")
    with pytest.raises(DataError, match="nothing to train on"):
        data_of("tar").loader("train")
    assert len(data_of("tar").sources["val"]) == 2 * COUNTS["train"]


def written(kind: str) -> None:
    """Writes data of a task as files: pictures in ``i/``, and what belongs to them."""
    generator = np.random.default_rng(1)
    Path("i").mkdir()
    pixels = [generator.integers(0, 256, (40, 48, 3)).astype(np.uint8) for _ in range(24)]
    for k, image in enumerate(pixels):
        Image.fromarray(image).save(f"i/{k:02}.{'jpg' if k % 3 else 'png'}")
    names = sorted(os.listdir("i"))
    if kind in ("boxes", "outlines", "objects"):
        corners = generator.uniform(0, 20, (48, 2))
        boxes = np.concatenate([corners, generator.uniform(4, 20, (48, 2))], 1).tolist()
        entries = [
            {
                "id": k,
                "image_id": k // 2,
                "category_id": [7, 3, 5][k % 3],
                "bbox": box,
                "iscrowd": int(k == 5),
                "area": 10 + k / 7,
            }
            for k, box in enumerate(boxes)
            if k > 1  # the first picture has none
        ]
        for (x, y, w, h), entry in zip(boxes[2:], entries, strict=True) if kind != "boxes" else ():
            entry["segmentation"] = [[x, y, x + w, y, x + w / 3, y + h]]
        images = [{"id": k, "file_name": f"i/{name}"} for k, name in enumerate(names)]
        categories = [{"id": k, "name": name} for k, name in ((3, "zebra"), (5, "a cat"), (7, "dog"))]
        Path("a.json").write_text(json.dumps({"images": images, "annotations": entries, "categories": categories}))
    elif kind == "masks":
        Path("m").mkdir()
        for name in names:
            values = generator.choice([0, 50, 255], (40, 48)).astype(np.uint8)
            Image.fromarray(values).save(Path("m", name).with_suffix(".png"))
        Path("classes.csv").write_text("name,value\nroad,50\nbackground,0\nvoid,255\n")
    else:
        numbers = generator.normal(size=(24, 5)).astype(np.float32)
        columns: dict[str, Any] = {"path": [f"i/{name}" for name in names], "label": ["ox", "a cow"] * 12}
        if kind == "labels":
            columns["labels"] = [" | ".join(["traffic light", "bus"][: k % 3]) for k in range(24)]
        elif kind == "quantities":
            columns |= {"height": numbers[:, 0], "weight": [None, *numbers[1:, 1]]}
        elif kind == "people":
            columns["who"] = [f"p{k % 12}" for k in range(24)]
        elif kind == "columns":
            columns["place"] = ["in", "out", "out"] * 8
        if kind in ("inputs", "labels", "quantities"):
            columns |= {name: numbers[:, k] for k, name in enumerate(("age", "a_x", "a_y", "b_x", "b_y"))}
        pd.DataFrame(columns).to_csv("t.csv", index=False)


TASKS: dict[str, tuple[type, str, dict[str, Any]]] = {
    "boxes": (COCODetection, "a.json", {"image_size": 32}),
    "outlines": (COCODetection, "a.json", {"image_size": 32, "masks": True, "tile": 32}),
    "objects": (COCOSegmentation, "a.json", {"image_size": 32}),
    "masks": (MaskFolder, ".", {"image_size": 32, "images": "i", "masks": "m"}),
    "labels": (MultiLabelTable, "t.csv", {"image_size": 16, "tabular": ["age"]}),
    "quantities": (
        RegressionTable,
        "t.csv",
        {"image_size": 16, "columns": ["weight", "height"], "keypoints": ["a", "b"]},
    ),
    "people": (PeopleTable, "t.csv", {"image_size": 16, "person_column": "who", "pictures_per_person": 2}),
    "columns": (LabelColumns, "t.csv", {"image_size": 16, "label_columns": ["place", "label"]}),
    "inputs": (Manifest, "t.csv", {"image_size": 16, "tabular": ["age"], "keypoints": ["a", "b"]}),
}


def alike(ours: Any, theirs: Any) -> bool:
    """Whether two batches are the same, bit for bit."""
    assert ours.keys() == theirs.keys()
    return all(
        torch.equal(torch.nan_to_num(a * 1.0), torch.nan_to_num(b * 1.0)) and a.dtype == b.dtype
        for key in theirs
        for a, b in zip(*([x] if isinstance(x, torch.Tensor) else x for x in (ours[key], theirs[key])), strict=True)
    )


@pytest.mark.parametrize("kind", TASKS)
def test_shards_of_every_task_give_the_batches_and_the_digests_of_the_files(kind: str) -> None:
    written(kind)
    make, place, settings = TASKS[kind]
    files = make(place, batch_size=4, num_workers=0, seed=3, **settings)
    convert("tar", data=files, form="webdataset")
    shards = make("tar", batch_size=4, num_workers=0, seed=3, **settings)
    if kind != "people":
        assert list(shards.label_names) == list(files.label_names)
    assert shards.identity()["splits"] == files.identity()["splits"]
    loader = files.loader("train")
    loader.set_epoch(1)
    batches = list(loader)
    loader = shards.loader("train")
    loader.load_state_dict({"epoch": 1, "batches_done": 1})
    ours = list(loader)
    assert len(ours) == len(batches) - 1 > 1
    assert all(map(alike, ours, batches[1:]))
    for split in ("val", "test"):
        assert all(map(alike, list(shards.loader(split)), list(files.loader(split))))


@pytest.mark.parametrize(
    ("made", "reader", "settings"),
    [(DigitScenes, COCODetection, {"masks": True}), (DigitMasks, MaskFolder, {})],
)
def test_data_that_are_no_files_become_shards_with_the_same_samples(made: Any, reader: Any, settings: Any) -> None:
    data = made(scene_size=32, train=6, val=6, test=6, batch_size=4, num_workers=0, **settings)
    convert("tar", data=data, form="webdataset")
    shards = reader("tar", image_size=32, batch_size=4, num_workers=0, **settings)
    assert list(shards.label_names) == list(data.label_names)
    for split in ("train", "val", "test"):
        ours, theirs = shards.dataset(split, False), data.dataset(split, False)
        assert len(ours) == 6
        for k in range(6):
            one, other = ours[k, 0], theirs[k, 0]
            assert all(np.array_equal(one[key], other[key]) for key in other if key != "area"), (split, k)


def test_detection_reads_parquet_as_hugging_face_has_it_and_writes_coco_from_it(
    recwarn: pytest.WarningsRecorder,
) -> None:
    names = {"names": ["mask", "glove"], "_type": "ClassLabel"}
    features = {"objects": {"feature": {"category": names, "bbox": {"length": 4}}, "_type": "Sequence"}}
    for split in ("train", "test"):
        objects = [{"id": [1, 2], "bbox": [[1, 2, 3, 4.5], [0, 0, 8, 8]], "category": [k % 2, 1]} for k in range(6)]
        images = [{"bytes": png(k + 10 * len(split)), "path": f"{k}.png"} for k in range(6)]
        table = pa.table(
            {"image": images, "objects": objects},
            metadata={"huggingface": json.dumps({"info": {"features": features}})},
        )
        pq.write_table(table, f"{split}-00000-of-00001.parquet")
    data = COCODetection("*.parquet", image_size=16)
    assert data.label_names == ["mask", "glove"]
    assert {name: len(source) for name, source in data.sources.items()} == {"train": 5, "val": 1, "test": 6}
    sample = data.sources["test"][1]
    assert sample["boxes"].tolist() == [[1, 2, 4, 6.5], [0, 0, 8, 8]]
    assert sample["labels"].tolist() == [1, 1]
    data.write("coco")
    again = COCODetection("coco", image_size=16)
    assert again.identity()["splits"] == data.identity()["splits"]


def test_classes_of_masks_are_named_at_an_address_too() -> None:
    written("masks")
    files = MaskFolder(".", image_size=32, images="i", masks="m")
    convert("tar", data=files, form="webdataset")
    fsspec.filesystem("memory").put("tar/", "/masks/", recursive=True)
    there = MaskFolder("memory://masks", image_size=32)
    assert there.label_names == files.label_names == ["road", "background"]
    assert there.identity()["splits"] == files.identity()["splits"]


def test_no_group_in_the_json_of_a_tar_is_in_two_splits() -> None:
    members = {}
    for k in range(36):
        members |= {f"{k}.png": png(k), f"{k}.json": json.dumps({"label": "ab"[k % 2], "patient": k // 3}).encode()}
    data = Manifest(write_tar("all.tar", members), group_column="patient", folds=3, fold=1, image_size=8)
    drawn = [(int(Path(path).stem) // 3, split) for split, own in data.sources.items() for path in own.paths or ()]
    assert {split for _, split in drawn} == {"train", "val", "test"}
    assert len(drawn) == 36
    assert len(set(drawn)) == 12


def test_an_index_follows_a_file_that_changes_at_once() -> None:
    for number in b"01":
        write_tar(
            "train.tar",
            {f"{k}.{kind}": png(k) if kind == "png" else bytes([number]) for k in range(4) for kind in ("png", "cls")},
        )
        assert set(ShardSet("train.tar").index["cls"]) == {chr(number)}


def test_splits_of_one_tar_are_drawn_as_those_of_the_files() -> None:
    written("boxes")
    files = COCODetection("a.json", image_size=32)
    files.take_whole()
    convert("whole", data=files, form="webdataset")
    Path("one").mkdir()
    os.replace("whole/test-000000.tar", "one/0.tar")
    os.replace("whole/classnames.txt", "one/classnames.txt")
    drawn = COCODetection("one", image_size=32).identity()["splits"]
    assert drawn == COCODetection("a.json", image_size=32).identity()["splits"]
    assert set(drawn) == {"train", "val", "test"}


class Ranged(http.server.SimpleHTTPRequestHandler):
    """Serves files, and parts of them, as every usual web server does and Python's own does not."""

    def do_GET(self) -> None:
        first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        data = Path(self.translate_path(self.path)).read_bytes()
        part = data[int(first) : int(last) + 1] if first else data
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(part)))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_: object) -> None: ...


def test_a_web_server_gives_the_same_images_as_the_disk(forms: dict[str, str]) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ranged)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        numbered = "tar/train-{000000..000000}.tar"
        data, local = data_of(f"http://127.0.0.1:{server.server_port}/{numbered}"), data_of(numbered)
        assert data.identity()["splits"] == local.identity()["splits"]
        assert torch.equal(data.samples("train", 8)["image"], local.samples("train", 8)["image"])
    finally:
        server.shutdown()
        server.server_close()


def write_tar(file: str, members: dict[str, bytes]) -> str:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_labels_are_text_json_or_numbers_and_splits_are_drawn_where_names_say_none() -> None:
    members = {}
    for k in range(24):
        members[f"a/{k:03}.png"] = png(k)
        label = ["owl", "bat", "cow"][k % 3]
        members[f"a/{k:03}.{'json' if k % 2 else 'txt'}"] = (
            json.dumps({"kind": label}).encode() if k % 2 else label.encode()
        )
    data = Shards(write_tar("mixed.tar", members), label_column="kind", image_size=8)
    assert data.label_names == ["bat", "cow", "owl"]
    assert sorted(data.sources) == ["test", "train", "val"]
    write_tar("few/00.tar", {name: content for name, content in members.items() if name.endswith("png")})
    write_tar("odd [1] {0..2}/all.TAR", members)  # a folder, not a pattern
    assert Shards("odd [1] {0..2}", label_column="kind", image_size=8).label_names == data.label_names
    assert UnlabelledShards("few", image_size=8).sources["train"].labels.max() == 0
    frame = pd.DataFrame({"image": [png(k) for k in range(24)], "label": [k % 12 for k in range(24)]})
    frame.to_parquet("numbers-train.parquet")
    assert Shards("numbers-train.parquet", image_size=8).label_names == [str(k) for k in range(12)]


def cut(file: str, size: int) -> str:
    os.truncate(file, os.path.getsize(file) - size)
    return file


WHOLE = {f"{k}.{kind}": png(k) if kind == "png" else str(k % 2).encode() for k in range(12) for kind in ("png", "cls")}
WRONG = {
    "cut off in a picture": (lambda: cut(write_tar("train.tar", WHOLE), 10240 + 600), ["train.tar cannot be read", "repair it"]),
    "without its end": (lambda: cut(write_tar("train.tar", {"0.png": b"0" * 512}), 10240 - 1024), ["train.tar", "cut off"]),
    "no tar": (lambda: str(Path("train.tar").write_bytes(b"text" * 999) and "train.tar"), ["train.tar cannot be read"]),
    "no label": (lambda: write_tar("train.tar", WHOLE | {"x.png": png(99)}), ["1 of 13 pictures", "x.png", ".cls"]),
    "an empty label": (lambda: write_tar("train.tar", WHOLE | {"0.cls": b""}), ["1 of 12 pictures", "0.png", ".cls"]),
    "a class without a name": (
        lambda: (Path("classnames.txt").write_text("owl\nbat"), write_tar("train.tar", WHOLE | {"0.cls": b"cow"}))[1],
        ["label 'cow'", "classnames.txt", "owl, bat"],
    ),
    "no pictures": (lambda: write_tar("train.tar", {}), ["The 1 files of train.tar have no pictures"]),
    "no JSON": (lambda: write_tar("train.tar", {"0.png": png(0), "0.json": b"{"}), ["train.tar", "0.json"]),
    "several labels": (
        lambda: (pd.DataFrame({"image": [png(0)], "label": [[0, 1]]}).to_parquet("train.parquet"), "train.parquet")[1],
        ["train.parquet/0 has a list", "'label'", "--data.label_column", "MultiLabelTable"],
    ),
    "a table": (lambda: str(Path("t.csv").write_text("path,label") and "t.csv"), ["t.csv is neither"]),
    "no shards": (lambda: (Path("none").mkdir(), "none")[1], ["none has no file", "--data.root"]),
    "no file": (lambda: "nowhere-{00..03}.tar", ["nowhere-00.tar", "--data.root"]),
    "no protocol": (lambda: "nonsense://bucket/train.tar", ["nonsense://bucket/train.tar", "nonsense"]),
    "no server": (lambda: "http://127.0.0.1:9/train-{0..1}.tar", ["http://127.0.0.1:9/train-0.tar cannot be read"]),
    "two members of one kind": (
        lambda: write_tar("train.tar", {"a/0.png": png(0), "a/0.jpg": png(1), "a/0.cls": b"0"}),
        ["train.tar has a/0.png and a/0.jpg", "name of its own"],
    ),
    "quantities": (lambda: write_tar("train.tar", WHOLE | {"3.cls": b"0.5"}), ["train.tar/3.png", "label 0.5", "RegressionTable"]),
    "packed as it is": (lambda: str(Path("t.tar").write_bytes(gzip.compress(b"text")) and "t.tar"), ["t.tar is compressed"]),
    "compressed": (lambda: str(Path("t.tar.gz").write_bytes(b"") or "t.tar.gz"), ["t.tar.gz is compressed"]),
    "no picture": (lambda: write_tar("train.tar", WHOLE | {"0.png": b"text"}), ["train.tar/0.png (not an image)", "on_bad_file"]),
    "some splits": (lambda: (write_tar("s/train.tar", WHOLE), write_tar("s/more.tar", WHOLE), "s")[2], ["s/more.tar is not"]),
}  # fmt: skip


@pytest.mark.parametrize(("make", "said"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_with_shards_is_one_paragraph(
    make: Any, said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    root = make()
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        classification(
            ["fit", "--data", "Shards", "--data.root", root, "--data.image_size", "16", "--trainer.logger", "false"]
        )
    message = capsys.readouterr().err
    assert message.startswith("error: "), message
    assert message.count("\n") == 1, message
    assert [part for part in said if part not in message] == [], message


def beside(said: Any) -> str:
    """A tar of pictures with a JSON beside each."""
    text = json.dumps(said).encode()
    return write_tar(
        "all.tar", {f"{k}.{kind}": png(k) if kind == "png" else text for k in range(9) for kind in ("png", "json")}
    )


OF_ONE = {"label": ["ox", "cow"]}, {"label": {"name": "ox"}}, {"label": [{"name": "ox"}]}
OF_NESTED = {"labels": [{"name": "ox"}]}, {"labels": {"name": "ox"}}


@pytest.mark.parametrize(
    ("made", "settings", "said", "message"),
    [
        *((Manifest, {}, said, "all.tar/0.png has a list or an object under 'label'.*label_column") for said in OF_ONE),
        (LabelColumns, {"label_columns": ["label"]}, OF_ONE[0], "all.tar/0.png has a list.*--data.label_columns"),
        (RegressionTable, {"columns": ["x"]}, {"x": [1, 2]}, "all.tar/0.png has a list.*--data.columns"),
        *((MultiLabelTable, {}, said, "all.tar/0.png has objects or lists under 'labels'") for said in OF_NESTED),
        (COCODetection, {}, {"objects": [{"bbox": [1, 2, 3, 4], "category": ["ox"]}]}, "ox"),
    ],
)
def test_a_list_where_one_value_is_expected_is_no_class(made: Any, settings: Any, said: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        _ = made(beside(said), image_size=8, **settings).sources


def test_what_lacks_beside_a_picture_is_told_with_its_name() -> None:
    whole = [{"label": "ox", "age": 3}, {"label": "cow", "age": 4}] * 6
    for key, said in (("label", {"age": 5}), ("age", {"label": "ox"})):
        members = {f"{k}.json": json.dumps(one).encode() for k, one in enumerate([said, *whole])}
        write_tar("all.tar", members | {f"{k}.png": png(k) for k in range(13)})
        with pytest.raises(DataError, match=f"nothing under '{key}' in all.tar/0.png"):
            _ = Manifest("all.tar", tabular=["age"], image_size=8).sources


def test_indices_of_categories_may_be_written_with_a_fraction_of_nothing() -> None:
    objects = [{"bbox": [1, 2, 3, 4], "category": 1.0}]
    assert COCODetection(beside({"objects": objects}), image_size=8).label_names == ["1"]
    Path("classnames.txt").write_text("ox\ncow\n")
    data = COCODetection(beside({"objects": objects}), image_size=8)
    assert data.label_names == ["ox", "cow"]
    assert data.sources["train"][0]["labels"].tolist() == [1]


def test_shards_that_cannot_be_read_are_told_as_shards_and_an_archive_beside_its_files_is_none() -> None:
    Path("packed").mkdir()
    Path("packed", "train.tar.gz").write_bytes(gzip.compress(b"text"))
    for root in ("packed", "packed/train.tar.gz"):
        with pytest.raises(DataError, match=r"train.tar.gz is compressed"):
            _ = COCODetection(root).sources
    frame = pd.DataFrame({"image": [png(k) for k in range(9)], "objects": [[]] * 9})
    frame.to_parquet("all.parquet")
    for made, said in ((COCODetection, r"\("), (RegressionTable, "as a table")):
        with pytest.raises(DataError, match=f"all.parquet cannot be read {said}"):
            _ = made(cut("all.parquet", 9)).sources
    Path("flat").mkdir()
    for k in range(9):
        Path("flat", f"{k}.png").write_bytes(png(k))
        Path("flat", f"{k}.txt").write_text("0 0.5 0.5 0.5 0.5")
    Path("flat", "classes.txt").write_text("ox")
    write_tar("flat/download.tar", WHOLE)
    assert sum(map(len, YOLODetection("flat", image_size=8).sources.values())) == 9


def test_what_cannot_become_shards_is_refused(capsys: pytest.CaptureFixture[str], forms: dict[str, str]) -> None:
    for args, said in (
        (["out", "--data", "MovingDigits", "--form", "webdataset"], "MovingDigits has others"),
        (["out", "--data", "DigitTasks", "--form", "webdataset"], "DigitTasks has others"),
        (["out", "--data", "DigitTextures", "--form", "webdataset"], "DigitTextures has others"),
        (
            ["out", "--data", "ImageFolder", "--data.root", "folder", "--form", "yolo"],
            "--form yolo is for data with boxes",
        ),
        (["tar", "--data", "ImageFolder", "--data.root", "folder", "--form", "webdataset"], "already exists"),
    ):
        with pytest.raises(SystemExit, match="2"):
            command(convert, args)
        assert said in capsys.readouterr().err
