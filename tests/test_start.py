"""A training that starts from a whole trained network: weights, classes, command line, resume."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import built
from mlflow.tracking import MlflowClient
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torchvision.models import detection as torchvisions
from torchvision.models import segmentation as segmenters
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_convert

from datamodules.options import Preprocessing
from modules import (
    BackboneError,
    ClassificationModule,
    DetectionModule,
    GANModule,
    InstanceSegmentationModule,
    SegmentationModule,
    VisionModule,
    create_backbone,
)
from modules.detection import FCOS, RTDETR, YOLO, FasterRCNN, RetinaNet
from modules.instance_segmentation import MaskRCNN
from modules.networks.decoders import UpsampledConvolutions
from modules.networks.dense_decoders import UNet
from modules.networks.weights import read_weights
from modules.published import torchvision as published
from modules.warm_start import warm_start
from pipelines.classification import classification
from pipelines.detection import detection
from pipelines.engine.start import _read
from pipelines.facenet import facenet
from pipelines.gan import gan
from pipelines.instance_segmentation import instance_segmentation
from pipelines.segmentation import segmentation
from pipelines.serving.store import save_model
from pipelines.tracking.logger import run_id_of

SIDE = 64
SMALL = {"backbone": "test_resnet", "image_size": SIDE, "backbone_options": {"small_stem": False}}
RCNN = {"width": 16, "hidden": 16, "strides": [8, 16], "proposals": 20}
DETECTORS = {
    "yolo": partial(YOLO, width=16, strides=[8, 16]),
    "fcos": partial(FCOS, width=32, depth=1, strides=[8, 16]),
    "retinanet": partial(RetinaNet, width=32, strides=[8, 16]),
    "faster_rcnn": partial(FasterRCNN, **RCNN),
    "rtdetr": partial(RTDETR, width=16, strides=[8, 16], queries=20, layers=2, denoising=10),
    "mask_rcnn": partial(MaskRCNN, mask_width=16, **RCNN),
}
KINDS = [*DETECTORS, "unet", "classifier"]
FAST = ["--trainer.enable_progress_bar", "false", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1",
        "--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1", "--data.batch_size", "4",
        "--data.num_workers", "0"]  # fmt: skip


def network(kind: str, names: list[str], seed: int = 0, **given) -> VisionModule:
    """One whose every number was drawn, as if it had learned."""
    torch.manual_seed(seed)
    given = SMALL | given
    module: VisionModule
    if kind == "unet":
        module = built(SegmentationModule, label_names=names, decoder=UNet, **given)
    elif kind == "classifier":
        module = built(ClassificationModule, num_classes=len(names), label_names=names, **given)
    else:
        made = InstanceSegmentationModule if kind == "mask_rcnn" else DetectionModule
        module = built(made, label_names=names, **{"detector": DETECTORS[kind]} | given)
    for key, value in module.state_dict().items():
        if value.is_floating_point() and value.ndim:
            value.normal_(0, 0.2)
            if key.endswith("running_var"):
                value.abs_().add_(0.5)
    return module.eval()


@torch.no_grad()
def by_class(kind: str, module: VisionModule) -> list[Tensor]:
    """What the last layers say of each class, the class last but for the values of a box or a mask."""
    image = torch.randint(256, (1, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    if kind in ("unet", "classifier"):
        return [module(image).movedim(1, 0)]
    if kind == "yolo":
        return [module(image)[0].movedim(2, 0)]
    if kind in ("fcos", "retinanet"):
        return [module(image)["cls_logits"].movedim(2, 0)]
    if kind == "rtdetr":
        net = module.detector.net
        return [layer(torch.ones(16)) for layer in (net.enc_score_head, *net.decoder.class_embed)]
    heads = module.detector.heads
    maps = module(image)
    where = [torch.tensor([[8.0, 8, 40, 48]])]
    scores, boxes = heads.box_predictor(heads.box_head(heads.box_roi_pool(maps, where, [(SIDE, SIDE)])))
    found = [scores[:, 1:].T, boxes.view(-1, module.num_classes + 1, 4)[:, 1:].movedim(1, 0)]
    if kind == "mask_rcnn":
        masks = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(maps, where, [(SIDE, SIDE)])))
        found.append(masks[:, 1:].movedim(1, 0))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_taken_over_and_classes_go_by_their_names(kind: str) -> None:
    source = network(kind, ["ant", "bee", "cat"])
    same, other = network(kind, ["ant", "bee", "cat"], 1), network(kind, ["cat", "dog", "eel", "ant"], 2)
    said = warm_start(same, source)
    assert said == f"all {sum(v.numel() for v in source.state_dict().values()):,} weights are loaded."
    for key, value in source.state_dict().items():
        assert torch.equal(same.state_dict()[key], value), key
    before = {key: value.clone() for key, value in other.state_dict().items()}
    said = warm_start(other, source)
    assert "kept by name: cat, ant; new: dog, eel; left out: bee" in said
    layers = tuple(other.class_layers)
    for key, value in source.state_dict().items():
        if not key.startswith(layers):
            assert torch.equal(other.state_dict()[key], value), key
        else:
            assert not torch.equal(other.state_dict()[key], before[key]), key
    old, new = by_class(kind, source), by_class(kind, other)
    for one, two in zip(old, new, strict=True):
        torch.testing.assert_close(two[[0, 3]], one[[2, 0]])
        assert not two[1].isclose(one[1]).all()
    unknown = network(kind, ["x", "y"], 3)
    before = {key: value.clone() for key, value in unknown.state_dict().items()}
    assert "Classes new: x, y; left out: ant, bee, cat" in warm_start(unknown, source)
    background = ("cls_score", "bbox_pred", "mask_fcn_logits", "denoising_class_embed")
    for key, value in unknown.state_dict().items():
        if key.startswith(layers) and not any(name in key for name in background):
            assert torch.equal(value, before[key]), key


def test_classes_of_a_conditional_gan_go_by_their_names_also_under_spectral_normalisation() -> None:
    def network(names: list[str], seed: int) -> GANModule:
        torch.manual_seed(seed)
        small = {
            "in_chans": 1,
            "image_size": 12,
            "generator": UpsampledConvolutions(8),
            "backbone_options": {"width": 8},
        }
        return built(GANModule, label_names=names, conditional=True, spectral_norm=True, **small)

    source, other = network(["ant", "bee"], 0), network(["cat", "bee", "dog"], 1)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    assert "kept by name: bee; new: cat, dog; left out: ant" in warm_start(other, source)
    ours, theirs = other.state_dict(), source.state_dict()
    embeddings = [key for key in ours if "embedding" in key and not key.endswith("_v")]
    assert len(embeddings) == 4  # of both generators and of the discriminator, with a singular vector
    for key in embeddings:
        assert torch.equal(ours[key][1], theirs[key][1]), key
        assert torch.equal(ours[key][[0, 2]], before[key][[0, 2]]), key
    assert all(torch.equal(ours[key], theirs[key]) for key in ours if key not in embeddings)


def test_the_same_classes_in_another_order_give_the_same_answers() -> None:
    source, other = network("faster_rcnn", ["ant", "bee", "cat"]), network("faster_rcnn", ["cat", "ant", "bee"], 1)
    assert "all" in warm_start(other, source)
    image = torch.randint(256, (2, 3, SIDE, SIDE), dtype=torch.uint8)
    with torch.no_grad():
        one, two = (module.detector.detect(module(image)) for module in (source, other))
    assert sum(len(found["labels"]) for found in one) > 0
    for a, b in zip(one, two, strict=True):
        assert [source.label_names[k] for k in a["labels"]] == [other.label_names[k] for k in b["labels"]]
        torch.testing.assert_close(a["boxes"], b["boxes"])


def test_grey_images_start_from_colour_and_what_does_not_fit_is_refused() -> None:
    source = network("yolo", ["ant", "bee"])
    grey = network("yolo", ["ant", "bee"], 1, in_chans=1)
    warm_start(grey, source)
    key = next(key for key, value in source.backbone.state_dict().items() if value.ndim == 4)
    kernel = source.backbone.state_dict()[key]
    torch.testing.assert_close(grey.backbone.state_dict()[key], kernel.sum(1, keepdim=True))
    wide = network("yolo", ["ant", "bee"], detector=partial(YOLO, width=32, strides=[8, 16]))
    with pytest.raises(BackboneError, match=r"detector.width is 32 \(was 16\)"):
        warm_start(wide, source)
    with pytest.raises(BackboneError, match=r"detector is modules.detection.FCOS \(was modules.detection.YOLO\)"):
        warm_start(network("fcos", ["ant", "bee"]), source)


def coco(folder: Path, names: list[str]) -> list[str]:
    """Grey squares of a size for each class, with outlines; the arguments that read them."""
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    draws = np.random.default_rng(0)
    for number in range(12):
        picture = draws.integers(0, 90, (SIDE, SIDE, 3), np.uint8)
        kind = number % len(names)
        side, left, top = 20 + 6 * kind, *draws.integers(2, 24, 2).tolist()
        picture[top : top + side, left : left + side] = 150 + 30 * kind
        Image.fromarray(picture).save(folder / "images" / f"{number}.png")
        images.append({"id": number, "file_name": f"images/{number}.png", "width": SIDE, "height": SIDE})
        outline = [left, top, left + side, top, left + side, top + side, left, top + side]
        annotations.append({"id": number + 1, "image_id": number, "category_id": kind + 1, "iscrowd": 0,
                            "bbox": [left, top, side, side], "area": side * side, "segmentation": [outline]})  # fmt: skip
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
    said = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "boxes.json").write_text(json.dumps(said))
    return ["--data.root", str(folder / "boxes.json"), "--data.image_size", str(SIDE), "--data.augmentation", "none"]


def saved(module: VisionModule, task: str, folder: str = "source") -> str:
    save_model(Path(folder), module, Preprocessing(SIDE, 1), task)
    return folder


@pytest.mark.parametrize("kind", ["yolo", "retinanet", "faster_rcnn", "mask_rcnn", "unet"])
def test_a_training_with_other_classes_needs_no_more_than_where_it_starts(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command, data = {
        "mask_rcnn": (instance_segmentation, "COCODetection"),
        "unet": (segmentation, "COCOSegmentation"),
    }.get(kind, (detection, "COCODetection"))
    names = ["background", "ant", "bee"] if kind == "unet" else ["ant", "bee"]
    source = network(kind, names)
    masks = ["--data.masks", "true"] if kind == "mask_rcnn" else []
    cli = command(["fit", "--start", saved(source, command.name), "--data", data, *coco(Path("new"), ["bee", "cat"]), *masks,
                   *FAST, "--model.backbone.transfer", "features", "--output", "out"])  # fmt: skip
    message = capsys.readouterr().err
    assert "Starting from source: " in message
    assert f"kept by name: {'background, ' if kind == 'unet' else ''}bee; new: cat; left out: ant" in message
    made, expected = cli.model.architecture, source.architecture
    for key in ("backbone", "backbone_options", "decoder" if kind == "unet" else "detector"):
        assert made[key] == expected[key]
    learned = type(source).load_from_checkpoint("out/best.ckpt")
    for key, value in source.backbone.state_dict().items():
        assert torch.equal(learned.backbone.state_dict()[key], value), key
    last = next(iter(cli.model.class_layers))
    assert not torch.equal(learned.get_submodule(last).weight, source.get_submodule(last).weight)
    assert cli.trainer.logger.tags["source_model"] == "source"


DIGITS = ["--data", "Digits8x8", "--data.image_size", "12", *FAST]


def test_from_the_registry_with_licence_strategy_and_exact_resume(capsys: pytest.CaptureFixture[str]) -> None:
    source = network("classifier", [str(k) for k in range(10)], image_size=12, in_chans=1)
    source.licence = "apache-2.0"
    torch.manual_seed(0)
    first = ["fit", *DIGITS, "--register", "started", "--start", saved(source, "classification"), "--output", "first"]
    classification(first)
    address = "models:/started@latest"
    long = ["fit", *DIGITS, "--trainer.max_epochs", "2", "--start", address, "--register", "again"]
    whole = classification([*long, "--output", "whole", "--model.backbone.transfer", "auto"])
    tags = MlflowClient().get_run(run_id_of("whole")).data.tags
    assert tags["source_model"] == "models:/started/1"
    assert tags["weights_licence"] == "apache-2.0"
    assert MlflowClient().get_model_version("again", "1").tags["weights_licence"] == "apache-2.0"
    assert "models:/started/1: all" in capsys.readouterr().err

    part = [*long, "--output", "part", "--model.backbone.transfer", "auto"]
    with pytest.raises(ZeroDivisionError):
        classification([*part, "--trainer.callbacks+=faults.Crash", "--trainer.callbacks.step", "1"])
    classification(first)  # a second version, which `latest` now means
    capsys.readouterr()
    MlflowClient().delete_model_version("started", "1")
    resumed = classification(part)
    assert "Starting from" not in capsys.readouterr().err
    for key, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], value), key
    assert resumed.model.licence == "apache-2.0"
    assert MlflowClient().get_run(run_id_of("part")).data.tags["source_model"] == "models:/started/1"
    figures = classification(["test", "--output", "whole"])
    assert figures.rows["test/accuracy"] == whole.rows["test/accuracy"]


def test_a_recipe_and_a_folder_of_a_training_name_it_too(capsys: pytest.CaptureFixture[str]) -> None:
    source = network("classifier", [str(k) for k in range(10)], image_size=12, in_chans=1)
    saved(source, "classification")
    Path("recipe.yaml").write_text(
        "start: source/model.safetensors\nmodel:\n  label_smoothing: 0.1\n  pretrained: true\n"
    )
    quick = [*DIGITS, "--trainer.logger", "false"]
    one = classification(["fit", "--config", "recipe.yaml", *quick, "--output", "one"])
    assert one.model.label_smoothing == 0.1
    assert one.model.architecture == source.architecture
    two = classification(
        ["fit", "--start", "one", *quick, "--output", "two", "--model.backbone.transfer", "freeze_unfreeze"]
    )
    assert "Starting from one/best.ckpt: all" in capsys.readouterr().err
    best = ClassificationModule.load_from_checkpoint("one/best.ckpt")
    for key, value in best.backbone.state_dict().items():  # in the first of its epochs only the head learns
        assert torch.equal(two.model.backbone.state_dict()[key], value), key


def of_torchvision(name: str) -> Any:
    """One of torchvision's detectors. Its own weights are not to be had without a network; random ones have the same form."""
    return told_apart(getattr(torchvisions, name)(weights=None, weights_backbone=None))


