"""Losses against hand-worked values, metrics against pycocotools, and detectors that learn."""

import contextlib
import io
import math
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import mlflow
import numpy as np
import pytest
import torch
from conftest import ROOT, built
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchvision.ops import box_iou

from benchmarks.rcnn import RegionClassifier, propose
from datamodules import DigitScenes
from datamodules.annotated.mixing import boxes_of
from datamodules.options import Preprocessing
from modules import DetectionModule, MultiTaskModule, Optimization, SegmentationModule, create_backbone
from modules.detection import FCOS, RTDETR, YOLO, FasterRCNN, RetinaNet
from modules.detection.metrics import DetectionMetric, average_precision, best_threshold, confusion, match, overlaps
from modules.detection.pictures import BoxExample
from modules.detection.yolo import assign, cell_centres, decode_boxes, distribution_focal_loss, quality_focal_loss
from modules.inspection import feature_maps
from modules.networks import BackboneError
from modules.networks.backbones import computed_whole
from modules.networks.dense_decoders import DeepLabV3Plus
from modules.networks.features import extract
from modules.networks.pyramid import Pyramid, aligned
from modules.optimization import parameter_groups
from modules.pictures.boxes import draw_boxes
from modules.spec import Backbone, DataSpec
from pipelines.detection import detection
from pipelines.serving.store import save_model

SLIM = {"channels": [16, 32, 64, 128], "small_stem": False}
DETECTORS = {
    "yolo": (partial(YOLO, width=32, depth=1), 70),
    "fcos": (partial(FCOS, width=32, depth=1), 90),
    "retinanet": (partial(RetinaNet, width=32), 120),
    "faster_rcnn": (partial(FasterRCNN, strides=[4, 8], width=32, hidden=64), 250),
    "rtdetr": (partial(RTDETR, strides=[4, 8, 16], width=32, queries=60, layers=2, denoising=20), 350),
}


def small(detector: Any, **options: Any) -> DetectionModule:
    torch.manual_seed(0)
    return built(
        DetectionModule,
        num_classes=10,
        image_size=64,
        backbone="resnet18",
        backbone_options=SLIM,
        detector=detector,
        **options,
    )


@pytest.mark.parametrize("detector", [FCOS, RetinaNet])
def test_a_width_that_has_no_groups_is_refused(detector: Any) -> None:
    with pytest.raises(BackboneError, match=r"multiple of 32, such as 32 or 64, not 48"):
        small(partial(detector, width=48))
    with pytest.raises(BackboneError, match=r"such as 32, not 16"):
        small(partial(detector, width=16))


def boxes_like(count: int, generator: torch.Generator, side: float = 64) -> Tensor:
    corners = torch.rand(count, 2, 2, generator=generator) * side
    low, high = corners.amin(1), corners.amax(1) + 1
    return torch.cat((low, high), 1)


# Losses


def test_distribution_focal_loss_is_what_one_works_out_by_hand() -> None:
    logits = torch.log(torch.tensor([0.1, 0.2, 0.6, 0.1]))[None, None].repeat(1, 4, 1)
    target = torch.tensor([[1.25, 2.0, 0.0, 7.0]])  # the last lies outside and counts as the last bin
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    expected = [
        -(0.75 * math.log(0.2) + 0.25 * math.log(0.6)) - entropy,
        -math.log(0.6),
        -math.log(0.1),
        -math.log(0.1),
    ]
    assert float(distribution_focal_loss(logits, target)) == pytest.approx(np.mean(expected), abs=0.01)
    exact = torch.full((1, 4, 4), -50.0)
    exact[..., 1:3] = torch.log(torch.tensor([0.75, 0.25]))
    assert float(distribution_focal_loss(exact, torch.full((1, 4), 1.25))) == pytest.approx(0, abs=1e-6)


def test_quality_focal_loss_is_what_one_works_out_by_hand() -> None:
    logit = math.log(0.2 / 0.8)
    got = quality_focal_loss(torch.tensor([logit, logit, logit]), torch.tensor([0.0, 0.7, 0.2]))
    entropy = -(0.7 * math.log(0.2) + 0.3 * math.log(0.8))
    assert got.tolist() == pytest.approx([0.04 * -math.log(0.8), 0.25 * entropy, 0], abs=1e-6)


def test_boxes_are_expected_distances_from_their_place() -> None:
    points, strides = cell_centres([(2, 3)], [8], torch.device("cpu"))
    assert points.tolist() == [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12]]
    sides = torch.full((1, 6, 4, 4), -50.0)
    for side, r in enumerate([1, 2, 3, 0]):  # bin 0 is -1 stride, bin 1 is 0
        sides[..., side, r] = 50.0
    assert decode_boxes(sides, points, strides)[0, 4].tolist() == [12, 4, 28, 4]
    sides[..., 0, 2] = 50.0  # half 0, half one stride
    assert decode_boxes(sides, points, strides)[0, 4, 0] == 8


