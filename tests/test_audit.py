"""The audit of data: what is planted is found, and what cannot be audited is told in a paragraph."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from PIL import Image, ImageEnhance

from datamodules import Digits8x8, MaskFolder, Series, VisionDataModule
from datamodules.checking import inspect_images
from datamodules.duplicates import grouped, near_pairs, oddities, thumbnail
from modules import AutoencodingModule, Backbone, DataSpec, SegmentationModule, SequenceModule, VisionModule
from modules.measures.labels import doubts, held_out_probabilities
from pipelines.audit import audit
from pipelines.classification import classification
from pipelines.engine.command import command
from pipelines.serving.registration import register
from pipelines.tracking.logger import run_id_of


def scene(seed: int, side: int = 32) -> Image.Image:
    """A smooth picture of its own."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)


def test_near_copies_are_found_and_pictures_of_one_colour_are_not() -> None:
    picture = scene(0, 64)
    near = [
        picture.resize((24, 24)),
        picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        ImageEnhance.Brightness(picture).enhance(0.8),
        picture.crop((4, 2, 64, 62)),
    ]
    flat = [Image.new("RGB", (8, 8), "red")] * 2
    pictures = [picture, *near, *(scene(k) for k in range(1, 20)), *flat]
    thumbnails = np.stack([thumbnail(np.asarray(each)) for each in pictures])
    mirrored = thumbnails[:, :, ::-1].astype(np.float32)  # of which a network's features make little difference
    features = (thumbnails + mirrored).reshape(len(pictures), -1)
    pairs, alike = near_pairs(features, thumbnails, 0.95)
    groups = grouped(pairs, len(pictures))
    assert (groups[:5] == groups[0]).all()
    assert len(np.unique(groups)) == len(pictures) - 4
    assert alike.min() >= 0.95
    assert near_pairs(features[:1], thumbnails[:1], 0.95)[0].shape == (0, 2)


def test_unusual_files_are_told_apart_from_varied_ones() -> None:
    sizes = [(30, 40), (40, 30), (45, 45), (36, 38), (300, 400), (10, 90)]
    paths = []
    for k, (width, height) in enumerate(sizes):
        scene(k).resize((width, height)).save(f"{k}.png")
        paths.append(f"{k}.png")
    scene(0).save("film.gif", save_all=True, append_images=[scene(1)])
    Image.fromarray(np.full((36, 36), 40000, np.uint16)).save("deep.png")
    paths += ["film.gif", "deep.png"]
    thumbnails = np.stack([thumbnail(np.asarray(Image.open(path).convert("RGB"))) for path in paths])
    told = oddities(inspect_images(paths), thumbnails)
    assert told[:4] == [""] * 4
    assert told[4].startswith("unusual size: 300×400, the usual is 3")
    assert told[5].startswith("unusual shape: 10×90")
    assert told[6] == "2 frames or pages"
    assert told[7] == "one colour; 16 bits"


def test_confident_learning_by_hand() -> None:
    likely = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.3, 0.7], [0.45, 0.55], [0.85, 0.15]])
    labels = np.array([0, 0, 0, 1, 1, 1])
    # Mean own probability: 0.6 of class 0, 0.4667 of class 1.
    found = doubts(likely, labels)
    assert found.joint.tolist() == [[2, 1], [1, 2]]
    assert found.likely.tolist() == [0, 0, 1, 1, 1, 0]
    assert found.places.tolist() == [2, 5]


def test_held_out_probabilities_are_of_heads_that_saw_no_copy() -> None:
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 20)
    features = generator.normal(0, 0.3, (60, 8)).astype(np.float32)
    features[np.arange(60), labels] += 2
    labels[0], features[1], labels[1] = 1, features[0], 1  # a wrong label, there twice
    groups = np.arange(60)
    groups[1] = 0
    likely = held_out_probabilities(features, labels, groups, 4)
    assert likely[:2].argmax(1).tolist() == [0, 0]
    assert (likely.argmax(1) == labels)[2:].all()
    assert (likely[:, 3] == 0).all()
    alone = held_out_probabilities(features[:41], np.r_[labels[:40], 2], groups[:41], 3)
    assert alone[40, 2] == 1  # nothing is left of its class to learn from
    with pytest.raises(ValueError, match="two classes"):
        held_out_probabilities(features[:5], np.zeros(5, np.int64), groups[:5], 2)


