"""Fovea from Python, and the notebooks that show it."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from mlflow.tracking import MlflowClient

import fovea
from modules import ClassificationModule
from pipelines.engine.command import UsageError

SMALL = {"data.train_per_class": 30, "data.num_workers": 0, "trainer.enable_progress_bar": False}


def test_a_training_answers_goes_on_and_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    first = fovea.train("classification", data="Digits8x8", backbone="mlp", max_epochs=1, output="out", settings=SMALL)
    assert first.address is None
    longer = fovea.train(
        "classification", data="Digits8x8", backbone="mlp", max_epochs=np.int64(2), output="out", settings=SMALL
    )
    assert (longer.run_id, longer.output) == (first.run_id, Path("out"))
    assert longer.metrics["test/accuracy"] == MlflowClient().get_run(str(first.run_id)).data.metrics["test/accuracy"]
    monkeypatch.setattr(ClassificationModule, "losses", None)  # what is trained is not trained again
    address = longer.register("from-python")
    assert address == longer.register("from-python")
    answer = longer.model.predict([picture])
    assert fovea.load(address, "cpu").predict(picture[None]) == answer
    assert len(longer.model.predict(np.repeat(picture[..., None], 3, 2))) == 1, "one picture, not its rows"
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        longer.model.predict([picture], batch_size=0)
    assert longer.model.draw(picture, answer[0]).width >= 8


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"task": "classifiction"}, "no task 'classifiction'.*Did you mean classification"),
        ({"data": "Digit8x8"}, "no Digit8x8.*Did you mean Digits8x8"),
        ({"data": "ImageFolder", "root": Path("nowhere")}, "no folder .*nowhere"),
        ({"settings": {"model.mixup": -1}}, "--model.mixup must be at least 0, not -1"),
        ({"settings": {"trainer": {"max_epoch": 1}}}, "max_epoch"),
        ({"register": "a/b"}, "a/b"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_are_errors_of_one_paragraph(wrong: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told) as error:
        fovea.train(**{"task": "classification", "data": "Digits8x8", "backbone": "mlp"} | wrong)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    assert wrong.keys() == {"task"} or isinstance(error.value, UsageError)


@pytest.mark.parametrize("whole", [pytest.param(True, marks=pytest.mark.slow), False], ids=["whole", "shortened"])
@pytest.mark.parametrize(
    ("notebook", "figure", "least"),
    [("own_folder", "test/accuracy", 0.9), ("own_boxes", "test/ap50", 0.1), ("faces", "test/auc", 0.8)],
)
def test_a_notebook_runs(
    notebook: str, figure: str, least: float, whole: bool, empty: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copy(empty, "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    names: dict[str, Any] = {}
    for cell in json.loads(Path(ROOT, "examples", f"{notebook}.ipynb").read_text())["cells"]:
        assert not cell.get("outputs")  # they are somebody's
        code = "".join(cell["source"])
        if cell["cell_type"] == "code":
            exec(code if whole else re.sub(r"max_epochs=\d+", "max_epochs=1", code), names)
    assert (least if whole else 0) <= names["training"].metrics[figure] <= 1
