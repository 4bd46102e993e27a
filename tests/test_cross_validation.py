"""Folds divide data that have no splits, and a command trains them all."""

import os
import shutil
import signal
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import pytest
from conftest import start
from mlflow.tracking import MlflowClient
from PIL import Image

from datamodules import (
    DataError,
    ImageFolder,
    Manifest,
    MultiLabelTable,
    PeopleFolder,
    PeopleTable,
    RegressionTable,
    VisionDataModule,
)
from pipelines.cross_validate import cross_validate
from pipelines.tracking.logger import run_id_of

CLASSES = {"cat": 12, "dog": 30, "ox": 6}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of classes, and tables of its files: five patients have pictures of all classes, each of twelve people of one."""
    root, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    rows, sets = ["path,label,patient,person"], ["path,labels,patient"]
    for shade, (name, count) in enumerate(CLASSES.items()):
        (root / "files" / name).mkdir(parents=True)
        for k in range(count):
            picture = random.integers(0, 60, (12, 12, 3), np.uint8) + np.uint8(80 * shade)
            Image.fromarray(picture).save(root / "files" / name / f"{k}.png")
            rows.append(f"files/{name}/{k}.png,{name},p{k % 5},{name}{k % 4}")
            sets.append(f"files/{name}/{k}.png,{name}{'|young' if k % 3 else ''},p{k % 5}")
    (root / "table.csv").write_text("\n".join(rows))
    numbers = ["path,patient,size", *(f"{row.split(',')[0]},{row.split(',')[2]},{k}" for k, row in enumerate(rows[1:]))]
    (root / "numbers.csv").write_text("\n".join(numbers))
    (root / "sets.csv").write_text("\n".join(sets))
    return root


def files(data: VisionDataModule) -> dict[str, set[str]]:
    """The files of each split."""
    return {name: set(source.paths.tolist()) for name, source in data.sources.items()}


KINDS: dict[str, Callable[[Path, dict[str, Any]], VisionDataModule]] = {
    "folder": lambda root, more: ImageFolder(str(root / "files"), **more),
    "table": lambda root, more: Manifest(str(root / "table.csv"), **more),
    "grouped table": lambda root, more: Manifest(str(root / "table.csv"), group_column="patient", **more),
    "label sets": lambda root, more: MultiLabelTable(str(root / "sets.csv"), **more),
    "grouped label sets": lambda root, more: MultiLabelTable(str(root / "sets.csv"), group_column="patient", **more),
    "quantities": lambda root, more: RegressionTable(str(root / "numbers.csv"), **more),
    "grouped quantities": lambda root, more: RegressionTable(str(root / "numbers.csv"), group_column="patient", **more),
    "people": lambda root, more: PeopleTable(str(root / "table.csv"), person_column="person", **more),
}


@pytest.mark.parametrize("kind", KINDS)
def test_folds_share_out_all_files_and_are_always_the_same(kind: str, pictures: Path) -> None:
    tests: list[set[str]] = []
    for fold in range(3):
        found, again = (files(KINDS[kind](pictures, {"folds": 3, "fold": fold})) for _ in range(2))
        assert found == again
        assert found.keys() == {"train", "val", "test"}
        assert sum(map(len, found.values())) == len(set().union(*found.values())) == sum(CLASSES.values())
        tests.append(found["test"])
        if kind in ("folder", "table"):
            counts = {name: sum(Path(path).parent.name == name for path in found["test"]) for name in CLASSES}
            assert counts == {name: count // 3 for name, count in CLASSES.items()}
        if kind == "people":
            people = [{f"{Path(path).parent}{int(Path(path).stem) % 4}" for path in part} for part in found.values()]
            assert [len(part) for part in people] == [6, 2, 4]
            assert len(set().union(*people)) == 12
        if kind.startswith("grouped"):
            patients = [{int(Path(path).stem) % 5 for path in part} for part in found.values()]
            assert sum(map(len, patients)) == len(set().union(*patients)) == 5
    assert sum(map(len, tests)) == len(set().union(*tests)) == sum(CLASSES.values())


def test_what_is_of_one_group_is_drawn_into_one_split(pictures: Path) -> None:
    for kind in ("grouped table", "grouped label sets", "grouped quantities"):
        found = files(KINDS[kind](pictures, {}))
        patients = [{int(Path(path).stem) % 5 for path in part} for part in found.values()]
        assert sorted(map(len, patients)) == [1, 1, 3]
        assert len(set().union(*patients)) == 5


def test_folds_that_cannot_be_are_refused_by_name(pictures: Path) -> None:
    table = (pictures / "table.csv").read_text().splitlines()
    split = [f"{row},{'split' if k == 0 else 'val' if k % 2 else 'train'}" for k, row in enumerate(table)]
    (pictures / "split.csv").write_text("\n".join(split))
    own = {"train": pictures / "files"}
    Path("splits").mkdir()
    for name, folder in own.items():
        Path("splits", name).symlink_to(folder)
    for said, make in {
        "--data.fold 3 does not exist: 3 folds are numbered 0 to 2": lambda: KINDS["folder"](
            pictures, {"folds": 3, "fold": 3}
        ),
        "--data.folds 3 needs --data.fold too": lambda: KINDS["folder"](pictures, {"folds": 3}),
        "--data.fold 0 needs --data.folds too": lambda: KINDS["folder"](pictures, {"fold": 0}),
        "folds must be at least 2": lambda: KINDS["folder"](pictures, {"folds": 1, "fold": 0}),
        "'ox' has 6 images, fewer than --data.folds 7": lambda: KINDS["folder"](pictures, {"folds": 7, "fold": 0}),
        "'cat' has 5 groups with images, fewer": lambda: KINDS["grouped table"](pictures, {"folds": 6, "fold": 0}),
        "12 people are too few for --data.folds 7": lambda: KINDS["people"](pictures, {"folds": 7, "fold": 0}),
        "without splits, and splits has train": lambda: ImageFolder("splits", folds=3, fold=0),
        "and split has train, val": lambda: Manifest(str(pictures / "split.csv"), folds=3, fold=0),
        "images of 'p0' are in the splits": lambda: Manifest(str(pictures / "split.csv"), group_column="patient"),
        "no column 'paitent'": lambda: Manifest(str(pictures / "table.csv"), group_column="paitent"),
        "two groups or more": lambda: Manifest(str(pictures / "table.csv"), group_column="label"),
        "3 people are too few": lambda: PeopleFolder(str(pictures / "files"), folds=2, fold=0),
    }.items():
        with pytest.raises(DataError, match=said):
            _ = make().sources  # type: ignore[no-untyped-call]


class CutOff(L.Callback):
    """Kills this process in the second epoch of the second fold, once."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 1 and trainer.default_root_dir.endswith("/1") and not Path("cut").exists():
            Path("cut").touch()
            os.kill(os.getpid(), signal.SIGKILL)


