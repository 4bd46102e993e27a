"""Trainings with weights split among the processes, and the checkpoints that they leave."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import start
from test_contract import QUIET, TASKS, weights

from pipelines.classification import classification

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
    assert start(classification, [*args, "--trainer.max_epochs", "2", "--output", "whole"], 2) == [0, 0]
    assert start(classification, [*split, "--trainer.max_epochs", "1", "--output", "split"], 2) == [0, 0]
    shutil.copytree("split", "on")
    assert start(classification, [*split, "--trainer.max_epochs", "2", "--output", "split"], 2) == [0, 0]
    assert_near("whole/last.ckpt", "split/last.ckpt")
    alone = [*args, "--trainer.devices", "1", "--data.batch_size", "32", "--trainer.max_epochs", "2", "--output", "on"]
    assert classification(alone).trainer.global_step == 4
    assert_near("whole/last.ckpt", "on/last.ckpt")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (["--model.optimization.ema_decay", "0.9"], "ema_decay"),
        (["--model.optimization.l2_penalty", "0.1"], "l2_penalty"),
        (["--model.backbone.transfer", "features"], "frozen_epochs"),
        (["--trainer.precision", "bf16-true"], "bf16-true"),
    ],
)
def test_what_cannot_be_split_is_refused(setting: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        classification(["fit", "--data", "Digits8x8", "--data.image_size", "12", *TWO, "--trainer.strategy", "fsdp2", *setting,
                        "--output", "out"])  # fmt: skip
    assert end.value.code == 2
    assert said in capsys.readouterr().err
    assert not Path("out/last.ckpt").exists()


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
