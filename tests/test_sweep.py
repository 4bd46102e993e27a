"""A sweep finds the best trial, is shared, and goes on where it was cut off."""

import math
import os
import shlex
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import optuna
import pytest
from conftest import start
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from optuna.trial import TrialState, create_trial
from test_contract import TASKS

from datamodules import Digits8x8
from pipelines import sweep
from pipelines.engine.children import resolved
from pipelines.serving import registry
from pipelines.tracking.logger import run_id_of

STORAGE = "sqlite:///studies.db"
RECIPE = """
data: {class_path: Digits8x8, init_args: {image_size: 12, num_workers: 0, batch_size: 64}}
model: {optimization: {lr: 0.003}}
trainer: {max_epochs: 2, limit_train_batches: 8, limit_val_batches: 1, limit_test_batches: 1, accelerator: cpu,
          enable_progress_bar: false, log_every_n_steps: 100}
"""


class CutOff(L.Callback):
    """Sends this process a signal in its second epoch, once."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 1 and not Path("cut").exists():
            Path("cut").touch()
            os.kill(os.getpid(), getattr(signal, self.name))


def search(space: str, trials: int, **options: Any) -> int:
    Path("recipe.yaml").write_text(RECIPE)
    Path("space.yaml").write_text(space)
    study = Path.cwd().name  # the experiment has the runs of all tests
    return sweep.sweep(Path("recipe.yaml"), Path("space.yaml"), trials, study=study, storage=STORAGE, **options)


def command(args: list[str]) -> None:
    sweep.HEARTBEAT = 1
    space, trials, more = args
    raise SystemExit(search(space, int(trials), args=more))


def study() -> optuna.Study:
    return optuna.load_study(study_name=Path.cwd().name, storage=STORAGE)


def children(parent: str) -> list[Run]:
    client = MlflowClient()
    experiment = client.get_run(parent).info.experiment_id
    return client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")


def test_the_best_on_the_validation_split_is_told_and_registered(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    space = "model.optimization.lr: {low: 1e-3, high: 1e-2, log: true}\ndata.augmentation: [none, light]\n"
    assert search(space, 2, register="swept") == 0
    done = study()
    parent, best = done.user_attrs["parent"], done.best_trial
    runs = {run.data.tags["trial"]: run for run in children(parent)}
    assert runs.keys() == {"0", "1"}
    for trial in done.trials:
        run = runs[str(trial.number)]
        assert float(run.data.params["model.optimization.lr"]) == trial.params["model.optimization.lr"]
        assert run.data.params["data.init_args.augmentation"] == trial.params["data.augmentation"]
        history = MlflowClient().get_metric_history(run.info.run_id, "val/accuracy")
        assert trial.value == pytest.approx(max(point.value for point in history))
    swept = MlflowClient().get_run(parent)
    assert swept.info.status == "FINISHED"
    assert swept.data.tags["best_run"] == best.user_attrs["run_id"]
    version = MlflowClient().get_model_version("swept", "1")
    assert version.run_id == best.user_attrs["run_id"]
    measured = MlflowClient().get_run(version.run_id).data.metrics["test/accuracy"]
    assert float(version.tags["test.accuracy"]) == pytest.approx(measured, abs=1e-6)
    assert registry.load("models:/swept/1").module.num_classes == 10
    assert f"{best.value:.4f}" in capsys.readouterr().out
    assert search(space, 2, register="swept") == 0
    assert len(MlflowClient().search_model_versions("name='swept'")) == 1
    assert len(study().trials) == 2
    monkeypatch.setattr(Digits8x8, "identity", lambda _: {"splits": {"val": {"digest": "new"}}})  # images were added
    with pytest.raises(ValueError, match="started with another data"):
        search(space, 3, register="swept")


def test_a_hopeless_trial_ends_early_and_in_good_order() -> None:
    space, longer = "model.optimization.lr: [1.0e-9]", "--trainer.max_epochs 4 --trainer.limit_train_batches 1"
    assert search(space, 1, args=longer) == 0
    (first,) = study().trials
    assert len(first.intermediate_values) == 4
    good = create_trial(value=1.0, params=first.params, distributions=first.distributions,
                        intermediate_values=dict.fromkeys(range(4), 1.0), user_attrs={"run_id": "none"})  # fmt: skip
    study().add_trials([good] * 5)
    assert search(space, 7, args=longer) == 0
    last = study().trials[-1]
    assert last.state == TrialState.PRUNED
    assert len(last.intermediate_values) == 2
    assert MlflowClient().get_run(last.user_attrs["run_id"]).info.status == "FINISHED"


@pytest.mark.parametrize(
    ("name", "code"), [pytest.param("SIGINT", 130, marks=pytest.mark.slow), ("SIGKILL", -signal.SIGKILL)]
)
def test_a_sweep_that_was_cut_off_goes_on_within_the_trial(name: str, code: int) -> None:
    fault = f"--trainer.callbacks+=test_sweep.CutOff --trainer.callbacks.name {name}"
    args = ["model.label_smoothing: {low: 0, high: 0.1}", "1", fault]
    assert start(command, args) == [code]
    before = run_id_of(next(Path("outputs", "sweeps").glob("*/0000")))
    assert start(command, args) == [0]
    first, second = study().trials
    assert (first.state, second.state) == (TrialState.FAIL, TrialState.COMPLETE)
    assert second.params == first.params
    assert second.user_attrs["run_id"] == before
    assert list(second.intermediate_values) == [1]
    (run,) = children(study().user_attrs["parent"])
    assert run.info.status == "FINISHED"
    assert [point.step for point in MlflowClient().get_metric_history(before, "val/loss")] == [7, 15]


def test_two_processes_share_a_sweep() -> None:
    with ThreadPoolExecutor() as pool:
        args = ["model.label_smoothing: {low: 0, high: 0.1}", "3", "--trainer.max_epochs 1"]
        assert list(pool.map(lambda _: start(command, args), range(2))) == [[0], [0]]
    assert 3 <= len(study().trials) <= 4  # both may begin the last one at the same moment
    assert len(children(study().user_attrs["parent"])) == len(study().trials)


def test_several_processes_for_each_training_are_refused() -> None:
    """They would take the sweep's own command line for theirs, or a trial each."""
    with pytest.raises(ValueError, match="each in a single process"):
        search("model.label_smoothing: [0]", 1, args="--trainer.devices 2")


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ("model.optimization.lrr: [0.1]", r"model\.optimization\.lrr cannot be set to 0\.1"),
        ("data.augmentation: [none, lite]", r"data\.augmentation cannot be set to lite"),
        ("model.label_smoothing: {low: 0.1, high: 1.5}", r"model\.label_smoothing cannot be set to 1\.5"),
        ("data.batch_size: {low: 0, high: 8}", r"data\.batch_size cannot be set to 0: .* at least 1"),
        ("data.batch_size: {low: 4, hi: 8}", r"data\.batch_size: give a list"),
        ("data.batch_size: {low: 8, high: 4}", r"data\.batch_size.*low=8"),
        ("output: [a, b]", "output: the sweep sets this itself"),
        ("- 1", "is no search space"),
    ],
)
def test_a_setting_that_cannot_be_is_named_before_the_first_trial(space: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search(space, 1)
    assert not Path("outputs").exists()


def test_a_signal_while_settings_are_checked_is_not_taken_for_a_mistake() -> None:
    def ended(_: Any) -> NoReturn:
        raise SystemExit(143)

    with pytest.raises(SystemExit) as end:
        resolved(ended, [])
    assert end.value.code == 143


def test_settings_that_fail_do_not_end_the_sweep() -> None:
    assert search("model.backbone: [no_such_net]", 2) == 1
    assert [trial.state for trial in study().trials] == [TrialState.FAIL] * 2
    assert "do not go together" in study().trials[0].user_attrs["error"]
    assert MlflowClient().get_run(study().user_attrs["parent"]).info.status == "FAILED"


SCENES = [
    "--data.scene_size",
    "48",
    "--data.train",
    "32",
    "--data.val",
    "16",
    "--data.test",
    "16",
    "--data.batch_size",
    "8",
]
OTHERS = {
    "instance_segmentation": ["--data", "DigitScenes", *SCENES, "--data.masks", "true", "--model.backbone", "test_resnet",
                              "--model.detector", "modules.instance_segmentation.MaskRCNN", "--model.detector.width", "16",
                              "--model.detector.hidden", "16", "--model.detector.mask_width", "16"],
    "masked_autoencoding": ["--data", "Digits8x8", "--data.image_size", "16", "--model.backbone.options",
                            "{patch_size: 4, embed_dim: 24, depth: 1, num_heads: 2}", "--model.decoder_dim", "16",
                            "--model.decoder_depth", "1"],
    "translation": ["--data.image_size", "12", "--data.batch_size", "16", "--model.judge_steps", "5",
                    "--model.translator", "ResidualTranslator", "--model.translator.width", "4", "--model.translator.blocks", "1",
                    "--model.backbone.options.width", "4"],
}  # fmt: skip
JUDGED = {"autoencoding": "min", "gan": "min", "masked_autoencoding": "min", "translation": "min"}
SMALL = {name: task.small for name, task in TASKS.items()} | OTHERS


QUICK = ("gan",)  # classification is above


@pytest.mark.parametrize("task", [pytest.param(t, marks=[] if t in QUICK else pytest.mark.slow) for t in SMALL])
def test_every_task_is_swept(task: str) -> None:
    less = "{max_epochs: 1, limit_train_batches: 1, limit_val_batches: 2, limit_test_batches: 1, accelerator: cpu, enable_progress_bar: false}"
    Path("recipe.yaml").write_text(f"trainer: {less}")
    Path("space.yaml").write_text("model.optimization.lr: [0.001]")
    name = Path.cwd().name
    assert (
        sweep.sweep(Path("recipe.yaml"), Path("space.yaml"), 1, task, name, STORAGE, args=shlex.join(SMALL[task])) == 0
    )
    done = study()
    assert done.direction.name.lower() == f"{JUDGED.get(task, 'max')}imize"
    assert math.isfinite(done.best_value)
    run = MlflowClient().get_run(done.user_attrs["parent"])
    monitor = next(key for key in run.data.metrics if key.startswith("val/"))
    history = MlflowClient().get_metric_history(done.best_trial.user_attrs["run_id"], monitor)
    assert [point.value for point in history] == [pytest.approx(done.best_value)]
