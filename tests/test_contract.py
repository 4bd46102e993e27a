"""What every task promises, through its own command line. A new task adds a line to CASES."""

import signal
from dataclasses import dataclass, field

import mlflow
import pytest
import torch
from conftest import ROOT, start
from mlflow.tracking import MlflowClient

from examples.keypoints import keypoints
from modules import BackboneError, VisionModule
from pipelines.autoencoding import autoencoding
from pipelines.classification import classification
from pipelines.detection import detection
from pipelines.engine.cli import VisionCLI
from pipelines.engine.task import Task
from pipelines.facenet import facenet
from pipelines.few_shot import few_shot
from pipelines.gan import gan
from pipelines.multi_label import multi_label
from pipelines.multi_task import multi_task
from pipelines.q_learning import q_learning
from pipelines.regression import regression
from pipelines.segmentation import segmentation
from pipelines.self_supervised import self_supervised
from pipelines.sequences import sequences
from pipelines.serving import registry
from pipelines.stylization import stylization
from pipelines.super_resolution import super_resolution
from pipelines.tracking.logger import run_id_of


@dataclass
class Case:
    command: Task
    small: list[str]  # embedded data and a small network
    random: list[str]  # the same with augmentation and randomness inside the network
    overfit: list[str] | None = field(default_factory=list)  # what it takes to learn eight samples by heart
    descent: str = "0.02"  # a rate at which plain gradient descent does not diverge


