"""Conversion of torchvision's pretrained detectors and DeepLabV3."""

from typing import Any

import torchvision
from torch import Tensor
from torchvision.models import detection, segmentation

from modules.networks import BackboneError
from modules.networks.weights import OF_DETECTOR
from modules.published import Published

PREFIX = "torchvision:"  # prefix of their names
SIDE = 800  # shorter side of the detectors' training images, in pixels
MAP_SIDE = 520  # shorter side of DeepLabV3's training images
OF_DEEPLAB = "classifier.0.convs.0.0.weight"
LICENCE = "BSD-3-Clause (torchvision), learned from COCO"
FASTER: dict[str, Any] = {"strides": [4, 8, 16, 32], "anchor_scale": 8.0, "pooled_level": True}
DENSE: dict[str, Any] = {"strides": [8, 16, 32], "coarser_levels": True}
DETECTORS: dict[str, tuple[str, str, dict[str, Any]]] = {  # module, detector and its options
    "fasterrcnn_resnet50_fpn": ("DetectionModule", "modules.detection.FasterRCNN", FASTER),
    "fasterrcnn_resnet50_fpn_v2": (
        "DetectionModule", "modules.detection.FasterRCNN", FASTER | {"second_version": True},
    ),
    "maskrcnn_resnet50_fpn": ("InstanceSegmentationModule", "modules.instance_segmentation.MaskRCNN", FASTER),
    "maskrcnn_resnet50_fpn_v2": (
        "InstanceSegmentationModule", "modules.instance_segmentation.MaskRCNN", FASTER | {"second_version": True},
    ),
    "retinanet_resnet50_fpn_v2": ("DetectionModule", "modules.detection.RetinaNet", DENSE),
    "fcos_resnet50_fpn": ("DetectionModule", "modules.detection.FCOS", DENSE),
}  # fmt: skip
DEEPLABS = {f"deeplabv3_{backbone}": backbone for backbone in ("resnet50", "resnet101")}
MODELS = (*DETECTORS, *DEEPLABS)
PLACES = {  # prefixes of torchvision's parameters -> Fovea's
    "backbone.body.": "backbone.",
    "backbone.fpn.": "detector.neck.fpn.",
    "rpn.": "detector.rpn.",
    "roi_heads.": "detector.heads.",
    "head.": "detector.net.head.",
}


def download(name: str) -> dict[str, Tensor]:
    """Downloads the published weights of one of `MODELS`, or reads them from torchvision's cache.

    Raises:
        BackboneError: the model is unknown, or the download fails.
    """
    if name not in MODELS:
        raise BackboneError(
            f"There is no {PREFIX}{name} to start from, but {', '.join(PREFIX + key for key in MODELS)}."
        )
    weights = torchvision.models.get_model_weights(name).DEFAULT
    try:
        state: dict[str, Tensor] = weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise BackboneError(
            f"The weights of {PREFIX}{name} cannot be downloaded ({error}): fetch {weights.url} where there is a network, and give "
            "that file with --start."
        ) from None
    return state


def is_published(state: dict[str, Tensor]) -> bool:
    """Whether weights are those of a detector or a DeepLabV3 of torchvision."""
    return OF_DETECTOR in state or OF_DEEPLAB in state


def converted(state: dict[str, Tensor]) -> Published:
    """Converts a detector of torchvision on ResNet-50 with a feature pyramid, or its DeepLabV3, to a module with equal
    predictions.

    Args:
        state: weights as saved from torchvision's model, with any number of classes. Detectors with 91 classes were
            trained on COCO; its 80 classes with objects are kept, by name. DeepLabV3 with 21 classes was trained on
            Pascal VOC's classes.

    Raises:
        BackboneError: the weights are not those of one of `MODELS`.
    """
    try:
        return (_segmenter if OF_DEEPLAB in state else _detector)(state)
    except RuntimeError:
        raise BackboneError(
            f"These weights are not of torchvision's {', '.join(MODELS)}: no other detector or segmenter of torchvision's can be taken "
            "over as a whole. Its backbone can: --model.backbone FILE --model.backbone.options.architecture resnet50."
        ) from None


