"""A run tells the truth about its training."""

import ctypes
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.metadata import distributions
from pathlib import Path
from threading import Event, Thread
from uuid import uuid4

import faults
import mlflow
import numpy as np
import pytest
import torch
from conftest import ROOT, start
from mlflow.tracking import MlflowClient
from PIL import Image

from pipelines import export, inspect, predict, sweep
from pipelines import transferability as transfer
from pipelines.autoencoding import autoencoding
from pipelines.classification import classification
from pipelines.engine.command import command
from pipelines.engine.folders import RUN_FILE
from pipelines.engine.recipes import expand
from pipelines.facenet import facenet
from pipelines.serving import promotion, registry
from pipelines.tracking import client, journal
from pipelines.tracking.__main__ import send
from pipelines.tracking.client import TrackingError, experiment_id, tracking_client
from pipelines.tracking.journal import Journal
from pipelines.tracking.logger import RunLogger, run_id_of
from pipelines.tracking.provenance import flatten, packages
from pipelines.tracking.redaction import redact

SMALL = ["--data", "Digits8x8", "--data.image_size", "12", "--trainer.enable_progress_bar", "false",
         "--trainer.max_epochs", "2", "--output", "out"]  # fmt: skip


def run(output: str = "out") -> mlflow.entities.Run:
    return MlflowClient().get_run(run_id_of(output))


def begin(args: list[str]) -> None:
    mlflow.set_tracking_uri("sqlite:///new.db")
    (Path() / f"ready{os.environ['RANK']}").touch()
    while len(list(Path().glob("ready*"))) < 3:
        time.sleep(0.001)
    experiment_id(tracking_client(), "new")


def test_first_runs_that_begin_at_the_same_moment_share_the_store_that_they_make() -> None:
    assert start(begin, [], 3) == [0, 0, 0]
    assert [e.name for e in MlflowClient("sqlite:///new.db").search_experiments()] == ["new", "Default"]


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


def every_run() -> list[mlflow.entities.Run]:
    return mlflow.search_runs(search_all_experiments=True, output_format="list")


def test_mlflow_run_is_one_run_and_runs_no_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT, "project", ignore=lambda folder, names: {n for n in names if n[0] == "." or n in UNTRACKED})
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    before = {run.info.run_id for run in every_run()}
    mlflow.run("project", "classification", env_manager="local", parameters={
        "data": "Digits8x8", "max_epochs": "1",
        "args": '--data.image_size 12 --run_name "a; touch pwned" --trainer.enable_progress_bar false'})  # fmt: skip
    assert not list(tmp_path.rglob("pwned"))
    (only,) = (run for run in every_run() if run.info.run_id not in before)
    assert only.info.status == "FINISHED"
    assert only.info.run_name == "a; touch pwned"
    assert only.data.params["trainer.max_epochs"] == "1"
    assert "test/accuracy" in only.data.metrics


UNTRACKED = {"outputs", "mlruns", "mlartifacts", "data", "mlflow.db", "docs", "tests", "benchmarks"}


def test_a_preview_is_drawn_and_tracked() -> None:
    small = [*SMALL[:6], "--output", "out"]
    classification(["preview", *small, "--data.augmentation", "strong", "--images", "2", "--draws", "3"])
    with Image.open("out/preview.png") as sheet:
        assert sheet.width > 4 * 100  # as it is, and three augmented, in a row
    images = MlflowClient().list_artifacts(run().info.run_id, "images")
    assert any("train~preview" in file.path for file in images)


def test_empty_parameters_count_as_not_given() -> None:
    given = ["fit", "--data.root", "", "--trainer.max_epochs", "1", "--args", "--a 'b c' --d $(touch pwned)"]
    assert expand(given) == ["fit", "--trainer.max_epochs", "1", "--a", "b c", "--d", "$(touch", "pwned)"]


def test_every_setting_becomes_a_parameter() -> None:
    assert flatten({"a": {"b": [1, None], "c": None, "d": "x"}, "e": {}}) == [
        ("a.b", "[1, null]"), ("a.c", "null"), ("a.d", "x"), ("e", "{}")
    ]  # fmt: skip