CASES = (
    Case(
        classification,
        ["--data", "Digits8x8", "--data.image_size", "12", "--data.batch_size", "64"],
        ["--data.augmentation", "strong", "--model.backbone.options.drop_rate", "0.3", "--model.mixup", "0.2"],
    ),
    Case(
        multi_label,
        ["--data", "DigitSets", "--data.scene_size", "32", "--data.train", "128", "--data.val", "33", "--data.test", "33",
         "--data.augmentation", "none", "--data.batch_size", "64", "--model.backbone", "lenet5"],
        ["--data.batch_size", "8", "--data.augmentation", "strong", "--model.backbone.options.drop_rate", "0.3"],
    ),
    Case(
        regression,
        ["--data", "DigitSums", "--data.scene_size", "32", "--data.train", "128", "--data.val", "33", "--data.test", "33",
         "--data.augmentation", "none", "--data.batch_size", "64", "--model.backbone", "lenet5"],
        ["--data.batch_size", "8", "--data.augmentation", "strong", "--model.backbone.options.drop_rate", "0.3"],
    ),
    Case(
        sequences,
        ["--data", "MovingDigits", "--data.scene_size", "32", "--data.train", "128", "--data.val", "33", "--data.test", "33",
         "--data.lengths", "[2, 4]", "--data.augmentation", "none", "--data.batch_size", "64", "--model.hidden_size", "32"],
        ["--data.batch_size", "8", "--data.augmentation", "strong", "--model.backbone.options.drop_rate", "0.3"],
        ["--trainer.max_epochs", "120", "--trainer.check_val_every_n_epoch", "120", "--model.optimization.lr", "0.01",
         "--model.hidden_size", "128"],
    ),
    Case(
        detection,
        ["--data", "DigitScenes", "--data.scene_size", "48", "--data.train", "128", "--data.val", "33", "--data.test", "33",
         "--data.augmentation", "none", "--data.batch_size", "64", "--model.backbone", "lenet5", "--model.detector", "YOLO",
         "--model.detector.strides", "[4, 8]", "--model.detector.width", "16", "--model.detector.depth", "1",
         "--model.detector.norm", "group"],  # of each image alone, so that two processes see what one does
        ["--data.batch_size", "8", "--data.augmentation", "[{strong: {rotate: 20}}, {RandomGamma: {p: 0.5}}]",
         "--data.mixing.mosaic", "0.5", "--data.mixing.mixup", "0.3", "--data.image_size", "48x64", "--data.fit", "stretch",
         "--model.multi_scale", "0.5",
         "--model.backbone", "test_resnet", "--model.backbone.options.drop_path_rate", "0.3"],
        ["--trainer.max_epochs", "120", "--trainer.check_val_every_n_epoch", "120", "--model.backbone", "test_resnet",
         "--model.optimization.lr", "0.01"],
    ),
    Case(
        autoencoding,
        ["--data", "Digits8x8", "--data.image_size", "12x16", "--data.batch_size", "64"],
        ["--data.augmentation", "strong", "--model.bottleneck", "Variational", "--model.noise", "GaussianNoise"],
        descent="0.0005",  # its loss is a sum over pixels
    ),
    Case(
        facenet,
        # All triplets: which of two nearly equal ones is mined would hang on the last bit.
        ["--data", "Glyphs", "--data.people", "96", "--data.batch_size", "64",
         "--model.loss", "modules.facenet.TripletLoss"],
        ["--data.batch_size", "16", "--data.augmentation", "strong", "--model.miner", "modules.facenet.ProgressiveMiner"],
    ),
    Case(
        few_shot,
        ["--data", "Glyphs", "--data.people", "96", "--data.batch_size", "64", "--model.way", "3", "--model.queries", "3"],
        ["--data.batch_size", "16", "--data.augmentation", "strong", "--model.backbone", "lenet5",
         "--model.backbone.options.drop_rate", "0.3"],
        ["--data.batch_size", "64"],  # two characters are told apart at once
        descent="0.0001",  # of squared distances in many dimensions
    ),
    Case(
        self_supervised,
        ["--data", "Digits8x8", "--data.image_size", "12", "--data.batch_size", "64", "--model.backbone", "lenet5",
         "--model.method", "DINO", "--model.method.prototypes", "64", "--model.method.hidden", "32", "--model.method.local_size", "12"],
        ["--data.augmentation", "strong", "--model.backbone", "test_resnet", "--model.backbone.options.drop_rate", "0.3",
         "--model.method.local_size", "8"],
        overfit=None,
    ),
    Case(
        segmentation,
        ["--data", "DigitMasks", "--data.scene_size", "32", "--data.train", "128", "--data.val", "33", "--data.test", "33",
         "--data.augmentation", "none", "--data.batch_size", "64", "--model.backbone", "test_convnext",
         "--model.decoder", "FPN", "--model.decoder.width", "64", "--model.decoder.dropout", "0"],
        ["--data.augmentation", "strong", "--data.class_weighting", "sqrt", "--data.batch_size", "8",
         "--model.decoder.dropout", "0.3", "--model.backbone.options.drop_path_rate", "0.3"],
    ),
    Case(
        multi_task,
        ["--data", "DigitTasks", "--data.scene_size", "32", "--data.train", "128", "--data.val", "33", "--data.test", "33",
         "--data.augmentation", "none", "--data.batch_size", "64", "--model.backbone", "test_convnext",
         "--model.decoder", "FPN", "--model.decoder.width", "64", "--model.decoder.dropout", "0",
         "--model.detector", "YOLO", "--model.detector.strides", "[4, 8]", "--model.detector.width", "16",
         "--model.detector.depth", "1", "--model.detector.norm", "group"],
        ["--data.batch_size", "8", "--data.augmentation", "strong", "--model.backbone.options.drop_path_rate", "0.3",
         "--model.weighting", "uncertainty", "--model.pcgrad", "true", "--model.bottleneck", "Variational"],
        ["--trainer.max_epochs", "150", "--trainer.check_val_every_n_epoch", "150", "--model.optimization.lr", "0.01"],
    ),
    Case(
        gan,
        ["--data", "Digits8x8", "--data.image_size", "12x16", "--data.batch_size", "64", "--model.num_samples", "200",
         "--model.generator", "UpsampledConvolutions", "--model.generator.width", "8", "--model.generator.norm", "pixel",
         "--model.backbone.options.width", "8", "--model.health_every", "5"],
        ["--data.augmentation", "strong", "--model.backbone.options.drop_rate", "0.3", "--model.regularizer", "R1",
         "--model.spectral_norm", "true", "--model.optimization.discriminator_steps", "2"],
        overfit=None,
    ),
    Case(
        keypoints,  # the example of docs/new_task.md
        ["--data.train", "260", "--data.batch_size", "64", "--model.backbone", "lenet5"],
        ["--data.batch_size", "16", "--model.optimization.l2_penalty", "0.001"],
        ["--trainer.max_epochs", "150", "--trainer.check_val_every_n_epoch", "150", "--model.optimization.lr", "0.01"],
    ),
    Case(
        super_resolution,
        ["--data", "Digits8x8", "--data.image_size", "16x24", "--data.batch_size", "64", "--model.generator.width", "8",
         "--model.generator.blocks", "1", "--model.backbone.options.width", "4"],
        ["--data.augmentation", "strong", "--model.backbone.options.drop_rate", "0.3", "--model.adversarial", "0.1"],
        ["--trainer.max_epochs", "120", "--trainer.check_val_every_n_epoch", "120", "--model.generator.width", "32",
         "--model.optimization.lr", "0.005"],
    ),
    Case(
        q_learning,
        ["--data", "Gymnasium", "--data.val", "5", "--data.test", "33", "--data.batch_size", "64", "--data.epoch_batches", "8",
         "--data.replay_start", "100"],
        ["--data.batch_size", "8", "--data.memory_size", "110", "--data.epsilon_steps", "30", "--model.double", "true",
         "--model.dueling", "true", "--model.target_update", "2", "--model.backbone.options.drop_rate", "0.3"],
        overfit=None,
    ),
    Case(
        stylization,
        ["--data", "Digits8x8", "--data.image_size", "16x24", "--data.batch_size", "64", "--model.backbone", "test_resnet",
         "--model.backbone.pretrained", "false", "--model.translator.width", "4", "--model.translator.blocks", "1",
         "--model.style", str(ROOT / "docs/style.jpg"), "--model.style_size", "32"],
        ["--data.augmentation", "strong", "--model.optimization.l2_penalty", "0.001"],
        overfit=None,
        descent="0.0000001",  # its loss grows with the fourth power
    ),
)  # fmt: skip
TASKS = {case.command.name: case for case in CASES}


