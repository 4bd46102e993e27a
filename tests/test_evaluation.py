"""Evaluations: they measure what was trained, under its names, and leave its record as it is."""

import hashlib
import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from conftest import built
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from PIL import Image

from datamodules import COCODetection, COCOSegmentation, DataError, DigitTasks, ImageFolder
from datamodules.classes import adopt_classes
from modules import (
    BackboneError,
    ClassificationModule,
    DetectionModule,
    GANModule,
    InstanceSegmentationModule,
    MultiTaskModule,
    SegmentationModule,
    TranslationModule,
)
from modules.checkpoints import check_network, classes_of
from modules.spec import Backbone, DataSpec
from pipelines.classification import classification
from pipelines.engine.evaluation import take_unseen
from pipelines.serving.subject import Subject
from pipelines.tracking.logger import run_id_of

QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
DIGITS = ["--data", "Digits8x8", "--data.image_size", "12", "--trainer.max_epochs", "1", *QUIET]


def run(output: str | Path) -> mlflow.entities.Run:
    return MlflowClient().get_run(run_id_of(output))


def record(output: str) -> tuple[dict[str, str], dict[str, object]]:
    """A training's files by their digests, and what MLflow has of its run."""
    files = {str(f): hashlib.sha1(f.read_bytes()).hexdigest() for f in Path(output).rglob("*") if f.is_file()}
    return files, run(output).to_dictionary()


def test_evaluations_in_a_trainings_folder_leave_its_record_and_are_runs_of_their_own() -> None:
    fit = classification(["fit", *DIGITS, "--output", "out"])
    before = record("out")
    figures = []
    for more in ([], ["--data.batch_size", "50"], ["--config", "out/config.yaml", "--model.label_smoothing", "0.1"]):
        cli = classification(["test", "--output", "out", *more])
        assert cli.options.data.class_path == "datamodules.Digits8x8"
        assert run(cli.output).data.tags["evaluates"] == run_id_of("out")
        assert run(cli.output).data.tags[MLFLOW_PARENT_RUN_ID] == run_id_of("out")
        assert run(cli.output).inputs.dataset_inputs
        figures.append(cli.rows["test/accuracy"])
    assert set(figures) == {fit.rows["test/accuracy"]}
    table = classification(["predict", "--ckpt_path", "out/best.ckpt", "--output", "out"]).output / "predictions.jsonl"
    assert len(table.read_text().splitlines()) == len(fit.datamodule.sources["test"])
    classification(["preview", "--output", "out"])
    classification(["validate", "--output", "elsewhere", "--ckpt_path", "out/best.ckpt"])
    assert run("elsewhere").data.tags["evaluates"] == run_id_of("out")
    files, entity = record("out")
    assert {name: digest for name, digest in files.items() if name in before[0]} == before[0]
    assert entity == before[1]
    made = {path.name.split("-")[0] for path in Path("out").iterdir() if "-2" in path.name}
    assert made == {"test", "predict", "preview"}


def test_a_run_says_what_its_data_are_and_how_long_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    fit = classification(["fit", *DIGITS, "--data.batch_size", "300", "--output", "out", "--trainer.max_epochs", "3"])
    said = capsys.readouterr().err
    counts = ", ".join(f"{len(source):,} {split}" for split, source in fit.datamodule.sources.items())
    assert (
        f"Data: Digits8x8: {counts}; 10 classes (0, 1, 2, 3, 4, 5, 6, 7, …), from 121 images of 8 to 128 of 5 " in said
    )
    assert "12 × 12 pixels, 1 channel." in said
    assert "Network: lenet5; " in said
    assert f"On cpu: 4 steps an epoch, {fit.trainer.global_step} in all, 300 images a batch." in said
    assert said.count("Data:") == 1
    assert "These are few steps" in said
    classification(["test", "--output", "out"])
    assert "2 batches of the test split" in capsys.readouterr().err
    few = [f"--trainer.limit_{split}_batches=1" for split in ("train", "val", "test")]  # a batch, not all of them
    classification(["fit", *DIGITS, "--output", "few", *few])
    said = capsys.readouterr().err
    assert "On cpu: 1 step an epoch, 1 in all" in said
    assert "few steps" not in said, "as few batches as were asked for"
    oblong = ["--data.image_size", "32x48", "--backbone", "test_resnet"]
    classification(["fit", *DIGITS, *oblong, "--output", "oblong", *few])
    said = capsys.readouterr().err
    assert "32 × 48 pixels, 1 channel." in said
    assert "bfloat16" not in said
    classification(["test", "--output", "oblong", "--data.image_size", "40"])
    assert "Trained with --data.image_size 32x48, evaluated with 40." in capsys.readouterr().err
    lenet = refused(["test", "--output", "out", "--data.image_size", "16"], capsys)
    assert "trained with --data.image_size 12 and takes no other" in lenet
    assert "the number of values of backbone." in lenet


