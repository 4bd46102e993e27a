"""A run tells the truth about its training."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import torch
from conftest import ROOT, start
from mlflow.tracking import MlflowClient

from pipelines.classification import classification
from pipelines.cli import expand
from pipelines.tracking import flatten, run_id_of

SMALL = ["--data", "Digits8x8", "--data.image_size", "12", "--trainer.enable_progress_bar", "false",
         "--trainer.max_epochs", "2", "--output", "out"]  # fmt: skip


def run(output: str = "out") -> mlflow.entities.Run:
    return MlflowClient().get_run(run_id_of(output))


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_with_a_checkpoint_and_a_killed_run_that_goes_on(name: str, code: int) -> None:
    fault = [
        "--trainer.callbacks+=faults.Kill",
        "--trainer.callbacks.step",
        "7",
        "--trainer.callbacks.signal_name",
        name,
    ]
    assert start(classification, ["fit", *SMALL, *fault]) == [code]
    assert run().info.status == "KILLED"
    before = run().info.run_id
    assert torch.load("out/last.ckpt", weights_only=True)["global_step"] >= 7
    assert start(classification, ["fit", *SMALL]) == [0]
    assert run().info.status == "FINISHED"
    assert run().info.run_id == before
    assert "error" not in run().data.tags


def test_a_crash_is_a_failed_run_with_its_cause() -> None:
    with pytest.raises(ZeroDivisionError):
        classification(["fit", *SMALL, "--trainer.callbacks+=faults.Crash"])
    assert run().info.status == "FAILED"
    assert run().data.tags["error"] == "ZeroDivisionError: on purpose"
    text = mlflow.artifacts.load_text(f"{run().info.artifact_uri}/error.txt")
    assert "faults.py" in text


def test_mlflow_run_is_one_run_and_runs_no_shell(tmp_path: Path) -> None:
    shutil.copytree(ROOT, "project", ignore=lambda folder, names: {n for n in names if n[0] == "." or n in UNTRACKED})
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{tmp_path}/own.db"
    command = ["mlflow", "run", "project", "--env-manager", "local", "-e", "classification", "-P", "data=Digits8x8",
               "-P", "max_epochs=1",
               "-P", 'args=--data.image_size 12 --run_name "a; touch pwned" --trainer.enable_progress_bar false']  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list(tmp_path.rglob("pwned"))
    client = MlflowClient(f"sqlite:///{tmp_path}/own.db")
    (only,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert only.info.status == "FINISHED"
    assert only.info.run_name == "a; touch pwned"
    assert only.data.params["trainer.max_epochs"] == "1"
    assert "test/accuracy" in only.data.metrics


UNTRACKED = {"outputs", "mlruns", "mlartifacts", "data", "mlflow.db", "docs", "tests", "benchmarks"}


def test_empty_parameters_count_as_not_given() -> None:
    given = ["fit", "--data.root", "", "--trainer.max_epochs", "1", "--args", "--a 'b c' --d $(touch pwned)"]
    assert expand(given) == ["fit", "--trainer.max_epochs", "1", "--a", "b c", "--d", "$(touch", "pwned)"]


def test_every_setting_becomes_a_parameter() -> None:
    assert flatten({"a": {"b": [1, None], "c": None, "d": "x"}, "e": {}}) == [
        ("a.b", "[1, null]"), ("a.c", "null"), ("a.d", "x"), ("e", "{}")
    ]  # fmt: skip
