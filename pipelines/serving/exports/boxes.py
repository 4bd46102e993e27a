"""Exportable detectors: their networks, and box selection as part of an ONNX file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import FrozenBatchNorm2d, nms, roi_align
from typing_extensions import override

from modules import DetectionModule
from modules.callbacks.means import Losses
from modules.detection.detector import MIN_SCORE
from pipelines.serving.exports.base import Exported, copied, replaced
from pipelines.serving.fitting import Fitting

SMALLEST = 1e-2  # side of a box that torchvision keeps, in pixels


class _ExportedBoxes(Exported[DetectionModule]):
    """Base class whose boxes are in the pixels of the original picture if the file includes the preprocessing."""

    detector: Any

    @override
    def placed(self, answers: tuple[Tensor, ...], picture: Tensor) -> tuple[Tensor, ...]:
        return in_pixels_of(picture, self.fitting, answers)


class ExportedDetector(_ExportedBoxes):
    """Boxes and scores of all places of a one-stage detector, float32 B×A×4 and B×A×K; in ONNX, followed by box
    selection."""

    outputs = ("boxes", "scores")

    @override
    def take(self, module: DetectionModule) -> None:
        if module.across_classes:
            raise ValueError(
                "a detector whose boxes are chosen across classes is not exported: onnx chooses within classes"
            )
        self.backbone, self.detector = copied(module.backbone), copied(module.detector)
        self.threshold, self.most = float(module.threshold), module.detector.max_detections
        self.meaning = f"boxes float32 B×A×4 (xyxy, pixels of the input), scores float32 B×A×{module.num_classes}"

    @override
    def answer(self, image: Tensor) -> tuple[Tensor, ...]:
        return self.detector.dense(self.detector(self.backbone(image)))

    @override
    def expected(self, module: DetectionModule, image: Tensor) -> tuple[Tensor, ...]:
        detector: Any = module.detector
        return detector.dense(module(image))

    @override
    def stand_in(self, module: DetectionModule, run: Callable[..., list[Tensor]]) -> bool:
        def found(image: Tensor) -> list[dict[str, Tensor]]:
            boxes, labels, scores, which = run(image, threshold=torch.full((1,), MIN_SCORE))
            rows = [which == k for k in range(len(image))]
            best = [row.nonzero()[:, 0][scores[row].argsort(descending=True)][: self.most] for row in rows]
            return [{"boxes": boxes[own], "labels": labels[own], "scores": scores[own]} for own in best]

        return answering(module, found)


def answering(module: Any, found: Callable[[Tensor], Any]) -> bool:
    """Replaces a detector's network by a function that finds boxes in uint8 B×C×S×S."""
    module.detector.detect, module._losses = lambda told: told, lambda *_: Losses({})
    return replaced(module, found)