@pytest.mark.parametrize("able", [True, False])
def test_a_processor_without_bfloat16_is_told_of(
    able: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": able}, raising=False)
    few = [f"--trainer.limit_{split}_batches=1" for split in ("train", "val", "test")]
    classification(["fit", *DIGITS, "--trainer.precision", "bf16-mixed", *few])
    assert ("--trainer.precision bf16-mixed takes several times as long" in capsys.readouterr().err) != able


def test_a_learning_rate_is_found_also_where_epochs_are_short_and_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    finder = ["--trainer.callbacks+=LearningRateFinder", "--trainer.callbacks.num_training_steps=40"]
    short = [*DIGITS, "--data.batch_size", "300", "--output", "out", *finder]
    cli = classification(["fit", *short])
    assert 1e-5 < cli.model.lr < 1
    assert cli.trainer.global_step == 4
    told = re.search(r"chooses a rate of (\S+), found in (\d+) steps", capsys.readouterr().err)
    assert told is not None
    assert told[1] == f"{cli.model.lr:.3g}"
    assert int(told[2]) > 12  # the first ten are not looked at
    assert cli.trainer.max_epochs == 1
    rates = MlflowClient().get_metric_history(run_id_of("out"), "lr")
    assert rates[0].value == pytest.approx(cli.model.lr)  # a warm-up of one step


def test_a_set_without_splits_is_the_test_as_a_whole_unless_the_network_learned_from_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for root, first in (("learned", 0), ("other", 100)):
        for k, name in enumerate(("cat", "dog")):
            Path(root, name).mkdir(parents=True)
            for i in range(10):
                Image.new("RGB", (12, 12), (200 * k, first + i, 90)).save(f"{root}/{name}/{i}.png")
    folder = ["--data", "ImageFolder", "--data.image_size", "12", "--trainer.max_epochs", "1", *QUIET]
    classification(["fit", *folder, "--data.root", "learned", "--output", "out", "--register", "drawn"])
    weights = ["--ckpt_path", "out/best.ckpt", "--output", "elsewhere"]

    def measured(root: str, *more: str) -> int:
        return len(classification(["test", *folder, "--data.root", root, *weights, *more]).datamodule.sources["test"])

    assert measured("learned") == 3
    assert measured("learned", "--data.train_per_class", "2") == 3
    shutil.copytree("learned", "copy")
    assert measured("copy") == 3
    capsys.readouterr()
    assert measured("other") == 20
    assert "all of it is the test" in capsys.readouterr().err
    Image.new("RGB", (12, 12), (9, 9, 9)).save("learned/cat/new.png")
    subject, grown = Subject.find("models:/drawn/1"), ImageFolder("learned")
    for take in (lambda: measured("learned"), lambda: take_unseen(grown, subject)):
        capsys.readouterr()
        take()
        assert "may have images of the training" in "".join(capsys.readouterr().err.split("\n"))
    assert len(grown.sources["test"]) == 3
    for root, size in (("copy", 3), ("other", 20)):
        take_unseen(data := ImageFolder(root), subject)
        assert len(data.sources["test"]) == size


def test_an_evaluation_without_weights_says_what_to_give(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        classification(["test", *DIGITS, "--output", "nothing"])
    assert end.value.code == 2
    assert "Which weights?" in capsys.readouterr().err


COLOURS = {"cat": (200, 30, 30), "dog": (30, 200, 30), "frog": (30, 30, 200), "bird": (200, 200, 30)}


def folder(root: str, names: list[str], each: int = 12) -> str:
    generator = np.random.default_rng(0)
    for name in names:
        for i in range(each):
            file = Path(root, name, f"{i}.png")
            file.parent.mkdir(parents=True, exist_ok=True)
            noise = generator.integers(0, 40, (16, 16, 3), np.uint8)
            Image.fromarray(noise + np.asarray(COLOURS[name], np.uint8)).save(file)
    return root


def refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        classification(args)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_classes_are_matched_by_name_and_unknown_ones_refused(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ["--data", "ImageFolder", "--data.image_size", "16", "--data.batch_size", "8", *QUIET, "--output", "out"]
    recipe += ["--trainer.max_epochs", "8", "--model.optimization.lr", "0.003"]
    cli = classification(["fit", *recipe, "--data.root", folder("all", ["cat", "dog", "frog"])])
    assert cli.rows["test/accuracy"] == "1.0000"
    for names in (["frog", "cat"], ["frog", "dog"]):
        root = "_".join(names)
        few = classification(["test", "--output", "out", "--data.root", folder(root, names)])
        assert few.rows["test/accuracy"] == "1.0000"
        assert few.model.label_names == ["cat", "dog", "frog"]
        assert few.datamodule.identity()["label_names"] == sorted(names)
    folder("other", ["bird", "cat", "dog"])
    before, there = record("out"), set(Path("out").iterdir())
    for args in (["test", "--output", "out", "--data.root", "other"], ["fit", *recipe, "--data.root", "other"]):
        said = refused(args, capsys)
        assert "cat, dog, frog" in said
        assert "bird, cat, dog" in said
    assert record("out") == before
    assert set(Path("out").iterdir()) == there


def annotated(root: str, names: list[str]) -> str:
    """Six pictures with an object of each class: squares with outlines, in COCO's format."""
    Path(root).mkdir()
    images, found = [], []
    for i in range(6):
        Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(Path(root, f"{i}.png"))
        images.append({"id": i, "file_name": f"{i}.png", "width": 64, "height": 64})
        for k in range(len(names)):
            x, side = 20 * k, 10 + k
            outline = [[x, 0, x + side, 0, x + side, side, x, side]]
            found.append({"id": len(found) + 1, "image_id": i, "category_id": k + 1, "bbox": [x, 0, side, side],
                          "area": side**2, "iscrowd": 0, "segmentation": outline})  # fmt: skip
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(names)]
    content = {"images": images, "annotations": found, "categories": categories}
    file = Path(root, "boxes.json")
    file.write_text(json.dumps(content))
    return str(file)


def test_classes_of_boxes_and_masks_are_numbered_as_the_network_does() -> None:
    root = annotated("boxes", ["cat", "dog"])
    data = COCODetection(root, masks=True, image_size=64)
    own = data.sources["train"][0]
    identity = data.identity()
    adopt_classes(data, ["dog", "frog", "cat"])
    assert data.num_classes == 3
    sample = data.dataset("train", False)[0, 0]
    assert [data.label_names[k] for k in sample["labels"]] == ["cat", "dog"]
    areas = {data.label_names[k - 1]: int((sample["mask"] == k).sum()) for k in np.unique(sample["mask"])[1:]}
    assert areas == {"cat": int((own["mask"] == 1).sum()), "dog": int((own["mask"] == 2).sum())}
    assert data.identity() == identity

    pixels = COCOSegmentation(root, image_size=64, class_weighting="sqrt")
    weights = dict(zip(pixels.label_names, pixels.class_weights or [], strict=True))
    names = ["dog", "background", "frog", "cat"]
    adopt_classes(pixels, names)
    assert dict(zip(names, pixels.class_weights or [], strict=True)) == weights | {"frog": 0}
    mask = pixels.sources["train"][0]["mask"]
    assert {names[k] for k in np.unique(mask[mask != 255])} == {"background", "cat", "dog"}
    assert np.array_equal(pixels.dataset("train", False)[0, 0]["mask"], mask)
    learned = pixels.dataset("train", True)[0, 0]["mask"]
    assert {names[k] for k in np.unique(learned[learned != 255])} <= {"background", "cat", "dog"}
    assert (learned == names.index("background")).any()


def test_classes_of_several_tasks_are_numbered_as_the_network_does() -> None:
    """Its classes are those of its boxes, of its pixels or of its images; numbers of digits are none of them."""
    turned = {"segmentation": ["background", "dog", "cat"], "detection": ["dog", "cat"], "reconstruction": []}
    for left_out in ("segmentation", "detection"):
        kept = {name: names for name, names in turned.items() if name != left_out}
        network = MultiTaskModule(DataSpec(image_size=64, targets=kept), Backbone("test_resnet"))
        data = COCODetection(annotated(f"no {left_out}", ["cat", "dog"]), masks=True, image_size=64)
        adopt_classes(data, classes_of(network.architecture) or [])
        assert {name: data.targets.get(name, []) for name in kept} == kept
    data = ImageFolder(folder("images", ["cat", "dog"]), image_size=16)
    kinds = {"classification": ["dog", "cat"], "reconstruction": []}
    network = MultiTaskModule(DataSpec(image_size=64, targets=kinds), Backbone("test_resnet"))
    adopt_classes(data, classes_of(network.architecture) or [])
    assert data.targets["classification"] == ["dog", "cat"]
    with pytest.raises(DataError, match="bird"):
        adopt_classes(ImageFolder(folder("others", ["bird", "dog"])), classes_of(network.architecture) or [])
    scenes = DigitTasks(scene_size=32, train=2, val=2, test=2)
    adopt_classes(scenes, scenes.targets["classification"])
    assert len(scenes.label_names) == 10


NAMED = {
    "classification": partial(built, ClassificationModule, num_classes=2, image_size=16),
    "detection": partial(built, DetectionModule, num_classes=2, image_size=64, backbone="lenet5"),
    "instances": partial(built, InstanceSegmentationModule, num_classes=2, image_size=64, backbone="test_resnet"),
    "segmentation": partial(built, SegmentationModule, num_classes=2, image_size=64, backbone="test_resnet"),
    "conditional GAN": partial(built, GANModule, image_size=16, conditional=True),
    "translation": partial(built, TranslationModule, image_size=16),
}


@pytest.mark.parametrize("make", NAMED.values(), ids=NAMED)
def test_weights_that_know_other_classes_are_refused(make: Any) -> None:
    one, same, other = (make(label_names=[*names]) for names in (("a", "b"), ("a", "b"), ("a", "c")))
    check_network(one.architecture, same.architecture)
    with pytest.raises(BackboneError, match=r"a, b; here they are a, c\."):
        check_network(one.architecture, other.architecture)


def test_labels_that_a_network_does_not_learn_may_differ() -> None:
    one, other = (GANModule(DataSpec(label_names=[*names], image_size=16)) for names in (("a", "b"), ("a", "c", "d")))
    check_network(one.architecture, other.architecture)