def every(*slow: str) -> pytest.MarkDecorator:
    """All tasks; those named, whose parts other tasks test here, in the slow suite."""
    marks = {name: [pytest.mark.slow] * (name in slow) for name in TASKS}
    return pytest.mark.parametrize(
        "task", [pytest.param(case, id=name, marks=marks[name]) for name, case in TASKS.items()]
    )


FEW = ["--trainer.limit_train_batches", "4", "--trainer.limit_val_batches", "2", "--trainer.limit_test_batches", "1"]
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]


def fit(task: Case, *args: str) -> VisionCLI:
    return task.command(["fit", *task.small, *QUIET, "--output", "out", *args])


def run_of(output: str) -> mlflow.entities.Run:
    return MlflowClient().get_run(run_id_of(output))


def history(output: str) -> dict[str, list[tuple[int, float]]]:
    """Every metric that is a function of the training, by step."""
    client, run = MlflowClient(), run_of(output)
    keys = [key for key in run.data.metrics if not key.startswith("system/") and "per_second" not in key]
    return {key: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)] for key in keys}


def weights(file: str) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(file, weights_only=True)
    moments = {
        f"{number}.{i}.{key}": value
        for number, optimizer in enumerate(checkpoint["optimizer_states"])
        for i, state in optimizer["state"].items()
        for key, value in state.items()
    }
    current = {f"current.{key}": value for key, value in checkpoint.get("current_model_state", {}).items()}
    return checkpoint["state_dict"] | current | moments


@every()
def test_trains_registers_loads_back_and_predicts_the_same(task: Case) -> None:
    cli = fit(task, *FEW, "--trainer.max_epochs", "2", "--register", "small")
    run = run_of("out")
    assert run.info.status == "FINISHED"
    assert run.data.tags["task"] == cli.task
    assert {"model.backbone.name", "data.init_args.batch_size", "trainer.max_epochs"} <= set(run.data.params)
    metrics = history("out")
    assert len(metrics[cli.model.monitor]) == 2
    assert any(key.startswith("test/") for key in metrics)
    found = {file.path for file in MlflowClient().list_artifacts(run.info.run_id)}
    assert {"config.yaml", "data.json", "environment.txt", "checkpoints", "images"} <= found

    loaded = registry.load(cli.rows["registered"])
    assert isinstance(loaded.module, VisionModule)
    dataset = cli.datamodule.test_dataloader().dataset
    images = [dataset.source[i]["image"] for i in range(5)]
    batch = next(iter(cli.datamodule.test_dataloader()))
    expected = cli.model.eval().predict({key: value[:5] for key, value in batch.items()})
    assert loaded.predict(None, images).to_dict("records") == expected
    best = type(cli.model).load_from_checkpoint("out/best.ckpt")
    assert best.predict({key: value[:5] for key, value in batch.items()}) == expected
    with pytest.raises(BackboneError, match=f"{type(cli.model).__name__}.load_from_checkpoint"):
        VisionModule.load_from_checkpoint("out/best.ckpt")


@every("multi_task", "multi_label", "regression", "sequences", "detection", "keypoints", "super_resolution")
def test_overfits_a_handful_of_samples(task: Case) -> None:
    if task.overfit is None:
        pytest.skip("its loss has no bound that eight samples let it come near to")
    fit(task, "--trainer.overfit_batches", "1", "--data.batch_size", "8", "--trainer.max_epochs", "60",
        "--trainer.check_val_every_n_epoch", "60", "--model.optimization.lr", "0.003", *task.overfit)  # fmt: skip
    losses = [value for _, value in history("out")["train/loss"]]
    assert losses[-1] < 0.05 * losses[0]


