"""Trainings with weights split among the processes, and the checkpoints that they leave."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import start
from test_contract import QUIET, TASKS, weights

from pipelines.classification import classification
from pipelines.few_shot import few_shot
from pipelines.self_supervised import self_supervised
from pipelines.super_resolution import super_resolution

REFUSED = ("few_shot", "self_supervised", "gan", "super_resolution")
PLAIN = ["--model.optimization.optimizer", "SGD", "--model.optimization.optimizer.lr", "0.02"]
TWO = [*QUIET, *PLAIN, "--data.num_workers", "0", "--data.batch_size", "16", "--trainer.devices", "2",
       "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1"]  # fmt: skip


def assert_near(one: str, other: str) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5, msg=key)


def test_split_weights_learn_what_whole_ones_do_and_their_checkpoints_are_whole() -> None:
    vit = ["--model.backbone", "vit_tiny_patch16_224", "--model.backbone.options.patch_size", "4",
           "--model.backbone.options.depth", "2"]  # fmt: skip
    args = ["fit", "--data", "Digits8x8", "--data.image_size", "8", *TWO, *vit, "--model.optimization.optimizer.momentum", "0.9",
            "--trainer.gradient_clip_val", "0.5", "--model.optimization.lr_scheduler", "torch.optim.lr_scheduler.ConstantLR"]  # fmt: skip
    split = [*args, "--trainer.strategy", "fsdp2"]
    assert start(classification, [*split, "--trainer.max_epochs", "1", "--output", "split"], 2) == [0, 0]
    shutil.copytree("split", "on")
    assert start(classification, [*split, "--trainer.max_epochs", "2", "--output", "split"], 2) == [0, 0]
    alone = [*args, "--trainer.devices", "1", "--data.batch_size", "32", "--trainer.max_epochs", "2"]
    for output in ("whole", "on"):
        assert classification([*alone, "--output", output]).trainer.global_step == 4
        assert_near(f"{output}/last.ckpt", "split/last.ckpt")


@pytest.mark.parametrize(
    ("task", "setting", "said"),
    [
        (classification, ["--model.optimization.ema_decay", "0.9"], "--model.optimization.ema_decay 0.9 averages"),
        (classification, ["--model.optimization.l2_penalty", "0.1"], "--model.optimization.l2_penalty 0.1 sums"),
        (classification, ["--model.backbone.transfer", "features"], "--model.backbone.transfer features needs whole"),
        (classification, ["--trainer.precision", "bf16-true"], "--trainer.precision bf16-true has not been tried"),
        (classification, ["--trainer.strategy", "fsdp"], "FSDPStrategy splits the weights"),
        (self_supervised, [], "the teacher of DINO"),
        (self_supervised, ["--model.method", "DINO"], "DINO does not allow: its teacher"),
        (self_supervised, ["--model.method", "VICReg", "--model.backbone.compile", "true"], "compile True has not"),
        (few_shot, [], "FewShotModule does not allow: the learned factor"),
        (super_resolution, [], "SuperResolutionModule does not allow: several networks"),
    ],
)
def test_what_cannot_be_split_is_refused_before_data_are_read(
    task: Any, setting: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = "PeopleFolder" if task is few_shot else "ImageFolder"
    with pytest.raises(SystemExit) as end:
        task(["fit", "--data", data, "--data.root", "nowhere", *QUIET, "--trainer.devices", "2", "--trainer.strategy", "fsdp2", *setting])  # fmt: skip
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert said in told
    assert "ddp" in told or "--trainer.strategy fsdp2 splits them, too" in told
    assert not Path("outputs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_a_task_learns_with_split_weights_or_refuses_them(name: str) -> None:
    case: Any = TASKS[name]
    args = ["fit", *case.small, *TWO, "--model.optimization.optimizer.lr", case.descent, "--trainer.max_epochs", "2"]
    codes = start(case.command, [*args, "--trainer.strategy", "fsdp2", "--output", "split"], 2)
    if name in REFUSED:
        assert codes == [2, 2]
        return
    assert codes == [0, 0]
    assert start(case.command, [*args, "--output", "whole"], 2) == [0, 0]
    assert_near("whole/last.ckpt", "split/last.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["classification", "segmentation"])
def test_split_weights_in_mixed_precision_learn_what_whole_ones_do(name: str) -> None:
    case: Any = TASKS[name]
    args = ["fit", *case.small, *TWO, "--model.optimization.optimizer.lr", case.descent, "--trainer.max_epochs", "2",
            "--trainer.precision", "bf16-mixed"]  # fmt: skip
    assert start(case.command, [*args, "--output", "whole"], 2) == [0, 0]
    assert start(case.command, [*args, "--trainer.strategy", "fsdp2", "--output", "split"], 2) == [0, 0]
    assert_near("whole/last.ckpt", "split/last.ckpt")