def naive_assign(scores: Tensor, guesses: Tensor, points: Tensor, strides: Tensor, boxes: Tensor, labels: Tensor,
                 top: int) -> tuple[list[int], list[float]]:  # fmt: skip
    """Section 3.2 of the paper for one image, in loops."""
    places, wishes = len(points), []
    for box, label in zip(boxes, labels, strict=True):
        fit = {}
        for a in range(places):
            middle, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2
            if all(abs(points[a, d] - middle[d]) <= max(half[d], strides[a] / 2) for d in (0, 1)):
                overlap = float(box_iou(box[None], guesses[a][None]))
                fit[a] = (float(scores[a, label]) * overlap**6 + 1e-12, overlap)
        best = sorted(fit, key=lambda a: -fit[a][0])[:top]
        wishes.append({a: fit[a] for a in best})
    matched, quality = [-1] * places, [0.0] * places
    for a in range(places):
        wanting = [m for m in range(len(boxes)) if a in wishes[m]]
        if wanting:
            matched[a] = max(wanting, key=lambda m: wishes[m][a][1])
    for m, wish in enumerate(wishes):
        own = {a: fit for a, fit in wish.items() if matched[a] == m}
        if own:
            t, u = max(fit for fit, _ in own.values()), max(overlap for _, overlap in own.values())
            for a, (fit, _) in own.items():
                quality[a] = fit / t * u
    return matched, quality


def test_assignment_equals_the_papers_in_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    points, strides = cell_centres([(8, 8), (4, 4)], [8, 16], torch.device("cpu"))
    counts, images = [3, 0, 5], 3
    scores = torch.rand(images, len(points), 4, generator=generator)
    reach = 9 + 20 * torch.rand(images, len(points), 4, generator=generator)  # so wide that no two fit equally badly
    guesses = torch.cat((points - reach[..., :2], points + reach[..., 2:]), 2)
    boxes, labels, real = (
        torch.zeros(images, 5, 4),
        torch.zeros(images, 5, dtype=torch.long),
        torch.zeros(images, 5) > 0,
    )
    for i, count in enumerate(counts):
        boxes[i, :count] = boxes_like(count, generator)
        labels[i, :count] = torch.randint(4, (count,), generator=generator)
        real[i, :count] = True
    boxes[2, 0] = torch.tensor([17.0, 10.0, 18.5, 40.0])  # thin: no place of the coarser map lies in it
    matched, quality = assign(scores, guesses, points, strides, boxes, labels, real, top=4)
    for i, count in enumerate(counts):
        expected = naive_assign(scores[i], guesses[i], points, strides, boxes[i, :count], labels[i, :count], 4)
        assert matched[i].tolist() == expected[0]
        assert quality[i].tolist() == pytest.approx(expected[1], rel=1e-4, abs=1e-9)
    assert 0 in matched[2]


def test_a_loss_of_one_object_is_what_one_works_out_by_hand() -> None:
    """One map of one place, so that everything can be written down: complete IoU, quality and spread."""
    backbone = create_backbone("resnet18", image_size=64, features_only=True, small_stem=False)
    yolo = YOLO(backbone, 2, 64, strides=[32], width=16, bins=4)
    points, strides = torch.tensor([[32.0, 32.0]]), torch.tensor([32.0])
    sides = torch.full((1, 1, 4, 4), -50.0)
    sides[..., 2] = 50.0  # one stride to each side: the box 0 0 64 64
    batch = {
        "boxes": [torch.tensor([[0.0, 0.0, 64.0, 32.0]])],
        "labels": [torch.tensor([1])],
        "ignore": [torch.tensor([False])],
    }
    parts, total = yolo.losses((torch.zeros(1, 1, 2), sides, points, strides), batch)
    iou, shape = 0.5, 4 / math.pi**2 * (math.atan(2) - math.atan(1)) ** 2
    distance = 16**2 / (64**2 + 64**2)
    complete = 1 - iou + distance + shape * shape / (1 - iou + shape)
    assert float(total) == 1  # at least
    assert float(parts["box"]) == pytest.approx(2.5 * iou * complete, rel=1e-4)
    entropy = math.log(2)  # of a score of 0.5
    assert float(parts["class"]) == pytest.approx(0.25 * entropy, rel=1e-4)  # right class: 0.5 is the quality
    assert float(parts["spread"]) == pytest.approx(0.5 * iou * 100 / 4, rel=1e-3)  # only the bottom is a stride off


