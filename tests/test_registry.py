"""What a run learned is found by name."""

import base64
import io
import json
import re
import subprocess
import sys
import tomllib
from functools import partial
from importlib.metadata import packages_distributions
from pathlib import Path

import faults
import mlflow
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from mlflow.tracking import MlflowClient
from PIL import Image

from datamodules import CIFAR10, DataError, ImageFolder
from modules import BackboneError, ClassificationModule, DetectionModule
from modules.detection import RTDETR
from modules.spec import Backbone, DataSpec
from pipelines.classification import classification
from pipelines.engine.cli import VisionCLI
from pipelines.engine.command import command
from pipelines.engine.start import with_start
from pipelines.evaluate import evaluate
from pipelines.serving import evaluation, promotion, registration, registry
from pipelines.serving import store as storage
from pipelines.tracking.logger import run_id_of


def train(name: str, epochs: int) -> VisionCLI:
    return classification(["fit", "--data", "Digits8x8", "--data.image_size", "12", "--trainer.max_epochs", str(epochs),
                           "--trainer.enable_progress_bar", "false", "--register", name, "--output", f"{name}-{epochs}",
                           "--model.optimization.lr", "0.003"])  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> VisionCLI:
    """A model of two versions: the first is much the better one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("registry"))
        good = train("two", 6)
        train("two", 1)
    return good


def test_only_a_better_version_becomes_champion(trained: VisionCLI) -> None:
    assert "there was none before" in promotion.promote("two", "1")
    assert "is not better" in promotion.promote("two")
    client = MlflowClient()
    assert client.get_model_version_by_alias("two", "champion").version in (1, "1")
    promotion.promote("two", "1", alias="challenger")
    assert "forced" in promotion.promote("two", "2", alias="challenger", force=True)
    assert "two version 1 is challenger: test.accuracy" in promotion.promote("two", "1", alias="challenger")
    assert float(client.get_model_version("two", "1").tags["test.accuracy"]) > 0.7


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("two", "give models:/two/2, or models:/two@ALIAS"),
        ("two/1", "give models:/two/1, or"),
        ("models:/two", "give models:/two/2, or"),
        ("models:/two/7", "two has no version 7; it has 1, 2"),
        ("models:/two@nobody", "No version of two is called nobody; it has 1, 2"),
        ("models:/deux/1", "No model 'deux' is registered in .*; registered are: .*two"),
    ],
)
def test_an_address_that_is_none_is_put_right(trained: VisionCLI, address: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        registry.load(address)
    if address == "two":
        with pytest.raises(BackboneError, match="Registered is models:/two"):
            with_start(["fit", "--start", address], ClassificationModule)


def test_a_saved_model_measures_what_it_did_in_training(trained: VisionCLI) -> None:
    figures = evaluation.evaluate(registry.model_folder("models:/two/1"))
    for key, value in MlflowClient().get_run(trained.trainer.logger.run_id).data.metrics.items():
        if key.startswith("test/"):
            assert figures[key] == pytest.approx(value, abs=1e-6), key
    table = promotion.compare("two", "1", "2")
    assert f"{figures['test/accuracy']:.4f}" in table


def test_a_registered_model_is_measured_on_any_data_in_a_run_that_names_it(
    trained: VisionCLI, capsys: pytest.CaptureFixture[str]
) -> None:
    learned = trained.datamodule
    for name in ("3", "7"):  # a folder of its own, without splits, with two of the ten classes and other sizes
        Path("own", name).mkdir(parents=True)
        for i in range(6):
            side = 20 + i
            chosen = np.flatnonzero(learned.sources["test"].labels == int(name))[i]
            image = Image.fromarray(learned.sources["test"][chosen]["image"][..., 0]).resize((side, side))
            image.save(f"own/{name}/{i}.png")
    figures = evaluate("models:/two/1", data=ImageFolder("own", in_chans=1, num_workers=0), output=Path("measured"))
    files = sorted(Path("own").rglob("*.png"))
    answers = registry.load("models:/two/1").stream(files, 4, lambda _: None)
    right = [answer["label"] == file.parent.name for file, answer in zip(files, answers, strict=True)]
    assert figures["test/accuracy"] == pytest.approx(np.mean(right))
    run = MlflowClient().get_run(run_id_of("measured"))
    assert run.info.status == "FINISHED"
    assert run.data.tags["source_model"] == "models:/two/1"
    assert run.data.tags["evaluates"] == trained.trainer.logger.run_id
    assert run.data.metrics["test/accuracy"] == pytest.approx(figures["test/accuracy"])
    assert "all of it is the test" in capsys.readouterr().err
    before = Path("measured", "run.json").read_text()
    evaluate("models:/two/1", data=ImageFolder("own", in_chans=1, num_workers=0), output=Path("measured"))
    assert Path("measured", "run.json").read_text() == before, "a folder has one run, also that of a training"
    assert run_id_of(next(Path("measured").glob("evaluate-*"))) != run.info.run_id
    Path("own", "cat").mkdir()
    Image.new("L", (8, 8)).save("own/cat/0.png")
    with pytest.raises(DataError, match="cat"):
        evaluate("models:/two/1", data=ImageFolder("own", in_chans=1, num_workers=0), output=Path("refused"))
    assert not Path("refused").exists(), "what is refused is no run"
    with pytest.raises(ValueError, match="in_chans 3 where it takes 1"):
        evaluate("models:/two/1", data=CIFAR10())


@pytest.mark.usefixtures("_interruptible")
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_an_evaluation_of_a_registered_model_and_its_run(
    name: str, code: int, trained: VisionCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = faults.Send("on_test_batch_end", name)
    monkeypatch.setattr(ClassificationModule, "on_test_batch_end", send.send)
    with pytest.raises(SystemExit) as end:
        command(evaluate, ["models:/two/1", "--output", "ended"])
    assert end.value.code == code
    assert MlflowClient().get_run(run_id_of("ended")).info.status == "KILLED"


def test_a_model_whose_files_are_gone_is_told(trained: VisionCLI) -> None:
    MlflowClient().create_registered_model("bare")
    MlflowClient().create_model_version("bare", str(Path("gone").absolute()))
    with pytest.raises(ValueError, match=r"models:/bare/1 is registered in .* but its files cannot be had"):
        registry.load("models:/bare/1")
    MlflowClient().delete_registered_model("bare")


def test_the_registry_is_listed_and_a_version_demoted(trained: VisionCLI) -> None:
    promotion.promote("two", "1", alias="listed")
    assert "listed: 1" in promotion.list_models()
    assert "listed" in promotion.show("two")
    assert registry.pinned("models:/two@listed") == "models:/two/1"
    assert "models:/two/1 is in copy" in registry.download("models:/two@listed", "copy")
    assert storage.load_model(Path("copy"))[0].label_names == [str(digit) for digit in range(10)]
    with pytest.raises(ValueError, match="already exists"):
        registry.download("models:/two/1", "copy")
    assert promotion.demote("two", "listed") == "two version 1 is no longer listed."
    with pytest.raises(ValueError, match="No version of two is listed"):
        promotion.demote("two", "listed")


def test_of_two_promoters_at_once_the_better_wins(trained: VisionCLI) -> None:
    client = MlflowClient()
    for better_first in (True, False):
        order = ["1", "2"] if better_first else ["2", "1"]
        client.set_model_version_tag("two", order[0], "claim.raced", "written just before the other took the alias")
        promotion.promote("two", order[1], alias="raced")
        assert str(client.get_model_version_by_alias("two", "raced").version) == "1"
        promotion.demote("two", "raced")


def add(name: str, **tags: object) -> str:
    """Registers a version that has tags and nothing else."""
    client = MlflowClient()
    if not mlflow.search_registered_models(filter_string=f'name="{name}"'):
        client.create_registered_model(name)
    tags = {"monitor": "val/accuracy", "mode": "max"} | {key.replace("_", "."): value for key, value in tags.items()}
    return str(client.create_model_version(name, Path.cwd().as_uri(), tags=tags).version)


def test_what_counts_is_the_data_that_the_figure_was_measured_on() -> None:
    add("picky", test_accuracy=0.8, digest_test="same", digest_train="100 images", val_accuracy=0.99)
    add("picky", test_accuracy=0.9, digest_test="same", digest_train="1000 images", val_accuracy=0.98)
    add("picky", test_accuracy=0.95, digest_test="others", digest_train="1000 images")
    add("picky", val_accuracy=0.97, digest_val="same")
    promotion.promote("picky", "1")
    assert "picky version 2 is champion: test.accuracy 0.9 against 0.8" in promotion.promote("picky", "2")
    for other in ("3", "4"):
        kept = promotion.promote("picky", other)
        assert f"version {other} was measured on other data" in kept
        assert f"compare picky 2 {other}." in kept
    assert str(MlflowClient().get_model_version_by_alias("picky", "champion").version) == "2"


def test_a_champion_without_a_figure_is_beaten_by_any_that_has_one() -> None:
    for value in ("nan", "0.5", "nan"):
        add("lost", monitor="val/loss", mode="min", test_loss=value, digest_test="same")
    promotion.promote("lost", "1")
    assert "lost version 2 is champion" in promotion.promote("lost", "2")
    assert "is not better" in promotion.promote("lost", "3")


def test_names_numbers_and_aliases_are_told_apart() -> None:
    name, client = "it's mine", MlflowClient()
    assert [add(name), add(name)] == ["1", "2"]
    assert promotion.show(name).count("│ None │") == 2  # no run
    client.set_registered_model_alias(name, "2", "1")  # which MLflow does not mind
    assert registry.pinned(f"models:/{name}@2") == f"models:/{name}/1"
    assert promotion.promote(name, "2").startswith(f"{name} version 2 is champion")
    for address in ("@latest", "/latest", "@champion", "/2"):
        assert registry.pinned(f"models:/{name}{address}") == f"models:/{name}/2"
    for alias in ("2", "v2", "latest", "", "a b"):
        with pytest.raises(ValueError, match="cannot be an alias"):
            promotion.promote(name, "1", alias=alias)
    promotion.demote(name, "2")


def test_the_list_has_more_than_a_page() -> None:
    client, names = MlflowClient(), [f"page-{n:03}" for n in range(101)]
    for name in names:
        client.create_registered_model(name)
    try:
        add(names[-1], test_accuracy=0.5)
        assert names[-1] in promotion.list_models()
    finally:
        for name in names:
            client.delete_registered_model(name)


@pytest.mark.parametrize("name", ["a/b", "a:b", "a@b", " ", "..", "a#b", 'a"b', "a\nb"])
def test_a_name_that_cannot_be_found_again_is_refused_before_training(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        classification(["fit", "--data", "Digits8x8", "--output", "out", "--register", name])
    assert end.value.code == 2
    assert "MLflow cannot keep a model under this name" in capsys.readouterr().err
    assert not Path("out").exists()


def test_both_versions_are_measured_on_the_data_of_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator, folders = np.random.default_rng(0), {}
    for number, (size, side) in enumerate([(24, 16), (60, 24)], 1):
        for k in range(size):
            file = Path(f"data{number}", "ab"[k % 2], f"{k}.png")
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 255, (32, 32), np.uint8)).save(file)
        options = {"root": str(tmp_path / f"data{number}"), "in_chans": 1, "image_size": side, "num_workers": 0}
        data = ImageFolder(**options)
        module = ClassificationModule(
            DataSpec(num_classes=2, label_names=data.label_names, in_chans=1, image_size=side)
        )
        with mlflow.start_run() as run:
            pass
        registration.register("measured", module, data, {"class_path": "ImageFolder", "init_args": options},
                          "classification", run.info.run_id, {})  # fmt: skip
        folders[number] = registry.model_folder(f"models:/measured/{number}")
    own = {n: evaluation.evaluate(folder)["test/loss"] for n, folder in folders.items()}
    for first, second in ((1, 2), (2, 1)):
        capsys.readouterr()
        shown = promotion.compare("measured", str(first), str(second))
        assert f"Version {second} has another test split" in capsys.readouterr().err
        options = {"root": str(tmp_path / f"data{first}"), "in_chans": 1, "image_size": {1: 16, 2: 24}[second],
                   "num_workers": 0}  # fmt: skip
        there = evaluation.evaluate(folders[second], ImageFolder(**options))["test/loss"]
        assert there != own[second]
        row = next(line for line in shown.splitlines() if "test/loss" in line)
        assert f"{own[first]:.4f}" in row
        assert f"{there:.4f}" in row


def test_unknown_names_are_told(trained: VisionCLI) -> None:
    with pytest.raises(ValueError, match=r"No model 'tow'.*two"):
        promotion.promote("tow")
    with pytest.raises(ValueError, match="no version 9; it has 1, 2"):
        promotion.promote("two", "9")
    with pytest.raises(ValueError, match="No model 'tow' is registered"):
        registry.load("models:/tow@champion")


def test_a_model_takes_images_in_every_form_and_answers_the_same(trained: VisionCLI, tmp_path: Path) -> None:
    model = registry.load("models:/two/1")
    pixels = trained.datamodule.sources["test"][3]["image"][..., 0]
    Image.fromarray(pixels).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    forms = [tmp_path / "a.png", str(tmp_path / "a.png"), data, base64.b64encode(data).decode(), Image.open(tmp_path / "a.png"),
             pixels, pixels[..., None], np.stack([pixels] * 3, -1)]  # fmt: skip
    answers = model.predict(None, forms)
    assert len(answers) == len(forms)
    assert len({json.dumps(row) for row in answers.to_dict("records")}) == 1
    assert answers.equals(model.predict(None, pd.DataFrame({"image": forms})))
    with pytest.raises(ValueError, match=r"nothing\.png is neither a file"):
        model.predict(None, ["nothing.png"])
    with pytest.raises(ValueError, match="float64"):
        model.predict(None, [pixels / 255])


def test_a_registered_model_is_data_with_a_signature(trained: VisionCLI) -> None:
    folder = Path(mlflow.artifacts.download_artifacts("models:/two/1"))
    assert not [file for file in folder.rglob("*") if file.suffix in (".pkl", ".pth", ".pt", ".ckpt")]
    info = mlflow.models.get_model_info("models:/two/1")
    assert info.signature.inputs.input_names() == ["image"]
    assert "label" in info.signature.outputs.input_names()
    example = mlflow.models.Model.load(str(folder)).load_input_example(str(folder))
    with Image.open(io.BytesIO(base64.b64decode(example["image"][0]))) as picture:
        made = np.asarray(picture)[..., None]
    assert made.shape == (12, 12, 1)  # made up: a picture of the data may be of a person
    assert not any((made == source[i]["image"]).all() for source in trained.datamodule.sources.values()
                   for i in range(len(source)) if source[i]["image"].shape == made.shape)  # fmt: skip


def test_the_backbone_of_a_registered_model_starts_another_training(trained: VisionCLI) -> None:
    cli = classification(["fit", "--data", "Digits8x8", "--data.image_size", "12", "--trainer.max_epochs", "1",
                          "--trainer.enable_progress_bar", "false", "--model.backbone", "models:/two@latest", "--output", "on",
                          "--model.optimization.frozen_epochs", "-1", "--register", "next's"])  # fmt: skip
    taken = cli.model.backbone.state_dict()
    assert cli.trainer.logger.tags["source_model"] == "models:/two/2"
    for key, value in registry.load("models:/two/latest").module.backbone.state_dict().items():
        assert value.equal(taken[key]), key
    again = registry.load("models:/next's@latest").module
    assert again.backbone.conv1.weight.equal(taken["conv1.weight"])


@pytest.mark.slow  # imports everything in a process of its own
def test_a_served_model_asks_for_all_that_it_imports() -> None:
    code = (
        "import sys, faiss, modules, modules.callbacks.support_vectors, modules.measures.labels, pipelines.serving.model;"
        "[getattr(modules, name) for name in modules.__all__]; print(*{name.partition('.')[0] for name in sys.modules})"
    )
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    known = packages_distributions()
    used = {package.lower().replace("_", "-") for name in imported for package in known.get(name, [])}
    direct = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    own = {re.split(r"[\[<>=]", name)[0] for name in direct} - {"fastapi"}  # that is MLflow's, which needs it too
    assert used & own == set(registration.NEEDED)


def test_a_model_asks_for_the_package_that_its_parts_come_from() -> None:
    detector = partial(RTDETR, width=16, queries=8, layers=2, strides=[8, 16])
    module = DetectionModule(DataSpec(num_classes=2, image_size=64), Backbone("test_resnet"), detector=detector)
    assert registration._of_parts(module) == ["transformers"]
    assert registration._of_parts(ClassificationModule(DataSpec(num_classes=2, image_size=28, in_chans=1))) == []
