"""What a run learned is found by name."""

import base64
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from mlflow.tracking import MlflowClient
from PIL import Image

from pipelines import registry, storage
from pipelines.classification import classification
from pipelines.cli import VisionCLI


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
    assert "there was none before" in registry.promote("two", "1")
    assert "is not better" in registry.promote("two")
    client = MlflowClient()
    assert client.get_model_version_by_alias("two", "champion").version in (1, "1")
    registry.promote("two", "1", alias="challenger")
    assert "forced" in registry.promote("two", "2", alias="challenger", force=True)
    assert "two version 1 is challenger: test.accuracy" in registry.promote("two", "1", alias="challenger")
    assert float(client.get_model_version("two", "1").tags["test.accuracy"]) > 0.7


def test_a_saved_model_measures_what_it_did_in_training(trained: VisionCLI) -> None:
    figures = registry.evaluate(registry.model_folder("models:/two/1"))
    for key, value in MlflowClient().get_run(trained.trainer.logger.run_id).data.metrics.items():
        if key.startswith("test/"):
            assert figures[key] == pytest.approx(value, abs=1e-6), key
    table = registry.compare("two", "1", "2")
    assert f"{figures['test/accuracy']:.4f}" in table


def test_the_registry_is_listed_and_a_version_demoted(trained: VisionCLI) -> None:
    registry.promote("two", "1", alias="listed")
    assert "listed: 1" in registry.overview()
    assert "listed" in registry.show("two")
    assert registry.pinned("models:/two@listed") == "models:/two/1"
    assert "models:/two/1 is in copy" in registry.download("models:/two@listed", "copy")
    assert storage.load_model(Path("copy"))[0].label_names == [str(digit) for digit in range(10)]
    with pytest.raises(ValueError, match="there already"):
        registry.download("models:/two/1", "copy")
    assert registry.demote("two", "listed") == "two version 1 is listed no more."
    with pytest.raises(ValueError, match="No version of two is listed"):
        registry.demote("two", "listed")


def test_of_two_promoters_at_once_the_better_wins(trained: VisionCLI) -> None:
    client = MlflowClient()
    for better_first in (True, False):
        order = ["1", "2"] if better_first else ["2", "1"]
        client.set_model_version_tag("two", order[0], "claim.raced", "written just before the other took the alias")
        registry.promote("two", order[1], alias="raced")
        assert str(client.get_model_version_by_alias("two", "raced").version) == "1"
        registry.demote("two", "raced")


def test_unknown_names_are_told(trained: VisionCLI) -> None:
    with pytest.raises(ValueError, match=r"No model 'tow'.*two"):
        registry.promote("tow")
    with pytest.raises(ValueError, match="no version 9; it has 1, 2"):
        registry.promote("two", "9")
    with pytest.raises(ValueError, match="models:/tow@champion is not in the registry"):
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
    assert info.saved_input_example_info


def test_the_backbone_of_a_registered_model_starts_another_training(trained: VisionCLI) -> None:
    cli = classification(["fit", "--data", "Digits8x8", "--data.image_size", "12", "--trainer.max_epochs", "1",
                          "--trainer.enable_progress_bar", "false", "--model.backbone", "models:/two/1", "--output", "on",
                          "--model.optimization.frozen_epochs", "-1", "--register", "next"])  # fmt: skip
    taken = cli.model.backbone.state_dict()
    assert cli.trainer.logger.tags["source_model"] == "models:/two/1"
    for key, value in trained.model.backbone.state_dict().items():
        assert value.equal(taken[key]), key
    again = registry.load("models:/next/1").module
    assert again.backbone.conv1.weight.equal(taken["conv1.weight"])


def test_a_served_model_asks_for_all_that_it_imports() -> None:
    code = "import sys, pipelines.pyfunc; print(*{name.partition('.')[0] for name in sys.modules})"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    known = packages_distributions()
    used = {package.lower().replace("_", "-") for name in imported for package in known.get(name, [])}
    direct = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert used & {re.split(r"[\[<>=]", name)[0] for name in direct} == set(registry.NEEDED)