def _segmenter(state: dict[str, Tensor]) -> Published:
    """Converts a DeepLabV3; raises a RuntimeError if the weights are of another network."""
    name = "deeplabv3_resnet101" if "backbone.layer3.22.conv1.weight" in state else "deeplabv3_resnet50"
    rows = len(state["classifier.4.bias"])
    auxiliary = any(key.startswith("aux_classifier.") for key in state)
    model: Any = getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=rows, aux_loss=auxiliary)
    model.load_state_dict(state)
    names = segmentation.DeepLabV3_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1.meta["categories"]
    names = names if rows == len(names) else map(str, range(rows))
    places = {"classifier.4.": "decoder.last.", "classifier.": "decoder.net.", "backbone.": "backbone."}
    labels = ["background", *list(names)[1:]]  # the name in Fovea's data modules
    architecture = {
        "num_classes": rows, "label_names": labels, "in_chans": 3, "image_size": MAP_SIDE,
        "backbone": DEEPLABS[name], "backbone_options": {"small_stem": False, "output_stride": 8},
        "decoder": {"class_path": "modules.segmentation.DeepLabV3", "init_args": {}},
    }  # fmt: skip
    return Published("SegmentationModule", architecture, _moved(model.state_dict(), places), LICENCE)


def _moved(state: dict[str, Tensor], places: dict[str, str]) -> dict[str, Tensor]:
    """Renames weights by their prefix; weights without a counterpart, such as the auxiliary head, are dropped."""
    found = {key: next((begin for begin in places if key.startswith(begin)), None) for key in state}
    return {places[b] + key.removeprefix(b): state[key] for key, b in found.items() if b is not None}


def _told_by(state: dict[str, Tensor]) -> tuple[str, int]:
    """Identifies which of `DETECTORS` weights belong to, and their number of classes including the background."""
    if (rows := state.get("roi_heads.box_predictor.cls_score.bias")) is not None:
        kind = "maskrcnn" if any(key.startswith("roi_heads.mask_predictor.") for key in state) else "fasterrcnn"
        second = "backbone.fpn.inner_blocks.0.1.weight" in state  # its batch normalisation
        return f"{kind}_resnet50_fpn{'_v2' if second else ''}", len(rows)
    rows = state.get("head.classification_head.cls_logits.bias")
    if rows is None:
        raise RuntimeError("no head of a detector")
    if "head.regression_head.bbox_ctrness.bias" in state:
        return "fcos_resnet50_fpn", len(rows)
    return "retinanet_resnet50_fpn_v2", len(rows) // 9


def _detector(state: dict[str, Tensor]) -> Published:
    """Converts a detector; raises a RuntimeError if the weights are of another network."""
    name, rows = _told_by(state)
    model = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=rows)
    model.load_state_dict(state)  # also renames parameters of older files
    names = detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    if rows != len(names):
        names = ["__background__", *map(str, range(1, rows))]
    kept = [k for k, label in enumerate(names) if label != "N/A"]
    places = PLACES if name.startswith(("faster", "mask")) else PLACES | {"backbone.fpn.": "detector.net.backbone.fpn."}
    own = dict[str, Tensor]()
    for key, value in model.state_dict().items():
        if "predictor.cls_score" in key or "mask_fcn_logits" in key:
            value = value[kept]
        elif "predictor.bbox_pred" in key:
            value = value.unflatten(0, (-1, 4))[kept].flatten(0, 1)
        elif "classification_head.cls_logits" in key:  # of each anchor; the background's row is unused here
            value = value.unflatten(0, (-1, rows))[:, kept[1:]].flatten(0, 1)
        own[key] = value
    kind, detector, options = DETECTORS[name]
    labels = [names[k] for k in kept[1:]]
    architecture = {
        "num_classes": len(labels), "label_names": labels, "in_chans": 3, "image_size": SIDE, "fit": "pad",
        "backbone": "resnet50", "backbone_options": {"small_stem": False},
        "detector": {"class_path": detector, "init_args": options},
    }  # fmt: skip
    return Published(kind, architecture, _moved(own, places), LICENCE)