def digits(root: str) -> tuple[str, str]:
    """Digits of three classes as files in splits, one with a wrong label, and one as a copy of another; their paths."""
    source = Digits8x8(image_size=16).sources["train"]
    for k, label in enumerate(source.labels[:400]):
        if label in (0, 1, 6):
            split = ("train", "train", "val", "test")[k % 4]
            Path(root, split, str(label)).mkdir(parents=True, exist_ok=True)
            pixels = np.asarray(Image.fromarray(source.images[k][..., 0]).resize((16, 16)))
            Image.fromarray(pixels).save(Path(root, split, str(label), f"{k}.png"))
    files = sorted(Path(root, "train/0").iterdir())
    wrong, copy = Path(root, "train/1/wrong.png"), Path(root, "test/0/copy.png")
    files[0].rename(wrong)
    shutil.copy(files[1], copy)
    for k in range(5):
        Path(root, "train/6", f"broken{k}.png").write_bytes(files[2].read_bytes()[: 40 * k])
    return str(wrong), str(copy)


def registered(name: str, module: VisionModule, data: VisionDataModule, task: str) -> str:
    client = MlflowClient()
    run = client.create_run(client.create_experiment(name)).info.run_id
    register(name, module, data, {}, task, run, {})
    return f"models:/{name}/1"


def refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        command(audit, args)
    assert end.value.code == 2
    said = capsys.readouterr().err.rpartition("error: ")[2].strip()
    assert "\n" not in said
    return said


def test_what_is_planted_in_a_folder_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    wrong, copy = digits("planted")
    folder = ["--data", "ImageFolder", "--data.root", "planted"]
    small = [
        "--data.image_size",
        "16",
        "--data.in_chans",
        "1",
        "--data.on_bad_file",
        "skip_all",
        "--data.batch_size",
        "16",
    ]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "12"]
    fit = classification(["fit", *folder, *small, *quiet, "--register", "digits"])
    command(audit, ["models:/digits@latest", *folder, "--output", "out"])
    with Path("out/findings.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {kind: [row for row in rows if row["kind"] == kind] for kind in {row["kind"] for row in rows}}
    assert len(found["unreadable"]) == 5
    assert found["doubtful label"][0]["path"] == wrong
    assert (found["doubtful label"][0]["label"], found["doubtful label"][0]["looks_like"]) == ("1", "0")
    exact = found["exact copy"]
    assert {row["split"] for row in exact} == {"train", "test"}
    assert copy in {row["path"] for row in exact}
    assert {row["detail"] for row in exact} == {"several splits"}
    page = Path("out/report.html").read_text()
    assert page.count("src=data:image/webp") >= 3
    assert "http" not in page
    run = MlflowClient().get_run(run_id_of("out"))
    assert run.data.tags["source_model"] == "models:/digits/1"
    assert run.data.tags["audits"] == fit.trainer.logger.run_id
    assert run.data.metrics["audit/unreadable"] == 5
    files = {file.path for file in MlflowClient().list_artifacts(run.info.run_id)}
    assert {"report.html", "findings.csv"} <= files
    assert "held-out accuracy" in capsys.readouterr().out

    Path("empty").mkdir()
    for name in ("8", "cow"):
        shutil.copytree("planted/train/0", f"other/{name}")
    assert "registered are: " in refused(["models:/nobody@latest", *folder], capsys)
    assert "no sub-folders" in refused(["models:/digits/1", "--data", "ImageFolder", "--data.root", "empty"], capsys)
    said = refused(["models:/digits/1", "--data", "ImageFolder", "--data.root", "other"], capsys)
    assert "the network knows 0, 1, 6" in said
    assert "--likeness" in refused(["models:/digits/1", *folder, "--likeness", "2"], capsys)
    codes = AutoencodingModule(DataSpec(in_chans=1, image_size=16))
    address = registered("codes", codes, Digits8x8(image_size=16), "autoencoding")
    assert "has no classes" in refused([address, *folder], capsys)
    series = SequenceModule(DataSpec(num_classes=256, in_chans=1, image_size=1), Backbone("embedding"))
    address = registered("series", series, Series(), "sequences")
    assert "learns from clips, and only images are audited" in refused([address], capsys)


def test_of_class_maps_copies_and_files_are_judged() -> None:
    for k in range(8):
        for part in ("images", "masks"):
            Path("maps", part).mkdir(parents=True, exist_ok=True)
        scene(k, 64).save(f"maps/images/{k}.png")
        Image.fromarray((np.indices((64, 64)).sum(0) > 60).astype(np.uint8)).save(f"maps/masks/{k}.png")
    scene(3, 64).save("maps/images/6.png")
    data = MaskFolder("maps", image_size=64)
    module = SegmentationModule(DataSpec(label_names=data.label_names, image_size=64), Backbone("test_resnet"))
    figures = audit(registered("maps", module, data, "segmentation"), data=data, output=Path("out"))
    assert figures["exact copy"] == 2
    assert "doubtful label" not in figures
    assert "Labels, boxes and masks are not judged" in Path("out/report.html").read_text()
