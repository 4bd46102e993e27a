"""Instance segmentation with Mask R-CNN."""

from collections.abc import Callable, Mapping
from itertools import zip_longest
from typing import Any, ClassVar

import numpy as np
import torch
from faster_coco_eval.core import mask as rle
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision, PanopticQuality
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import MultiScaleRoIAlign
from typing_extensions import override

from modules.answers import Answer, Image
from modules.base import Stage
from modules.callbacks.publish import Report
from modules.detection import DetectionModule, Detector, FasterRCNN
from modules.detection.answers import BoxAnswers
from modules.detection.detector import Detections
from modules.detection.masks import pixels
from modules.detection.metrics import COCO
from modules.measures.per_stage import PerStage
from modules.optimization import Optimization
from modules.pictures.palette import colour_of, tint
from modules.pictures.sheets import as_rgb, enlarged, sheet
from modules.ranges import Positive, PositiveInt, ShareBelowOne
from modules.spec import Backbone, DataSpec
from modules.training_data import Batch
from modules.warm_start import ClassRows

SHOWN = 8  # number of validation images shown with their masks
SHARE = 0.6  # opacity of the colours in drawn masks
VISIBLE = 0.5  # minimum visible fraction of an object in a panoptic map


class MaskRCNN(FasterRCNN):
    """Mask R-CNN (He et al. 2017, arXiv:1703.06870), from torchvision: Faster R-CNN with a branch that predicts a mask
    of 28×28 pixels for each region. Arguments are as in `FasterRCNN`, and:

    Args:
        mask_width: channels of the four 3×3 convolutions of the mask branch.
        second_version: see `FasterRCNN`; the mask branch is normalised too.
    """

    class_layers: ClassVar[Mapping[str, ClassRows]] = {
        **FasterRCNN.class_layers,
        "heads.mask_predictor.mask_fcn_logits": ClassRows(background=1),
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
        mask_width: PositiveInt = 256,
        pooled_level: bool = False,
        second_version: bool = False,
    ) -> None:
        super().__init__(
            backbone, num_classes, image_size, strides, width, hidden, anchor_scale, proposals, samples, pooled_level,
            second_version,
        )  # fmt: skip
        self.options["mask_width"] = mask_width
        pool: Any = self.heads.box_roi_pool
        self.heads.mask_roi_pool = MultiScaleRoIAlign(
            pool.featmap_names, 14, 2, canonical_scale=pool.canonical_scale, canonical_level=pool.canonical_level
        )
        self.heads.mask_head = MaskRCNNHeads(width, (mask_width,) * 4, 1, nn.BatchNorm2d if second_version else None)
        self.heads.mask_predictor = MaskRCNNPredictor(mask_width, mask_width, num_classes + 1)


