"""FCOS, RetinaNet and Faster R-CNN, built from torchvision's parts on Fovea's feature maps.

torchvision's own resizing and normalisation are not used: `VisionModule.normalize` has normalised the images.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchvision.models.detection import fcos, retinanet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, box_iou
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7
from typing_extensions import override

from modules.detection.detector import (
    MIN_SCORE,
    UNSEEN,
    Detections,
    Detector,
    OneStageDetector,
    default_strides,
    inside,
    unseen,
)
from modules.networks import BackboneError
from modules.networks.pyramid import Pyramid
from modules.ranges import Positive, PositiveInt
from modules.spec import sides
from modules.training_data import Batch
from modules.warm_start import ClassRows

GROUPS = 32  # of group normalisation (Wu & He 2018, arXiv:1803.08494)


def _check_width(detector: nn.Module, width: int) -> None:
    if width % GROUPS:
        low, high = max(1, width // GROUPS) * GROUPS, (width // GROUPS + 1) * GROUPS
        near = f"{low} or {high}" if low != high else f"{low}"
        raise BackboneError(
            f"{type(detector).__name__} normalises its channels in {GROUPS} groups: give a --model.detector.width that is a "
            f"multiple of {GROUPS}, such as {near}, not {width}."
        )


class _Neck(nn.Module):
    """Feature pyramid network (Lin et al. 2017, arXiv:1612.03144) over the maps at the detector's strides."""

    def __init__(
        self, pyramid: Pyramid, width: int, coarser: ExtraFPNBlock | None = None, norm: type[nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.pyramid, self.out_channels = (pyramid,), width  # in a tuple, so that its weights are not registered twice
        self.fpn = FeaturePyramidNetwork(pyramid.channels, width, coarser, norm)

    def forward(self, features: Sequence[Tensor]) -> dict[str, Tensor]:
        """Computes feature maps of equal width, by name; the coarser levels come last."""
        return self.fpn({str(i): x for i, x in enumerate(self.pyramid[0](features))})


def _strides(strides: list[int] | None, image_size: int | str) -> list[int]:
    """Returns default strides: four from 4 on up to 256 pixels, five from 8 on for larger images."""
    return strides or default_strides(image_size, 4 if max(sides(image_size)) <= 256 else 5)


def _images(count: int, maps: Sequence[Tensor], size: tuple[int, int]) -> ImageList:
    """Creates the image list from which torchvision's parts read the image sizes."""
    return ImageList(maps[0].new_empty(count, 0, *size), [size] * count)


def _targets(batch: Batch, first_label: int = 0) -> list[dict[str, Tensor]]:
    """Converts a batch to torchvision's targets, with classes from ``first_label`` on; boxes to ignore are kept
    apart."""
    targets = [
        {"boxes": boxes[~ignore], "labels": labels[~ignore] + first_label, "ignored": boxes[ignore]}
        for boxes, labels, ignore in zip(batch["boxes"], batch["labels"], batch["ignore"], strict=True)
    ]
    for target, masks, ignore in zip(targets, batch.get("masks", ()), batch["ignore"], strict=False):
        target["masks"] = masks[~ignore]
    return targets


class _Anchored(OneStageDetector):
    """Base class of torchvision's one-stage detectors, whose heads refine anchors."""

    class_layers: ClassVar[Mapping[str, ClassRows]] = {"net.head.classification_head.cls_logits": ClassRows()}
    net: Any

    @override
    def forward(self, features: Sequence[Tensor]) -> dict[str, Any]:
        maps = list(self.net.backbone(features).values())
        outputs = {key: value.float() for key, value in self.net.head(maps).items()}
        anchors = self.net.anchor_generator(_images(1, maps, self.size), maps)[0]
        return outputs | {"anchors": anchors, "sizes": [x.shape[2] * x.shape[3] for x in maps]}


class FCOS(_Anchored):
    """FCOS, fully convolutional one-stage detection (Tian et al. 2019, arXiv:1904.01355), from torchvision.

    Each location near the centre of an object predicts its class and the distances to its four sides; the size of an
    object determines the map that it is assigned to. A third output, centreness, lowers the scores far from the centre.

    Args:
        strides: strides of the feature maps; by default four from 4 on up to 256 pixels, otherwise five from 8 on.
        width: channels of neck and branches, a multiple of 32.
        depth: number of 3×3 convolutions in each branch.
        coarser_levels: add two maps, each half the size of the previous one, as published, for larger images.
    """

    def __init__(
        self,
        backbone: Any,
        num_classes: int,
        image_size: int | str,
        strides: list[int] | None = None,
        width: PositiveInt = 256,
        depth: PositiveInt = 4,
        coarser_levels: bool = False,
    ) -> None:
        _check_width(self, width)
        options = {"width": width, "depth": depth, "coarser_levels": coarser_levels}
        super().__init__(backbone, num_classes, image_size, _strides(strides, image_size), options)
        levels = _levels(self.pyramid.strides, coarser_levels)
        self.net = fcos.FCOS(
            _Neck(self.pyramid, width, LastLevelP6P7(width, width) if coarser_levels else None),
            num_classes,
            anchor_generator=AnchorGenerator(tuple((s,) for s in levels), ((1.0,),) * len(levels)),
            head=fcos.FCOSHead(width, 1, num_classes, depth),
        )  # fmt: skip

    def losses(self, outputs: dict[str, Any], batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """See `Detector.losses`. In evaluation it is computed image by image, so that the mean is independent of the
        batches."""
        count = len(batch["boxes"])
        if not self.training and count > 1:
            each, shared = [], ("anchors", "sizes")
            for i in range(count):
                part = {key: value if key in shared else value[i : i + 1] for key, value in outputs.items()}
                each.append(self.losses(part, {key: batch[key][i : i + 1] for key in ("boxes", "labels", "ignore")})[0])
            return {key: torch.stack([one[key] for one in each]).mean() for key in each[0]}, torch.tensor(count)
        targets, anchors = _targets(batch), outputs["anchors"]
        middles = (anchors[:, :2] + anchors[:, 2:]) / 2
        masked = torch.stack([unseen(middles, *one) for one in zip(batch["boxes"], batch["ignore"], strict=True)])
        heads = outputs | {"cls_logits": outputs["cls_logits"].masked_fill(masked[..., None], UNSEEN)}
        parts = self.net.compute_loss(targets, heads, [anchors] * count, outputs["sizes"])
        names = {"classification": "class", "bbox_regression": "box", "bbox_ctrness": "centre"}
        return {names[key]: value for key, value in parts.items()}, torch.tensor(len(targets))

    @override
    def dense(self, outputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        boxes = self.net.box_coder.decode(
            outputs["bbox_regression"], outputs["anchors"].expand_as(outputs["bbox_regression"])
        )
        scores = (outputs["cls_logits"].sigmoid() * outputs["bbox_ctrness"].sigmoid()).sqrt()
        return self.within(boxes), scores


def _levels(strides: Sequence[int], coarser: bool) -> list[int]:
    """Returns the strides of all maps, including the two coarser ones."""
    return [*strides, *([2 * strides[-1], 4 * strides[-1]] if coarser else [])]


def _anchors(strides: Sequence[int], scale: float, steps: int, whole: bool = False) -> AnchorGenerator:
    """Creates anchors of three aspect ratios and several sizes per octave; sizes are proportional to the stride.

    Args:
        strides: strides of the maps.
        scale: side of the smallest anchor, in strides.
        steps: number of sizes per octave.
        whole: round sides down to integers, as torchvision does.
    """
    sizes = tuple(tuple(scale * stride * 2 ** (i / steps) for i in range(steps)) for stride in strides)
    if whole:
        sizes = tuple(tuple(float(int(side)) for side in row) for row in sizes)
    return AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(strides))


class RetinaNet(_Anchored):
    """RetinaNet (Lin et al. 2017, arXiv:1708.02002), from torchvision: nine anchors per location, and focal loss, which
    gives the many easy negatives a small weight.

    Args:
        strides: strides of the feature maps; by default four from 4 on up to 256 pixels, otherwise five from 8 on.
        width: channels of neck and branches, a multiple of 32.
        anchor_scale: side of the smallest anchor of each map, in strides.
        coarser_levels: add two maps, each half the size of the previous one, as published, for larger images.
    """

    def __init__(
        self,
        backbone: Any,
        num_classes: int,
        image_size: int | str,
        strides: list[int] | None = None,
        width: PositiveInt = 256,
        anchor_scale: Positive = 4.0,
        coarser_levels: bool = False,
    ) -> None:
        _check_width(self, width)
        options = {"width": width, "anchor_scale": anchor_scale, "coarser_levels": coarser_levels}
        super().__init__(backbone, num_classes, image_size, _strides(strides, image_size), options)
        levels = _levels(self.pyramid.strides, coarser_levels)
        self.net = retinanet.RetinaNet(
            _Neck(self.pyramid, width, LastLevelP6P7(self.pyramid.channels[-1], width) if coarser_levels else None),
            num_classes,
            anchor_generator=_anchors(levels, anchor_scale, 3, whole=coarser_levels),
            head=retinanet.RetinaNetHead(
                width, 9, num_classes, partial(nn.GroupNorm, GROUPS)
            ),  # torchvision's second version
        )

    def losses(self, outputs: dict[str, Any], batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """See `Detector.losses`; a mean over the images."""
        targets, matched = _targets(batch), []
        anchors, matcher = outputs["anchors"], self.net.proposal_matcher
        for target in targets:
            if len(target["boxes"]):
                index = matcher(box_iou(target["boxes"], anchors))
            else:
                index = torch.full((len(anchors),), matcher.BELOW_LOW_THRESHOLD, device=anchors.device)
            index[(index < 0) & _in_ignored(anchors, target)] = matcher.BETWEEN_THRESHOLDS
            matched.append(index)
        parts = self.net.head.compute_loss(targets, outputs, [anchors] * len(targets), matched)
        names = {"classification": "class", "bbox_regression": "box"}
        return {names[key]: value for key, value in parts.items()}, torch.tensor(len(targets))

    @override
    def dense(self, outputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        anchors, deltas = outputs["anchors"], outputs["bbox_regression"]
        boxes = self.net.box_coder.decode_single(deltas.flatten(0, 1), anchors.expand_as(deltas).flatten(0, 1))
        return self.within(boxes.view(deltas.shape)), outputs["cls_logits"].sigmoid()


def _in_ignored(boxes: Tensor, target: Mapping[str, Tensor]) -> Tensor:
    """Whether the centres of boxes lie in a region to ignore, bool N."""
    return inside((boxes[:, :2] + boxes[:, 2:]) / 2, target["ignored"]).any(0)


class _Proposals(RegionProposalNetwork):
    """torchvision's region proposal network, without a loss in regions to ignore."""

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """See torchvision; -1 is neither object nor background."""
        labels, boxes = super().assign_targets_to_anchors(anchors, targets)
        for label, places, target in zip(labels, anchors, targets, strict=True):
            label[(label == 0) & _in_ignored(places, target)] = -1
        return labels, boxes


class _Heads(RoIHeads):
    """torchvision's heads, without a loss in regions to ignore."""

    def select_training_samples(self, proposals: list[Tensor], targets: Any) -> Any:
        """See torchvision."""
        self._targets = targets
        return super().select_training_samples(proposals, targets)

    def assign_targets_to_proposals(
        self, proposals: list[Tensor], gt_boxes: list[Tensor], gt_labels: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """See torchvision; -1 is neither object nor background."""
        matched, labels = super().assign_targets_to_proposals(proposals, gt_boxes, gt_labels)
        for label, places, target in zip(labels, proposals, self._targets, strict=True):
            label[(label == 0) & _in_ignored(places, target)] = -1
        return matched, labels


class FasterRCNN(Detector):
    """Faster R-CNN (Ren et al. 2015, arXiv:1506.01497) with a feature pyramid, from torchvision: a region proposal
    network, and a head that classifies and refines each region.

    The numbers of proposals and samples are proportional to the image size: the published 2,000 and 512 are for images
    of 800 pixels, and far too many for small ones.

    Args:
        strides: strides of the feature maps; by default four from 4 on up to 256 pixels, otherwise five from 8 on.
        width: channels of the pyramid.
        hidden: units of the two layers of the head.
        anchor_scale: side of each map's anchors, in strides.
        proposals: number of regions per image in training, half as many in evaluation; by default 2,000 at 800 pixels.
        samples: number of regions per image that the loss is computed on, by default 512 at 800 pixels.
        pooled_level: add a level of every second position of the coarsest map, with larger anchors, as published (Lin
            et al. 2017, section 4.1).
        second_version: batch normalisation in the pyramid, two convolutions in the region proposal network, and a head
            of four normalised convolutions and one linear layer (Li et al. 2021, arXiv:2111.11429, as in torchvision).
    """

    nms_iou = 0.5
    class_layers: ClassVar[Mapping[str, ClassRows]] = {
        "heads.box_predictor.cls_score": ClassRows(background=1),
        "heads.box_predictor.bbox_pred": ClassRows(background=1, inner=4),
    }

    def __init__(
        self,
        backbone: Any,
        num_classes: int,
        image_size: int | str,
        strides: list[int] | None = None,
        width: PositiveInt = 256,
        hidden: PositiveInt = 1024,
        anchor_scale: Positive = 6.0,
        proposals: PositiveInt | None = None,
        samples: PositiveInt | None = None,
        pooled_level: bool = False,
        second_version: bool = False,
    ) -> None:
        share = min(1.0, max(sides(image_size)) / 800)
        proposals, samples = proposals or round(2000 * share), samples or max(64, round(512 * share))
        options = {"width": width, "hidden": hidden, "anchor_scale": anchor_scale,
                   "proposals": proposals, "samples": samples, "pooled_level": pooled_level,
                   "second_version": second_version}  # fmt: skip
        super().__init__(backbone, num_classes, image_size, _strides(strides, image_size), options)
        norm = nn.BatchNorm2d if second_version else None
        self.neck = _Neck(self.pyramid, width, LastLevelMaxPool() if pooled_level else None, norm)
        levels = [*self.pyramid.strides, *([2 * self.pyramid.strides[-1]] if pooled_level else [])]
        numbers = {"training": proposals, "testing": max(1, proposals // 2)}
        self.rpn = _Proposals(
            _anchors(levels, anchor_scale, 1), RPNHead(width, 3, 2 if second_version else 1), 0.7, 0.3, samples, 0.5, numbers, numbers, 0.7
        )  # fmt: skip
        pool = MultiScaleRoIAlign([str(i) for i in range(len(self.pyramid.strides))], 7, 2,
                                  canonical_scale=round(224 * share), canonical_level=4)  # fmt: skip
        look = (
            FastRCNNConvFCHead((width, 7, 7), [width] * 4, [hidden], norm)
            if second_version
            else TwoMLPHead(width * 49, hidden)
        )
        self.heads = _Heads(
            pool, look, FastRCNNPredictor(hidden, num_classes + 1),
            0.5, 0.5, samples, 0.25, None, MIN_SCORE, self.nms_iou, self.max_detections,
        )  # fmt: skip

    @override
    def forward(self, features: Sequence[Tensor]) -> dict[str, Tensor]:
        return {key: x.float() for key, x in self.neck(features).items()}

    def losses(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """See `Detector.losses`. It samples regions at random; evaluation is deterministic and therefore has no
        loss."""
        targets = _targets(batch, first_label=1)  # torchvision's class 0 is the background
        if not self.training:
            return {}, torch.tensor(len(targets))
        maps = list(outputs.values())
        images = _images(len(maps[0]), maps, self.size)
        regions, first = self.rpn(images, outputs, targets)
        _, second = self.heads(outputs, regions, images.image_sizes, targets)
        names = {"loss_objectness": "region", "loss_rpn_box_reg": "region_box",
                 "loss_classifier": "class", "loss_box_reg": "box", "loss_mask": "mask"}  # fmt: skip
        return {names[key]: value for key, value in (first | second).items()}, torch.tensor(len(targets))

    @torch.no_grad()
    @override
    def detect(self, outputs: dict[str, Tensor]) -> list[Detections]:
        maps = list(outputs.values())
        images = _images(len(maps[0]), maps, self.size)
        regions, _ = self.rpn(images, outputs)
        found, _ = self.heads(outputs, regions, images.image_sizes)
        kept = [self.suppressed(one["boxes"], one["scores"], one["labels"]) for one in found]
        return [
            {
                key: value[keep] for key, value in (one | {"labels": one["labels"] - 1}).items()
            }  # torchvision's class 0 is the background
            for one, keep in zip(found, kept, strict=True)
        ]

    def choose(self, max_detections: int | None, nms_iou: float | None, across_classes: bool | None) -> None:
        """See `Detector.choose`; also updates torchvision's heads, which apply non-maximum suppression per class."""
        super().choose(max_detections, nms_iou, across_classes)
        self.heads.detections_per_img, self.heads.nms_thresh = self.max_detections, self.nms_iou
        counts: Any = self.rpn._post_nms_top_n
        counts["testing"] = max(counts["testing"], self.max_detections)
