"""Object detection."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import override

from modules.answers import Answer
from modules.base import Stage
from modules.calibrated import CalibratedModule
from modules.callbacks.means import Losses
from modules.callbacks.publish import Report
from modules.detection import pictures
from modules.detection.answers import BoxAnswers
from modules.detection.detector import Detections, Detector
from modules.detection.metrics import UNSURE, DetectionMetric
from modules.detection.yolo import YOLO
from modules.measures.per_stage import PerStage
from modules.networks import BackboneError
from modules.networks.parts import describe
from modules.networks.pyramid import skip_unread
from modules.optimization import Optimization
from modules.pictures.boxes import draw_boxes
from modules.pictures.charts import confusion_matrix
from modules.pictures.sheets import as_rgb, sheet
from modules.ranges import ShareBelowOne
from modules.spec import Backbone, DataSpec
from modules.training_data import Batch, given_data
from modules.views import mirrored, mirrored_boxes
from modules.warm_start import ClassRows

SHOWN = 8  # number of validation images shown with their detections
WORST = 8  # number of images with the most mistakes shown
SMALLEST = 0.02  # minimum side of a box, in pixels


def scaled_sizes(size: tuple[int, int], multiple: int, spread: float) -> list[tuple[int, int]]:
    """Returns sizes smaller and larger than one, with about its aspect ratio.

    >>> scaled_sizes((96, 128), 32, 0.25)
    [(64, 96), (96, 128), (128, 160)]
    >>> scaled_sizes((96, 128), 32, 0)
    [(96, 128)]

    Args:
        size: height and width.
        multiple: divisor of all sides.
        spread: maximum relative difference of the longer side, in [0, 1).

    Raises:
        BackboneError: there is no other size.
    """
    if not spread:
        return [size]
    longer = max(size)
    counts = range(
        max(1, math.ceil((1 - spread) * longer / multiple)), math.floor((1 + spread) * longer / multiple) + 1
    )
    sizes = [
        (max(1, round(size[0] * count / longer)) * multiple, max(1, round(size[1] * count / longer)) * multiple)
        for count in counts
    ]
    if len(sizes) < 2:
        raise BackboneError(
            f"--model.multi_scale {spread} leaves no other size than {size[0]}×{size[1]} pixels: sizes are multiples of {multiple}, "
            "the largest stride of the detector. Raise it, or leave it out."
        )
    return sizes


class DetectionModule(CalibratedModule):
    """Object detection: a backbone with a detector on its feature maps.

    Metrics: COCO's average precision (``ap``, ``ap50``, ``ap75``, by size and per class) and average recall, and the
    best F1 with its threshold. Logs detections next to the ground truth for the same images each epoch, the images
    with the most mistakes, precision-recall curves, and the confusion matrix at the best threshold. The best
    threshold on the validation set is stored with the weights: `predict` returns the boxes whose score reaches it.

    Args:
        data: description of the data.
        backbone: the network that the detector is built on.
        detector: detects boxes in the feature maps: YOLO, FCOS, RetinaNet, FasterRCNN or RTDETR.
        optimization: optimiser, schedule and regularisation.
        max_detections: maximum number of boxes per image that are returned and evaluated; COCO's metrics use 100.
        nms: IoU threshold of non-maximum suppression; by default 0.6, in Faster R-CNN 0.5 and in RT-DETR 1 (none).
        across_classes: apply non-maximum suppression across classes.
        multi_scale: in training, resize each batch to a random size between ``1 - multi_scale`` and ``1 + multi_scale`` times
            ``image_size``, in multiples of the detector's largest stride; 0 for none.
    """

    monitor = "val/ap"
    mode = "max"

    any_bands = True
    takes = ("num_classes", "label_names", "in_chans", "image_size", "fit")
    needs: tuple[str, ...] = ("boxes",)
    mirrors = True
    late_parts: ClassVar[Mapping[str, type]] = {"detector": Detector}

    def __init__(
        self,
        data: DataSpec,
        backbone: Backbone = Backbone("resnet18"),
        optimization: Optimization | None = None,
        detector: Callable[[nn.Module, int, int | str], Detector] = YOLO,
        max_detections: int = 100,
        nms: float | None = None,
        across_classes: bool = False,
        multi_scale: ShareBelowOne = 0.0,
    ) -> None:
        super().__init__(data, backbone, optimization, "maps")
        num_classes, self.fit = data.num_classes, data.fit
        self.detector = detector(self.backbone, num_classes, data.image_size)
        skip_unread(self, self.detector.pyramid)
        self.training_sizes = scaled_sizes(self.size, self.detector.multiple, multi_scale)
        if self.channels_last:
            self.detector.to(memory_format=torch.channels_last)
        self.keep_thresholds(torch.tensor(UNSURE))
        self.told: set[int] | None = None  # classes to return; None for all
        self.choose(max_detections=max_detections, nms=nms, across_classes=across_classes)
        self.figures = PerStage(lambda _: DetectionMetric(num_classes, max_detections))
        self.answers = BoxAnswers(self.label_names)
        self.shown: list[pictures.BoxExample] = []
        self.worst: list[tuple[int, pictures.BoxExample]] = []

    def choose(
        self,
        threshold: float | None = None,
        max_detections: int | None = None,
        nms: float | None = None,
        across_classes: bool | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        """Sets which boxes are returned; None leaves a setting unchanged.

        Args:
            threshold: minimum score, in [0, 1].
            max_detections: see `DetectionModule`.
            nms: see `DetectionModule`; in [0, 1].
            across_classes: see `DetectionModule`.
            classes: names of the classes to return.

        Raises:
            BackboneError: a value is out of range, or a class is unknown.
        """
        if unknown := [name for name in classes or () if name not in self.label_names]:
            raise BackboneError(f"There is no class {unknown[0]!r}, but {', '.join(self.label_names)}.")
        self.told = self.told if classes is None else {self.label_names.index(name) for name in classes}
        if max_detections is not None and max_detections < 1:
            raise BackboneError(f"max_detections must be at least 1, not {max_detections}.")
        for name, value in (("nms", nms), ("threshold", threshold)):
            if value is not None and not 0 <= value <= 1:
                raise BackboneError(f"{name} must be between 0 and 1, not {value}.")
        if threshold is not None:
            self.threshold.fill_(threshold)
        self.detector.choose(max_detections, nms, across_classes)

    @property
    def across_classes(self) -> bool:
        """Whether non-maximum suppression is applied across classes."""
        return self.detector.across_classes

    @override
    def parts(self) -> dict[str, Any]:
        return {
            "max_detections": self.detector.max_detections,
            "nms": self.detector.nms_iou,
            "across_classes": self.detector.across_classes,
            "detector": describe(self.detector, **self.detector.options),
        }

    @property
    @override
    def class_layers(self) -> dict[str, ClassRows]:
        return {f"detector.{name}": rows for name, rows in self.detector.class_layers.items()}

    def forward(self, image: Tensor) -> Any:
        """Computes the raw outputs of the detector from images, uint8 B×C×H×W."""
        self.detector.size = image.shape[2], image.shape[3]  # batches may have other shapes than `image_size`
        return self.detector(self.backbone(self.normalize(image)))

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        wanted, stride = getattr(given_data(self.trainer), "pad_multiple", None), self.detector.multiple
        if wanted is not None and wanted % stride:
            raise BackboneError(
                f"--data.pad_multiple {wanted} is no multiple of {stride}, the largest stride of the detector: give "
                f"--data.pad_multiple {-(-wanted // stride) * stride}."
            )

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return super().training_step(self._rescaled(batch, batch_idx), batch_idx)

    def _rescaled(self, batch: Batch, batch_idx: int) -> Batch:
        """Resizes a training batch to one of `training_sizes`, drawn from (seed, epoch, batch) for all processes."""
        if len(self.training_sizes) < 2:
            return batch
        seed = 0 if (data := given_data(self.trainer)) is None else data.seed
        chosen = np.random.default_rng((seed, self.current_epoch, batch_idx)).integers(len(self.training_sizes))
        image, (height, width) = batch["image"], self.training_sizes[chosen]
        down, across = height / image.shape[2], width / image.shape[3]
        resized = F.interpolate(image.float(), (height, width), mode="bilinear", antialias=True, align_corners=False)
        resized = resized if image.is_floating_point() else resized.round().clamp(0, 255).to(image.dtype)
        boxes = [each * each.new_tensor([across, down, across, down]) for each in batch["boxes"]]
        masks = [F.interpolate(each[None], (height, width))[0] for each in batch.get("masks", [])]
        return {**batch, "image": resized, "boxes": boxes, **({"masks": masks} if masks else {})}

    @override
    def losses(self, batch: Batch) -> Losses:
        return self._losses(self(batch["image"]), batch)

    def _losses(self, outputs: Any, batch: Batch) -> Losses:
        terms, weight = self.detector.losses(outputs, batch)
        return Losses({f"loss_{name}": value for name, value in terms.items()}, weight=float(weight))

    @override
    def measure(self, batch: Batch, stage: Stage) -> Losses:
        outputs = self(batch["image"])
        losses = self._losses(outputs, batch)
        self._measure(batch, self._detect(batch["image"], outputs), stage)
        return losses

    def _detect(self, image: Tensor, outputs: Any) -> list[Detections]:
        """Detects boxes in images, in pixels of the input, and fuses those of mirrored views."""
        found = [self.detector.detect(outputs)]
        for axes in self.views.axes[1:]:
            others = self.detector.detect(self(mirrored(image, axes)))
            found.append(
                [
                    {**one, "boxes": mirrored_boxes(one["boxes"], axes, (image.shape[2], image.shape[3]))}
                    for one in others
                ]
            )
        return found[0] if len(found) == 1 else [self.detector.fused(views) for views in zip(*found, strict=True)]

    def _original(self, found: list[Detections], batch: Batch) -> list[Detections]:
        """Converts boxes to pixels of the original images, and removes those in the padding."""
        sizes = batch.get("size")
        result = []
        for i, detections in enumerate(found):
            height, width = sizes[i].tolist() if sizes is not None else self.size
            down, across = self._factors(height, width)
            boxes = detections["boxes"].float()
            boxes = boxes * boxes.new_tensor([across, down, across, down])
            limits = boxes.new_tensor([width, height, width, height])
            detections = {**detections, "boxes": boxes.clamp(min=0).minimum(limits)}
            if "scores" in detections:
                sides = detections["boxes"][:, 2:] - detections["boxes"][:, :2]
                kept = (sides >= SMALLEST).all(1)
                detections = {key: value[kept] for key, value in detections.items()}
            result.append(detections)
        return result

    def _factors(self, height: float, width: float) -> tuple[float, float]:
        """Returns the pixels of an original image of this size per pixel of the input, vertically and horizontally."""
        down, across = height / self.size[0], width / self.size[1]
        return (max(down, across),) * 2 if self.fit == "pad" else (down, across)

    def _measure(self, batch: Batch, found: list[Detections], stage: Stage) -> None:
        keys = ("boxes", "labels", "ignore", *(("area",) if "area" in batch else ()))
        if any(len(boxes) > self.detector.max_detections for boxes in batch["boxes"]):
            rank_zero_warn(
                f"Some images have more than {self.detector.max_detections} objects, and no more than that are "
                "found: raise --model.max_detections."
            )
        truth = [dict(zip(keys, values, strict=True)) for values in zip(*(batch[key] for key in keys), strict=True)]
        found, truth = self._original(found, batch), self._original(truth, batch)
        metric = self.figures[stage]
        metric.rank, metric.world_size = self.global_rank, self.trainer.world_size
        metric.update(found, truth)
        if self.trainer.is_global_zero:
            with self.publisher.optional(f"{stage}/detections"):
                self._keep_pictures(batch, found, truth)

    def _keep_pictures(self, batch: Batch, found: list[Detections], truth: list[Detections]) -> None:
        """Keeps the first images, and those with the most mistakes."""
        for i, (one, other) in enumerate(zip(found, truth, strict=True)):
            sure = one["scores"] >= self.threshold
            example = pictures.BoxExample(
                batch["image"][i],
                {key: value[sure] for key, value in one.items()},
                other,
                self._factors(*batch["size"][i].tolist()),
            )
            if len(self.shown) < SHOWN:
                self.shown.append(example.cpu())
            errors = example.errors()
            if errors and (len(self.worst) < WORST or errors > self.worst[-1][0]):
                self.worst = sorted([*self.worst, (errors, example.cpu())], key=lambda pair: -pair[0])[:WORST]

    @override
    def report(self, stage: Stage) -> Report:
        metric = self.figures[stage]
        values = metric.compute()
        metric.reset()
        per_class, counts, curves = (values.pop(key) for key in ("per_class", "confusion", "curves"))
        report = Report(values)
        if stage == "val" and "threshold" in values:
            self.calibrate(torch.tensor(values["threshold"]))
        if "ap" not in values:
            rank_zero_warn(
                f"The {stage} split has no objects, so there is no average precision, and the score threshold "
                f"stays {float(self.measured):g}."
            )
        shown, worst, self.shown, self.worst = self.shown, self.worst, [], []
        names = self.label_names
        if shown:
            report.pictures["detections"] = lambda: pictures.pairs(shown, names)
        if worst:
            report.pictures["mistakes"] = lambda: pictures.pairs([example for _, example in worst], names)
        report.pictures["precision_recall"] = lambda: pictures.curves(curves, per_class, names)
        report.pictures["confusion_matrix"] = lambda: confusion_matrix(counts, [*names, "background"])
        rows = [
            [name, int(row.sum()), *(None if value != value else float(value) for value in figures),
             *(float(row[k] / part.sum()) if part.any() else None for part in (row, column))]
            for k, (name, figures, row, column) in enumerate(zip(names, per_class, counts, counts.T, strict=False))
        ]  # fmt: skip
        report.tables["per_class"] = ["class", "objects", "ap", "ap50", "recall", "precision"], rows
        return report

    @torch.inference_mode()
    @override
    def predict(self, batch: Batch) -> list[Answer]:
        """Returns ``boxes`` for each image (xyxy, in pixels of the original image), their ``labels`` and ``scores``,
        and its ``size`` (height, width).

        The boxes are those whose score reaches the best threshold on the validation set, in descending order of their
        score.
        """
        result = []
        for i, found in enumerate(self._original(self._detect(batch["image"], self(batch["image"])), batch)):
            size = batch["size"][i].tolist() if "size" in batch else [*self.size]
            sure = found["scores"] >= self.threshold
            if self.told is not None:
                sure &= torch.isin(found["labels"], torch.tensor([*self.told], device=self.device))
            result.append(self._told({key: value[sure] for key, value in found.items()}, size))
        return result

    def _told(self, found: Detections, size: list[int]) -> Answer:
        """Converts the detections in an image to plain data."""
        return {
            "boxes": [[round(value, 2) for value in box] for box in found["boxes"].tolist()],
            "labels": [self.label_names[k] for k in found["labels"].tolist()],
            "scores": [round(score, 6) for score in found["scores"].tolist()],
            "size": size,
        }

    def draw_samples(self, batch: Batch, columns: int = 8) -> NDArray[np.uint8]:
        """See `VisionModule.draw_samples`; with the boxes."""
        tiles = []
        for image, boxes, labels in zip(batch["image"], batch["boxes"], batch["labels"], strict=True):
            captions = [self.label_names[k] for k in labels]
            tiles.append(draw_boxes(as_rgb(image), boxes.numpy(), captions, labels.tolist(), 192))
        return sheet(tiles, columns)
