"""Several processes train one model, or say why they cannot."""

import contextlib
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import start
from mlflow.tracking import MlflowClient

from pipelines.classification import classification
from pipelines.engine.disk import held
from pipelines.engine.launch import Launcher, launcher, lost
from pipelines.tracking.logger import run_id_of

SMALL = ["fit", "--data", "Digits8x8", "--data.image_size", "12", "--data.num_workers", "0", "--trainer.accelerator", "cpu",
         "--trainer.enable_progress_bar", "false", "--trainer.max_epochs", "1", "--output", "out"]  # fmt: skip


@pytest.mark.parametrize("slurm", [False, True], ids=["torchrun", "slurm"])
def test_the_launcher_says_how_many_processes_train_one_model(slurm: bool) -> None:
    each_its_own = ["--trainer.devices", "1"]  # as where each process sees one device only
    assert start(classification, [*SMALL, *each_its_own], 2, slurm) == [2, 2]
    assert not Path("out/run.json").exists()
    assert start(classification, SMALL, 2, slurm) == [0, 0]
    assert MlflowClient().get_run(run_id_of("out")).data.tags["world_size"] == "2"


def told(args: list[str]) -> None:
    """Trains, and keeps what this process says."""
    rank = os.environ.get("RANK") or os.environ["SLURM_PROCID"]
    with Path(f"said-{rank}").open("w") as said, contextlib.redirect_stderr(said):
        classification(args)


@pytest.mark.parametrize("slurm", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["torchrun", "slurm"])
def test_what_the_first_process_refuses_ends_the_others_too(slurm: bool) -> None:
    """They would wait for it, half an hour long."""

    def refused(*more: str) -> list[str]:
        assert start(told, [*SMALL, "--data.batch_size", "32", *more], 2, slurm) == [2, 2]
        return [Path(f"said-{rank}").read_text() for rank in (0, 1)]

    with held(Path("out")):
        first, second = refused()
    assert "is in use by process" in first
    assert f"Process 0 of 2 ends: {first.removeprefix('error: ')}" in second
    assert not Path("out/run.json").exists()
    classification(SMALL)
    assert all(
        "the train split of" in said for said in refused("--trainer.max_epochs", "2", "--data.train_per_class", "9")
    )
    MlflowClient().delete_run(run_id_of("out"))
    assert all("was deleted: restore it" in said for said in refused())


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_killed_is_named_and_the_run_ends(killed: int) -> None:
    """Whoever is left says so, though torchrun ends it at the same moment."""
    kill = [
        "--trainer.callbacks+=faults.Kill",
        "--trainer.callbacks.step",
        "3",
        "--trainer.callbacks.rank",
        str(killed),
    ]
    codes = start(told, [*SMALL, *kill], 2, agent=True)
    assert codes[killed] == -9
    assert codes[1 - killed] == 2
    assert f"Process {killed} of 2" in Path(f"said-{1 - killed}").read_text()
    run = MlflowClient().get_run(run_id_of("out"))
    assert run.info.status == "FAILED"
    assert f"Process {killed} of 2" in run.data.tags["error"]


def test_a_process_that_is_stopped_is_told_from_one_that_has_ended() -> None:
    process = subprocess.Popen(["sleep", "600"])
    timeout = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation")
    both = [(platform.node(), os.getpid()), (platform.node(), process.pid)]
    process.send_signal(signal.SIGSTOP)
    assert f"Process 1 of 2 (number {process.pid} here) did not answer in time" in str(lost(timeout, both))
    assert "Another of the 2 processes did not answer" in str(lost(timeout, [both[0], ("elsewhere", process.pid)]))
    process.kill()
    process.wait()
    assert f"Process 1 of 2 (number {process.pid} here) has ended" in str(lost(timeout, both))


