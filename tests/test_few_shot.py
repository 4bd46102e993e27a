import json
import shutil
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from datamodules import Glyphs, HeldOutClasses
from modules import Backbone, ClassificationModule, DataSpec, FewShotModule, VisionModule
from modules.few_shot import episodes
from pipelines.engine.command import command
from pipelines.few_shot import few_shot
from pipelines.predict import predict
from pipelines.serving import registration


class Points(FewShotModule):
    """Points of the plane stand for pictures."""

    def forward(self, image: Tensor) -> Tensor:
        return image


def test_the_loss_is_the_softmax_over_squared_distances_to_the_prototypes():
    module = Points(DataSpec(1, 28), shots=2)
    torch.nn.init.zeros_(module.log_factor)  # the factor is 1, as published
    # Prototypes (1, 0) and (5, 1); what is asked about lies at squared distances 1 and 10, and 17 and 0.
    rows = {"image": [[0, 0], [5, 0], [2, 0], [5, 2], [2, 0], [5, 1]], "identity": [3, 8, 3, 8, 3, 8], "index": [0, 1, 2, 3, 4, 5]}  # fmt: skip
    batch = {key: torch.tensor(value, dtype=torch.float if key == "image" else torch.long) for key, value in rows.items()}  # fmt: skip
    losses = module.losses(batch)
    assert losses.total.item() == pytest.approx((np.log1p(np.exp(-9)) + np.log1p(np.exp(-17))) / 2, rel=1e-3)
    assert float(losses.figures["accuracy"]) == 1
    assert losses.weight == 2
    batch["index"][5] = 1  # a picture that is in the prototype is not asked about
    assert module.losses(batch).weight == 1


def test_episodes_are_the_same_each_time_and_have_no_picture_twice():
    labels = np.repeat(np.arange(7), [9, 3, 9, 8, 9, 9, 20])
    drawn = list(episodes(labels, 5, 8, 50))
    assert len(drawn) == 50
    for classes, places in drawn:
        assert len(set(classes)) == 5
        assert 1 not in classes, "it has too few pictures"
        assert len(np.unique(places)) == 40
        assert (labels[places] == classes[:, None]).all()
    for one, other in zip(drawn, episodes(labels, 5, 8, 50), strict=True):
        assert all(map(np.array_equal, one, other))


def test_classes_are_divided_and_not_pictures():
    sources = HeldOutClasses(published="Digits", draw=3).sources
    names = [set(source.names) for source in sources.values()]
    assert list(map(len, names)) == [4, 3, 3]
    assert len(set.union(*names)) == 10
    assert (
        set(HeldOutClasses(published="Digits", draw=3).sources["test"].names)
        == names[2]
        != set(HeldOutClasses(published="Digits").sources["test"].names)
    )


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--model.way", "8", "--model.queries", "3"], "of the 7 classes of the val split 7 have so many"),
        (["--model.queries", "15"], "with 16 pictures each"),
        (["--model.way", "1"], "tells classes apart"),
        (["--model.way", "3", "--model.queries", "3", "--model.shots", "4", "--data.batch_size", "16"], "none is left to ask about"),
    ],
)  # fmt: skip
def test_what_has_no_episodes_ends_in_one_paragraph(args, said, capsys):
    with pytest.raises(SystemExit) as end:
        few_shot(["fit", "--data", "Glyphs", "--data.people", "96", "--trainer.enable_progress_bar", "false", *args])
    message = capsys.readouterr().err
    assert end.value.code == 2
    assert said in message
    assert "Traceback" not in message


def registered(module: VisionModule, data: Glyphs, task: str) -> str:
    with mlflow.start_run() as run:
        pass
    config = {"class_path": "Glyphs", "init_args": {"people": 60}}
    version = registration.register(task, module, data, config, task, run.info.run_id, {})
    return f"models:/{task}/{version.version}"


def test_a_registered_model_takes_new_classes_from_a_folder_of_pictures(capsys):
    data = Glyphs(people=60, num_workers=0)
    spec = DataSpec(1, 32, label_names=["a", "b"])
    torch.manual_seed(0)
    own = registered(FewShotModule(spec, unit=True), data, "few_shot")
    other = registered(ClassificationModule(spec, Backbone("lenet5")), data, "classification")
    source = data.sources["test"]
    for name in source.names[source.counts >= 10][:4]:
        for n, place in enumerate(np.flatnonzero(source.people == name)[:10]):
            file = Path("support" if n < 6 else "asked", name, f"{n}.png")
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(source[place]["image"][..., 0]).save(file)
    Path("support", name, "notes.txt").touch()
    for model in (own, other):
        with pytest.raises(SystemExit):
            command(predict, [model, "asked", "--support", "support", "--json", "true", "--out", "drawn"])
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        right = [row["label"] == Path(row["path"]).parent.name for row in rows]
        assert len(right) == 16
        assert np.mean(right) > 0.8
        assert set(rows[0]["top"]) == {folder.name for folder in Path("support").iterdir()}
    assert len(list(Path("drawn").rglob("*.png"))) == 16
    shutil.copytree(Path("support", name), Path("one", "lone"))
    shutil.copytree("support", "three")
    Path("three", "bare").mkdir()
    for folder, said in (
        ("one", "only lone"),
        ("three", "no picture of bare can be read"),
        ("one/lone", "none with pictures"),
        ("nowhere", "no folder nowhere"),
    ):
        with pytest.raises(SystemExit) as end:
            command(predict, [own, "asked", "--support", folder])
        assert end.value.code == 2
        assert said in capsys.readouterr().err
