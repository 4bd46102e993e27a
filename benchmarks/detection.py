"""What detection costs: the lectures' order of detectors in one run, and training and evaluation against torchvision's.

**order**: milliseconds for one image, from uint8 pixels to boxes, of R-CNN, Fast R-CNN, Faster R-CNN, RetinaNet, FCOS
and YOLO, all on the same backbone, one image at a time. The first two take 200 proposals of `benchmarks.rcnn`, whose
time counts, as selective search counted in the papers. Nothing is trained but the SVMs: what is found does not change
what is computed.

**reference**: the same scenes, batches, backbone, pyramid and anchors (RetinaNet, ResNet-18, three maps of 256 channels
from stride 8 on), optimiser (SGD) and memory for both sides. Theirs is torchvision's RetinaNet (the second version, with group normalisation in the head) with a loop as in its
reference: float images in lists, its own normalisation, its detections measured by pycocotools. Ours is the module under
Lightning, with its metrics. Ratios of medians over rounds that take turns; data loading counts on both sides.

    python -m benchmarks.detection [order] [reference] [--images 20] [--rounds 3] [--threads 1]
"""

import argparse
import contextlib
import io
import logging
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import torch
import torchvision
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.retinanet import RetinaNetHead

from benchmarks import Row, Seconds, machine, now, table
from benchmarks.rcnn import RegionClassifier
from datamodules import DigitScenes
from modules import DetectionModule, Optimization
from modules.detection import FCOS, YOLO, FasterRCNN, RetinaNet
from modules.spec import DataSpec

BATCH_SIZE, BATCHES = 8, 12
SIDE = 128
STRIDES = [8, 16, 32]


def module(detector: Any, optimizer: Any = torch.optim.SGD) -> DetectionModule:
    torch.manual_seed(0)
    plan = Optimization(optimizer=optimizer, lr=1e-4)
    return DetectionModule(DataSpec(image_size=SIDE, num_classes=10), optimization=plan, detector=detector)


def order(images: int) -> None:
    """Prints the time of each family for an image."""
    data = DigitScenes(scene_size=SIDE, train=40, val=8, test=images)
    pictures = [data.sources["test"][i]["image"] for i in range(images)]
    lesson = [data.sources["train"][i] for i in range(40)]

    def network(detector: Any) -> Callable[[Any], Any]:
        net = module(detector).eval()
        return lambda image: net.predict({"image": torch.from_numpy(image).permute(2, 0, 1)[None]})

    def regions(shared: bool) -> Callable[[Any], Any]:
        classifier = RegionClassifier(module(YOLO), 10, shared)
        return classifier.fit([scene["image"] for scene in lesson], lesson).detect

    families: dict[str, Callable[[], Callable[[Any], Any]]] = {
        "R-CNN": lambda: regions(False),
        "Fast R-CNN": lambda: regions(True),
        "Faster R-CNN": lambda: network(partial(FasterRCNN, width=64, hidden=256)),
        "RetinaNet": lambda: network(partial(RetinaNet, width=64, strides=STRIDES)),
        "FCOS": lambda: network(partial(FCOS, width=64, depth=2, strides=STRIDES)),
        "YOLO": lambda: network(partial(YOLO, width=64, strides=STRIDES)),
    }
    print(f"\nmilliseconds for one image of {SIDE} px, ResNet-18, median of {images}")
    for name, make in families.items():
        detect, times = make(), []
        detect(pictures[0])
        for picture in pictures:
            start = time.process_time()
            detect(picture)
            times.append(time.process_time() - start)
        middle = float(np.median(times))
        print(f"{name:14}{middle * 1e3:9.1f} ms{1 / middle:9.1f} images/s", flush=True)


def theirs() -> torch.nn.Module:
    """torchvision's RetinaNet on its own ResNet-18, as its builders put it together."""
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=torch.nn.BatchNorm2d, trainable_layers=5,
        returned_layers=[2, 3, 4], extra_blocks=_NoFurther(),
    )  # fmt: skip
    sizes = tuple(tuple(4 * stride * 2 ** (i / 3) for i in range(3)) for stride in STRIDES)
    return torchvision.models.detection.RetinaNet(
        backbone, 10, min_size=SIDE, max_size=SIDE, anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 3),
        head=RetinaNetHead(256, 9, 10, partial(torch.nn.GroupNorm, 32)), score_thresh=0.01, detections_per_img=100,
    )  # fmt: skip