class MaskMetric(nn.Module):
    """Metrics of instance masks: COCO's average precision, and panoptic quality.

    Both are computed in pixels of the network's input. For panoptic quality (Kirillov et al. 2019, arXiv:1801.00868),
    the confident objects are overlaid, the most confident in front; pixels without an object are background, which
    counts as a class.

    Args:
        num_classes: number of classes without the background.
        most: maximum number of detections per image.
    """

    def __init__(self, num_classes: int, most: int = 100) -> None:
        super().__init__()
        self.num_classes = num_classes
        # More than 100 detections are the user's choice, so the library's warning is off. Its own reduction over
        # processes requires the same number of images in each.
        self.precision = MeanAveragePrecision(
            iou_type="segm", **COCO, max_detection_thresholds=[1, 10, most], sync_on_compute=False
        )
        self.quality = PanopticQuality(set(range(num_classes)), {num_classes}, allow_unknown_preds_category=True)

    def update(self, found: Mapping[str, Tensor], truth: Mapping[str, Tensor], threshold: float) -> None:
        """Adds an image.

        Args:
            found: ``masks`` bool N×S×S, ``labels``, ``scores``, the most confident first.
            truth: ``masks`` uint8 M×S×S, ``labels``, ``ignore``.
            threshold: score from which objects are in the panoptic map.
        """
        target = {"masks": truth["masks"].bool(), "labels": truth["labels"], "iscrowd": truth["ignore"].long()}
        self.precision.update([{key: found[key] for key in ("masks", "labels", "scores")}], [target])
        sure = found["scores"] >= threshold
        ours = panoptic_map(found["masks"][sure], found["labels"][sure], self.num_classes)
        true = panoptic_map(truth["masks"].bool(), truth["labels"], self.num_classes, 0.0)
        if truth["ignore"].any():
            true[truth["masks"][truth["ignore"]].any(0)] = -1
        self.quality.update(ours[None], true[None])

    def compute(self) -> dict[str, float]:
        """Returns ``mask_ap`` (mean over IoU thresholds from 0.5 to 0.95, and classes), ``mask_ap50``, ``mask_ap75``
        and ``panoptic_quality``, all in [0, 1]; without objects, only the last."""
        if torch.distributed.is_initialized():
            shares: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(shares, self.precision.metric_state)
            for name in shares[0]:  # a process has every world_size-th image
                images = zip_longest(*(share[name] for share in shares))
                setattr(self.precision, name, [each for turn in images for each in turn if each is not None])
        values = self.precision.compute()
        names = {"mask_ap": "map", "mask_ap50": "map_50", "mask_ap75": "map_75"}
        result = {key: float(values[name]) for key, name in names.items()} | {
            "panoptic_quality": float(self.quality.compute())
        }
        return {key: value for key, value in result.items() if value >= 0}  # -1 or NaN mark undefined metrics

    def reset(self) -> None:
        """Resets the metrics."""
        self.precision.reset()
        self.quality.reset()


def panoptic_map(masks: Tensor, labels: Tensor, num_classes: int, visible: float = VISIBLE) -> Tensor:
    """Computes class and object id of each pixel.

    Args:
        masks: bool N×S×S, the front-most first.
        labels: int64 N.
        num_classes: class index of the background.
        visible: minimum fraction of a mask that is not yet covered.

    Returns:
        int64 S×S×2: class and object id.
    """
    result = labels.new_zeros(*masks.shape[1:], 2)
    result[..., 0] = num_classes
    free = torch.ones(masks.shape[1:], dtype=torch.bool, device=masks.device)
    for number, (mask, label) in enumerate(zip(masks, labels, strict=True), 1):
        own = mask & free
        if own.any() and own.sum() >= visible * mask.sum():
            result[own] = torch.stack((label, label.new_tensor(number)))
            free &= ~own
    return result


