"""What fits into memory, and what stays the same with more processes."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import start
from mlflow.tracking import MlflowClient
from PIL import Image

from datamodules import DataError, Digits8x8
from modules import create_backbone
from pipelines.classification import classification
from pipelines.engine.batch_size import _Live
from pipelines.engine.trainer import SyncedNorms
from pipelines.facenet import facenet
from pipelines.gan import gan
from pipelines.multi_task import multi_task
from pipelines.self_supervised import self_supervised
from pipelines.tracking.logger import run_id_of

SMALL = ["fit", "--data", "Digits8x8", "--data.image_size", "12", "--data.num_workers", "0", "--trainer.accelerator", "cpu",
         "--trainer.enable_progress_bar", "false", "--trainer.max_epochs", "1", "--output", "out"]  # fmt: skip


def test_the_largest_batch_is_found_once_logged_and_kept() -> None:
    auto = [*SMALL, "--data.batch_size", "auto"]
    assert start(classification, auto, 2) == [0, 0]
    size = yaml.safe_load(Path("out/config.yaml").read_text())["data"]["init_args"]["batch_size"]
    assert size == 512  # of some 1,200 images, which memory has room for; each process has a half
    assert MlflowClient().get_run(run_id_of("out")).data.params["data.init_args.batch_size"] == "512"
    cli = classification([*auto, "--trainer.max_epochs", "2"])  # one process with the same batches
    assert cli.datamodule.batch_size == 1024
    assert cli.trainer.current_epoch == 2


def test_a_batch_has_no_more_than_memory_has_room_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    untracked = [*SMALL, "--data.batch_size", "auto", "--trainer.logger", "false"]
    monkeypatch.setattr("pipelines.engine.batch_size.CPU_BYTES", 4 * 2**20)
    size = classification(untracked).datamodule.batch_size
    assert 4 <= size <= 512
    monkeypatch.setattr("pipelines.engine.batch_size.CPU_BYTES", 8 * 2**20)
    assert classification([*untracked, "--output", "more"]).datamodule.batch_size == 2 * size
    monkeypatch.setattr("pipelines.engine.batch_size.CPU_BYTES", 2**10)
    with pytest.raises(SystemExit, match="2"):
        classification([*untracked, "--output", "none"])
    with pytest.raises(SystemExit, match="2"):
        gan([*untracked, "--output", "none"])
    said = capsys.readouterr().err
    assert "a step on two images takes more than" in said
    assert "this task trains several against each other: give a number" in said


@pytest.mark.parametrize("task", [multi_task, self_supervised], ids=["multi_task", "self_supervised"])
def test_a_step_of_several_heads_or_views_is_tried_before_there_is_a_trainer(task: Any) -> None:
    few = [
        "--data.image_size",
        "32",
        "--data.train_per_class",
        "2",
        "--backbone",
        "test_resnet",
        "--trainer.logger",
        "false",
    ]
    assert task([*SMALL, *few, "--data.batch_size", "auto"]).datamodule.batch_size == 16


def test_of_people_the_largest_batch_is_tried_and_what_the_data_lack_is_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for person in range(6):
        Path("people", str(person)).mkdir(parents=True)
        for k in range(4):
            Image.fromarray(np.full((16, 16, 3), 40 * person + k, np.uint8)).save(f"people/{person}/{k}.png")
    faces = ["fit", "--data", "PeopleFolder", "--data.root", "people", "--data.image_size", "16", "--backbone", "test_resnet",
             "--trainer.logger", "false", *SMALL[5:], "--data.batch_size", "auto"]  # fmt: skip
    assert facenet(faces).datamodule.batch_size == 8  # two people of six, since two each are for validation and test
    assert "8 for each process, since there are no images for more" in " ".join(capsys.readouterr().err.split())
    assert start(facenet, [*faces, "--output", "both"], 2) == [0, 0]  # whose batches are one batch of people
    with pytest.raises(SystemExit, match="2"):
        facenet([*faces, "--data.pictures_per_person", "3"])
    assert "is no multiple of --data.pictures_per_person 3" in capsys.readouterr().err


def test_a_batch_size_that_nobody_finds_out_is_refused() -> None:
    data: Any = Digits8x8(batch_size="auto")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="give a number"):
        data.loader("train")
    assert next(iter(data.loader("val")))["image"].shape[0] <= 64


def test_the_rate_is_that_of_all_images_of_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    rate = ["--lr", "0.001", "--model.optimization.lr_batch_size", "64", "--trainer.accumulate_grad_batches", "2"]
    untracked = [*SMALL, "--trainer.logger", "false", "--data.batch_size", "128", *rate]
    (group, *_) = classification(untracked).trainer.optimizers[0].param_groups
    assert group["initial_lr"] == pytest.approx(0.004)
    assert "Learning rate: 0.004 for 256 images a step, stated as 0.001 for 64." in " ".join(
        capsys.readouterr().err.split()
    )


@pytest.mark.parametrize(("name", "maps"), [("mobilenetv3_small_050", False), ("resnet10t", True)])
def test_activations_that_are_computed_again_take_less_memory_and_change_nothing(name: str, maps: bool) -> None:
    torch.manual_seed(0)
    kept = create_backbone(name, image_size=40, features_only=maps)
    again = create_backbone(name, image_size=40, features_only=maps, grad_checkpointing=True)
    again.load_state_dict(kept.state_dict())
    image, most = torch.randn(16, 3, 40, 40), []
    for network in (kept, again):
        with _Live() as live:
            found = network(image)
            sum(one.square().mean() for one in (found if maps else [found])).backward()
        most.append(live.most)
    assert most[1] < most[0]
    for one, other in zip(kept.parameters(), again.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or (other.grad is not None and torch.equal(one.grad, other.grad))
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in kept.state_dict().items())
    assert kept.recipe == again.recipe


def test_batch_normalisation_over_processes_keeps_activations_and_is_undone() -> None:
    """On CPUs torch has none to train with."""
    torch.manual_seed(0)
    network = timm.create_model("efficientnet_b0", num_classes=3).eval()
    image, kinds, synced = torch.randn(2, 3, 32, 32), [type(each) for each in network.modules()], SyncedNorms()
    there = synced.apply(deepcopy(network))
    assert any(isinstance(each, torch.nn.SyncBatchNorm) for each in there.modules())
    assert torch.equal(there(image), network(image))
    back = synced.revert(there)
    assert [type(each) for each in back.modules()] == kinds
    assert torch.equal(back(image), network(image))


def test_what_cannot_be_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for mistake in (
        ["--model.backbone.grad_checkpointing", "true"],
        ["--trainer.sync_batchnorm", "true", "--trainer.devices", "2"],
        [
            "--trainer.strategy",
            '{"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}',
            "--trainer.devices",
            "2",
        ],
        ["--data.batch_size", "largest"],
        ["--model.optimization.lr_batch_size", "0"],
    ):
        with pytest.raises(SystemExit, match="2"):
            classification([*SMALL, *mistake])
    said = capsys.readouterr().err
    assert "lenet5 has no gradient checkpointing" in said
    assert "torch has no batch normalisation over several processes on CPUs" in said
    assert "ModelParallelStrategy splits the weights among the processes" in said
    assert not Path("out/run.json").exists()