def test_weights_without_a_gradient_are_named_with_the_way_out() -> None:
    idle = [*SMALL, "--trainer.callbacks+=faults.Idle", "--trainer.limit_train_batches", "3", "--data.batch_size", "16"]
    assert start(told, idle, 2) == [2, 2]
    assert "did not depend on idle, and" in Path("said-0").read_text()
    way_out = ["--trainer.strategy", "ddp_find_unused_parameters_true"]
    assert start(told, [*idle, *way_out, "--output", "found"], 2) == [0, 0]


@pytest.mark.parametrize(
    ("tasks", "found"),
    [
        ({"SLURM_NTASKS": "6", "SLURM_NNODES": "3", "SLURM_TASKS_PER_NODE": "2(x3)"}, (6, 2, 3)),
        ({"SLURM_NTASKS": "4", "SLURM_NNODES": "2"}, (4, 2, 2)),
        ({"SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "4"}, (8, 4, 2)),
    ],
)
def test_slurm_is_understood(monkeypatch: pytest.MonkeyPatch, tasks: dict[str, str], found: tuple[int, ...]) -> None:
    assert launcher() is None
    for name, value in (tasks | {"SLURM_JOB_NAME": "train"}).items():
        monkeypatch.setenv(name, value)
    one = launcher()
    assert one is not None
    assert (one.processes, one.on_this_node, one.nodes) == found
    assert one.objection(found[0]) is None
    assert f"--trainer.devices {found[1]} --trainer.num_nodes {found[2]}" in str(one.objection(1))


def test_waiting_for_processes_that_nobody_started_is_refused() -> None:
    assert "wait for each other" in str(Launcher("SLURM", 1, 1).objection(2))


CLUSTER = Path(__file__).parents[1] / "examples" / "cluster"


@pytest.mark.slow
def test_torchrun_restarts_a_training_whose_process_was_killed() -> None:
    args = [*SMALL, "--trainer.max_epochs", "60", "--trainer.log_every_n_steps", "5"]
    environment = {"PROCESSES": "2", "RESTARTS": "1", "PYTHON": sys.executable, "PYTHONPATH": str(CLUSTER.parents[1])}
    agent = subprocess.Popen(
        [CLUSTER / "torchrun.sh", "classification", *args],
        env=os.environ | environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not Path("out/last.ckpt").exists():
        assert agent.poll() is None
        time.sleep(0.2)
    psutil.Process(agent.pid).children()[-1].kill()
    said = agent.communicate(timeout=300)[1]
    assert agent.returncode == 0, said
    assert "Resuming from out/last.ckpt" in said
    assert MlflowClient().get_run(run_id_of("out")).info.status == "FINISHED"


def test_a_restart_needs_a_folder() -> None:
    done = subprocess.run([CLUSTER / "torchrun.sh", "classification", "fit"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Give --output FOLDER" in done.stderr


def test_the_slurm_job_starts_what_it_is_told(tmp_path: Path) -> None:
    srun = tmp_path / "srun"  # shows how it was called, and that a task that srun starts runs
    srun.write_text('#!/bin/sh\necho "$@"\nshift\nexec "$@"\n')
    srun.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable}
    job = subprocess.run([CLUSTER / "train.sbatch", "--help"], env=os.environ | environment, cwd=CLUSTER.parents[1],
                         capture_output=True, text=True, check=True)  # fmt: skip
    assert job.stdout.startswith(f"--kill-on-bad-exit=1 {sys.executable} -m pipelines --help\n")
    assert "classification" in job.stdout


def test_the_kubernetes_job_fits_together() -> None:
    service, job = yaml.safe_load_all((CLUSTER / "job.yaml").read_text())
    spec = job["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    settings = {each["name"]: each["value"] for each in container["env"]}
    assert int(settings["NNODES"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    name = job["metadata"]["name"]
    assert settings["HEAD"].startswith(f"{name}-0.{spec['subdomain']}:")
    assert service["metadata"]["name"] == spec["subdomain"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in spec["volumes"]}
    root = CLUSTER.parents[1]
    assert (root / container["command"][1]).is_file()
    assert (root / container["args"][container["args"].index("--config") + 1]).is_file()
