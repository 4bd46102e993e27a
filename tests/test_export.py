"""A file for other programs answers as the model does."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from torch import Tensor

from modules import ClassificationModule
from pipelines import export, registry
from pipelines.classification import classification
from pipelines.cli import VisionCLI


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> VisionCLI:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("export"))
        cli = classification(["fit", "--data", "Digits8x8", "--data.image_size", "12", "--trainer.max_epochs", "2",
                              "--trainer.enable_progress_bar", "false", "--register", "sent", "--output", "out",
                              "--model.optimization.lr", "0.003"])  # fmt: skip
        registry.promote("sent")
    return cli


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved net with batch norm, whose statistics are of images."""
    torch.manual_seed(0)
    module = ClassificationModule(4, ["ä", "b", "c", "d"], image_size=32, backbone="test_resnet")
    with torch.no_grad():
        for _ in range(3):
            module(torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8))
    folder = tmp_path_factory.mktemp("resnet")
    registry.save_model(folder, module, {"image_size": 32}, "classification")
    return folder


def run(file: str, image: Tensor) -> tuple[Tensor, dict[str, str]]:
    """Answers and metadata of a file, without Fovea."""
    extra = {"metadata.json": ""}
    if file.endswith(".onnx"):
        session = onnxruntime.InferenceSession(file)
        answer = session.run(None, {"image": image.numpy()})[0]
        return torch.from_numpy(answer), session.get_modelmeta().custom_metadata_map
    if file.endswith(".pt"):
        answer = torch.jit.load(file, _extra_files=extra)(image)
    else:
        answer = torch.export.load(file, extra_files=extra).module()(image)
    return answer, json.loads(extra["metadata.json"])


@pytest.mark.parametrize("suffix", ["onnx", "pt", "pt2"])
def test_pixels_in_probabilities_out(trained: VisionCLI, suffix: str) -> None:
    said = export.export("models:/sent@champion", Path(f"deep/sent.{suffix}"))
    assert float(said.split()[-1].rstrip(".")) <= 1e-4
    assert [file.name for file in Path("deep").iterdir()] == [f"sent.{suffix}"]
    images = [trained.datamodule.sources["test"][i]["image"] for i in range(7)]
    loaded = registry.load("models:/sent@champion")
    batch = next(iter(trained.datamodule.test_dataloader()))["image"][:7]
    probabilities, metadata = run(f"deep/sent.{suffix}", batch)
    names = json.loads(metadata["label_names"])
    expected = loaded.predict(None, images)
    assert [names[k] for k in probabilities.argmax(1)] == expected["label"].tolist()
    assert probabilities.max(1).values.numpy() == pytest.approx(expected["probability"].to_numpy(), abs=1e-4)
    assert metadata["model"] == "models:/sent/1"
    assert json.loads(metadata["preprocessing"]) == trained.datamodule.preprocessing


@pytest.mark.parametrize("suffix", ["onnx", "pt", "pt2"])
def test_normalised_pixels_in_logits_out(resnet: Path, suffix: str) -> None:
    export.export(str(resnet), Path(f"net.{suffix}"), preprocessing=False)
    module, _ = registry.load_model(resnet)
    image = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8)
    _, metadata = run(f"net.{suffix}", torch.zeros(1, 3, 32, 32))
    mean, std = (torch.tensor(json.loads(metadata[key])).view(3, 1, 1) for key in ("mean", "std"))
    logits, _ = run(f"net.{suffix}", (image / 255 - mean) / std)
    with torch.no_grad():
        assert (logits - module(image)).abs().max() < 1e-4
    assert str(ROOT).encode() not in Path(f"net.{suffix}").read_bytes()


def test_the_onnx_file_is_valid_and_of_the_opset_asked_for(resnet: Path) -> None:
    export.export(str(resnet), Path("net.onnx"), opset=21)
    net = onnx.load("net.onnx")
    onnx.checker.check_model(net, full_check=True)
    assert net.opset_import[0].version == 21
    assert net.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    with pytest.raises(ValueError, match="cannot write opset 99"):
        export.export(str(resnet), Path("net.onnx"), opset=99)
    assert onnx.load("net.onnx").opset_import[0].version == 21


def test_safetensors_hold_the_weights_and_what_rebuilds_them(resnet: Path) -> None:
    export.export(str(resnet), Path("net"), "safetensors")
    with safe_open("net", "np") as file:
        metadata = file.metadata()
        assert json.loads(metadata["architecture"])["backbone"] == "test_resnet"
        assert json.loads(metadata["label_names"])[0] == "ä"
        head = file.get_tensor("head.weight")
    assert np.array_equal(head, registry.load_model(resnet)[0].head.weight.detach().numpy())


def test_a_file_that_answers_differently_is_not_kept(resnet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("net.pt").write_text("what was here before")
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(ValueError, match="differently"):
        export.export(str(resnet), Path("net.pt"))
    assert [file.read_text() for file in Path().iterdir()] == ["what was here before"]


def test_mistakes_are_told_in_one_paragraph(resnet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["export", "models:/nobody@champion", "a.onnx"])
    monkeypatch.delitem(sys.modules, "pipelines.export")
    with pytest.raises(SystemExit, match=r"^error: models:/nobody@champion is not in"):
        runpy.run_module("pipelines.export", run_name="__main__")
    with pytest.raises(ValueError, match="add --format"):
        export.export(str(resnet), Path("net.bin"))
    with pytest.raises(ValueError, match="--opset is for onnx"):
        export.export(str(resnet), Path("net.pt"), opset=18)
    Path("file").touch()
    with pytest.raises(ValueError, match="cannot be written"):
        export.export(str(resnet), Path("file/net.pt"))