def told_apart(theirs: Any) -> Any:
    """A network in evaluation, whose batch normalisations differ from each other."""
    for key, value in theirs.named_buffers():
        if key.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    return theirs.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", ["retinanet_resnet50_fpn_v2", "fcos_resnet50_fpn"])
def test_a_dense_detector_of_torchvisions_answers_alike_here_and_keeps_its_classes(name: str) -> None:
    theirs = of_torchvision(name)
    taken = published.converted(theirs.state_dict())
    ours = DetectionModule.from_architecture(taken.architecture | {"image_size": "256x64"}).eval()
    assert taken.kind == "DetectionModule"
    assert ours.load_state_dict(taken.weights, strict=False).missing_keys == ["threshold"]
    image = ours.normalize(torch.randint(256, (1, 3, 256, 64), dtype=torch.uint8))
    features = list(theirs.backbone(image).values())
    expected = theirs.head(features)
    anchors = theirs.anchor_generator(ImageList(image, [(256, 64)]), features)[0]
    found = ours.detector(ours.backbone(image))
    assert torch.equal(found["anchors"], anchors)
    kept = [
        k for k, label in enumerate(torchvisions.FCOS_ResNet50_FPN_Weights.COCO_V1.meta["categories"]) if label != "N/A"
    ]
    expected["cls_logits"] = expected["cls_logits"][..., kept[1:]]
    for key, value in expected.items():
        assert torch.allclose(found[key], value, rtol=1e-3, atol=1e-3 * float(value.abs().max())), key
    decoded = [theirs.box_coder.decode(expected["bbox_regression"][0], anchors)] if name.startswith("fcos") else [
        theirs.box_coder.decode_single(expected["bbox_regression"][0], anchors)]  # fmt: skip
    assert torch.allclose(ours.detector.within(decoded[0]), ours.detector.dense(found)[0][0], atol=0.1)
    first = {key: value for key, value in theirs.state_dict().items() if not re.search(r"head\.conv\.(0\.)?1\.", key)}
    with pytest.raises(BackboneError, match="no other detector or segmenter of torchvision's"):
        published.converted(first)  # such as RetinaNet's first version


