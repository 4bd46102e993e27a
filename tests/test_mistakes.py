"""A mistake of the user's is one paragraph that names it, and exit code 2, whatever the command."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from datamodules import DigitScenes
from modules import Backbone, DataSpec, SegmentationModule
from pipelines.classification import classification
from pipelines.gan import gan
from pipelines.instance_segmentation import instance_segmentation
from pipelines.segmentation import segmentation
from pipelines.serving import evaluation
from pipelines.serving.store import save_model

SMALL = ["fit", "--data", "Digits8x8", "--data.image_size", "12", "--trainer.max_epochs", "1", "--trainer.limit_train_batches",
         "2", "--trainer.enable_progress_bar", "false", "--trainer.logger", "false", "--output", "out"]  # fmt: skip

PLATEAU = "torch.optim.lr_scheduler.ReduceLROnPlateau"


@pytest.mark.parametrize(
    "mistake",
    [
        ("--model.optimization.lr", "0"),
        ("--model.optimization.lr", "-0.001"),
        ("--model.optimization.ema_decay", "1"),
        ("--model.optimization.l2_penalty", "-0.1"),
        ("--model.optimization.lr_scheduler.warmup", "2"),
        ("--model.optimization.frozen_epochs", "-2"),
        ("--model.optimization.lr", "inf"),
        ("--model.optimization.l1_penalty", "inf"),
        ("--model.label_smoothing", "-0.1"),
        ("--model.mixup", "-1"),
        ("--data.image_size", "0"),
        ("--data.batch_size", "0"),
        ("--data.num_workers", "-1"),
        ("--trainer.accumulate_grad_batches", "0"),
        ("--trainer.log_every_n_steps", "0"),
        ("--trainer.check_val_every_n_epoch", "0"),
        ("--trainer.max_epochs", "0"),
        ("--trainer.max_steps", "0"),
        ("--trainer.limit_train_batches", "0"),
        ("--trainer.val_check_interval", "0"),
        ("--trainer.val_check_interval", "100"),
        ("--model.optimization.optimizer", "SGD", "--model.optimization.optimizer.momentum", "-2"),
        ("--model.optimization.lr_scheduler", "StepLR", "--model.optimization.lr_scheduler.step_size", "0"),
        ("--model.optimization.optimizer", "SGD", "--model.optimization.optimizer.lr", "0"),
        ("--model.optimization.lr_scheduler", "OneCycleLR", "--model.optimization.lr_scheduler.max_lr", "-1"),
        ("--model.optimization.lr_scheduler", "ExponentialLR", "--model.optimization.lr_scheduler.gamma", "-1"),
        ("--model.optimization.lr_scheduler", "StepLR", "--model.optimization.lr_scheduler.step_size", "-2"),
        ("--model.optimization.lr_scheduler", PLATEAU, "--model.optimization.lr_scheduler.factor", "-1"),
        ("--trainer.max_time", "00:00:00:00"),
        ("--trainer.min_epochs", "-1"),
        ("--trainer.num_sanity_val_steps", "-2"),
        ("--trainer.devices", "0"),
        ("--trainer.accelerator", "abacus"),
        ("--trainer.enable_checkpointing", "false"),
        ("--seed_everything", "-1"),
        ("--checkpoint_seconds", "-1"),
        ("--model.backbone.options.nonsense", "3"),
    ],
    ids=" ".join,
)
def test_a_setting_out_of_its_range_is_refused_by_name(
    mistake: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert mistake[0].split(".")[-1].strip("-") in said(lambda: classification([*SMALL, *mistake]), capsys)


@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        ("--data Digitss", "There is no Digitss for --data. Did you mean Digits?"),
        ("--data ImageFolder", "--data also needs --data.root."),
        ("--data.batchsize 3", "There is no --data.batchsize: Digits8x8 has no such setting."),
        ("--model.mixupp 1", "classification has no setting --model.mixupp. Did you mean --model.mixup?"),
        ("--config misspelt.yaml", "classification has no setting --modell.mixup. Did you mean --model.mixup?"),
        ("--output damaged", "damaged/last.ckpt is not a file of weights, or is damaged"),
        ("--data.image_size large", "--data.image_size must be a whole number of pixels, at least 1, or HEIGHTxWIDTH such as 240x320, not large."),
        ("--data.image_size [24,40]", "--data.image_size must be a whole number of pixels, at least 1, or HEIGHTxWIDTH such as 240x320, not [24, 40]."),
        ("--data.batch_sizes 3", "Digits8x8 has no such setting. Did you mean --data.batch_size?"),
        ("--data.batch_size huge", "--data.batch_size must be a whole number or auto, not huge."),
        ("--model.backbone.options a:1", "--model.backbone.options must be a mapping, not a:1. Write it in quotes, with a space after each colon"),
        ("--trainer.max_time 8h", "such as 00:08:00:00 for eight hours, not 8h."),
        ("--data.augmentation some", "--data.augmentation must be a list or one of none, light, standard, strong, not some."),
        ("--data Manifest --data.file t.csv --data.tabular [2020]",
         "--data.tabular must be a list of texts, and YAML reads 2020 as none: put it in quotes"),
        ("--model.optimization.optimizer Adamm", "There is no Adamm for --model.optimization.optimizer. Did you mean Adam"),
        ("--model.optimization.optimizer SGD --model.optimization.optimizer.lr high", "optimizer.lr must be a number, not high."),
        ("--model.optimization.lr_scheduler StepLR", "also needs --model.optimization.lr_scheduler.step_size. See"),
        ("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks also needs --trainer.callbacks.monitor. See"),
        ("--config model.safetensors", "--config model.safetensors is not text"),
        ("--model.optimization.lr_scheduler ReduceLROnPlateau", f"write one of {PLATEAU}, lightning.pytorch.cli."),
        ("--trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor val/loss --trainer.callbacks.patience -1",
         "--trainer.callbacks.patience must be at least 0, not -1."),
        ("--trainer.callbacks+=Timer --trainer.callbacks.duration 00:00:00:00", "Timer leaves nothing to fit"),
        ("--trainer.callbacks+=LearningRateFinder --trainer.callbacks.min_lr -1", "give a min_lr above 0"),
        ("--trainer.logger true --register x --trainer.max_steps 1", "--trainer.max_steps 1 ends before the first one"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_as_a_setting_is_told_in_a_sentence(
    mistake: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("model.safetensors").write_bytes(b"\x80\x02")
    Path("misspelt.yaml").write_text("modell: {mixup: 1}")
    Path("damaged").mkdir()
    Path("damaged", "last.ckpt").touch()
    message = said(lambda: classification([*SMALL, *mistake.split()]), capsys)
    assert told in " ".join(message.split())
    assert "class_path" not in message


def test_weights_that_are_no_checkpoint_are_told_from_one(capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"head.weight": torch.zeros(10, 84)}, "model.safetensors")
    for verb in ("fit", "test"):
        message = said(lambda verb=verb: classification([verb, *SMALL[1:], "--ckpt_path", "model.safetensors"]), capsys)
        assert "--model.backbone" in message


def said(command: object, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that is refused says."""
    with pytest.raises(SystemExit) as end:
        command()  # type: ignore[operator]
    message = capsys.readouterr().err
    assert end.value.code == 2
    assert not any(word in message for word in ("Traceback", "usage:", "tip:"))
    assert "pydantic" not in message
    return message