def command(args: list[str]) -> None:
    cross_validate(Path("recipe.yaml"), 2, name=Path.cwd().name, args=args[0])


def test_all_folds_are_trained_once_also_where_one_was_cut_off(
    pictures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(pictures / "files", "files")
    recipe = """
data: {class_path: ImageFolder, init_args: {root: files, image_size: 12, num_workers: 0, batch_size: 8}}
trainer: {max_epochs: 2, accelerator: cpu, enable_progress_bar: false, log_every_n_steps: 100}
"""
    Path("recipe.yaml").write_text(recipe)
    Path("more.yaml").write_text("{trainer: {log_every_n_steps: 50}}")
    args = ["--trainer.callbacks+=test_cross_validation.CutOff --config more.yaml"]
    folder = Path("outputs", "cross_validation", Path.cwd().name)
    assert start(command, args) == [-signal.SIGKILL]
    before = [run_id_of(folder / str(fold)) for fold in range(2)]
    first = (folder / "0" / "last.ckpt").stat().st_mtime_ns
    command(args)
    assert (folder / "0" / "last.ckpt").stat().st_mtime_ns == first
    client = MlflowClient()
    child = client.get_run(before[1])
    assert (child.info.status, child.data.tags["fold"]) == ("FINISHED", "1")
    assert len(client.get_metric_history(before[1], "val/loss")) == 2
    parent = client.get_run(child.data.tags["mlflow.parentRunId"])
    children = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert {run.info.run_id for run in children} == set(before)
    assert parent.info.status == "FINISHED"
    values = [run.data.metrics["test/loss"] for run in children]
    assert parent.data.metrics["test/loss"] == pytest.approx(statistics.mean(values))
    assert parent.data.metrics["test/loss_std"] == pytest.approx(statistics.stdev(values))
    assert f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}" in capsys.readouterr().out
    for place in (folder / "0", folder / "1"):  # to make room; their figures stay those of these settings and data
        shutil.rmtree(place)
    with pytest.raises(ValueError, match="started with other args"):
        command([f"{args[0]} --trainer.max_epochs 3"])
    Path("more.yaml").write_text("{trainer: {log_every_n_steps: 51}}")
    with pytest.raises(ValueError, match="started with other recipes in --args"):
        command(args)
    Path("more.yaml").write_text("{trainer: {log_every_n_steps: 50}}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{Path.cwd()}/another.db")  # as where the first was removed
    command(args)
    (again,) = MlflowClient().search_runs([parent.info.experiment_id])
    assert again.data.metrics["test/loss"] == parent.data.metrics["test/loss"]
    next(Path("files", "dog").iterdir()).unlink()
    with pytest.raises(ValueError, match="folds of different data have no mean"):
        command(args)


def test_folds_that_are_not_tested_have_no_mean(pictures: Path) -> None:
    Path("recipe.yaml").write_text(
        f"data: {{class_path: ImageFolder, init_args: {{root: {pictures / 'files'}, image_size: 12}}}}"
    )
    with pytest.raises(ValueError, match="Fold 0 was not tested"):
        command(["--trainer.fast_dev_run true --trainer.accelerator cpu --trainer.enable_progress_bar false"])


def test_folds_are_refused_once_their_groups_have_changed(pictures: Path) -> None:
    table = pd.read_csv(pictures / "table.csv")
    table["path"] = [str(pictures / path) for path in table["path"]]
    table.to_csv("table.csv", index=False)
    data = "{file: table.csv, group_column: patient, image_size: 12}"
    Path("recipe.yaml").write_text(f"data: {{class_path: Manifest, init_args: {data}}}")
    args = ["--trainer.fast_dev_run true --trainer.accelerator cpu --trainer.enable_progress_bar false"]
    with pytest.raises(ValueError, match="Fold 0 was not tested"):
        command(args)
    table["patient"] = table["patient"].replace("p1", "p0")
    table.to_csv("table.csv", index=False)
    with pytest.raises(ValueError, match="folds of different data have no mean"):
        command(args)


def test_data_that_have_no_folds_are_named_before_the_first_training() -> None:
    Path("recipe.yaml").write_text("data: Digits8x8")
    with pytest.raises(ValueError, match=r"cannot be used for cross-validation: .*Digits8x8 has no such setting"):
        cross_validate(Path("recipe.yaml"))
    assert not Path("outputs").exists()