@torch.no_grad()
@pytest.mark.parametrize("version", ["", pytest.param("_v2", marks=pytest.mark.slow)])
def test_a_detector_of_torchvisions_answers_alike_here_and_keeps_its_classes(version: str) -> None:
    theirs = of_torchvision(f"maskrcnn_resnet50_fpn{version}")
    theirs.roi_heads.score_thresh = 0.0
    state = {key: value for key, value in theirs.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save(state, "maskrcnn.pth")  # the published file has none either
    taken = published.converted(read_weights("maskrcnn.pth", whole=True))
    assert taken.kind == "InstanceSegmentationModule"
    assert len(taken.architecture["label_names"]) == 80
    ours = InstanceSegmentationModule.from_architecture(taken.architecture | {"image_size": "800x64"}).eval()
    assert ours.load_state_dict(taken.weights, strict=False).missing_keys == ["threshold"]

    image = ours.normalize(torch.randint(256, (1, 3, 800, 64), dtype=torch.uint8))
    size = [(800, 64)]
    maps, features = ours.detector(ours.backbone(image)), theirs.backbone(image)
    assert list(maps) == list(features)
    for key, value in features.items():
        assert torch.allclose(maps[key], value, rtol=1e-4, atol=1e-4 * float(value.abs().max()))
    seen = ImageList(image, size)
    anchors = [rpn.anchor_generator(seen, list(features.values()))[0] for rpn in (theirs.rpn, ours.detector.rpn)]
    assert torch.equal(*anchors)
    for one, other in zip(
        theirs.rpn.head(list(features.values())), ours.detector.rpn.head(list(features.values())), strict=True
    ):
        assert all(torch.allclose(a, b, atol=1e-4 * float(a.abs().max())) for a, b in zip(one, other, strict=True))
    regions = [torch.tensor([[2.0, 3, 40, 300], [0, 0, 64, 800], [10, 400, 20, 420]])]
    names = torchvisions.MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    kept = [k for k, name in enumerate(names) if name != "N/A"]
    outputs = []
    for heads in (theirs.roi_heads, ours.detector.heads):
        scores, boxes = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, regions, size)))
        masks = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(features, regions, size)))
        outputs.append([scores, boxes.unflatten(1, (-1, 4)), masks])
    for one, other in zip(*outputs, strict=True):
        assert torch.allclose(one[:, kept], other, atol=1e-4 * float(one.abs().max()))

    start = _read("maskrcnn.pth", InstanceSegmentationModule)
    other = {"num_classes": 2, "label_names": ["zebra", "sprocket"], "image_size": 64}
    again = InstanceSegmentationModule.from_architecture(start.architecture | other)
    said = warm_start(again, start.load())
    assert "kept by name: zebra; new: sprocket" in said
    row = again.detector.heads.box_predictor.cls_score.weight[1]
    assert torch.equal(row, theirs.roi_heads.box_predictor.cls_score.weight[names.index("zebra")])
    with pytest.raises(BackboneError, match="is a whole InstanceSegmentationModule"):
        _read("maskrcnn.pth", DetectionModule)
    with pytest.raises(BackboneError, match="no other detector or segmenter of torchvision's"):
        published.converted({key: value for key, value in state.items() if "fpn" not in key})
    with pytest.raises(BackboneError, match="There is no torchvision:yolo"):
        _read("torchvision:yolo", DetectionModule)
    backbone = create_backbone("maskrcnn.pth", architecture="resnet50", image_size=800)
    assert torch.equal(backbone.state_dict()["layer4.2.conv3.weight"], state["backbone.body.layer4.2.conv3.weight"])