def test_parts_in_a_recipe_are_checked_too(capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.yaml").write_text("model:\n  objective: {class_path: Hinge, init_args: {}}\n  latent_size: 0\n")
    assert "--model.latent_size must be" in said(lambda: gan(["fit", "--config", "recipe.yaml"]), capsys)
    assert "--model.generator.width must be" in said(
        lambda: gan(["fit", "--model.generator", "UpsampledConvolutions", "--model.generator.width", "-8"]), capsys
    )


@pytest.mark.parametrize(
    "monitors",
    [
        "--trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor=val/nothing",
        "--trainer.callbacks+=ModelCheckpoint --trainer.callbacks.monitor=val_loss",
        "--model.optimization.lr_scheduler lightning.pytorch.cli.ReduceLROnPlateau "
        "--model.optimization.lr_scheduler.monitor val/nothing",
    ],
    ids=["stopping", "checkpoint", "schedule"],
)
def test_a_monitor_that_nothing_measures_is_told_before_the_training(
    monitors: str, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = Steps()
    assert "val/accuracy" in said(lambda: classification([*SMALL, *monitors.split()], [steps]), capsys)
    assert not steps.taken
    without = said(lambda: classification([*SMALL, *monitors.split(), "--trainer.limit_val_batches", "0"]), capsys)
    assert "there is no validation" in without


class Steps(L.Callback):
    """Counts the steps of a training."""

    taken = 0

    def on_train_batch_start(self, *args: object) -> None:
        self.taken += 1


class Late(L.Callback):
    """Measures something in the last batch of the validation."""

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if batch_idx == trainer.num_val_batches[0] - 1:
            pl_module.log("val/late", 1.0)


def test_a_monitor_that_is_measured_on_later_images_is_waited_for() -> None:
    stops = "--trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor=val/late"
    assert classification([*SMALL, *stops.split()], [Late()]).trainer.global_step == 2


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("registry show nobody", "No model 'nobody' is registered"),
        (
            "registry compare one 1",
            "registry compare also needs second. See python -m pipelines.registry compare --help.",
        ),
        ("registry lists", "registry has no lists, but list, show, promote, demote, compare, load. Did you mean list?"),
        ("registry", "What should registry do?"),
        ("registry show one 2", "registry does not know what to do with 2."),
        ("registry load models:/nobody/1 there", "nobody"),
        ("export models:/nobody/1 net.onnx", "nobody"),
        ("export models:/nobody/1", "export also needs file."),
        ("sweep none.yaml none.yaml", "none.yaml"),
        ("cross_validate none.yaml", "none.yaml"),
        ("autoencoding fit --data Digits8x8 --data.class_weighting sqrt", "sqrt weights the classes in a loss"),
        ("cross_validate none.yaml --folds 1", "--folds must be at least 2, not 1."),
        ("tracking nothing", "nothing is not the folder of a training"),
        ("predict models:/nobody/1 a.png", "nobody"),
        ("predict models:/nobody/1 a.png --batch_size some", "--batch_size must be a whole number, not some."),
        ("convert there --data COCODetection --data.root nothing", "nothing"),
        ("convert there --data Digits", "--form coco is for data with boxes"),
        ("inspect models:/nobody/1", "nobody"),
        ("transferability --backbone resnt18 --data Digits8x8", "resnt18"),
        ("autoencoding encode models:/nobody/1 pictures --batch_size 0", "--batch_size"),
        ("autoencoding points --lr -1", "--lr"),
        ("facenet enrol", "facenet enrol also needs model and gallery and paths."),
        (
            "classification fitt",
            "classification has no fitt, but fit, validate, test, predict, preview. Did you mean fit?",
        ),
        ("classification fit --config nowhere.yaml", "nowhere.yaml"),
        ("classification fit --config torn.yaml", "--config torn.yaml is not valid YAML"),
        (
            "classification fit --config endless.yaml",
            "--config endless.yaml is not a recipe: a part of it contains itself",
        ),
        ("classification fit --config list.yaml", "--config list.yaml is not a recipe"),
        (
            "classification fit --config clips.yaml",
            "clips.yaml has the setting model.cell, which classification does not",
        ),
        ("predict", "predict also needs model and paths."),
        ("datasets mnist --root a.png", "a.png is a file, where a folder is needed"),
        ("datasets mnist --root a.png/data", "a file lies where a folder above it should be"),
        ("cross_validate list.yaml --name ../x", "--name ../x is a path, but its folder lies in outputs"),
        ("sweep list.yaml list.yaml --study a/b", "--study a/b is a path"),
        ('cross_validate list.yaml --args "open', "a quotation in it does not end"),
    ],
)
def test_every_command_ends_alike(
    command: str, told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (8, 8)).save("a.png")
    Path("torn.yaml").write_text("data: [1")
    Path("list.yaml").write_text("- data")
    Path("clips.yaml").write_text("model: {cell: gru}")
    Path("endless.yaml").write_text("data: &a [*a]")
    name, *rest = command.split()
    monkeypatch.setattr(sys, "argv", [name, *rest])
    monkeypatch.delitem(sys.modules, f"pipelines.{name}", raising=False)
    message = said(lambda: runpy.run_module(f"pipelines.{name}", run_name="__main__"), capsys)
    assert told in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("train", "told", "way_out"),
    [
        (classification, "its samples have no label", "the default of this task"),
        (instance_segmentation, "its samples have no masks", "--data.masks true"),
        (segmentation, "has classes of objects, without the background", "give data of class maps"),
    ],
    ids=["label", "masks", "mask"],
)
def test_data_of_another_task_are_refused_by_what_they_lack(
    train: Callable[..., object], told: str, way_out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes = "fit --data DigitScenes --data.scene_size 32 --data.train 8 --data.val 8 --data.test 8 --model.backbone resnet18"
    message = " ".join(said(lambda: train([*scenes.split(), "--trainer.fast_dev_run", "true"]), capsys).split())
    assert told in message
    assert way_out in message


def test_a_model_is_not_measured_on_data_of_another_task() -> None:
    scenes = DigitScenes(scene_size=32, train=2, val=2, test=2, num_workers=0)
    module = SegmentationModule(DataSpec(label_names=["paper", "ink"], image_size=32), Backbone("test_resnet"))
    save_model(Path("model"), module, scenes.preprocessing, "segmentation")
    with pytest.raises(ValueError, match="DigitScenes does not fit a SegmentationModule: its samples have no mask"):
        evaluation.evaluate(Path("model"), scenes)