@every("multi_task", "multi_label", "regression", "sequences", "few_shot", "stylization", "keypoints")
def test_a_killed_training_goes_on_and_ends_bit_identical(task: Case) -> None:
    name = task.command.name
    workers = "2" if name in ("classification", "detection") else "0"
    args = ["fit", *task.small, *QUIET, *task.random, "--data.num_workers", workers, "--trainer.max_epochs", "2", *FEW,
            "--model.optimization.ema_decay", "0.9", "--trainer.log_every_n_steps", "1",
            "--trainer.accumulate_grad_batches", "2", "--trainer.gradient_clip_val", "1"]  # fmt: skip
    assert start(task.command, [*args, "--output", "whole"]) == [0]
    cut = [*args, "--output", "cut", "--checkpoint_seconds", "0"]
    at = "3" if name != "gan" else "1"  # of 4, and of a GAN's 2: in the second epoch
    kill = ["--trainer.callbacks+=faults.Kill", "--trainer.callbacks.step", at]
    assert start(task.command, [*cut, *kill]) == [-signal.SIGKILL]
    before = run_of("cut").info
    assert before.status == "RUNNING"
    assert start(task.command, cut) == [0]
    assert run_of("cut").info.run_id == before.run_id
    assert run_of("cut").info.status == "FINISHED"
    whole, resumed = weights("whole/last.ckpt"), weights("cut/last.ckpt")
    assert whole.keys() == resumed.keys()
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []
    assert history("cut") == history("whole")


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
@every(
    "multi_task", "multi_label", "regression", "sequences", "few_shot", "stylization", "keypoints", "super_resolution"
)
def test_several_processes_measure_what_one_does(task: Case, processes: int) -> None:
    both = ["--trainer.devices", str(processes), "--trainer.strategy", "ddp", "--data.num_workers", "0"]
    both += ["--data.batch_size", str(128 // processes)]
    # Adam's steps hang on the sign of gradients near zero, and hide a factor on all of them; these do neither.
    plain = ["--model.optimization.optimizer", "SGD", "--model.optimization.optimizer.lr", task.descent]
    args = [*task.small, *QUIET, *plain]
    length = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"]
    count = len(mlflow.search_runs(search_all_experiments=True))
    assert start(task.command, ["fit", *args, *both, *length, "--output", "several"], processes) == [0] * processes
    fit(task, *plain, *length, "--data.batch_size", "128", "--output", "one")
    losses = [[value for _, value in history(output)["val/loss"]] for output in ("one", "several")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    cli = task.command(["test", *args, "--output", "b", "--ckpt_path", "several/best.ckpt"])
    assert len(mlflow.search_runs(search_all_experiments=True)) == count + 3
    assert len(cli.datamodule.sources["test"]) % processes
    a, b = (
        {key: value for key, value in history(output).items() if key.startswith("test/")} for output in ("several", "b")
    )
    assert a.keys() == b.keys() != set()
    for key in b:
        assert a[key][-1][1] == pytest.approx(b[key][-1][1], rel=1e-3, abs=1e-4), key  # one of 33 is more
    if task.command is classification:  # for all: processes that only measure have one run, too
        alone = ["test", *args, *both, "--output", "a", "--ckpt_path", "several/best.ckpt"]
        assert start(task.command, alone, processes) == [0] * processes
        assert len(mlflow.search_runs(search_all_experiments=True)) == count + 4
        assert history("a")["test/accuracy"][-1][1] == pytest.approx(b["test/accuracy"][-1][1])


@every()
def test_a_mistake_ends_in_one_paragraph(task: Case, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        fit(task, "--model.backbone", "resnt18")
    message = capsys.readouterr().err
    assert end.value.code == 2
    assert "resnet18" in message
    assert "Traceback" not in message
    assert len(message) < 500


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("classification", "modules.classification.ClassificationModule._collect_mistakes"),
        ("autoencoding", "modules.autoencoding.module.AutoencodingModule._keep"),
        ("autoencoding", "modules.autoencoding.module.AutoencodingModule._pictures"),
        ("facenet", "modules.facenet.pictures.most_wrong"),
        ("gan", "modules.gan.module.GANModule._by_class"),
    ],
)
def test_what_is_gathered_for_pictures_ends_no_training(name: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise ArithmeticError("on purpose")

    monkeypatch.setattr(part, broken)
    few = [f"--trainer.limit_{split}_batches=1" for split in ("train", "val", "test")]
    more = ["--model.conditional", "true"] if name == "gan" else []
    with pytest.warns(UserWarning, match="could not be made .ArithmeticError: on purpose"):
        cli = fit(TASKS[name], "--trainer.max_epochs", "1", *few, *more)
    assert run_of("out").info.status == "FINISHED"
    assert any(key.startswith("test/") for key in cli.rows)
