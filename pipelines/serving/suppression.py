"""The choice among a one-stage detector's boxes, as part of an onnx file."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from pipelines.serving.exported import ExportedDetector


def with_suppression(file: Path, network: ExportedDetector) -> None:
    """Adds to an onnx file with boxes and scores of all places the choice among them, by onnx's NonMaxSuppression.

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
