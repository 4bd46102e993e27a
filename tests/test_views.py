"""Test-time augmentation: what is said of an image and of its mirror images, put together."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import built
from faster_coco_eval.core import mask as rle
from PIL import Image
from test_evaluation import DIGITS, refused, run
from torch import Tensor
from torchvision.ops import box_iou

from modules import (
    BackboneError,
    ClassificationModule,
    DetectionModule,
    MultiLabelModule,
    RegressionModule,
    SegmentationModule,
    SequenceModule,
    VisionModule,
)
from modules.detection import YOLO
from modules.ranges import Mirroring
from modules.views import AXES
from pipelines import evaluate, predict
from pipelines.classification import classification
from pipelines.engine.command import command

SMALL: dict[str, Any] = {"num_classes": 3, "label_names": ["a", "b", "c"], "image_size": 32, "in_chans": 3}
KINDS: dict[str, Any] = {
    "classification": (ClassificationModule, lambda said: said.softmax(1)),
    "several labels": (MultiLabelModule, lambda said: said.sigmoid()),
    "regression": (RegressionModule, lambda said: said),
    "segmentation": (SegmentationModule, lambda said: said.softmax(1)),
}


def made(kind: type[VisionModule]) -> Any:
    torch.manual_seed(0)
    module = built(kind, **SMALL, backbone="test_resnet").eval()
    for parameter in module.parameters():  # which say something of a picture
        if parameter.ndim > 1:
            torch.nn.init.kaiming_normal_(parameter)
    return module


def pictures() -> Tensor:
    """Two of noise, which is bright in a corner."""
    noise = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(1))
    ramp = torch.linspace(0, 1, 32)
    return (noise * ramp * ramp[:, None]).to(torch.uint8)


def numbers(answer: dict[str, Any]) -> Tensor:
    """The probabilities, quantities or class map of an answer."""
    if "masks" in answer:
        return torch.stack([torch.from_numpy(rle.decode(answer["masks"][name]).astype(np.float32)) if name in answer["masks"]
                            else torch.zeros(32, 32) for name in SMALL["label_names"]])  # fmt: skip
    named = answer.get("top") or answer.get("probabilities") or answer["values"]
    return torch.tensor([named[name] for name in SMALL["label_names"]])


@torch.no_grad()
@pytest.mark.parametrize("views", ["flip", "flips"])
@pytest.mark.parametrize("name", KINDS)
def test_an_answer_is_the_mean_over_the_views_each_turned_back(name: str, views: Mirroring) -> None:
    kind, likely = KINDS[name]
    module, image = made(kind), pictures()
    plain = [numbers(answer) for answer in module.predict({"image": image})]
    module.views.choose(views)
    said = []
    for axes in AXES[views]:
        one = likely(module(image.flip(axes)))
        said.append(one.flip(axes) if one.ndim == 4 else one)
    mean = torch.stack(said).mean(0)
    found = [numbers(answer) for answer in module.predict({"image": image})]
    if name == "segmentation":
        mean = torch.nn.functional.one_hot(mean.argmax(1), 3).permute(0, 3, 1, 2).float()
    for one, true, before in zip(found, mean, plain, strict=True):
        assert (one - true).abs().mean() < 3e-4
        assert (one - before).abs().max() > 1e-3
    module.views.choose("none")
    assert torch.equal(
        torch.stack([numbers(answer) for answer in module.predict({"image": image})]), torch.stack(plain)
    )


@torch.no_grad()
def test_a_detector_finds_in_a_mirrored_image_the_mirrored_boxes() -> None:
    module, image = made(DetectionModule), pictures()
    module.choose(threshold=0.0)
    module.views.choose("flips")
    found, mirror = (module.predict({"image": each}) for each in (image, image.flip(-1)))
    for one, other in zip(found, mirror, strict=True):
        assert len(one["boxes"]) > 3
        boxes, back = torch.tensor(one["boxes"]), torch.tensor(other["boxes"])
        back[:, [0, 2]] = 32 - back[:, [2, 0]]
        sure = boxes[:10]
        assert (box_iou(sure, back).amax(1) > 0.9).float().mean() >= 0.9


def test_boxes_of_one_object_are_fused_and_one_that_a_view_does_not_show_is_less_certain() -> None:
    backbone = built(DetectionModule, **SMALL, backbone="test_resnet").backbone
    detector = YOLO(backbone, 3, 32)
    first = {"boxes": torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]]), "labels": torch.tensor([1, 2]),
             "scores": torch.tensor([0.9, 0.8])}  # fmt: skip
    second = {"boxes": torch.tensor([[0.0, 0, 10, 12], [0, 0, 10, 10]]), "labels": torch.tensor([1, 0]),
              "scores": torch.tensor([0.3, 0.2])}  # fmt: skip
    found = detector.fused([first, second])
    assert found["labels"].tolist() == [1, 2, 0]
    assert found["scores"].tolist() == pytest.approx([0.6, 0.4, 0.1])
    assert found["boxes"][0].tolist() == pytest.approx([0, 0, 10, (0.9 * 10 + 0.3 * 12) / 1.2])
    assert found["boxes"][1:].tolist() == [[20, 20, 30, 30], [0, 0, 10, 10]]
    nothing = {key: value[:0] for key, value in first.items()}
    assert [len(value) for value in detector.fused([nothing, nothing]).values()] == [0, 0, 0]
    detector.choose(2, None, True)
    assert detector.fused([first, second])["labels"].tolist() == [1, 2]


def test_a_test_an_evaluation_and_a_prediction_can_look_at_mirror_images_and_the_run_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    fit = classification(["fit", *DIGITS, "--output", "out", "--register", "mirrored"])
    tests = [classification(["test", "--output", "out", "--tta", views]) for views in ("none", "flips")]
    assert tests[0].rows["test/loss"] == fit.rows["test/loss"] != tests[1].rows["test/loss"]
    assert [run(test.output).data.params["tta"] for test in tests] == ["none", "flips"]
    figures = evaluate.evaluate("models:/mirrored/1", output=Path("evaluated"), tta="flips")
    assert f"{figures['test/loss']:.4f}" == tests[1].rows["test/loss"]
    assert run(next(Path().glob("evaluated*"))).data.tags["tta"] == "flips"

    pixels = fit.datamodule.sources["test"][0]["image"][..., 0]
    for name, array in (("one", pixels), ("other", pixels[:, ::-1])):
        Path(name).mkdir()
        Image.fromarray(array).save(f"{name}/0.png")
    said = []
    for tta in ("none", "flip"):
        for name in ("one", "other"):
            capsys.readouterr()
            with pytest.raises(SystemExit):
                command(predict.predict, ["models:/mirrored/1", name, "--json", "true", "--tta", tta])
            said.append(json.loads(capsys.readouterr().out)["top"])
    assert said[0] != said[1]
    assert {k: round(p, 4) for k, p in said[2].items()} == {k: round(p, 4) for k, p in said[3].items()}


def test_where_mirror_images_cannot_be_looked_at_the_way_out_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert "give it to test with the same --output" in refused(["fit", *DIGITS, "--tta", "flip"], capsys)
    assert "--tta" in refused(["test", *DIGITS, "--output", "out", "--tta", "turn"], capsys)
    module = made(ClassificationModule)
    with pytest.raises(BackboneError, match="must be one of none, flip, flips, not turn"):
        module.views.choose("turn")
    with pytest.raises(
        BackboneError, match=r"which SequenceModule does not support.* Classification, several labels, regression"
    ):
        made(SequenceModule).views.choose("flip")
