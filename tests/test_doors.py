"""What a user starts: the one door, and the same from ``mlflow run``."""

import contextlib
import runpy
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import yaml
from conftest import ROOT, start

from pipelines import __main__ as door
from pipelines.engine.progress import ProgressBar
from pipelines.engine.task import SUBCOMMANDS, find_task


def test_every_task_and_command_has_its_line_at_the_door() -> None:
    started = {file.stem for file in Path(ROOT, "pipelines").glob("*.py") if "__main__" in file.read_text()}
    started |= {file.parent.name for file in Path(ROOT, "pipelines").glob("*/__main__.py")}
    assert {*door.TASKS, *door.COMMANDS} == started - {"cli", "__main__"}
    for name in started & {*door.TASKS}:
        assert name in door.overview()


def test_every_task_is_found_by_its_name() -> None:
    assert {name: find_task(name).name for name in door.TASKS} == {name: name for name in door.TASKS}
    for name in (*door.COMMANDS, "clasification", "engine.task", ""):
        with pytest.raises(ValueError, match="There is no task"):
            find_task(name)


def run(args: list[str]) -> None:
    """Does what ``python -m`` does, and keeps what is said."""
    module, *sys.argv[1:] = args
    with Path("said").open("w") as said, contextlib.redirect_stdout(said):
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def test_a_name_is_started_as_its_module_is() -> None:
    command = [sys.executable, "-m", "pipelines", "clasification"]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2
    assert "Did you mean classification?" in refused.stderr
    texts = []
    for way in (["pipelines", "convert"], ["pipelines.convert"]):
        assert start(run, [*way, "--help"]) == [0]
        texts.append(Path("said").read_text())
    assert texts[0] == texts[1] != ""


@pytest.mark.parametrize("name", door.COMMANDS)
def test_every_command_answers_to_help(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["pipelines", name, "--help"])
    with pytest.raises(SystemExit) as end:
        door.main()
    assert end.value.code == 0
    assert f"usage: python -m pipelines.{name}" in " ".join(capsys.readouterr().out.split())


def test_the_help_of_a_task_is_about_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        find_task("facenet").main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "usage: python -m pipelines.facenet" in text
    assert "enrol, identify, verify, cluster, align" in text
    for name, about in SUBCOMMANDS.items():
        assert f"{name} {about}" in text


def test_the_progress_bar_counts_epochs_from_one() -> None:
    bar = ProgressBar()
    for epochs, shown in ((2, "Epoch 2 of 2"), (-1, "Epoch 2")):
        bar.setup(L.Trainer(max_epochs=epochs, logger=False, enable_checkpointing=False), L.LightningModule(), "fit")
        assert bar._get_train_description(1).strip() == shown


def test_mlflow_run_has_an_entry_for_each_task() -> None:
    project = yaml.safe_load(Path(ROOT, "MLproject").read_text())
    entries = project["entry_points"]
    assert [name for name in entries if name != "main"] == list(door.TASKS)
    for name in door.TASKS:
        assert entries[name] == {
            "parameters": entries["classification"]["parameters"],
            "command": entries["classification"]["command"].replace("classification", name),
        }