def journal_and_server(output: str = "out") -> tuple[Counter[object], Counter[object]]:
    """Every metric and picture: those written down, and those that MLflow has."""
    entries = [json.loads(line) for line in Path(output, "journal.jsonl").read_bytes().splitlines()]
    written = Counter((e["key"], e["step"], e["value"]) for e in entries if e["kind"] == "metric")
    written.update((e["key"].replace("/", "~"), str(e["step"])) for e in entries if e["kind"] == "picture")
    client, run_id = MlflowClient(), run_id_of(output)
    keys = client.get_run(run_id).data.metrics
    there = Counter((m.key, m.step, m.value) for key in keys for m in client.get_metric_history(run_id, key))
    files = [Path(file.path).name for file in client.list_artifacts(run_id, "images")]
    there.update(tuple(name.split("+")[:3:2]) for name in files if name.endswith(".png"))
    assert len(files) == 2 * sum(name.endswith(".png") for name in files)
    return written, there


@pytest.mark.filterwarnings("ignore:MLflow does not")
def test_a_journal_survives_a_dead_server_and_answers_that_were_lost() -> None:
    client = MlflowClient()
    run_id = client.create_run("0").info.run_id
    Path("out").mkdir()
    Path("out/run.json").write_text(json.dumps({"run_id": run_id}))
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save("out/a.png")
    dead = Journal(Path("out"), run_id, MlflowClient("http://127.0.0.1:9"))
    for step in range(1500):
        dead.write({"kind": "metric", "key": "loss", "value": step / 7, "step": step})
        if step % 500 == 0:
            dead.write({"kind": "picture", "key": "train/samples", "step": step, "file": "a.png"})
            Path("out/table.json").write_text(str(step))
            dead.write({"kind": "file", "file": "table.json", "folder": "tables"})
    for value in ("x", None):
        dead.write({"kind": "tag", "key": "error", "value": value})
    dead.write({"kind": "status", "value": "KILLED"})
    assert dead.close(patience=0.5) == Path("out/journal.jsonl").stat().st_size
    assert Journal(Path("out"), run_id, client).close() == 0
    Path("out/journal.sent").write_text(f"{0:020d}")  # all was taken, and no answer came
    assert Journal(Path("out"), run_id, client).close() == 0
    written, there = journal_and_server()
    assert there == written
    assert Path(client.download_artifacts(run_id, "tables/table.json")).read_text() == "1000"
    assert run().info.status == "KILLED"
    assert "error" not in run().data.tags


@pytest.mark.filterwarnings("ignore:MLflow does not")
def test_what_mlflow_never_takes_does_not_hold_up_the_rest() -> None:
    client = MlflowClient()
    run_id = client.create_run("0").info.run_id
    Path("out").mkdir()
    journal = Journal(Path("out"), run_id, client)
    for key in ("a", "bad#key", "b"):
        journal.write({"kind": "metric", "key": key, "value": 1.0, "step": 0})
    journal.write({"kind": "picture", "key": "gone", "step": 0, "file": "gone.png"})
    journal.write({"kind": "status", "value": "FINISHED"})
    assert journal.close() == 0
    assert client.get_run(run_id).data.metrics == {"a": 1.0, "b": 1.0}
    assert client.get_run(run_id).info.status == "FINISHED"
    assert journal.refused == 2