@torch.no_grad()
def test_deeplab_of_torchvisions_answers_alike_here_and_keeps_its_classes() -> None:
    theirs = told_apart(
        segmenters.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=21, aux_loss=True)
    )
    torch.save(theirs.state_dict(), "deeplab.pth")
    start = _read("deeplab.pth", SegmentationModule)
    ours = start.load().eval()
    image = torch.randint(256, (1, 3, 64, 96), dtype=torch.uint8)
    expected = theirs(ours.normalize(image))["out"]
    assert torch.allclose(ours(image), expected, atol=1e-4 * float(expected.abs().max()))
    assert (start.architecture["label_names"][0], ours.licence) == ("background", published.LICENCE)

    other = {"num_classes": 3, "label_names": ["background", "sprocket", "cat"], "image_size": 64}
    again = SegmentationModule.from_architecture(start.architecture | other)
    assert "kept by name: background, cat; new: sprocket" in warm_start(again, ours)
    assert torch.equal(again.decoder.last.weight[2], theirs.classifier[4].weight[8])
    with pytest.raises(BackboneError, match="no other detector or segmenter"):
        published.converted({key.replace("layer3.5", "layer3.6"): value for key, value in theirs.state_dict().items()})


@torch.no_grad()
@pytest.mark.parametrize("version", [pytest.param("", marks=pytest.mark.slow), "V2"])
def test_an_rt_detr_of_transformers_answers_alike_here_and_keeps_its_classes(version: str) -> None:
    theirs_of = getattr(transformers, f"RTDetr{version}ForObjectDetection")
    config = getattr(transformers, f"RTDetr{version}Config")(
        id2label={0: "cat", 1: "remote"}, num_queries=126, decoder_layers=2
    )
    theirs = told_apart(theirs_of(config))
    theirs.save_pretrained("rtdetr")
    assert "model.decoder.layers.0.self_attn.out_proj.bias" in load_file("rtdetr/model.safetensors")  # as on the hub
    transformers.RTDetrImageProcessor(size={"height": 64, "width": 96}).save_pretrained("rtdetr")
    start = _read("rtdetr", DetectionModule)
    ours = start.load().eval()
    assert (ours.size, ours.fit, ours.label_names) == ((64, 96), "stretch", ["cat", "remote"])
    image = torch.randint(256, (1, 3, 64, 96), dtype=torch.uint8)
    found = theirs(image.float() / 255)
    boxes, scores = ours.detector.dense(ours(image))  # in another order
    expected = ours.detector.within(box_convert(found.pred_boxes, "cxcywh", "xyxy") * torch.tensor([96, 64, 96, 64]))
    one, other = (torch.cat((b, 100 * s), 2)[0] for b, s in ((expected, found.logits.sigmoid()), (boxes, scores)))
    nearest = (one[:, None] - other).abs().amax(2).amin(1)
    assert len(one) == len(other) == 126  # all places, so that none is chosen by the last bit of a score
    assert nearest.max() < 0.1

    again = DetectionModule.from_architecture(start.architecture | {"label_names": ["dog", "cat"]})
    assert "kept by name: cat; new: dog" in warm_start(again, ours)
    if version:
        Path("rtdetr/config.json").write_text(Path("rtdetr/config.json").read_text().replace('"gelu"', '"relu"'))
        with pytest.raises(BackboneError, match="differs in encoder_activation_function"):
            _read("rtdetr", DetectionModule)
        Path("rtdetr/config.json").write_text('{"model_type": "yolos"}')
        with pytest.raises(BackboneError, match="is a yolos, and of the library transformers only RT-DETR"):
            _read("rtdetr", DetectionModule)


