"""torchvision's trained detectors as networks to start from."""

from typing import Any

import torchvision
from torch import Tensor
from torchvision.models import detection

from modules.networks import BackboneError
from modules.networks.weights import OF_DETECTOR

PREFIX = "torchvision:"  # of the names under which they are asked for
SIDE = 800  # pixels of the images that they learned from, on the shorter side
LICENCE = "BSD-3-Clause (torchvision), learned from COCO"
FASTER: dict[str, Any] = {"strides": [4, 8, 16, 32], "anchor_scale": 8.0, "pooled_level": True}
DENSE: dict[str, Any] = {"strides": [8, 16, 32], "coarser_levels": True}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {  # module, detector and its options
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
PLACES = {  # of torchvision's parts in ours
    "backbone.body.": "backbone.",
    "backbone.fpn.": "detector.neck.fpn.",
    "rpn.": "detector.rpn.",
    "roi_heads.": "detector.heads.",
    "head.": "detector.net.head.",
}


def download(name: str) -> dict[str, Tensor]:
    """The published weights of one of `MODELS`, from torchvision's cache or by its address.

    Raises:
        BackboneError: there is no such model, or it cannot be had.
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
    """Whether weights are those of a detector of torchvision's."""
    return OF_DETECTOR in state


def _told_by(state: dict[str, Tensor]) -> tuple[str, int]:
    """Which of `MODELS` some weights may be of, and how many classes it has, with the background."""
    if (rows := state.get("roi_heads.box_predictor.cls_score.bias")) is not None:
        kind = "maskrcnn" if any(key.startswith("roi_heads.mask_predictor.") for key in state) else "fasterrcnn"
        second = "backbone.fpn.inner_blocks.0.1.weight" in state  # its normalisation
        return f"{kind}_resnet50_fpn{'_v2' if second else ''}", len(rows)
    rows = state.get("head.classification_head.cls_logits.bias")
    if rows is None:
        raise RuntimeError("no head of a detector")
    if "head.regression_head.bbox_ctrness.bias" in state:
        return "fcos_resnet50_fpn", len(rows)
    return "retinanet_resnet50_fpn_v2", len(rows) // 9


def converted(state: dict[str, Tensor]) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """A detector of torchvision's, on ResNet-50 with a feature pyramid, as a module of ours that answers alike.

    Args:
        state: its weights, as torchvision's model saves them, with any number of classes. Those of 91 rows are COCO's, of which
            the 80 that have objects are kept, by their names.

    Returns:
        The class of the module, its `VisionModule.architecture`, and its weights.

    Raises:
        BackboneError: it is another model than those in `MODELS`.
    """
    try:
        name, rows = _told_by(state)
        model = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=rows)
        model.load_state_dict(state)  # which also knows the names that older files have
    except RuntimeError:
        raise BackboneError(
            f"These weights are not of torchvision's {', '.join(MODELS)}: no other detector of torchvision's can be taken over as a "
            "whole. Its backbone can: --model.backbone FILE --model.backbone.options.architecture resnet50."
        ) from None
    names = detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    if rows != len(names):
        names = ["__background__", *map(str, range(1, rows))]
    kept = [k for k, label in enumerate(names) if label != "N/A"]
    places = PLACES if name.startswith(("faster", "mask")) else PLACES | {"backbone.fpn.": "detector.net.backbone.fpn."}
    own: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        begin = next(begin for begin in places if key.startswith(begin))
        if "predictor.cls_score" in key or "mask_fcn_logits" in key:
            value = value[kept]
        elif "predictor.bbox_pred" in key:
            value = value.unflatten(0, (-1, 4))[kept].flatten(0, 1)
        elif (
            "classification_head.cls_logits" in key
        ):  # of each anchor; these networks leave the background's row unused
            value = value.unflatten(0, (-1, rows))[:, kept[1:]].flatten(0, 1)
        own[places[begin] + key.removeprefix(begin)] = value
    kind, detector, options = MODELS[name]
    labels = [names[k] for k in kept[1:]]
    architecture = {
        "num_classes": len(labels), "label_names": labels, "in_chans": 3, "image_size": SIDE, "fit": "pad",
        "backbone": "resnet50", "backbone_options": {"small_stem": False},
        "detector": {"class_path": detector, "init_args": options},
    }  # fmt: skip
    return kind, architecture, own