@pytest.mark.parametrize("kind", DETECTORS)
def test_what_is_to_be_ignored_teaches_nothing(kind: str) -> None:
    module = small(DETECTORS[kind][0])
    image = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8)
    empty = {"boxes": [torch.zeros(0, 4)], "labels": [torch.zeros(0, dtype=torch.long)], "ignore": [torch.zeros(0) > 0]}
    whole = {
        "boxes": [torch.tensor([[-20.0, -20, 90, 90]])],
        "labels": [torch.tensor([3])],
        "ignore": [torch.tensor([True])],
    }
    losses = []
    for batch in (empty, whole):
        module.train()
        torch.manual_seed(1)
        parts, _ = module.detector.losses(module(image), batch)
        losses.append(sum(float(value.detach().nan_to_num(0)) for value in parts.values()))
    assert losses[0] > 0
    assert losses[1] == 0


@torch.no_grad()
def test_rtdetr_finds_what_the_library_finds_on_the_same_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modules.detection.transformer.TIE", 1e-6)  # scores of random weights are close to each other
    detector = small(DETECTORS["rtdetr"][0]).eval().detector
    maps = [torch.randn(3, 32, side, side) for side in (16, 8, 4)]
    boxes, scores = detector.dense(maps)
    found = detector.net(None, inputs_embeds=maps[0], encoder_outputs=(maps,))
    for n in range(3):  # queries are in another order
        told = found.intermediate_logits[n, -1].sigmoid()
        order = torch.cdist(scores[n].double(), told.double()).argmin(1)
        assert len(order.unique()) == 60
        torch.testing.assert_close(scores[n], told[order], atol=1e-5, rtol=1e-4)
        middles = found.intermediate_reference_points[n, -1, order, :2] * 64
        inner = (boxes[n] > 0).all(1) & (boxes[n] < 64).all(1)  # corners of the others were moved into the image
        torch.testing.assert_close(
            ((boxes[n, :, :2] + boxes[n, :, 2:]) / 2)[inner], middles[inner], atol=1e-3, rtol=1e-4
        )


@torch.no_grad()
def test_rtdetr_chooses_among_places_that_look_alike_whatever_the_last_digits_are() -> None:
    detector, chosen = small(DETECTORS["rtdetr"][0]).eval().detector, list[Tensor]()
    net: Any = detector.net
    for parameter in (*net.enc_score_head.parameters(), *net.enc_bbox_head.parameters()):
        parameter.zero_()  # as before it has learned anything: all places have one score
    net.enc_score_head.weight.normal_(std=1e-7)
    net.decoder.register_forward_pre_hook(
        lambda _, args, given: chosen.append(given["reference_points"]), with_kwargs=True
    )
    detector.dense([torch.randn(2, 32, side, side) for side in (16, 8, 4)])
    anchors, _ = net.generate_anchors(((16, 16), (8, 8), (4, 4)), device="cpu", dtype=torch.float32)
    torch.testing.assert_close(chosen[0], anchors[:, :60].expand(2, -1, -1))


@pytest.mark.parametrize(
    ("strides", "size", "said"),
    [
        (None, 50, "--data.image_size 48, not 50"),
        (None, "64x50", "--data.image_size 64x48, not 64x50"),
        ([4, 16], 64, "must double"),
    ],
)
def test_rtdetr_refuses_sizes_and_strides_that_its_maps_cannot_have(strides: Any, size: Any, said: str) -> None:
    with pytest.raises(BackboneError, match=said):
        built(
            DetectionModule, num_classes=2, image_size=size, backbone="test_resnet", detector=partial(RTDETR, strides=strides, width=16)
        )  # fmt: skip


# Metrics