def test_what_is_no_start_is_refused_in_a_paragraph(capsys: pytest.CaptureFixture[str]) -> None:
    source = network("classifier", ["a", "b"], image_size=12, in_chans=1)
    saved(source, "classification")
    Path("empty").mkdir()
    for given, words in {
        ("empty",): "is not a trained network",
        ("missing.ckpt",): "is not a trained network",
        ("models:/nobody@champion",): "nobody",
        ("source", "--model.backbone.transfer", "scratch"): "leave one out",
        ("source", "--model.backbone", "lenet5"): "backbone is lenet5 (was test_resnet)",
    }.items():
        with pytest.raises(SystemExit) as end:
            classification(["fit", "--start", *given, *DIGITS, "--output", "none"])
        message = capsys.readouterr().err
        assert end.value.code == 2
        assert words in message, message
        assert "Traceback" not in message
    with pytest.raises(SystemExit):
        segmentation(["fit", "--start", "source", "--output", "none"])
    assert "--model.backbone source" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "more"), [
    (facenet, ["--data", "Glyphs", "--data.people", "296", "--data.image_size", "32", "--model.embedding_size", "16"]),
    (gan, ["--data", "Digits8x8", "--data.image_size", "12", "--model.num_samples", "16", "--model.conditional", "true",
           "--model.generator", "UpsampledConvolutions", "--model.generator.width", "8", "--model.backbone.options.width", "8"]),
])  # fmt: skip
def test_every_task_starts_so(command: object, more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    fast = [*more, *FAST, "--trainer.logger", "false", "--data.batch_size", "16"]
    one = command(["fit", *fast, "--output", "one"])
    command(["fit", *FAST, *more[:6], "--data.batch_size", "16", "--trainer.logger", "false", "--start", "one", "--output", "two",
             "--model.optimization.lr", "1e-9"])  # fmt: skip
    assert "Starting from one/best.ckpt: all" in capsys.readouterr().err
    kind = type(one.model)
    start, two = (kind.load_from_checkpoint(f"{name}/best.ckpt") for name in ("one", "two"))
    assert start.architecture["backbone_options"] == two.architecture["backbone_options"]
    for key, value in start.named_parameters():
        if not key.startswith((*kind.training_only, "average.")):  # which goes after the generator
            torch.testing.assert_close(two.get_parameter(key), value, atol=1e-5, rtol=0)