class _NoFurther(torchvision.ops.feature_pyramid_network.ExtraFPNBlock):
    """No maps beyond those of the backbone, so that both sides have the same."""

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        return results, names


def as_theirs(batch: dict[str, Any]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    images = [image.contiguous().float() / 255 for image in batch["image"]]
    return images, [{"boxes": b, "labels": k} for b, k in zip(batch["boxes"], batch["labels"], strict=True)]


def train_theirs(net: torch.nn.Module, data: DigitScenes) -> Seconds:
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
    net.train()
    start = now()
    for batch in data.train_dataloader():
        images, targets = as_theirs(batch)
        loss = sum(net(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
    return now() - start


@torch.inference_mode()
def evaluate_theirs(net: torch.nn.Module, data: DigitScenes) -> Seconds:
    net.eval()
    start = now()
    found: list[dict[str, Any]] = []
    truth: list[dict[str, Any]] = []
    count = 0
    for batch in data.val_dataloader():
        images, targets = as_theirs(batch)
        for output, target in zip(net(images), targets, strict=True):
            for box, label, score in zip(
                output["boxes"].tolist(), output["labels"].tolist(), output["scores"].tolist(), strict=True
            ):
                found.append({"image_id": count, "category_id": label, "score": score,
                              "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]]})  # fmt: skip
            for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
                w, h = box[2] - box[0], box[3] - box[1]
                truth.append({"id": len(truth) + 1, "image_id": count, "category_id": label, "iscrowd": 0, "area": w * h,
                              "bbox": [box[0], box[1], w, h]})  # fmt: skip
            count += 1
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": i} for i in range(count)],
            "categories": [{"id": k} for k in range(10)],
            "annotations": truth,
        }
        coco.createIndex()
        measure = COCOeval(coco, coco.loadRes(found), "bbox")
        measure.evaluate()
        measure.accumulate()
        measure.summarize()
    return now() - start


class Stopwatch(L.Callback):
    """Times the training and the validation."""

    def on_train_epoch_start(self, *_: Any) -> None:
        self.start = now()

    def on_validation_start(self, *_: Any) -> None:
        self.trained = now() - self.start
        self.start = now()

    def on_validation_end(self, *_: Any) -> None:
        self.validated = now() - self.start


def reference(rounds: int) -> list[Row]:
    """Training and evaluation against torchvision's RetinaNet and loop."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    count = BATCH_SIZE * BATCHES
    data = DigitScenes(
        scene_size=SIDE, train=count, val=count, test=8, batch_size=BATCH_SIZE, augmentation="none", num_workers=0
    )
    for split in ("train", "val"):
        _ = [data.sources[split][i] for i in range(count)]  # composed before
    what, peer = f"RetinaNet on ResNet-18, {SIDE} px", f"torchvision {torchvision.__version__}, its RetinaNet and loop"
    training = Row(f"training, {what}", count, [], peer, [], "≥ 1")
    evaluation = Row(f"evaluation, {what}", count, [], f"{peer}, pycocotools", [], "≥ 1")
    for _ in range(rounds):
        net = theirs()
        training.theirs.append(train_theirs(net, data))
        evaluation.theirs.append(evaluate_theirs(net, data))
        watch = Stopwatch()
        trainer = L.Trainer(
            max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, num_sanity_val_steps=0,
            use_distributed_sampler=False, enable_model_summary=False, callbacks=[watch],
        )  # fmt: skip
        trainer.fit(module(partial(RetinaNet, strides=STRIDES)), data)
        training.ours.append(watch.trained)
        evaluation.ours.append(watch.validated)
    return [training, evaluation]


def main() -> None:
    parser = argparse.ArgumentParser(description="Times detectors, and the pipeline against torchvision's.")
    parser.add_argument("parts", nargs="*", default=["order", "reference"])
    parser.add_argument("--images", type=int, default=20, help="images of the order")
    parser.add_argument("--rounds", type=int, default=3, help="rounds against the reference")
    parser.add_argument(
        "--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", 1)), help="threads of torch"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine())
    if "order" in options.parts:
        order(options.images)
    if "reference" in options.parts:
        print(f"\n{table(reference(options.rounds))}")


if __name__ == "__main__":
    main()