def in_pixels_of(picture: Tensor, fitting: Fitting | None, answers: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Converts boxes, the first of some outputs, from resized images to the pixels of the originals."""
    assert fitting is not None
    return answers[0] * fitting.factors(picture), *answers[1:]


class ExportedTwoStage(_ExportedBoxes):
    """Faster R-CNN's or Mask R-CNN's detections in one picture with scores above ``threshold`` (float32 1): ``boxes``
    float32 N×4 (xyxy, pixels of the input), ``labels`` int64 N, ``scores`` float32 N and ``masks`` float32 N×28×28 in
    [0, 1], each relative to its box.

    It repeats what torchvision's parts do with one picture, in terms that an exporter follows.
    """

    inputs = ("image", "threshold")
    anchors: Tensor

    @override
    def take(self, module: DetectionModule) -> None:
        self.backbone, self.detector = copied(module.backbone), copied(module.detector)
        self.heads, self.rpn, self.size = self.detector.heads, self.detector.rpn, module.size
        with torch.no_grad():  # the pools note the scales of the maps when they see them
            maps = self.detector(self.backbone(torch.zeros(1, module.in_chans, *module.size)))
            self.detector.detect(maps)
            places = [*maps.values()]
            seen = ImageList(torch.zeros(1, 0, *module.size), [module.size])
            self.register_buffer("anchors", self.rpn.anchor_generator(seen, places)[0])
            self.counts = [x.numel() for x in self.rpn.head(places)[0]]
        for part in [*self.heads.modules()]:  # torch's asks whether there are regions, which an exporter cannot follow
            for name, norm in [*part.named_children()]:
                if isinstance(norm, nn.BatchNorm2d):
                    frozen = FrozenBatchNorm2d(norm.num_features, norm.eps)
                    frozen.load_state_dict(norm.state_dict())
                    setattr(part, name, frozen)
        self.threshold = float(module.threshold)
        self.outputs = ("boxes", "labels", "scores", *(["masks"] if self.heads.has_mask() else []))
        self.meaning = "boxes float32 N×4 (xyxy, pixels of the input), labels int64 N, scores float32 N"
        if self.heads.has_mask():
            self.meaning += ", masks float32 N×28×28 in [0, 1], each of its box"

    @override
    def accepts(self, module: DetectionModule) -> str:
        return f"{super().accepts(module).replace('B×', '1×', 1)}, threshold float32 1"

    @override
    def sizes(self) -> tuple[Any, ...]:
        return dict(self.any_size) if self.fitting else {}, ({},)

    @override
    def example(self, module: DetectionModule, count: int) -> tuple[Tensor, ...]:
        return super().example(module, count)[0][-1:], torch.zeros(1)  # all that is found

    @override
    def expected(self, module: DetectionModule, image: Tensor, threshold: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        (found,) = module.detector.detect(module(image))
        found = {name: value[found["scores"] > threshold] for name, value in found.items()}
        return tuple(found[name].squeeze(1) if name == "masks" else found[name] for name in self.outputs)

    @override
    def answer(self, image: Tensor, threshold: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        maps = self.detector.neck(self.backbone(image))
        regions = self._regions([*maps.values()])
        seen = self.heads.box_head(_pooled(self.heads.box_roi_pool, maps, regions))
        logits, moves = self.heads.box_predictor(seen)
        boxes = self.heads.box_coder.decode_single(moves, regions).unflatten(1, (-1, 4))[:, 1:]  # 0 is the background
        boxes, scores = self.detector.within(boxes), logits.softmax(1)[:, 1:]
        large = (boxes[..., 2:] - boxes[..., :2] >= SMALLEST).all(2)
        places = ((scores > self.heads.score_thresh) & large).nonzero()
        boxes, scores, labels = boxes[places[:, 0], places[:, 1]], scores[places[:, 0], places[:, 1]], places[:, 1]
        groups = [labels, torch.zeros_like(labels)] if self.detector.across_classes else [labels]
        for k in range(len(groups)):
            keep = self._kept(boxes, scores, groups[k], self.detector.nms_iou, self.detector.max_detections)
            boxes, scores, labels, groups = boxes[keep], scores[keep], labels[keep], [group[keep] for group in groups]
        sure = (scores > threshold).nonzero()[:, 0]
        boxes, scores, labels = boxes[sure], scores[sure], labels[sure]
        if not self.heads.has_mask():
            return boxes, labels, scores
        seen = self.heads.mask_head(_pooled(self.heads.mask_roi_pool, maps, boxes))
        masks = self.heads.mask_predictor(seen).sigmoid()
        own = (labels + 1)[:, None, None, None].expand(-1, 1, *masks.shape[2:])
        return boxes, labels, scores, masks.gather(1, own)[:, 0]

    @override
    def stand_in(self, module: DetectionModule, run: Callable[..., list[Tensor]]) -> bool:
        def found(image: Tensor) -> list[dict[str, Tensor]]:
            told = [dict(zip(self.outputs, run(one[None], torch.zeros(1)), strict=True)) for one in image]
            return [{key: x[:, None] if key == "masks" else x for key, x in one.items()} for one in told]

        return answering(module, found)

    def _regions(self, maps: list[Tensor]) -> Tensor:
        """Proposals of the first stage, float32 R×4; see `RegionProposalNetwork.filter_proposals`."""
        objectness, moves = concat_box_prediction_layers(*self.rpn.head(maps))
        boxes, scores = self.detector.within(self.rpn.box_coder.decode_single(moves, self.anchors)), objectness[:, 0]
        best, levels, start = [], [], 0
        for level, count in enumerate(self.counts):
            most = min(self.rpn.pre_nms_top_n(), count)
            best.append(scores[start : start + count].topk(most).indices + start)
            levels.append(torch.full_like(best[-1], level))
            start += count
        order, group = torch.cat(best), torch.cat(levels)
        boxes, scores = boxes[order], scores[order].sigmoid()
        large = (boxes[:, 2:] - boxes[:, :2] >= self.rpn.min_size).all(1).nonzero()[:, 0]
        boxes, scores, group = boxes[large], scores[large], group[large]
        return boxes[self._kept(boxes, scores, group, self.rpn.nms_thresh, self.rpn.post_nms_top_n())]

    def _kept(self, boxes: Tensor, scores: Tensor, group: Tensor, iou: float, most: int) -> Tensor:
        """Indices of the boxes that survive non-maximum suppression within each group, int64, best score first."""
        apart = group[:, None] * (max(self.size) + 1.0)  # no box of one group reaches one of another
        return nms(boxes + apart, scores, iou)[:most]


def _pooled(pool: Any, named: dict[str, Tensor], boxes: Tensor) -> Tensor:
    """`MultiScaleRoIAlign` of one picture's boxes, float32 R×C×P×P: pools from every map, then selects the level of
    each box."""
    maps = [x for name, x in named.items() if name in pool.featmap_names]  # a coarser one may be for proposals alone
    regions = torch.cat([torch.zeros_like(boxes[:, :1]), boxes], 1)
    level = pool.map_levels([boxes])[:, None, None, None] if len(maps) > 1 else torch.zeros((), dtype=torch.int64)
    pooled = [
        roi_align(x, regions, pool.output_size, scale, pool.sampling_ratio)
        for x, scale in zip(maps, pool.scales, strict=True)
    ]
    result = pooled[0]
    for k in range(1, len(pooled)):
        result = torch.where(level == k, pooled[k], result)
    return result


def with_default(file: Path, name: str, value: float) -> None:
    """Makes a float32 input of length 1 of an ONNX file optional."""
    model = onnx.load(str(file))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([value], np.float32), name))
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(file))


def with_suppression(file: Path, network: ExportedDetector) -> None:
    """Appends NonMaxSuppression to an ONNX file that outputs the boxes and scores of all places.

    Its outputs are then, for all N boxes found in a batch, up to 100 of each class in an image: ``boxes`` float32 N×4 (xyxy, in pixels of the input),
    ``labels`` int64 N, ``scores`` float32 N, ``image_index`` int64 N. The input ``threshold``
    float32 1 may be left out; it is then the one that was best in validation.
    """
    model = onnx.load(str(file))
    graph, detector = model.graph, network.detector
    for node in graph.node:  # free the names
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = {"boxes": "all_boxes", "scores": "all_scores"}.get(name, name)
    scores = next(output for output in graph.output if output.name == "scores").type.tensor_type.shape.dim
    limit = detector.candidates
    values: dict[str, NDArray[Any]] = {
        "most": np.array([detector.max_detections], np.int64),
        "iou": np.array([detector.nms_iou], np.float32),
        "threshold": np.array([network.threshold], np.float32),
        "columns": np.array([1, 1, 1], np.int64),
        "last": np.array([1], np.int64),
        "pair": np.array([0, 2], np.int64),
        "triple": np.array([0, 2, 1], np.int64),
        "flat": np.array([0, -1], np.int64),
        "sorted": np.array([limit + 1], np.int64),
        "next": np.array([limit], np.int64),
        "none": np.array(0, np.float32),
    }  # fmt: skip
    graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in values.items())
    make = onnx.helper.make_node
    candidates = "all_scores"
    if scores[1].dim_value * scores[2].dim_value > limit:  # of each image, as `OneStageDetector.detect` does
        candidates = "candidates"
        graph.node.extend(
            [
                make("Reshape", ["all_scores", "flat"], ["flat_scores"]),
                make("TopK", ["flat_scores", "sorted"], ["sorted_scores", "_order"]),
                make("Gather", ["sorted_scores", "next"], ["next_score"], axis=1),
                make("Unsqueeze", ["next_score", "last"], ["bound"]),
                make("Greater", ["all_scores", "bound"], ["is_candidate"]),
                make("Where", ["is_candidate", "all_scores", "none"], ["candidates"]),
            ]
        )
    graph.node.extend(
        [
            make("Transpose", [candidates], ["by_class"], perm=[0, 2, 1]),
            make("NonMaxSuppression", ["all_boxes", "by_class", "most", "iou", "threshold"], ["chosen"]),
            make("Split", ["chosen", "columns"], ["image_column", "label_column", "_place"], axis=1),
            make("Squeeze", ["image_column", "last"], ["image_index"]),
            make("Squeeze", ["label_column", "last"], ["labels"]),
            make("Gather", ["chosen", "pair"], ["image_and_place"], axis=1),
            make("GatherND", ["all_boxes", "image_and_place"], ["boxes"]),
            make("Gather", ["chosen", "triple"], ["image_place_label"], axis=1),
            make("GatherND", ["all_scores", "image_place_label"], ["scores"]),
        ]
    )
    kinds = onnx.TensorProto
    described: list[tuple[str, int, list[str | int]]] = [("boxes", kinds.FLOAT, ["n", 4]), ("labels", kinds.INT64, ["n"]), ("scores", kinds.FLOAT, ["n"]),
                 ("image_index", kinds.INT64, ["n"])]  # fmt: skip
    del graph.output[:]
    graph.output.extend(onnx.helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in described)
    graph.input.append(onnx.helper.make_tensor_value_info("threshold", kinds.FLOAT, [1]))
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(file))
