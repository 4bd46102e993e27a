"""A file for other programs answers as the model does."""

import json
import runpy
import subprocess
import sys
from ast import literal_eval
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import ROOT, built
from mlflow.tracking import MlflowClient
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from datamodules import CSVDetection
from datamodules.options import Preprocessing
from modules import (
    AutoencodingModule,
    ClassificationModule,
    DetectionModule,
    FaceNetModule,
    FewShotModule,
    GANModule,
    InstanceSegmentationModule,
    MaskedAutoencodingModule,
    MultiLabelModule,
    MultiTaskModule,
    QLearningModule,
    RegressionModule,
    SegmentationModule,
    SelfSupervisedModule,
    SequenceModule,
    StylizationModule,
    SuperResolutionModule,
    TranslationModule,
    VisionModule,
)
from modules.detection import FCOS, RTDETR, YOLO, RetinaNet
from modules.instance_segmentation import MaskRCNN
from modules.spec import Backbone, DataSpec
from modules.super_resolution import SRResNet
from modules.translation import ResidualTranslator
from pipelines import export
from pipelines.classification import classification
from pipelines.engine.cli import VisionCLI
from pipelines.serving import exporting, precisions, promotion, registry
from pipelines.serving import store as storage
from pipelines.serving.fitting import Fitting


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> VisionCLI:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("export"))
        cli = classification(["fit", "--data", "Digits8x8", "--data.image_size", "12", "--trainer.max_epochs", "2",
                              "--trainer.enable_progress_bar", "false", "--register", "sent", "--output", "out",
                              "--model.optimization.lr", "0.003"])  # fmt: skip
        promotion.promote("sent")
    return cli


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved net with batch norm, whose statistics are of images."""
    torch.manual_seed(0)
    module = ClassificationModule(
        DataSpec(num_classes=4, label_names=["ä", "b", "c", "d"], image_size=32), Backbone("test_resnet")
    )
    with torch.no_grad():
        for _ in range(3):
            module(torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8))
    folder = tmp_path_factory.mktemp("resnet")
    storage.save_model(folder, module, Preprocessing(32, 1), "classification")
    return folder


def run_file(file: str, image: Tensor) -> tuple[Tensor, dict[str, str]]:
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
    probabilities, metadata = run_file(f"deep/sent.{suffix}", batch)
    names = json.loads(metadata["label_names"])
    expected = loaded.predict(None, images)
    assert [names[k] for k in probabilities.argmax(1)] == expected["label"].tolist()
    assert probabilities.max(1).values.numpy() == pytest.approx(expected["probability"].to_numpy(), abs=1e-4)
    assert metadata["model"] == "models:/sent/1"
    assert json.loads(metadata["preprocessing"]) == trained.datamodule.preprocessing.as_data()


@pytest.mark.parametrize("fit", ["crop", "pad", "extend", "stretch"])
def test_pictures_are_fitted_in_a_file_as_in_training(fit: Any) -> None:
    """Up to one grey level: OpenCV computes in whole numbers."""
    rng = np.random.default_rng(0)
    for height, width in ((20, 30), (77, 50), (33, 200), (10, 300), (24, 40)):
        picture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        for size in (32, "24x40"):
            preprocessing = Preprocessing(size, 3, fit)
            wanted = preprocessing.transform()(image=picture)["image"]
            (got,) = Fitting(preprocessing)(torch.from_numpy(picture).permute(2, 0, 1)[None])
            far = np.abs(got.permute(1, 2, 0).numpy() - wanted)
            assert far.max() <= 1
            assert far.mean() < 0.2


def test_the_example_on_the_page_needs_nothing_of_ours(trained: VisionCLI) -> None:
    export.export("models:/sent@champion", Path("FILE.onnx"), with_preprocessing=True)
    page = (ROOT / "docs/registry.md").read_text()
    code = page.split("## Export")[1].split("```python\n")[1].split("```")[0]
    pixels = np.repeat(np.repeat(trained.datamodule.sources["test"][3]["image"][..., 0], 3, 0), 4, 1)
    Image.fromarray(pixels).save("PICTURE.png")
    command = [sys.executable, "-I", "-c", code + "\nimport sys; print(sorted(sys.modules))"]
    answer, modules = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert not {"torch", "modules", "datamodules", "pipelines"} & set(literal_eval(modules))
    (wanted,) = registry.load("models:/sent@champion").predict(None, ["PICTURE.png"]).to_dict("records")
    name, probability = answer.split()
    assert name == wanted["label"]
    assert float(probability) == pytest.approx(wanted["probability"], abs=0.02)


def test_boxes_in_a_picture_of_any_size_are_in_its_pixels(tmp_path: Path) -> None:
    folder, module = detector(YOLO, tmp_path / "saved")
    export.export(str(folder), Path("boxes.pt"), with_preprocessing=True)
    picture = np.random.default_rng(0).integers(0, 256, (90, 160, 3), dtype=np.uint8)
    seen = torch.from_numpy(Preprocessing(64, 3, "pad").transform()(image=picture)["image"]).permute(2, 0, 1)[None]
    boxes, _ = torch.jit.load("boxes.pt")(torch.from_numpy(picture).permute(2, 0, 1)[None])
    with torch.no_grad():
        wanted, _ = module.detector.dense(module(seen))
    assert (boxes - 2.5 * wanted).abs().mean() < 0.5
    with pytest.raises(ValueError, match="takes pixels: leave --preprocessing false out"):
        export.export(str(folder), Path("boxes.pt"), preprocessing=False, with_preprocessing=True)


def test_fewer_bits_are_written_measured_and_recorded(trained: VisionCLI) -> None:
    said = export.export("models:/sent@champion", Path("sent.onnx"), precisions=["fp16", "int8"])
    assert all(name in said for name in ("val/accuracy", "milliseconds", "sent.fp16.onnx", "sent.int8.onnx"))
    client = MlflowClient()
    (run,) = [
        run
        for experiment in client.search_experiments()
        for run in client.search_runs([experiment.experiment_id], "tags.source_model = 'models:/sent/1'")
        if "exports" in run.data.tags
    ]
    figures = run.data.metrics
    module = registry.load("models:/sent@champion").module
    batch = next(iter(trained.datamodule.val_dataloader()))
    wanted = module.predict(batch)
    for name, bound in (("fp16", 0.02), ("int8", 0.1)):
        assert abs(figures[f"{name}/val/accuracy"] - figures["fp32/val/accuracy"]) <= bound
        assert figures[f"{name}/megabytes"] < 0.7 * figures["fp32/megabytes"]
        said_of, metadata = run_file(f"sent.{name}.onnx", batch["image"])
        assert np.abs(said_of.max(1).values.numpy() - [one["probability"] for one in wanted]).max() < 3 * bound
        assert metadata["model"] == "models:/sent/1"
    with pytest.raises(ValueError, match="--precisions is for onnx"):
        export.export("models:/sent@champion", Path("sent.pt"), precisions="fp16,int8")
    with pytest.raises(ValueError, match="--precisions has no int4, but fp16, int8"):
        export.export("models:/sent@champion", Path("sent.onnx"), precisions="fp16, int4")


@pytest.mark.parametrize("suffix", ["onnx", "pt", "pt2"])
def test_normalised_pixels_in_logits_out(resnet: Path, suffix: str) -> None:
    export.export(str(resnet), Path(f"net.{suffix}"), preprocessing=False)
    module, _ = storage.load_model(resnet)
    image = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8)
    _, metadata = run_file(f"net.{suffix}", torch.zeros(1, 3, 32, 32))
    mean, std = (torch.tensor(json.loads(metadata[key])).view(3, 1, 1) for key in ("mean", "std"))
    logits, _ = run_file(f"net.{suffix}", (image / 255 - mean) / std)
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
    assert np.array_equal(head, storage.load_model(resnet)[0].head.weight.detach().numpy())


def detector(kind: object, folder: Path, size: int | str = 64) -> tuple[Path, DetectionModule]:
    """A saved detector that finds much in noise."""
    torch.manual_seed(0)
    options = {"backbone": "test_resnet", "detector": partial(kind, width=32, strides=[8, 16])}  # type: ignore[call-overload]
    module = built(DetectionModule, num_classes=3, label_names=["a", "b", "c"], image_size=size, **options)
    with torch.no_grad():
        for _ in range(3):
            module(torch.randint(256, (8, 3, *module.size), dtype=torch.uint8))
        for name, bias in module.named_parameters():
            if name.endswith(("class_branch.last.bias", "cls_logits.bias")):
                bias.add_(4.5)
    module.eval()
    with torch.no_grad():
        found = module.detector.detect(module(torch.randint(256, (8, 3, *module.size), dtype=torch.uint8)))
    module.threshold.fill_(float(torch.stack([one["scores"][20] for one in found]).max()))
    storage.save_model(folder, module, Preprocessing(size, 3, "pad"), "detection")
    return folder, module


def test_of_equal_scores_a_file_may_take_any_first_and_nothing_else() -> None:
    boxes = torch.tensor(
        [[start, 0.0, start + 1.0, 1.0] for start in (0.0, 0.2, 0.4)]
    )  # the middle one suppresses both

    def error(found: list[int], *scores: float, threshold: float = 0.1, most: int = 100) -> float:
        limits: Any = SimpleNamespace(candidates=1000, max_detections=most, nms_iou=0.6)
        given = torch.tensor(scores)[:, None]
        rows = torch.cat((boxes, torch.zeros(3, 1), given), 1)[found]
        return exporting.selection_error(rows, boxes, given, limits, threshold)

    tied = (0.5, 0.5 + 1e-6, 0.4)
    assert error([0, 2], *tied) == error([1], *tied) == 0
    assert error([0], *tied, threshold=0.4) == 0, "the last has the score of the threshold"
    assert error([0], *tied, most=1) == 0
    for found, scores in (([0], tied), ([], tied), ([0, 2], (0.5, 0.6, 0.4))):
        with pytest.raises(ValueError, match=r"it lacks [13] boxes"):
            error(found, *scores)
    with pytest.raises(ValueError, match=r"two boxes of class 0 that overlap by 0\.667"):
        error([0, 1, 2], *tied)
    assert error([1], *tied, threshold=0.6) == float("inf"), "none is that sure"


@pytest.mark.parametrize(
    "kind", [YOLO, *(pytest.param(kind, marks=pytest.mark.slow) for kind in (FCOS, RetinaNet, RTDETR))]
)
def test_a_detector_as_onnx_finds_what_the_module_finds(kind: type, tmp_path: Path) -> None:
    folder, module = detector(kind, tmp_path / "saved", "48x80" if kind is FCOS else 64)
    said = export.export(str(folder), Path("boxes.onnx"))
    assert float(said.split()[-1].rstrip(".")) <= 1e-4
    height, width = module.size
    image = torch.randint(256, (5, 3, height, width), dtype=torch.uint8)
    session = onnxruntime.InferenceSession("boxes.onnx")
    onnx.checker.check_model(onnx.load("boxes.onnx"), full_check=True)
    assert json.loads(session.get_modelmeta().custom_metadata_map["label_names"]) == ["a", "b", "c"]
    scores = np.zeros(0)
    for higher in (False, True):
        if higher:
            module.threshold.fill_(float(np.median(scores)) + 1e-6)
        given = {"image": image.numpy()} | ({"threshold": module.threshold[None].numpy()} if higher else {})
        boxes, labels, scores, which = session.run(["boxes", "labels", "scores", "image_index"], given)
        assert len(boxes) > 5
        sides = np.diff(boxes.clip(0, [width, height] * 2).reshape(-1, 2, 2), axis=1)[:, 0]
        told = (sides >= 0.02).all(1)  # a box beside the picture is no answer, which the file does not know
        boxes, labels, scores, which = boxes[told], labels[told], scores[told], which[told]
        for i, answer in enumerate(module.predict({"image": image})):
            names = [module.label_names[k] for k in labels[which == i]]
            assert sorted(names) == sorted(answer["labels"])
            rows = zip(boxes[which == i], names, scores[which == i], strict=True)
            for box, name, score in rows:  # those of equal score may be in another order
                near = np.abs(np.array(answer["boxes"]) - box).max(1) < 0.02
                assert any(
                    near[j] and answer["labels"][j] == name and abs(answer["scores"][j] - score) < 1e-4
                    for j in range(len(near))
                )
    twin, prepared = storage.load_model(folder)
    network = exporting.exported("model", twin, prepared, True)
    assert network
    assert network.stand_in(twin, precisions._answers(session, network))
    with torch.no_grad():
        for one, other in zip(twin.detector.detect(twin(image)), module.detector.detect(module(image)), strict=True):
            assert one["scores"].sort().values == pytest.approx(other["scores"].sort().values, abs=1e-4)


def test_a_detector_whose_data_are_padded_to_several_sizes_is_measured_at_the_file_s(tmp_path: Path) -> None:
    folder, _ = detector(YOLO, tmp_path / "saved")
    rows = ["path,xmin,ymin,xmax,ymax,label,split"]
    for k, size in enumerate([(64, 64), (64, 20), (20, 64), (40, 64)]):
        Image.new("RGB", size).save(f"{k}.png")
        rows += [
            f"{k}.png,2,2,12,12,{label},{split}"
            for split in ("train", "val")
            if (split == "val") == (k > 0)
            for label in "abc"
        ]
    Path("boxes.csv").write_text("\n".join(rows))
    data = CSVDetection("boxes.csv", image_size=64, batch_size=2, num_workers=0, pad_multiple=16)
    export.export(str(folder), Path("boxes.onnx"))
    network = exporting.exported("model", *storage.load_model(folder), True)
    assert network
    measured = precisions.compared({"fp32": Path("boxes.onnx")}, network, folder, data)
    assert set(measured["fp32"]) == {"megabytes", "val/ap", "milliseconds"}
    assert data.pad_multiple == 16


@pytest.mark.slow
def test_a_detector_that_finds_all_that_it_may_is_written_too(tmp_path: Path) -> None:
    folder, module = detector(YOLO, tmp_path / "saved")
    module.choose(threshold=0.0, max_detections=5)  # of an image; the file's are of each class
    storage.save_model(folder, module, Preprocessing(64, 3, "pad"), "detection")
    assert float(export.export(str(folder), Path("boxes.onnx")).split()[-1].rstrip(".")) <= 1e-4


def test_a_detector_s_file_takes_as_many_candidates_as_the_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modules.detection.detector.CANDIDATES", 10)
    folder, module = detector(YOLO, tmp_path / "saved")
    module.choose(threshold=0.0, max_detections=4, nms=0.05)  # of 40 candidates fewer are left than of all
    storage.save_model(folder, module, Preprocessing(64, 3, "pad"), "detection")
    assert float(export.export(str(folder), Path("boxes.onnx")).split()[-1].rstrip(".")) <= 1e-4


@pytest.mark.parametrize("kind", [YOLO, pytest.param(RTDETR, marks=pytest.mark.slow)])
def test_a_detector_as_pt2_gives_all_places(kind: type, tmp_path: Path) -> None:
    folder, module = detector(kind, tmp_path / "saved")
    export.export(str(folder), Path("boxes.pt2"), preprocessing=False)
    image = torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8)
    boxes, scores = torch.export.load("boxes.pt2").module()(module.normalize(image).contiguous())
    with torch.no_grad():
        expected = module.detector.dense(module(image))
    assert (boxes - expected[0]).abs().max() < 0.01
    assert (scores - expected[1]).abs().max() < 1e-4


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("suffix", ["pt", pytest.param("onnx", marks=pytest.mark.slow)])
def test_mask_rcnn_finds_boxes_and_masks_as_the_module_does(suffix: str, published: bool) -> None:
    torch.manual_seed(0)
    of = {"pooled_level": published, "second_version": published}  # as torchvision's, which --start takes
    parts = partial(MaskRCNN, width=16, hidden=16, mask_width=8, strides=[4, 8], **of)
    module = built(
        InstanceSegmentationModule,
        num_classes=3,
        image_size="48x80",
        backbone="test_resnet",
        detector=parts,
        across_classes=True,
    ).eval()
    for (
        parameter
    ) in module.detector.parameters():  # of a norm they are as large as its numbers, lest all scores be equal
        torch.nn.init.normal_(parameter, std=1.0 if published and parameter.ndim == 1 else 0.05)
    module.threshold.fill_(0.2)
    storage.save_model(Path("model"), module, Preprocessing("48x80", 3, "pad"), "instance_segmentation")
    export.export("model", Path(f"net.{suffix}"))
    image = torch.randint(256, (1, 3, 48, 80), dtype=torch.uint8)
    with torch.no_grad():
        (wanted,) = module.detector.detect(module(image))
    sure = wanted["scores"] > module.threshold
    assert sure.any()
    if suffix == "onnx":  # whose threshold may be left out
        session = onnxruntime.InferenceSession("net.onnx", providers=["CPUExecutionProvider"])
        found = [torch.from_numpy(value) for value in session.run(None, {"image": image.numpy()})]
    else:
        found = torch.jit.load("net.pt")(image, module.threshold[None])
    for name, value in zip(("boxes", "labels", "scores", "masks"), found, strict=True):
        torch.testing.assert_close(value, wanted[name][sure].reshape(value.shape), atol=1e-3, rtol=1e-4)


def test_a_file_that_answers_differently_is_not_kept(resnet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("net.pt").write_text("what was here before")
    monkeypatch.setattr(exporting, "TOLERANCE", -1.0)
    with pytest.raises(ValueError, match="differently"):
        export.export(str(resnet), Path("net.pt"))
    assert [file.read_text() for file in Path().iterdir()] == ["what was here before"]


def test_mistakes_are_told_in_one_paragraph(
    resnet: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["export", "models:/nobody@champion", "a.onnx"])
    monkeypatch.delitem(sys.modules, "pipelines.export")
    with pytest.raises(SystemExit) as end:
        runpy.run_module("pipelines.export", run_name="__main__")
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: No model 'nobody' is registered in")
    with pytest.raises(ValueError, match="add --format"):
        export.export(str(resnet), Path("net.bin"))
    with pytest.raises(ValueError, match="--opset is for onnx"):
        export.export(str(resnet), Path("net.pt"), opset=18)
    Path("file").touch()
    with pytest.raises(ValueError, match="cannot be written"):
        export.export(str(resnet), Path("file/net.pt"))


SMALL_SCENES = {"image_size": 32, "backbone": "test_resnet"}
EVERY = {
    "classification": lambda: ClassificationModule(DataSpec(num_classes=3, in_chans=1, image_size=12)),
    "detection": lambda: built(
        DetectionModule,
        num_classes=2,
        detector=partial(YOLO, width=16, depth=1, strides=[4, 8]),
        **SMALL_SCENES,
    ),
    "segmentation": lambda: built(SegmentationModule, num_classes=2, **SMALL_SCENES),
    "multi_task": lambda: MultiTaskModule(
        DataSpec(image_size=32, targets={"classification": ["a", "b"], "segmentation": ["c", "d"], "detection": ["d"]}),
        Backbone("test_resnet"),
        detector=partial(YOLO, width=16, depth=1, strides=[4, 8]),
    ),
    "instance_segmentation": lambda: built(
        InstanceSegmentationModule,
        num_classes=2,
        detector=partial(MaskRCNN, width=8, hidden=8, mask_width=8, strides=[4, 8]),
        **SMALL_SCENES,
    ),
    "autoencoding": lambda: AutoencodingModule(DataSpec(label_names=None, in_chans=1, image_size=12)),
    "masked_autoencoding": lambda: MaskedAutoencodingModule(
        DataSpec(in_chans=1, image_size=16),
        Backbone("vit_tiny_patch16_224", options={"patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}),
        decoder_dim=16,
    ),
    "facenet": lambda: FaceNetModule(DataSpec(in_chans=1, image_size=12)),
    "self_supervised": lambda: SelfSupervisedModule(DataSpec(in_chans=1, image_size=12), Backbone("test_resnet")),
    "few_shot": lambda: FewShotModule(DataSpec(in_chans=1, image_size=12)),
    "gan": lambda: GANModule(
        DataSpec(label_names=None, in_chans=1, image_size=12), Backbone("dcgan", options={"width": 4})
    ),
    "super_resolution": lambda: SuperResolutionModule(
        DataSpec(in_chans=1, image_size=16), Backbone("dcgan", options={"width": 4}), generator=SRResNet(4, 1)
    ),
    "translation": lambda: TranslationModule(
        DataSpec(label_names=["a", "b"], image_size=12, attributes=None),
        Backbone("patchgan", options={"width": 4}),
        translator=ResidualTranslator(4, 1),
    ),
    "sequences": lambda: SequenceModule(DataSpec(num_classes=3, in_chans=1, image_size=12), hidden_size=8),
    "multi_label": lambda: MultiLabelModule(DataSpec(num_classes=3, in_chans=1, image_size=12)),
    "regression": lambda: RegressionModule(DataSpec(num_classes=2, in_chans=1, image_size=12)),
    "q_learning": lambda: QLearningModule(DataSpec(num_classes=3, in_chans=4, image_size=12), Backbone("lenet5")),
    "stylization": lambda: StylizationModule(
        DataSpec(image_size=16), Backbone("test_resnet"), translator=ResidualTranslator(4, 1)
    ),
}
QUICK = ("autoencoding", "gan")  # to write as onnx; the others are written so by `make slow`


def saved(task: str) -> VisionModule:
    """A network of a task in the folder ``model``, whose parameters are not near zero."""
    torch.manual_seed(0)
    module = EVERY[task]().eval()
    frames = 3 if task == "sequences" else None
    storage.save_model(Path("model"), module, Preprocessing(module.image_size, module.in_chans, frames=frames), task)
    return module


@pytest.mark.parametrize("task", EVERY)
def test_every_task_is_exported(task: str) -> None:
    saved(task)
    module, _ = storage.load_model(Path("model"))
    export.export("model", Path("net.safetensors"))
    with safe_open("net.safetensors", "pt") as file:
        assert json.loads(file.metadata()["label_names"]) == list(getattr(module, "label_names", None) or [])
        twin = type(module).from_architecture(json.loads(file.metadata()["architecture"]))
        twin.load_state_dict({key: file.get_tensor(key) for key in file.keys()}, strict=False)  # noqa: SIM118
    for key, value in module.state_dict().items():
        if not key.startswith(module.training_only):
            assert torch.equal(twin.state_dict()[key], value), key
    for suffix in ("pt", "onnx") if task in QUICK else ("pt",):
        said = export.export("model", Path(f"net.{suffix}"))
        assert float(said.split()[-1].rstrip(".")) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("task", sorted(EVERY.keys() - set(QUICK)))
def test_every_task_is_exported_as_onnx_and_pt2(task: str) -> None:
    saved(task)
    for suffix in ("onnx", "pt2"):
        assert float(export.export("model", Path(f"net.{suffix}")).split()[-1].rstrip(".")) <= 1e-4


def test_clips_of_any_length_in_onnx_are_told_apart_as_by_the_module() -> None:
    module: Any = saved("sequences")
    export.export("model", Path("net.onnx"), preprocessing=False)
    clip, length = torch.randint(256, (4, 3, 1, 12, 12), dtype=torch.uint8), torch.tensor([1, 3, 2, 1])
    session = onnxruntime.InferenceSession("net.onnx", providers=["CPUExecutionProvider"])
    with torch.no_grad():
        wanted = module(clip, length)
        clip = module.normalize(clip)
    clip[0, 1:] = 1e3  # what is beyond a clip's end counts for nothing
    got = session.run(None, {"image": clip.numpy(), "length": length.numpy()})[0]
    assert np.abs(got - wanted.numpy()).max() < 1e-4
    twin, prepared = storage.load_model(Path("model"))
    network = exporting.exported("model", twin, prepared, False)
    assert network
    assert network.stand_in(twin, precisions._answers(session, network))
    short = torch.randint(256, (2, 2, 1, 12, 12), dtype=torch.uint8), torch.tensor([1, 2])
    with torch.no_grad():  # a batch of validation data is as long as its longest clip
        assert (twin(*short) - module(*short)).abs().max() < 1e-4


def test_a_segmentation_network_takes_images_of_any_size_on_request() -> None:
    saved("segmentation")
    module, _ = storage.load_model(Path("model"))
    said = export.export("model", Path("net.pt2"), dynamic=True)
    assert "uint8 B×3×H×W, both multiples of 16" in said
    image = torch.randint(256, (2, 3, 96, 64), dtype=torch.uint8)
    with torch.no_grad():
        assert (torch.export.load("net.pt2").module()(image) - module(image).softmax(1)).abs().max() < 1e-4
    export.export("model", Path("net.pt"), dynamic=True)
    with pytest.raises(
        RuntimeError, match=r"size of dim 2 \(50\)"
    ):  # the file does not pad, and would answer otherwise
        torch.jit.load("net.pt")(image[..., :50, :])
    saved("classification")
    with pytest.raises(ValueError, match="leave --dynamic out"):
        export.export("model", Path("net.pt"), dynamic=True)


@pytest.mark.parametrize("several", [False, True])
def test_maps_of_a_network_without_padding_are_exported_with_the_images_size(several: bool) -> None:
    torch.manual_seed(0)
    data, backbone = DataSpec(num_classes=2, image_size=48), Backbone("airbench")
    both = replace(data, targets={"segmentation": ["a", "b"], "classification": ["a", "b"]})
    module = MultiTaskModule(both, backbone, tasks=[*both.targets]) if several else SegmentationModule(data, backbone)
    network = exporting.exported("model", module.eval(), Preprocessing(48, 3, "pad"), True)
    assert network
    (image,) = network.example(module, 2)
    with torch.no_grad():
        got, wanted = network.answer(module.normalize(image))[-1], network.expected(module, image)[-1]
    assert got.shape == (2, 2, 48, 48)
    assert (got - wanted).abs().max() < 1e-4


def test_a_network_of_a_kind_that_is_not_exported_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    saved("classification")
    monkeypatch.delitem(exporting.EXPORTED, ClassificationModule)
    with pytest.raises(ValueError, match=r"is a ClassificationModule, .* \.safetensors"):
        export.export("model", Path("net.onnx"))


def test_a_stylizer_in_onnx_paints_pictures_of_other_sizes_as_the_model_does() -> None:
    torch.manual_seed(0)
    module = EVERY["stylization"]().eval()
    for parameter in module.painter.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    storage.save_model(Path("model"), module, Preprocessing(16, 3, "native"), "stylization")
    export.export("model", Path("painter.onnx"))
    session = onnxruntime.InferenceSession("painter.onnx", providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["input"] == "uint8 B×3×H×W, both multiples of 4"
    image = torch.randint(256, (2, 3, 24, 40), dtype=torch.uint8)
    with torch.no_grad():
        wanted = module(image)
    assert ((wanted > 0) & (wanted < 1)).float().mean() > 0.2
    assert np.abs(session.run(None, {"image": image.numpy()})[0] - wanted.numpy()).max() < 1e-4
