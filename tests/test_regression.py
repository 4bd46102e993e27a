"""Quantities of images: tables of numbers, figures, values that are not known."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import written_table
from mlflow.tracking import MlflowClient
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

from datamodules import DataError, MultiLabelTable, RegressionTable
from datamodules.classes import adopt_classes
from modules import Backbone, DataSpec, RegressionModule
from pipelines import export, predict
from pipelines.regression import regression
from pipelines.serving import registry
from pipelines.tracking.logger import run_id_of

SPEC = DataSpec(
    label_names=["age", "height"], in_chans=1, image_size=16, target_mean=[40.0, 1.7], target_std=[20.0, 0.1]
)


def table(text: str, images: int = 40, **options: Any) -> RegressionTable:
    return RegressionTable(written_table(text, images), image_size=16, num_workers=0, **options)


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_numbers_are_read_as_they_are_written() -> None:
    rows = [f"{k}.png;{k / 2}".replace(".5", ",5") + f";{'' if k % 4 else 1e3 * k};mr {k}" for k in range(40)]
    data = table("path;age;income;name\n" + "\n".join(rows))
    assert data.label_names == ["age", "income"]
    values = {
        Path(str(path)).stem: row
        for s in data.sources.values()
        for path, row in zip(s.paths, s.labels.tolist(), strict=True)
    }
    assert {int(k): row[0] for k, row in values.items()} == {k: k / 2 for k in range(40)}
    assert {int(k): row[1] for k, row in values.items() if row[1] == row[1]} == {k: 1e3 * k for k in range(0, 40, 4)}
    train = data.sources["train"].labels.astype(np.float64)
    assert data.target_mean == pytest.approx(np.nanmean(train, 0))
    assert data.target_std == pytest.approx(np.nanstd(train, 0))
    sizes = [np.sort(data.sources[split].labels[:, 0]) for split in ("train", "val", "test")]
    assert [len(own) for own in sizes] == [29, 5, 6]
    assert all(own[0] < 8 and own[-1] > 12 for own in sizes)  # small and large ones in all


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("path,age\n0.png,1\n", {}, "1 image is too few to draw splits from.*'split'"),
        ("path,age\n0.png,old\n1.png,3\n", {}, "no column with only numbers.*--data.columns"),
        ("path,age\n0.png,old\n1.png,3\n", {"columns": ["age"]}, "'old' under 'age'"),
        ("path,age\n0.png,3\n1.png,inf\n2.png,4\n", {}, "nearest to one is 'age', which also has 'inf'"),
        ('path,pay\n0.png,"1,000"\n1.png,999\n2.png,"1,200"\n', {}, "Is '1,000' under 'pay' .* a thousand times more"),
        ('path,pay\n0.png,"900,000"\n1.png,"1,000,000"\n', {}, "Is '900,000' under 'pay'"),
        (
            "path,at\n0.png,1700000001\n1.png,1700000009\n",
            {},
            "from 1,700,000,001 to 1,700,000,009 under 'at', .* apart",
        ),
        ("path,age\n0.png,1\n", {"columns": ["weight"]}, "no column 'weight'"),
        (
            "path,age,split\n0.png,,train\n1.png,3,test\n2.png,4,val\n",
            {"columns": ["age"]},
            "No training image .* 'age'",
        ),
    ],
)
def test_tables_without_numbers_are_refused(text: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        _ = table(text, 3, **options).target_mean


def test_columns_that_may_be_meant_otherwise_are_told() -> None:
    rows = "\n".join(f"{k}.png,{k},{'12 kg' if k == 7 else k},{k}" for k in range(40))
    with pytest.warns(UserWarning, match="several columns 'age'") as told:
        assert table(f"path,age,weight,age\n{rows}").label_names == ["age", "age.1"]
    assert "'weight' in " in str(told[-1].message)
    assert "no quantity here, since it has '12 kg'" in str(told[-1].message)


def test_figures_are_those_of_scikit_learn_and_leave_out_what_is_not_known() -> None:
    random = np.random.default_rng(0)
    truth = random.normal((40, 1.7), (20, 0.1), (50, 2)).astype(np.float32)
    said = truth + random.normal(0, (3, 0.05), (50, 2)).astype(np.float32)
    truth[::3, 1] = np.nan
    module = RegressionModule(SPEC, Backbone("mlp"))
    for part in np.array_split(np.arange(50), 4):
        module.pairs["test"].update(torch.from_numpy(np.stack([said[part], truth[part]], 1)))
    found = module.report("test").figures
    known = np.isfinite(truth)
    for k, name in enumerate(("age", "height")):
        y, p = truth[known[:, k], k].astype(np.float64), said[known[:, k], k].astype(np.float64)
        assert found[f"mae/{name}"] == pytest.approx(mean_absolute_error(y, p))
        assert found[f"rmse/{name}"] == pytest.approx(root_mean_squared_error(y, p))
    scores = [r2_score(truth[known[:, k], k], said[known[:, k], k]) for k in range(2)]
    assert found["r2"] == pytest.approx(np.mean(scores), abs=1e-5)


def test_a_value_that_is_not_known_teaches_nothing() -> None:
    module = RegressionModule(SPEC, Backbone("mlp"))
    image = torch.randint(256, (4, 1, 16, 16), dtype=torch.uint8)
    target = torch.tensor([[30.0, 1.6], [50.0, torch.nan], [torch.nan, torch.nan], [20.0, 1.8]])
    losses = module.losses({"image": image, "target": target})
    known = target.isfinite()
    error = ((module(image) - target) / torch.tensor([20.0, 0.1]))[known]
    huber = torch.where(error.abs() < 1, error.square() / 2, error.abs() - 0.5)
    torch.testing.assert_close(losses.total, huber.mean())
    assert losses.weight == 5
    nothing = module.losses({"image": image, "target": torch.full((4, 2), torch.nan)})
    assert float(nothing.total.detach()) == 0
    nothing.total.backward()


def test_from_a_table_to_a_registered_model_that_answers_in_the_data_s_units(
    capsys: pytest.CaptureFixture[str],
) -> None:
    # MLflow takes no brackets in the names of figures
    rows = "\n".join(f"{k}.png,{'train' if k < 28 else 'val' if k < 34 else 'test'},{1000 + 10 * k}" for k in range(40))
    table(f"path,split,brightness (%)\n{rows}")
    command = ["fit", "--data", "RegressionTable", "--data.file", "t.csv", "--data.image_size", "16", "--backbone", "mlp",
               "--data.augmentation", "none", "--data.num_workers", "0", "--lr", "0.01", "--trainer.max_epochs", "4",
               "--data.batch_size", "4",
               "--trainer.enable_progress_bar", "false", "--output", "o", "--register", "brightness"]  # fmt: skip
    regression(command)
    assert "test/mae/brightness _" in MlflowClient().get_run(run_id_of("o")).data.metrics
    dark, answer = registry.load("models:/brightness/1").predict(None, ["3.png", "20.png"])["values"]
    assert 800 < dark["brightness (%)"] < answer["brightness (%)"] < 1500
    assert predict.predict("models:/brightness/1", ["3.png"]) == 0
    assert f"{dark['brightness (%)']:.6g}" in capsys.readouterr().out
    export.export("models:/brightness/1", Path("b.onnx"))
    pixels = np.full((1, 3, 16, 16), 120, np.uint8)
    (said,) = onnxruntime.InferenceSession("b.onnx").run(None, {"image": pixels})
    assert said[0, 0] == pytest.approx(answer["brightness (%)"], abs=0.01)


@pytest.mark.parametrize(("kind", "unknown"), [(RegressionTable, np.nan), (MultiLabelTable, 0)])
def test_columns_go_by_their_names_where_another_network_has_them_in_another_order(kind: Any, unknown: float) -> None:
    table("path,b,a\n" + "\n".join(f"{k}.png,{int(k % 3 == 0)},{k % 2}" for k in range(40)))
    data = kind("t.csv", image_size=16, num_workers=0)
    before = data.sources["test"].labels
    adopt_classes(data, ["a", "c", "b"])
    after = data.sources["test"]
    assert list(data.label_names) == ["a", "c", "b"]
    np.testing.assert_array_equal(
        after.labels, np.stack([before[:, 1], np.full(len(before), unknown), before[:, 0]], 1)
    )
    np.testing.assert_array_equal(after[0][after.key], after.labels[0])
    with pytest.raises(DataError, match=r"'b' among its .*, which the network has not learned"):
        adopt_classes(kind("t.csv", image_size=16, num_workers=0), ["a"])