class InstanceSegmentationModule(DetectionModule):
    """Instance segmentation: a backbone with Mask R-CNN on its feature maps; boxes as in `DetectionModule`, and masks.

    Metrics: those of `DetectionModule`, the average precision of masks (``mask_ap``, ``mask_ap50``, ``mask_ap75``), and
    panoptic quality. Logs masks next to the ground truth.

    Args:
        data: description of the data, which must have masks.
        backbone: the network that the detector is built on.
        detector: detects boxes and masks in the feature maps: MaskRCNN.
        optimization: optimiser, schedule and regularisation.
        max_detections: maximum number of objects per image that are returned and evaluated; COCO's metrics use 100.
        nms: IoU threshold of non-maximum suppression; by default 0.5.
        across_classes: apply non-maximum suppression across classes.
        multi_scale: see `DetectionModule`.
    """

    monitor = "val/mask_ap"

    needs = ("boxes", "masks")
    mirrors = False

    def __init__(
        self,
        data: DataSpec,
        backbone: Backbone = Backbone("resnet18"),
        optimization: Optimization | None = None,
        detector: Callable[[nn.Module, int, int | str], Detector] = MaskRCNN,
        max_detections: int = 100,
        nms: float | None = None,
        across_classes: bool = False,
        multi_scale: ShareBelowOne = 0.0,
    ) -> None:
        super().__init__(data, backbone, optimization, detector, max_detections, nms, across_classes, multi_scale)
        self.mask_figures = PerStage(lambda _: MaskMetric(self.num_classes, max_detections))
        self.answers = MaskAnswers(self.label_names)
        self.tinted: list[NDArray[np.uint8]] = []

    def _measure(self, batch: Batch, found: list[Detections], stage: Stage) -> None:
        super()._measure(batch, found, stage)
        for i, one in enumerate(found):
            masks = pasted(one, *batch["image"].shape[2:])
            truth = {key: batch[key][i] for key in ("masks", "labels", "ignore")}
            self.mask_figures[stage].update({**one, "masks": masks}, truth, float(self.threshold))
            if self.trainer.is_global_zero and len(self.tinted) < 2 * SHOWN:
                with self.publisher.optional(f"{stage}/masks"):
                    sure = one["scores"] >= self.threshold
                    self.tinted += [tinted(batch["image"][i], part, 256) for part in (truth["masks"], masks[sure])]

    @override
    def report(self, stage: Stage) -> Report:
        report = super().report(stage)
        metric = self.mask_figures[stage]
        report.figures |= metric.compute()
        metric.reset()
        shown, self.tinted = self.tinted, []
        if shown:
            report.pictures["masks"] = lambda: sheet(shown, 4, ["truth", "found"] * (len(shown) // 2))
        return report

    def _told(self, found: Detections, size: list[int]) -> Answer:
        """As in `DetectionModule`, with ``masks``, COCO's run-length codes in pixels of the original image."""
        shapes = pasted(found, *size)
        seen = shapes.any(2).any(1)  # objects without pixels are dropped
        found, shapes = {key: value[seen] for key, value in found.items()}, shapes[seen]
        codes = [rle.encode(np.asfortranarray(mask, np.uint8)) for mask in shapes.cpu().numpy()]
        masks = [{"size": list(code["size"]), "counts": code["counts"].decode()} for code in codes]
        return super()._told(found, size) | {"masks": masks}

    def draw_samples(self, batch: Batch, columns: int = 8) -> NDArray[np.uint8]:
        """See `VisionModule.draw_samples`; with the objects as overlays."""
        pairs = zip(batch["image"], batch["masks"], strict=True)
        return sheet([tinted(image, masks, 192) for image, masks in pairs], columns)


class MaskAnswers(BoxAnswers):
    """Predicted boxes with labels, scores and masks."""

    def draw(self, image: Image, answer: Answer) -> Image:
        """See `Answers.draw`; with boxes, and the objects as overlays."""
        owner = np.zeros(image.shape[:2], np.uint8)
        for number, code in reversed(list(enumerate(answer["masks"]))):  # one at a time: there may be thousands
            owner[pixels(code)] = colour_of(number)
        return super().draw(tint(as_rgb(image), owner, SHARE), answer)


def pasted(found: Mapping[str, Tensor], height: int, width: int) -> Tensor:
    """Pastes the masks of regions into masks of the image.

    Args:
        found: ``masks`` float N×1×28×28 in [0, 1], and their ``boxes`` float N×4, xyxy in pixels of the image.
        height, width: size of the image.

    Returns:
        bool N×H×W.
    """
    if not len(found["boxes"]):
        return torch.zeros(0, height, width, dtype=torch.bool, device=found["boxes"].device)
    return paste_masks_in_image(found["masks"], found["boxes"], (height, width))[:, 0] > 0.5


def tinted(image: Tensor, masks: Tensor, side: int) -> NDArray[np.uint8]:
    """Draws an image with its objects as overlays in different colours, uint8 H×W×3.

    Args:
        image: uint8 C×H×W.
        masks: N×H×W, the front-most first.
        side: minimum length of the shorter side of the result; smaller images are enlarged by an integer factor.
    """
    owner = np.zeros(image.shape[1:], np.uint8)
    for number, mask in reversed(list(enumerate(masks.bool().cpu().numpy()))):
        owner[mask] = colour_of(number)
    return enlarged(tint(as_rgb(image), owner, SHARE), side)
