"""Several labels an image: tables, thresholds, figures."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import written_table
from sklearn.metrics import average_precision_score, f1_score
from torch import Tensor

from datamodules import DataError, MultiLabelTable
from modules import Backbone, BackboneError, DataSpec, MultiLabelModule
from pipelines.multi_label import multi_label


def table(text: str, images: int = 40, **options: Any) -> MultiLabelTable:
    return MultiLabelTable(written_table(text, images), image_size=16, num_workers=0, **options)


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def sets(data: MultiLabelTable) -> dict[str, set[str]]:
    """The labels of each image, of all splits."""
    names = data.label_names
    return {
        Path(str(path)).name: {names[k] for k in np.flatnonzero(row)}
        for source in data.sources.values()
        for path, row in zip(source.paths, source.labels, strict=True)
    }


@pytest.mark.parametrize("separator", ["|", ";", ",", " "])
def test_cells_of_labels_and_columns_of_labels_say_the_same(separator: str) -> None:
    own = [{"cat", "dog"}, {"cat"}, set(), {"dog", "ox"}]
    rows = [f'{k}.png,"{separator.join(sorted(own[k % 4]))}"' for k in range(40)]
    cells = table("path,labels\n" + "\n".join(rows))
    assert cells.label_names == ["cat", "dog", "ox"]
    expected = {f"{k}.png": own[k % 4] for k in range(40)}
    assert sets(cells) == expected
    marks = [["1", "yes", "TRUE"][k % 3] if has else ["0", "no", ""][k % 3] for k in range(40) for has in [True, False]]
    rows = [
        f"{k}.png,{k}," + ",".join(marks[2 * k + (name not in own[k % 4])] for name in ("dog", "cat", "ox"))
        for k in range(40)
    ]
    columns = table("path,number,dog,cat,ox\n" + "\n".join(rows))
    assert columns.label_names == ["dog", "cat", "ox"]
    assert sets(columns) == expected


def test_rare_labels_are_in_all_splits_that_are_drawn() -> None:
    rows = [f"{k}.png,{'common' if k % 2 else ''}{'|rare' if k % 5 == 0 else ''}" for k in range(40)]
    data = table("path,labels\n" + "\n".join(rows))
    assert {name: len(source) for name, source in data.sources.items()} == {"train": 29, "val": 5, "test": 6}
    for source in data.sources.values():
        assert (source.labels.sum(0) > 0).all()
    twice = table("path,labels\n" + "\n".join(rows))
    assert twice.identity() == data.identity()
    assert data.identity()["splits"]["train"]["classes"]["rare"] == data.sources["train"].labels[:, 1].sum()


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("path,name\n0.png,a\n", {}, "--data.label_column"),
        ("path,cat\n0.png,maybe\n", {"label_columns": ["cat"]}, "'maybe' under 'cat'"),
        ("path,cat\n0.png,1\n", {"label_columns": ["dog"]}, "no column 'dog'"),
        ("labels\na\n", {}, "no column 'path'"),
        ("path,labels\n0.png,\n1.png,\n", {}, "no label under 'labels'"),
        ("path,labels,split\n0.png,a,train\n1.png,a|b,test\n", {}, "label 'b' in no row to train on"),
    ],
)
def test_tables_without_labels_are_refused(text: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match="(?s)" + said.replace("|", r"\|")):
        _ = table(text, 2, **options).sources


def test_a_label_that_none_or_all_have_is_told() -> None:
    rows = [f"{k}.png,all{'|b' if k % 2 else ''},{'train' if k < 30 else 'test'}" for k in range(40)]
    with pytest.warns(UserWarning, match="every image to train on has the label 'all'"):
        _ = table("path,labels,split\n" + "\n".join(rows)).sources


def test_figures_are_those_of_scikit_learn_at_thresholds_of_the_validation() -> None:
    random = np.random.default_rng(0)
    truth = (random.random((60, 3)) < [0.5, 0.2, 0.0]).astype(np.int64)
    scores = np.clip(random.random((60, 3)) * 0.6 + 0.3 * truth, 0.01, 0.99).astype(np.float32)
    module = MultiLabelModule(DataSpec(label_names=["a", "b", "never"], in_chans=1, image_size=16), Backbone("mlp"))
    for stage in ("val", "test"):
        for part in np.array_split(np.arange(60), 4):
            module.curves[stage].update(torch.from_numpy(scores[part]), torch.from_numpy(truth[part]))
        found = module.report(stage)
        expected = average_precision_score(truth[:, :2], scores[:, :2], average="macro")
        assert found.figures["map"] == pytest.approx(expected, abs=1e-6)
        best = [max((f1_score(truth[:, k], scores[:, k] >= t), -t) for t in scores[:, k].tolist()) for k in range(2)]
        assert found.figures["f1"] == pytest.approx(np.mean([f1 for f1, _ in best]), abs=1e-6)
    for k, (f1, _) in enumerate(best):
        assert f1_score(truth[:, k], scores[:, k] >= float(module.threshold[k])) == pytest.approx(f1)
    assert float(module.threshold[2]) == 0.5
    assert [row[0] for row in found.tables["per_label"][1]] == ["a", "b", "never"]
    assert found.tables["per_label"][1][2][2] is None


def test_thresholds_go_with_the_weights_and_decide_what_is_told() -> None:
    cli = multi_label(["fit", "--data.scene_size", "32", "--data.train", "64", "--data.val", "32", "--data.test", "16",
                       "--trainer.max_epochs", "2", "--model.optimization.ema_decay", "0.5", "--output", "o",
                       "--model.loss", "timm.loss.AsymmetricLossMultiLabel", "--backbone", "mlp",
                       "--trainer.enable_progress_bar", "false"])  # fmt: skip
    loaded = MultiLabelModule.load_from_checkpoint("o/best.ckpt")
    saved = torch.load("o/best.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(loaded.threshold, saved["threshold"])
    assert not (loaded.threshold == 0.5).all()
    image: Tensor = cli.datamodule.samples("test", 4)["image"]
    for answer in loaded.predict({"image": image}):
        told = {name for name, p in answer["probabilities"].items()
                if p >= round(float(loaded.threshold[loaded.label_names.index(name)]), 6) - 1e-6}  # fmt: skip
        assert set(answer["labels"]) == told
        assert answer["labels"] == sorted(answer["labels"], key=lambda name: -answer["probabilities"][name])


def test_the_presence_of_a_label_weighs_the_more_the_rarer_it_is() -> None:
    rows = "\n".join(f"{k}.png,{'train' if k < 30 else 'val'},{int(k % 3 == 0)},{int(k % 2)}" for k in range(40))
    data = table(f"path,split,rare,even\n{rows}", class_weighting="balanced")
    assert data.class_weights == [2, 1]
    spec = DataSpec.of(data, (*MultiLabelModule.takes, *MultiLabelModule.takes_for_training))
    module, batch = MultiLabelModule(spec), data.samples("train", 8)
    with torch.no_grad():
        p, truth = module(batch["image"]).sigmoid(), batch["labels"]
        expected = -(torch.tensor([2, 1]) * truth * p.log() + (1 - truth) * (1 - p).log()).mean()
        assert module.losses(batch).total == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(BackboneError, match="leave one out"):
        MultiLabelModule(spec, loss=torch.nn.BCEWithLogitsLoss())


def test_a_single_label_is_a_matter_of_two_classes() -> None:
    with pytest.raises(DataError, match=r"only one class, 'a'.*two classes"):
        _ = table("path,labels\n0.png,a\n1.png,\n", 2).num_classes


def test_the_pictures_that_are_shown_come_from_all_over_the_split(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[list[set[str]]] = []
    report = MultiLabelModule.report

    def watched(module: MultiLabelModule, stage: Any) -> Any:
        shown.append([{module.label_names[k] for k in has.nonzero()[:, 0].tolist()} for *_, has in module.shown])
        return report(module, stage)

    monkeypatch.setattr(MultiLabelModule, "report", watched)
    rows = [f"{k}.png,{'ab'[k >= 20]},{split}" for split in ("train", "val") for k in range(40)]  # sorted by label
    table("path,labels,split\n" + "\n".join(rows))
    args = ["--data", "MultiLabelTable", "--data.file", "t.csv", "--data.image_size", "16", "--backbone", "mlp",
            "--data.batch_size", "16", "--trainer.logger", "false", "--output", "o", "--trainer.enable_progress_bar", "false",
            "--data.num_workers", "0"]  # fmt: skip
    cli = multi_label(["fit", *args, "--trainer.max_epochs", "1"])
    assert all(sum(one == {name} for one in shown[0]) >= 7 for name in "ab")
    assert len(shown) == 1, "without a test split, the best weights are validated again, though their figures are known"
    assert multi_label(["validate", *args]).trainer.callback_metrics == cli.trainer.callback_metrics
