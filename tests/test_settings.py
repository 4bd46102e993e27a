"""Short names of settings, and those that earlier versions had."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from mlflow.tracking import MlflowClient
from PIL import Image
from torchvision.models import detection as torchvisions

import datamodules
from modules import DetectionModule
from pipelines.classification import classification
from pipelines.detection import detection
from pipelines.engine.children import resolved
from pipelines.engine.command import command
from pipelines.engine.settings import present
from pipelines.engine.start import with_start
from pipelines.evaluate import evaluate
from pipelines.facenet import facenet

SMALL = ["--data", "Digits", "--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1",
         "--trainer.limit_test_batches", "1", "--trainer.enable_progress_bar", "false"]  # fmt: skip


def test_short_and_former_names_set_what_the_present_ones_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    former = {"backbone": "convnet", "backbone_options": {"channels": [8, 16]}, "channels_last": False}
    Path("former.yaml").write_text(yaml.safe_dump({"model": former, "trainer": {"max_epochs": 1}}))
    present = {"backbone": {"name": "convnet", "options": {"channels": [8, 16]}, "channels_last": False}}
    Path("present.yaml").write_text(yaml.safe_dump({"model": present, "trainer": {"max_epochs": 1}}))
    one = classification(["fit", "--config", "former.yaml", *SMALL, "--batch_size", "32", "--lr=0.002", "--seed", "3",
                          "--model.backbone_options.drop_rate", "0.2", "--output", "one"])  # fmt: skip
    two = classification(["fit", "--config", "present.yaml", *SMALL, "--data.batch_size", "32", "--output", "two",
                          "--model.optimization.lr", "0.002", "--seed_everything", "3",
                          "--model.backbone.options.drop_rate", "0.2"])  # fmt: skip
    first, second = (yaml.safe_load(Path(name, "config.yaml").read_text()) for name in ("one", "two"))
    assert first["model"] == second["model"]
    assert first["data"] == second["data"]
    assert first["model"]["backbone"]["options"] == {"channels": [8, 16], "drop_rate": 0.2}
    for key, value in one.model.state_dict().items():
        assert torch.equal(value, two.model.state_dict()[key]), key


def test_paths_from_the_home_folder_and_classes_by_a_former_file_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for k in range(12):
        Path("pets", "cat" if k % 2 else "dog").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 20 * k, np.uint8)).save(f"pets/{'cat' if k % 2 else 'dog'}/{k}.png")
    data = {"class_path": "datamodules.labelled.files.ImageFolder", "init_args": {"root": "~/pets", "image_size": 8}}
    Path("own.yaml").write_text(yaml.safe_dump({"data": data, "output": "~/kept", "trainer": {"max_epochs": 1}}))
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.logger", "false", "--data.num_workers", "0"]
    cli = classification(["fit", "--config=~/own.yaml", "--backbone", "convnet", *quiet])
    assert (cli.output, cli.datamodule.root) == (tmp_path / "kept", str(tmp_path / "pets"))
    assert classification(["test", "--output=~/kept", *quiet]).rows["test/accuracy"], (
        "config.yaml is there without a run"
    )
    Path("pets").rename("my: pets")
    assert classification(["test", "--output=~/kept", "--data.root", "my: pets", *quiet]).datamodule.root == "my: pets"
    with pytest.raises(SystemExit):
        command(evaluate, ["models:/none/1", "--data", "ImageFolder", "--data.root", "my: pets"])
    assert "No model 'none' is registered" in capsys.readouterr().err


def test_a_folder_of_an_earlier_version_goes_on_and_is_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    classification(["fit", *SMALL, "--max_epochs", "1", "--output", "old"])
    config = yaml.safe_load(Path("old/config.yaml").read_text())
    backbone = config["model"].pop("backbone")
    del backbone["grad_checkpointing"]  # which came later
    config["model"] |= {
        "backbone": backbone.pop("name"),
        "backbone_options": backbone.pop("options") or None,
        **backbone,
    }
    Path("old/config.yaml").write_text(yaml.safe_dump(config))
    for file in (Path("old/last.ckpt"), Path("old/best.ckpt")):
        checkpoint = torch.load(file, weights_only=True)
        file.unlink()  # both names are of one file
        if recipe := checkpoint.get("recipe"):
            recipe["fixed"]["model.transfer"] = recipe["fixed"].pop("model.backbone.transfer")
        torch.save(checkpoint, file)
    measured = classification(["test", "--output", "old", "--trainer.enable_progress_bar", "false"])
    assert "test/accuracy" in measured.rows
    on = classification(["fit", "--config", "old/config.yaml", "--max_epochs", "2", "--output", "old"])
    assert on.trainer.current_epoch == 2


@pytest.mark.parametrize(
    ("task", "name", "args"),
    [
        (classification, "CIFAR10", ["--data", "CIFAR10"]),
        (classification, "ImageFolder", ["--data.class_path=datamodules.ImageFolder"]),
        (classification, "CIFAR10", ["--config", "digits.yaml", "--data", "CIFAR10"]),
        (classification, "Digits8x8", ["--data=CIFAR10", "--config", "data: Digits8x8"]),
        (detection, "COCODetection", ["--data", "COCODetection"]),
        (facenet, "Glyphs", ["--data", "Glyphs"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_data_come_with_their_own_defaults_whatever_was_named_before(
    task: Callable[..., Any], name: str, args: list[str],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("digits.yaml").write_text("data: Digits\n")
    with pytest.raises(SystemExit):
        task(["fit", *args, "--print_config"])
    data = yaml.safe_load(capsys.readouterr().out)["data"]
    assert data["class_path"] == f"datamodules.{name}"
    own = {field.name: field.default for field in fields(getattr(datamodules, name))}
    for key in ("image_size", "batch_size", "flip", "crop_pct"):
        assert data["init_args"].get(key) == own.get(key), key


@pytest.mark.parametrize("data", ["Digts", "pipelines.Nope", "nope.Nope", "lightning.Trainer", "{a", "[]"])
def test_data_that_are_none_are_refused_in_a_line(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        classification(["fit", "--data", data])
    assert end.value.code == 2
    assert data in capsys.readouterr().err


def test_a_task_without_arguments_trains_and_a_setting_without_a_value_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert present([]) == []
    for setting, said in (
        ("--max_epochs", "--trainer.max_epochs"),
        ("--data.root", "--data"),
        ("--config", "--config"),
    ):
        with pytest.raises(SystemExit) as end:
            classification(["fit", setting])
        assert end.value.code == 2
        assert f"{said}, or a setting below it, has no value" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    Path("outputs").write_text("a file in the place of the folder: far enough to see that it is a fit")
    with pytest.raises(SystemExit) as end:
        classification([])
    assert end.value.code == 2
    assert "cannot be written to" in capsys.readouterr().err


def test_the_best_checkpoint_is_chosen_by_the_figure_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = [*SMALL, "--max_epochs", "3", "--trainer.limit_val_batches", "2"]
    for monitor, mode in (("val/loss", "min"), ("val/loss", "max"), ("val/f1", "max")):
        folder = f"{monitor.replace('/', '_')}-{mode}"
        cli = classification(["fit", *small, "--monitor", monitor, "--monitor_mode", mode, "--output", folder])
        history = MlflowClient().get_metric_history(cli.trainer.logger.run_id, monitor)
        best = {"min": min, "max": max}[mode](point.value for point in history)
        step = torch.load(f"{folder}/best.ckpt", weights_only=True)["global_step"] - 1
        assert {point.step: point.value for point in history}[step] == best
    for wrong, said in (
        (["--monitor", "val/f1"], "--monitor val/NAME --monitor_mode"),
        (["--monitor", "train/loss", "--monitor_mode", "min"], "validation figure"),
        (["--monitor", "val/f2", "--monitor_mode", "max"], "val/f2"),
        (["--output", "val_f1-max", "--max_epochs", "4"], "--monitor val/f1"),
    ):
        with pytest.raises(SystemExit) as end:
            classification(["fit", *small, *wrong])
        assert end.value.code == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["model: [1, 2]", "trainer: [max_epochs]", "trainer: 3"])
def test_a_recipe_whose_parts_have_no_names_is_refused(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text(recipe)
    with pytest.raises(SystemExit) as end:
        classification(["fit", "--config", str(tmp_path / "r.yaml")])
    assert end.value.code == 2
    assert "has settings by their names" in capsys.readouterr().err


@pytest.mark.parametrize(("given", "own"), [
    (["--model.detector", "FCOS"], {"width": 256, "depth": 4}),
    (["--model.detector.width", "64", "--model.detector", "FCOS"], {"width": 64, "depth": 4}),
    (["--config", "recipe.yaml"], {"width": 256, "hidden": 512}),
    (["--config", "recipe.yaml", "--model.detector", "YOLO"], {"width": 64, "depth": 2}),
])  # fmt: skip
def test_a_part_has_the_defaults_of_its_own_class_and_not_of_the_one_that_it_replaces(
    given: list[str], own: dict[str, int]
) -> None:
    Path("recipe.yaml").write_text("{data: DigitScenes, model: {detector: {class_path: modules.detection.FasterRCNN, "
                                   "init_args: {hidden: 512}}}}")  # fmt: skip
    settings = resolved(detection, ["fit", *given])["model"]["detector"]["init_args"]
    assert settings == settings | own


def test_a_detector_of_torchvisions_is_a_start_that_needs_no_settings() -> None:
    model = torchvisions.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3)
    torch.save(model.state_dict(), "frcnn.pth")
    args, start = with_start(["fit", "--start", "frcnn.pth"], DetectionModule)
    assert start is not None
    assert start.published is not None
    part = resolved(detection, args)["model"]["detector"]
    module = DetectionModule.from_architecture(start.architecture | {"detector": part})
    assert module.load_state_dict(start.published.weights, strict=False).missing_keys == ["threshold"]
