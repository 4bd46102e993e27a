"""A mistake of the user's is one paragraph that names it, and exit code 2, whatever the command."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pipelines.classification import classification
from pipelines.gan import gan
from pipelines.instance_segmentation import instance_segmentation

SMALL = ["fit", "--data", "Digits8x8", "--data.image_size", "12", "--trainer.max_epochs", "1", "--trainer.limit_train_batches",
         "2", "--trainer.enable_progress_bar", "false", "--trainer.logger", "false", "--output", "out"]  # fmt: skip


@pytest.mark.parametrize(
    "mistake",
    [
        ("--model.optimization.lr", "0"),
        ("--model.optimization.lr", "-0.001"),
        ("--model.optimization.ema_decay", "1"),
        ("--model.optimization.l2_penalty", "-0.1"),
        ("--model.optimization.lr_scheduler.warmup", "2"),
        ("--model.optimization.frozen_epochs", "-2"),
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
        ("--trainer.devices", "0"),
        ("--trainer.accelerator", "abacus"),
        ("--trainer.enable_checkpointing", "false"),
        ("--seed_everything", "-1"),
        ("--checkpoint_seconds", "-1"),
        ("--model.backbone_options.nonsense", "3"),
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
        ("--data.image_size large", "--data.image_size must be a whole number, not large."),
        ("--data.augmentation some", "--data.augmentation must be one of none, light, standard, strong, not some."),
        ("--model.optimization.optimizer Adamm", "There is no Adamm for --model.optimization.optimizer. Did you mean Adam"),
        ("--model.optimization.optimizer SGD --model.optimization.optimizer.lr high", "optimizer.lr must be a number, not high."),
        ("--model.optimization.lr_scheduler StepLR", "also needs --model.optimization.lr_scheduler.step_size. See"),
        ("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks also needs --trainer.callbacks.monitor. See"),
        ("--config model.safetensors", "no text"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_as_a_setting_is_told_in_a_sentence(
    mistake: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("model.safetensors").write_bytes(b"\x80\x02")
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
    assert "Traceback" not in message
    assert "pydantic" not in message
    return message


def test_parts_in_a_recipe_are_checked_too(capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.yaml").write_text("model:\n  objective: {class_path: Hinge, init_args: {}}\n  latent_size: 0\n")
    assert "--model.latent_size must be" in said(lambda: gan(["fit", "--config", "recipe.yaml"]), capsys)
    assert "--model.generator.width must be" in said(
        lambda: gan(["fit", "--model.generator", "UpsampledConvolutions", "--model.generator.width", "-8"]), capsys
    )


@pytest.mark.parametrize("kind", ["EarlyStopping", "ModelCheckpoint"])
def test_a_monitor_that_nothing_measures_is_told(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    monitor = [f"--trainer.callbacks+={kind}", "--trainer.callbacks.monitor=val/nothing"]
    assert "val/accuracy" in said(lambda: classification([*SMALL, *monitor]), capsys)


@pytest.mark.parametrize(
    "command",
    [
        ["registry", "show", "nobody"],
        ["registry", "load", "models:/nobody/1", "there"],
        ["export", "models:/nobody/1", "net.onnx"],
        ["sweep", "none.yaml", "none.yaml"],
        ["tracking", "nothing"],
        ["predict", "models:/nobody/1", "a.png"],
        ["convert", "there", "--data", "COCODetection", "--data.root", "nothing"],
        ["inspect", "models:/nobody/1"],
        ["transferability", "--backbone", "resnt18", "--data", "Digits8x8"],
        ["autoencoding", "encode", "models:/nobody/1", "pictures", "--batch_size", "0"],
        ["autoencoding", "points", "--lr", "-1"],
        ["predict"],
    ],
    ids=" ".join,
)
def test_every_command_ends_alike(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (8, 8)).save("a.png")
    name, *rest = command
    monkeypatch.setattr(sys, "argv", [name, *rest])
    monkeypatch.delitem(sys.modules, f"pipelines.{name}", raising=False)
    said(lambda: runpy.run_module(f"pipelines.{name}", run_name="__main__"), capsys)


@pytest.mark.parametrize(
    ("train", "lacking"), [(classification, "label"), (instance_segmentation, "masks")], ids=["label", "masks"]
)
def test_data_of_another_task_are_refused_by_what_they_lack(
    train: Callable[..., object], lacking: str, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes = "fit --data DigitScenes --data.scene_size 32 --data.train 8 --data.val 8 --data.test 8 --model.backbone resnet18"
    message = said(lambda: train([*scenes.split(), "--trainer.fast_dev_run", "true"]), capsys)
    assert f"its samples have no {lacking}" in message