def test_a_server_that_is_not_there_at_the_start_is_one_paragraph(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@127.0.0.1:9")
    with pytest.raises(SystemExit) as end:
        classification(["fit", *SMALL])
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert "MLflow at http://***@127.0.0.1:9 does not answer: start it, or unset MLFLOW_TRACKING_URI" in message
    assert "Traceback" not in message


COMMANDS = {
    "registry list": promotion.list_models,
    "registry show": lambda: promotion.show("x"),
    "registry promote": lambda: promotion.promote("x"),
    "registry demote": lambda: promotion.demote("x"),
    "registry compare": lambda: promotion.compare("x", "1", "2"),
    "registry load": lambda: registry.download("models:/x/1", "copy"),
    "predict": lambda: command(predict.predict, ["models:/x@y", "a.png"]),
    "inspect": lambda: command(inspect.inspect, ["models:/x/1", "a.png"]),
    "export": lambda: export.export("models:/x/1", Path("x.onnx")),
    "sweep": lambda: sweep.sweep(Path("recipe.yaml"), Path("space.yaml"), storage="sqlite:///studies.db"),
    "transfer": lambda: command(transfer.transferability, ["--backbone", "lenet5", "--data", "datamodules.Digits8x8"]),
    "verify": lambda: facenet.main(["verify", "models:/x/1", "a.png", "a.png"]),
    "encode": lambda: autoencoding.main(["encode", "models:/x/1", "a.png"]),
    "fit": lambda: classification(["fit", *SMALL]),
    "fit from a model": lambda: classification(
        ["fit", *SMALL, "--trainer.logger", "false", "--model.backbone", "models:/x@y"]
    ),
}


@pytest.mark.parametrize("silent", [False, True])
def test_no_command_waits_for_a_server_that_is_not_there(
    silent: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody listens, or somebody who never answers."""
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save("a.png")
    Path("recipe.yaml").write_text("data: Digits8x8")
    Path("space.yaml").write_text("data.batch_size: [16, 32]")
    monkeypatch.setattr(client, "PATIENCE", 0.3)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        if silent:
            mute.listen(100)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{mute.getsockname()[1]}")
        for name, ask in COMMANDS.items():
            start = time.monotonic()
            with pytest.raises((SystemExit, ValueError)) as end:
                ask()
            assert time.monotonic() - start < 10, name
            said = capsys.readouterr().err if isinstance(end.value, SystemExit) else str(end.value)
            assert "does not answer: start it, or unset MLFLOW_TRACKING_URI" in said, name
            assert "Traceback" not in said, name
        Path("out").mkdir(exist_ok=True)
        Path("out/run.json").write_text(json.dumps({"run_id": "x", "tracking_uri": os.environ["MLFLOW_TRACKING_URI"]}))
        with pytest.raises(ValueError, match="still does not accept it: it does not answer"):
            send(Path("out"))


def test_a_deleted_experiment_is_told_before_training(capsys: pytest.CaptureFixture[str]) -> None:
    number = MlflowClient().create_experiment("gone")
    MlflowClient().delete_experiment(number)
    with pytest.raises(SystemExit) as end:
        classification(["fit", *SMALL, "--experiment", "gone"])
    assert end.value.code == 2
    assert f"mlflow experiments restore --experiment-id {number}" in capsys.readouterr().err


def test_a_run_that_is_deleted_in_mid_training_is_all_there_once_it_is_restored(
    capsys: pytest.CaptureFixture[str],
) -> None:
    fault = ["--trainer.callbacks+=faults.DeleteRun", "--trainer.callbacks.step", "7"]
    with pytest.warns(UserWarning, match=r"The run was deleted|restore it with: mlflow runs restore --run-id"):
        cli = classification(["fit", *SMALL, *fault, "--register", "orphan"])
    assert "restore it with: mlflow runs restore" in cli.rows["registered"]
    with pytest.raises(SystemExit):
        classification(["fit", *SMALL])
    assert "was deleted: restore it with" in capsys.readouterr().err
    MlflowClient().restore_run(run_id_of("out"))
    send(Path("out"))
    written, there = journal_and_server()
    assert there == written
    assert run().info.status == "FINISHED"


def test_a_training_whose_store_has_lost_its_run_goes_on_in_a_new_one_with_all_that_was_recorded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for step in range(2):
        logger = RunLogger(Path("out"), "classification", "lost", {})
        logger.log_metrics({"val/loss": 1.0 - step}, step)
        logger.finish()
        record = json.loads(Path("out", RUN_FILE).read_text())
        Path("out", RUN_FILE).write_text(json.dumps(record | {"run_id": uuid4().hex}))
    assert "no longer has the run of out" in capsys.readouterr().err
    assert [m.value for m in MlflowClient().get_metric_history(record["run_id"], "val/loss")] == [1.0, 0.0]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[faults.Server]:
    faults.Server.current = server = faults.Server(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    server.start()
    server.wait()
    yield server
    server.stop()


LONG = [*SMALL, "--trainer.max_epochs", "4", "--trainer.log_every_n_steps", "1"]
OUTAGE = ["--trainer.callbacks+=faults.Outage", "--trainer.callbacks.begin", "7"]


@pytest.mark.slow
def test_a_server_that_goes_and_comes_back_has_all_once(server: faults.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "PATIENCE", 300)
    with pytest.warns(UserWarning, match="does not answer"):
        cli = classification(["fit", *LONG, *OUTAGE, "--trainer.callbacks.end", "70"])
    written, there = journal_and_server()
    assert there == written
    steps = [step for key, step, *_ in written if key == "train/loss_step"]
    assert steps == list(range(cli.trainer.global_step))
    assert run().info.status == "FINISHED"


@pytest.mark.slow
def test_a_server_that_is_gone_at_the_end_gets_all_of_it_later(
    server: faults.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "PATIENCE", 1)
    with pytest.warns(UserWarning, match="python -m pipelines.tracking out"):
        first = classification(["fit", *LONG, *OUTAGE, "--register", "later"])
    assert first.rows["registered"].startswith("no: MLflow does not answer.")
    command = [sys.executable, "-m", "pipelines.tracking", "out"]
    assert "still does not accept it" in subprocess.run(command, capture_output=True, text=True).stderr
    server.start()
    server.wait()
    assert run().info.status == "RUNNING"
    assert "All of out is in run" in subprocess.run(command, capture_output=True, text=True).stdout
    written, there = journal_and_server()
    assert there == written
    assert run().info.status == "FINISHED"
    assert run().data.tags["registered"].startswith("no:")
    again = classification(["fit", *LONG, "--register", "later"])
    assert again.rows["registered"] == run().data.tags["registered"] == "models:/later/1"
    assert again.trainer.global_step == first.trainer.global_step


@pytest.mark.slow
def test_a_server_that_asks_who_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = faults.Server(tmp_path, "--app-name", "basic-auth")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    server.start()
    try:
        server.wait()
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "another")
        with pytest.raises(SystemExit) as end:
            classification(["fit", *SMALL])
        message = capsys.readouterr().err
        assert end.value.code == 2
        assert "MLFLOW_TRACKING_PASSWORD" in message
        assert "Traceback" not in message
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", faults.PASSWORD)
        cli = classification(["fit", *SMALL, "--register", "guarded"])
        written, there = journal_and_server()
        assert there == written
        assert run().info.status == "FINISHED"
        assert registry.load(cli.rows["registered"]).module.architecture == cli.model.architecture
        files = [file for file in Path("out").rglob("*") if file.is_file()]
        assert not [file for file in [*files, tmp_path / "server.db"] if faults.PASSWORD.encode() in file.read_bytes()]
    finally:
        server.stop()


@pytest.mark.parametrize(
    "fault",
    [
        "Kill --trainer.callbacks.step 7",
        pytest.param("Send --trainer.callbacks.hook on_test_batch_end", marks=pytest.mark.slow),
    ],
    ids=["training", "test"],
)
def test_a_slurm_job_at_its_time_limit_is_put_back_and_goes_on(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "bin" / "scontrol"  # of all of SLURM the only part that is called
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    args = ["fit", *SMALL[:-2], "--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.num_workers", "0"]
    faults = [f"--trainer.callbacks+=faults.{fault}", "--trainer.callbacks.signal_name SIGUSR1"]
    assert start(classification, [*args, *" ".join(faults).split()], 2, slurm=True) == [143, 143]
    assert (tmp_path / "called").read_text() == "requeue 4242\n"
    (output,) = Path("outputs/classification").iterdir()
    assert output.name == "lenet5-digits8x8-slurm-4242.0"
    before = run(str(output))
    assert before.info.status == "KILLED"
    assert (before.data.tags["launcher"], before.data.tags["slurm.job_id"]) == ("slurm", "4242")
    assert before.data.tags["world_size"] == "2"
    assert start(classification, args, 2, slurm=True) == [0, 0]
    assert run(str(output)).info.run_id == before.info.run_id
    assert run(str(output)).info.status == "FINISHED"
    assert len(list(Path("outputs/classification").iterdir())) == 1


@pytest.mark.slow
def test_one_command_uses_two_devices() -> None:
    args = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.accelerator", "cpu", *SMALL[:-2]]
    command = [sys.executable, "-m", "pipelines.classification", "fit", *args, "--data.num_workers", "0"]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    (output,) = Path("outputs/classification").iterdir()
    assert run(str(output)).data.tags["world_size"] == "2"
    assert run(str(output)).info.status == "FINISHED"


def test_a_finished_training_is_registered_without_training_again() -> None:
    first = classification(["fit", *SMALL])
    before = journal_and_server()[1]
    last = Path("out/last.ckpt").read_bytes()
    again = classification(["fit", *SMALL, "--register", "afterwards"])
    assert again.rows["registered"] == "models:/afterwards/1"
    assert again.trainer.global_step == first.trainer.global_step
    assert Path("out/last.ckpt").read_bytes() == last
    assert journal_and_server()[1] == before

    (model,) = MlflowClient().search_logged_models(
        [run().info.experiment_id],
        f"source_run_id = '{run().info.run_id}'",
        order_by=[{"field_name": "metrics.val/accuracy"}],
    )
    figures = {metric.key: metric for metric in model.metrics}
    best = max((value, -step) for key, step, *rest in before if key == "val/accuracy" for value in rest)
    assert (figures["val/accuracy"].value, -figures["val/accuracy"].step) == best
    assert figures["test/accuracy"].value == run().data.metrics["test/accuracy"]
    assert figures["test/accuracy"].dataset_name == first.datamodule.identity()["name"]


def test_credentials_reach_no_run(tmp_path: Path) -> None:
    password, access, api_key = secrets = uuid4().hex, f"AKIA{uuid4().hex[:16].upper()}", uuid4().hex  # not in any file
    classification(["fit", *SMALL, "--trainer.max_epochs", "1", "--run_name", f"a http://me:{password}@host {access}",
                    "--trainer.callbacks+=faults.Notify", "--trainer.callbacks.address", f"smtp://me:{password}@host/x",
                    "--trainer.callbacks.api_key", api_key])  # fmt: skip
    params = run().data.params
    assert '"address": "smtp://***@host/x", "api_key": "***"' in params["trainer.callbacks"]
    kept = Path(mlflow.artifacts.download_artifacts(run().info.artifact_uri, dst_path=str(tmp_path / "kept")))
    texts = {str(f): f.read_bytes() for folder in (kept, Path("out")) for f in folder.rglob("*") if f.is_file()}
    texts |= {key: value.encode() for key, value in {**params, **run().data.tags, "": str(run())}.items()}
    assert len(texts) > 50
    assert [(name, secret) for name, text in texts.items() for secret in secrets if secret.encode() in text] == []
    tags = run().data.tags
    assert {"1×cpu", "1×NVIDIA"} & {tags["devices"], tags["devices"][:8]}
    assert tags["launcher"] == "python"
    assert int(tags["parameters"]) > 10_000


@pytest.mark.parametrize(
    ("given", "hidden"),
    [
        ('+    api_key: str = "abc"', "+    api_key: str = ***"),
        ("+export AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI/K7MDENG", "+export AWS_SECRET_ACCESS_KEY=***"),
        ("+serve --password hunter2 --port 80", "+serve --password *** --port 80"),
        ("+get('https://host/x?token=abcdef12&y=1')", "+get('https://host/x?token=***&y=1')"),
        ("+Authorization: Bearer abcdefghijkl", "+Authorization: Bearer ***"),
        ("+-----BEGIN RSA PRIVATE KEY-----\n+MIIE\n+-----END RSA PRIVATE KEY-----\n+x", "+***\n+x"),
        ("+cls_token = nn.Parameter(x); num_tokens: 5", "+cls_token = nn.Parameter(x); num_tokens: 5"),
    ],
)
def test_credentials_are_hidden_in_code_and_the_rest_is_not(given: str, hidden: str) -> None:
    assert redact(given) == hidden


def test_a_diverging_training_says_so_and_keeps_the_last_good_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        classification(["fit", *SMALL, "--model.optimization.lr", "1e30", "--trainer.log_every_n_steps", "5"])
    assert end.value.code == 2
    assert "The loss is nan at step 5" in capsys.readouterr().err
    assert run().info.status == "FAILED"
    assert "backbone.conv1.weight" in run().data.tags["error"]
    assert not list(Path("out").glob("*.ckpt"))


def test_a_loss_that_is_not_finite_in_one_process_ends_all_of_them() -> None:
    args = ["fit", *SMALL, "--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.log_every_n_steps", "1",
            "--trainer.callbacks+=faults.SpoilLoss", "--trainer.callbacks.step", "2", "--trainer.callbacks.rank", "1"]  # fmt: skip
    begun = time.monotonic()
    assert start(classification, args, 2) == [2, 2]
    assert time.monotonic() - begun < 120  # neither waits for the other
    assert "at step 2; it was" in run().data.tags["error"]
    assert run().info.status == "FAILED"


def test_weights_that_are_spoilt_in_the_last_step_of_an_epoch_are_not_kept() -> None:
    cli = classification(["fit", *SMALL, "--trainer.max_epochs", "1"])
    steps = cli.trainer.global_step
    spoil = ["--trainer.callbacks+=faults.Spoil", "--trainer.callbacks.step", str(2 * steps),
             "--trainer.callbacks.parameter", "backbone.conv2.weight"]  # fmt: skip
    with pytest.raises(SystemExit):
        classification(["fit", *SMALL, *spoil])
    assert f"Not all weights are finite at step {2 * steps}" in run().data.tags["error"]
    assert "is the parameter backbone.conv2.weight" in run().data.tags["error"]
    for file in ("last", "best"):
        checkpoint = torch.load(f"out/{file}.ckpt", weights_only=True)
        assert checkpoint["global_step"] == steps
        assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


def test_the_packages_of_a_run_are_those_that_are_installed() -> None:
    installed = {
        f"{d.metadata['Name']}=={d.version}".lower().replace("_", "-").replace(".", "-") for d in distributions()
    }
    assert {name.replace("_", "-").replace(".", "-") for name in packages()} == installed


def test_a_store_that_is_none_is_told_in_a_paragraph(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], empty: Path
) -> None:
    (tmp_path / "bad.db").write_text("no database")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/bad.db")
    with pytest.raises(SystemExit) as end:
        classification(["fit", "--data", "Digits8x8", "--backbone", "mlp", "--output", "out"])
    assert end.value.code == 2
    assert "bad.db cannot be used as MLflow's store" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"bad\.db cannot be used as MLflow's store"):
        registry.model_folder("models:/some/1")
    shutil.copy(empty, tmp_path / "later.db")
    with closing(sqlite3.connect(tmp_path / "later.db")) as store, store:
        store.execute("UPDATE alembic_version SET version_num = 'later'")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/later.db")
    with pytest.raises(TrackingError, match=r"later\.db are of another version of MLflow than"):
        tracking_client()


@contextmanager
def without_privileges() -> Iterator[None]:
    """Context in which root is refused what other users are."""
    libc, version, rights = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(version, rights)
    libc.capset(version, (ctypes.c_uint32 * 6)(0, *rights[1:3], 0, *rights[4:]))  # the effective ones
    try:
        yield
    finally:
        libc.capset(version, rights)


def test_a_store_that_cannot_be_written_is_told_or_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("none", "theirs"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/{name}/mlflow.db")
        if name == "theirs":
            (experiment,) = tracking_client().search_experiments()
            Path(tmp_path, name, "mlflow.db.lock").unlink()
        Path(tmp_path, name).chmod(0o555)
        with without_privileges():
            if name == "theirs":
                assert tracking_client().search_experiments()[0].name == experiment.name
            else:
                with pytest.raises(TrackingError, match="start the command in one that you may write to"):
                    tracking_client()


def test_secrets_are_hidden_while_the_environment_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_PASSWORD", "opensesame")
    done = Event()

    def change() -> None:
        while not done.is_set():
            os.environ["COMES_AND_GOES"] = "x"
            os.environ.pop("COMES_AND_GOES")

    other = Thread(target=change)
    other.start()
    try:
        assert {redact("say opensesame") for _ in range(3000)} == {"say ***"}
    finally:
        done.set()
        other.join()