def random_scene(seed: int, images: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Detections that are truth with noise, beside false ones; ties of scores, ignored objects, empty images. The last column
    of the truth is the area of the box."""
    rng = np.random.default_rng(seed)
    truth, found = [], []
    for image in range(images):
        for _ in range(rng.integers(0, 7)):
            corner, size = rng.uniform(0, 200, 2), rng.uniform(5, 120, 2)
            box, label = np.concatenate((corner, corner + size)), rng.integers(4)
            truth.append([image, *box, label, rng.random() < 0.15, size.prod()])
            for _ in range(rng.integers(0, 4)):
                noisy = box + rng.normal(0, 0.08 * size.repeat(2), 4)
                noisy[2:] = np.maximum(noisy[2:], noisy[:2] + 1)
                found.append([image, *noisy, label if rng.random() < 0.85 else rng.integers(4), round(rng.random(), 2)])
        for _ in range(rng.integers(0, 3)):
            corner = rng.uniform(0, 200, 2)
            found.append([image, *corner, *(corner + rng.uniform(5, 90, 2)), rng.integers(4), round(rng.random(), 2)])
    tables = (np.array(rows, np.float32).astype(np.float64) for rows in (found, truth))
    return tuple(tables)  # type: ignore[return-value]


def pycocotools_figures(found: np.ndarray, truth: np.ndarray, most: int = 100) -> dict[str, Any]:
    def rows(table: np.ndarray) -> list[dict[str, Any]]:
        return [
            {"id": i + 1, "image_id": int(r[0]), "category_id": int(r[5]), "area": float((r[3] - r[1]) * (r[4] - r[2])),
             "bbox": [float(r[1]), float(r[2]), float(r[3] - r[1]), float(r[4] - r[2])]}
            for i, r in enumerate(table)
        ]  # fmt: skip

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": i} for i in range(40)],
            "categories": [{"id": k} for k in range(4)],
            "annotations": [
                row | {"iscrowd": int(t[6]), "area": float(t[7])} for row, t in zip(rows(truth), truth, strict=True)
            ],
        }
        coco.createIndex()
        answers = coco.loadRes([row | {"score": float(f[6])} for row, f in zip(rows(found), found, strict=True)])
        measure = COCOeval(coco, answers, "bbox")
        measure.params.maxDets = [most]
        measure.evaluate()
        measure.accumulate()
    precision, recall = (
        np.where(measure.eval[key] < 0, np.nan, measure.eval[key])[..., -1] for key in ("precision", "recall")
    )
    sizes = {f"ap_{name}": np.nanmean(precision[..., i]) for i, name in enumerate(("small", "medium", "large"), 1)}
    figures = sizes | {"ap": np.nanmean(precision[..., 0]), "ap50": np.nanmean(precision[0, ..., 0]),
                       "ap75": np.nanmean(precision[5, ..., 0]), f"ar{most}": np.nanmean(recall[..., 0])}  # fmt: skip
    return figures | {"per_class": [measure.eval["precision"][:, :, k, 0, -1].mean() for k in range(4)]}


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_equals_that_of_pycocotools(seed: int) -> None:
    found, truth = random_scene(seed)
    expected, got = pycocotools_figures(found, truth), average_precision(found, truth, 4)
    assert 0.05 < expected["ap"] < 0.9
    assert got["per_class"][:, 0] == pytest.approx(expected.pop("per_class"), abs=1e-6)
    assert {key: got[key] for key in expected} == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("most", [100, 2])
def test_small_and_large_go_by_the_file_s_area_and_as_many_count_as_are_asked_for(most: int) -> None:
    found, truth = random_scene(7)
    area = (truth[:, 3:5] - truth[:, 1:3]).prod(1) * np.random.default_rng(0).uniform(0.2, 1, len(truth))
    by_box, truth = truth, np.column_stack((truth[:, :7], area.astype(np.float32)))
    expected, got = pycocotools_figures(found, truth, most), average_precision(found, truth, 4, most)
    assert got["per_class"][:, 0] == pytest.approx(expected.pop("per_class"), abs=1e-6)
    assert {key: got[key] for key in expected} == pytest.approx(expected, abs=1e-6)
    plain = average_precision(found, by_box, 4, most)
    assert plain["ap"] == got["ap"]
    assert plain["ap_small"] != got["ap_small"]


def test_crowded_images_are_measured_whole_where_that_is_asked_for() -> None:
    corners = torch.tensor([[10.0 * (k % 15), 10.0 * (k // 15)] for k in range(150)])
    one = {"boxes": torch.cat((corners, corners + 8), 1), "labels": torch.zeros(150).long(),
           "scores": torch.linspace(0.9, 0.1, 150), "ignore": torch.zeros(150).bool()}  # fmt: skip
    figures = []
    for most in (100, 300):
        metric = DetectionMetric(1, most)
        metric.update([one], [one])
        figures.append(metric.compute())
    assert figures[0]["ap"] == pytest.approx(0.663, abs=1e-3)
    assert figures[1]["ap"] == figures[1]["ar300"] == 1


@pytest.mark.parametrize("kind", ["yolo", "faster_rcnn"])
def test_which_boxes_are_kept_can_be_chosen(kind: str) -> None:
    module = small(DETECTORS[kind][0], max_detections=7).eval()
    image = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def boxes(**choice: Any) -> dict[str, Any]:
        module.choose(threshold=0.0, **choice)
        (answer,) = module.predict({"image": image})
        return answer

    assert len(boxes()["boxes"]) == 7
    assert len(boxes(max_detections=40)["boxes"]) == 40
    every = boxes()["labels"]
    name = every[0]
    assert boxes(classes=[name])["labels"] == [label for label in every if label == name]
    with pytest.raises(BackboneError, match=r"no class 'unicorn', but"):
        module.choose(classes=["unicorn"])
    module.choose(classes=module.label_names)
    apart = boxes(nms=0.1, across_classes=True, max_detections=300)
    found = torch.tensor(apart["boxes"])
    assert 1 < len(found) < 300
    assert (box_iou(found, found) - torch.eye(len(found))).max() <= 0.1 + 0.01
    again = DetectionModule.from_architecture(module.architecture)
    assert again.architecture == module.architecture
    assert again.detector.nms_iou == 0.1
    with pytest.raises(BackboneError, match="nms must be between 0 and 1, not 2"):
        module.choose(nms=2)


def test_overlaps_are_torchvisions() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = boxes_like(20, generator), boxes_like(30, generator)
    assert overlaps(one.double().numpy(), other.double().numpy()) == pytest.approx(
        box_iou(one, other).numpy(), abs=1e-6
    )


def test_parts_of_the_images_measured_apart_and_gathered_are_the_whole() -> None:
    """Two processes with every second image each, as they are gathered, and an odd number of images."""
    found, truth = random_scene(5, images=11)

    def feed(metric: DetectionMetric, image: int) -> None:
        f, t = (torch.from_numpy(table[table[:, 0] == image]).float() for table in (found, truth))
        metric.update(
            [{"boxes": f[:, 1:5], "labels": f[:, 5].long(), "scores": f[:, 6]}],
            [{"boxes": t[:, 1:5], "labels": t[:, 5].long(), "ignore": t[:, 6] > 0}],
        )

    whole, parts = DetectionMetric(4), [DetectionMetric(4), DetectionMetric(4)]
    for rank, metric in enumerate(parts):
        metric.rank, metric.world_size = rank, 2
    for image in range(11):
        feed(whole, image)
        feed(parts[image % 2], image)
    both = DetectionMetric(4)
    both.update([], [])
    both.detections = [torch.cat(parts[1].detections), torch.cat(parts[0].detections)]
    both.truth = [torch.cat(parts[1].truth), torch.cat(parts[0].truth)]
    one, two = whole.compute(), both.compute()
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert np.array_equal(value, two[key], equal_nan=True), key


def test_threshold_and_confusions_are_what_one_counts_by_hand() -> None:
    truth = np.array(
        [[0, 0, 0, 10, 10, 0, 0], [0, 20, 0, 30, 10, 1, 0], [1, 0, 0, 10, 10, 1, 0], [1, 50, 50, 90, 90, 0, 1]], float
    )
    found = np.array(
        [
            [0, 0, 0, 10, 10, 0, 0.9],  # hit
            [0, 20, 0, 30, 10, 0, 0.8],  # right place, wrong class
            [1, 0, 0, 10, 9, 1, 0.7],  # hit
            [1, 55, 55, 60, 60, 0, 0.6],  # part of a crowd: nothing
            [1, 30, 0, 40, 10, 1, 0.2],  # false alarm
            [1, 0, 1, 10, 10, 1, 0.1],  # found before: false alarm
        ],
        float,
    )
    assert match(found[:2], truth[:2]).tolist() == [0, -1]
    assert match(found[2:], truth[2:]).tolist() == [0, -2, -1, -1]
    threshold, f1 = best_threshold(found, truth)
    assert (threshold, f1) == (0.7, pytest.approx(2 * 2 / (3 + 3)))
    counts = confusion(found[found[:, 6] >= 0.15], truth, 2)
    assert counts.tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 0]]


@pytest.mark.parametrize("nothing", ["found", "truth", "both"])
def test_no_detections_or_no_objects_are_measured_too(nothing: str) -> None:
    metric, none = DetectionMetric(3), torch.zeros(0)
    full = {"boxes": torch.tensor([[1.0, 1, 9, 9]]), "labels": torch.tensor([2]), "scores": torch.tensor([0.5]),
            "ignore": torch.tensor([False])}  # fmt: skip
    empty = {"boxes": torch.zeros(0, 4), "labels": none.long(), "scores": none, "ignore": none > 0}
    metric.update([empty if nothing in ("found", "both") else full], [empty if nothing in ("truth", "both") else full])
    values = metric.compute()
    figures = {"ap": 0, "ap50": 0, "ap75": 0, "ar100": 0, "f1": 0} if nothing == "found" else {}
    assert {key: value for key, value in values.items() if not isinstance(value, np.ndarray)} == figures
    assert values["per_class"][:, 0] == pytest.approx([np.nan, np.nan, 0 if figures else np.nan], nan_ok=True)
    assert values["confusion"].sum() == (nothing != "both")  # missed, or a false alarm


# Backbones


@pytest.mark.parametrize(("name", "strides"), [("resnet18", [4, 8, 16, 32, 64]), ("convnext_atto", [4, 8]),
                                               ("swin_tiny_patch4_window7_224", [8, 16]), ("vit_tiny_patch16_224", [4, 8, 16, 32]),
                                               ("tf_efficientnet_lite0", [8, 16, 32]), ("lenet5", [2, 4, 8])])  # fmt: skip
def test_any_backbone_gives_maps_at_the_strides_asked_for(name: str, strides: list[int]) -> None:
    channels = 1 if name == "lenet5" else 3
    backbone = create_backbone(name, in_chans=channels, image_size=128, features_only=True)
    pyramid = Pyramid(backbone, strides)
    maps = pyramid(backbone(torch.randn(1, channels, 128, 128)))
    assert [x.shape[1] for x in maps] == pyramid.channels
    rim = 2 if name == "lenet5" else 0  # it does not pad
    assert all(abs(x.shape[2] - 128 // stride) <= rim for x, stride in zip(maps, strides, strict=True))


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext", "efficientvim_m1"])
def test_all_that_learns_gets_a_gradient_though_no_head_reads_the_last_map(name: str) -> None:
    """DDP ends a training in which it does not."""
    data, backbone = DataSpec(num_classes=2, image_size=128, label_names=["a", "b"]), Backbone(name)
    several = DataSpec(num_classes=2, image_size=128, targets={"detection": ["a", "b"], "segmentation": ["a", "b"]})
    for module in (
        DetectionModule(data, backbone, detector=partial(YOLO, width=16)),
        SegmentationModule(data, backbone, decoder=DeepLabV3Plus),
        MultiTaskModule(several, backbone, tasks=["detection", "segmentation"], decoder=DeepLabV3Plus),
    ):
        found = tree_leaves(module(torch.zeros(2, 3, 128, 128, dtype=torch.uint8)))
        torch.stack([output.sum() for output in found if output.requires_grad]).sum().backward()
        assert not [key for key, value in module.named_parameters() if value.requires_grad and value.grad is None]
        assert not all(parameter.requires_grad for parameter in module.backbone.parameters())


@pytest.mark.parametrize(
    ("name", "last"), [("test_resnet", "layer4"), ("test_efficientnet", "blocks.4"), ("test_convnext", "stages_3")]
)
def test_layers_that_no_head_reads_are_not_computed_but_looked_into(name: str, last: str) -> None:
    torch.manual_seed(0)
    data = DataSpec(num_classes=2, image_size=96, label_names=["a", "b"])
    module = DetectionModule(data, Backbone(name), detector=partial(YOLO, width=16))
    calls: list[nn.Module] = []
    next(module.backbone.get_submodule(last).children()).register_forward_hook(lambda layer, *_: calls.append(layer))
    image = torch.randint(256, (2, 3, 96, 96), dtype=torch.uint8)
    for one in (module.eval(), deepcopy(module).train()):
        found = tree_leaves(one(image))
        assert not calls
        with computed_whole(one.backbone):
            assert all(map(torch.equal, found, tree_leaves(one(image))))
        assert calls.pop() in one.backbone.modules()
    assert feature_maps(module, image, [last])[last].shape[2:] == (3, 3), "all maps can still be inspected"
    assert extract(module.backbone, [{"image": image}], module.normalize)[0].shape == (2, module.backbone.feature_info.channels()[-1])  # fmt: skip


@pytest.mark.parametrize("kind", [*DETECTORS])
@pytest.mark.parametrize("name", ["lenet5", "airbench"])
def test_maps_of_networks_without_padding_are_read(kind: str, name: str) -> None:
    torch.manual_seed(0)
    data = DataSpec(num_classes=2, image_size=96, label_names=["a", "b"])
    module = DetectionModule(data, Backbone(name), detector=DETECTORS[kind][0]).eval()
    with torch.no_grad():
        found = module.predict({"image": torch.randint(256, (2, 3, 96, 96), dtype=torch.uint8)})
    assert len(found) == 2


def test_aligned_maps_only_gain_a_border() -> None:
    maps = [torch.rand(1, 1, side, side + 2) for side in (23, 11, 5)]
    for exact in (True, False):
        padded = aligned(maps, [4, 8, 16], exact)
        assert [tuple(x.shape[2:]) for x in padded] == [(24, 28), (12, 14), (6, 7)]
        assert torch.equal(padded[0][..., :-1, 1:-2], maps[0])
    even = [torch.rand(1, 1, side, side) for side in (13, 7, 4)]
    assert all(x is y for x, y in zip(aligned(even, [8, 16, 32], exact=False), even, strict=True))


def test_strides_that_make_no_sense_are_refused() -> None:
    with pytest.raises(BackboneError, match="ascending powers of two, not \\[8, 12\\]"):
        small(partial(YOLO, strides=[8, 12]))


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext", "test_vit"])
def test_a_detectors_backbone_starts_another_task(name: str, tmp_path: Path) -> None:
    """Through the registry's own files, though made for feature maps its parts have other names, and the last are missing."""
    torch.manual_seed(0)
    module = DetectionModule(
        DataSpec(num_classes=2, image_size=160), Backbone(name), detector=partial(YOLO, strides=[8, 16], width=16)
    )
    save_model(tmp_path / "model", module, Preprocessing(160, 3, "pad"), "detection")
    log = mlflow.pyfunc.log_model(name="model", python_model=str(ROOT / "pipelines" / "serving" / "model.py"), pip_requirements=[],
                                  artifacts={"model": str(tmp_path / "model")}, registered_model_name=f"boxes-{name}")  # fmt: skip
    address = f"models:/boxes-{name}/{log.registered_model_version}"
    whole = create_backbone(address, image_size=160)
    assert whole(torch.zeros(1, 3, 160, 160)).ndim == 2
    again = DetectionModule(
        DataSpec(num_classes=5, image_size=160), Backbone(address), detector=partial(YOLO, strides=[16, 32], width=16)
    )
    image = torch.randint(256, (2, 3, 160, 160), dtype=torch.uint8)
    with torch.no_grad(), computed_whole(module.backbone):  # the first head did not read the last map
        mine, its = (m.eval().backbone(m.normalize(image)) for m in (module, again))
    assert all(torch.equal(one, other) for one, other in zip(mine, its, strict=True))


# The module


class Trained:
    """What a detector learned of eight scenes."""

    def __init__(self, kind: str, folder: Path) -> None:
        detector, steps = DETECTORS[kind]
        self.data = DigitScenes(scene_size=64, train=8, val=8, test=8, batch_size=8, augmentation="none")
        source: Any = self.data.sources["train"]
        source.extent = (0.3, 0.6)  # of 64 pixels
        self.data.sources["val"] = source
        self.module = small(detector, optimization=Optimization(lr=4e-3, ema_decay=0.9))
        trainer = L.Trainer(
            max_epochs=steps, check_val_every_n_epoch=steps, logger=False, enable_checkpointing=False, accelerator="cpu",
            enable_progress_bar=False, num_sanity_val_steps=0, use_distributed_sampler=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(self.module, self.data)
        trainer.save_checkpoint(folder / "eight.ckpt")
        self.checkpoint = torch.load(folder / "eight.ckpt", weights_only=True)["state_dict"]
        self.metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        self.module.eval()


@pytest.fixture(scope="module")
def yolo(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained("yolo", tmp_path_factory.mktemp("yolo"))


def test_yolo_learns_eight_scenes(yolo: Trained) -> None:
    assert yolo.metrics["val/ap50"] > 0.9
    assert yolo.metrics["val/f1"] > 0.9
    # Also where weights are averaged, of which the threshold is none.
    assert float(yolo.module.threshold) == pytest.approx(yolo.metrics["val/threshold"])
    assert float(yolo.checkpoint["threshold"]) == pytest.approx(yolo.metrics["val/threshold"])


@pytest.mark.parametrize(
    "kind", ["fcos", *(pytest.param(k, marks=pytest.mark.slow) for k in ("retinanet", "faster_rcnn", "rtdetr"))]
)
def test_the_other_detectors_learn_eight_scenes(kind: str, tmp_path: Path) -> None:
    assert Trained(kind, tmp_path).metrics["val/ap50"] > 0.9


def test_answers_are_in_pixels_of_the_image_as_it_was_read(yolo: Trained) -> None:
    batch = next(iter(yolo.data.val_dataloader()))
    plain = yolo.module.predict(batch)
    assert sum(len(answer["boxes"]) for answer in plain) > 8
    larger = yolo.module.predict({**batch, "size": torch.tensor([[96, 128]] * 8)})  # scaled by half, padded below
    for answer, twice in zip(plain, larger, strict=True):
        assert twice["labels"] == answer["labels"]
        expected = (np.array(answer["boxes"]).reshape(-1, 4) * 2).clip(0, [128, 96, 128, 96])
        assert np.array(twice["boxes"]).reshape(-1, 4) == pytest.approx(expected, abs=0.02)
        assert all(0 <= x <= 128 and 0 <= y <= 96 for box in twice["boxes"] for x, y in (box[:2], box[2:]))
    strips = yolo.module.predict({**batch, "size": torch.tensor([[16, 128]] * 8)})  # all below was added
    assert 0 < sum(len(answer["boxes"]) for answer in strips) < sum(len(answer["boxes"]) for answer in plain)
    assert all(y1 < y2 <= 16 for answer in strips for _, y1, _, y2 in answer["boxes"])


def test_a_module_is_made_again_from_its_architecture(yolo: Trained) -> None:
    again = DetectionModule.from_architecture(yolo.module.architecture)
    again.load_state_dict(yolo.module.state_dict())
    batch = next(iter(yolo.data.val_dataloader()))
    assert again.eval().predict(batch) == yolo.module.predict(batch)


def test_pictures_show_boxes(yolo: Trained) -> None:
    batch = next(iter(yolo.data.val_dataloader()))
    assert yolo.module.draw_samples(batch).shape[2] == 3
    image = batch["image"][0].permute(1, 2, 0).contiguous().numpy()
    before = image.copy()
    drawn = yolo.module.answers.draw(image, yolo.module.predict(batch)[0])
    assert drawn.shape == (256, 256, 3)
    assert (drawn != image.repeat(4, 0).repeat(4, 1)).any()
    assert (image == before).all()


def test_letters_of_other_languages_are_drawn() -> None:
    image, box = np.zeros((64, 64, 3), np.uint8), np.array([[8, 30, 40, 50]])
    assert (draw_boxes(image, box, ["ü"]) != draw_boxes(image, box, ["ж"])).any()


def test_head_and_backbone_learn_at_their_own_rates(yolo: Trained) -> None:
    names = {group["name"] for group in parameter_groups(yolo.module)}
    assert names == {"head", "head.no_decay", "backbone", "backbone.no_decay"}
    assert isinstance(yolo.module.detector, nn.Module)


# R-CNN and Fast R-CNN


def test_proposals_find_most_objects_without_learning() -> None:
    source = DigitScenes(train=8, val=8, test=20).sources["test"]
    hits = []
    for i in range(20):
        scene = source[i]
        regions = propose(scene["image"])
        assert len(regions) <= 200
        assert (regions >= 0).all()
        assert (regions <= 128).all()
        hits += (box_iou(torch.as_tensor(scene["boxes"]), regions).amax(1) >= 0.5).tolist()
    assert np.mean(hits) >= 0.85


@pytest.mark.parametrize("shared", [True, False])
def test_regions_are_classified_and_corrected(shared: bool) -> None:
    """With features that nothing was learned for, the scenes that it saw are still told from noise."""
    source = DigitScenes(train=8, val=8, test=8).sources["train"]
    scenes = [source[i] for i in range(8)]
    module = DetectionModule(
        DataSpec(num_classes=10, image_size=128), Backbone("resnet18", options={"channels": [16, 32, 64, 128]})
    )
    classifier = RegionClassifier(module, 10, shared, crop=48, count=100).fit([s["image"] for s in scenes], scenes)
    metric = DetectionMetric(10)
    for scene in scenes:
        found = classifier.detect(scene["image"])
        assert (found["boxes"][:, 2:] > found["boxes"][:, :2]).all()
        metric.update([found], [{key: torch.as_tensor(scene[key]) for key in ("boxes", "labels", "ignore")}])
    assert metric.compute()["ap50"] > 0.3


def test_training_batches_of_many_sizes_keep_their_boxes_and_are_the_same_again() -> None:
    module = small(partial(YOLO, width=16, depth=1), multi_scale=0.5)
    module._trainer = SimpleNamespace(datamodule=DigitScenes(seed=3), current_epoch=1)
    image = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    image[:, :, 16:40, 8:48] = 255
    batch = {"image": image, "boxes": [torch.tensor([[8.0, 16, 48, 40]])] * 2, "masks": [image[:1, 0].clone()] * 2}
    sides = set()
    for k in range(30):
        one, again = module._rescaled(batch, k), module._rescaled(batch, k)
        side = one["image"].shape[2]
        sides.add(side)
        assert one["image"].shape == again["image"].shape == (2, 3, side, side)
        found = boxes_of((one["image"][:1, 0] > 127).byte().numpy())
        assert np.allclose(one["boxes"][0], found, atol=0.6)
        assert np.allclose(one["boxes"][0], boxes_of(one["masks"][0].numpy()), atol=1)
        assert torch.isfinite(
            module.losses(one | {"labels": [torch.zeros(1).long()] * 2, "ignore": [torch.zeros(1).bool()] * 2}).total
        )
    assert sides == {32, 48, 64, 80, 96}
    assert small(partial(YOLO, width=16, depth=1))._rescaled(batch, 0) is batch
    with pytest.raises(BackboneError, match="leaves no other size than 64×64 pixels"):
        small(partial(YOLO, width=16, depth=1), multi_scale=0.1)


def test_a_padding_that_the_strides_do_not_divide_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        detection(["fit", "--data", "DigitScenes", "--data.scene_size", "64", "--data.train", "8", "--data.val", "4", "--data.test", "4",
                   "--data.pad_multiple", "12", "--backbone", "test_resnet", "--output", "out"])  # fmt: skip
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert (
        "--data.pad_multiple 12 is no multiple of 16, the largest stride of the detector: give --data.pad_multiple 16"
        in message
    )
    assert "Traceback" not in message


def test_boxes_are_drawn_where_they_are_in_images_of_any_shape() -> None:
    image, none = torch.zeros(3, 60, 80, dtype=torch.uint8), torch.zeros(0)
    found = {"boxes": torch.zeros(0, 4), "labels": none.long(), "scores": none}

    def drawn(scale: float) -> Any:
        truth = {
            "boxes": scale * torch.tensor([[10.0, 5, 70, 55]]),
            "labels": torch.tensor([0]),
            "ignore": torch.tensor([False]),
        }
        return BoxExample(image, found, truth, (scale, scale)).draw(["thing"])[0]

    rows, columns = np.nonzero(drawn(1.0).any(2))
    assert columns.max() / drawn(1.0).shape[1] == pytest.approx(70 / 80, abs=0.02)
    assert rows.max() / drawn(1.0).shape[0] == pytest.approx(55 / 60, abs=0.02)
    assert np.array_equal(drawn(1.0), drawn(2.0))
