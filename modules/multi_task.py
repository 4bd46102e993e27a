"""Multi-task learning: one backbone with a head per task."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import combinations
from typing import Any, ClassVar, Literal, cast

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import override

from modules.answers import Answer, Answers, Image
from modules.autoencoding import AutoencodingModule
from modules.autoencoding.bottlenecks import Bottleneck
from modules.base import Stage, VisionModule
from modules.calibrated import CalibratedModule
from modules.callbacks.means import Losses
from modules.callbacks.publish import Report
from modules.classification import ClassificationModule
from modules.detection import YOLO, DetectionModule, Detector
from modules.networks import BackboneError
from modules.networks.decoders import Decoder
from modules.networks.dense_decoders import DenseDecoder, UNet
from modules.networks.pyramid import skip_unread
from modules.optimization import Optimization
from modules.pictures.sheets import stacked, written
from modules.processes import mean_over_processes
from modules.segmentation import SegmentationModule
from modules.spec import Backbone, DataSpec, SharedBackbone
from modules.training_data import Batch, settings_of
from modules.warm_start import ClassRows

Maps = list[Tensor]
# The metric of each kind of task that counts in the score; all are in [0, 1], or nearly so, and higher is better.
SCORED = {"classification": "accuracy", "segmentation": "miou", "detection": "ap", "reconstruction": "ssim"}


class WholeSegmentation(SegmentationModule):
    """Semantic segmentation of images that were resized to the input as a whole, in pixels of the original images."""

    @override
    def class_maps(self, batch: Batch) -> Iterator[NDArray[np.uint8]]:
        found = self(batch["image"]).argmax(1, keepdim=True).byte()
        sizes = batch["size"].tolist() if "size" in batch else [self.size] * len(found)
        for one, (height, width) in zip(found, sizes, strict=True):
            factor = max(height / self.size[0], width / self.size[1])
            down, across = (
                (max(1, round(height / factor)), max(1, round(width / factor))) if self.fit == "pad" else self.size
            )
            yield F.interpolate(one[None, :, :down, :across], (height, width))[0, 0].cpu().numpy()


def kind_of(name: str) -> str:
    """Returns the kind of a task, a key of `SCORED`, from its name.

    >>> kind_of("detection"), kind_of("classification/colour")
    ('detection', 'classification')
    """
    return name.partition("/")[0]


def resolved(gradients: Tensor, generator: torch.Generator) -> Tensor:
    """Sums the gradients of tasks after removing conflicts: PCGrad (Yu et al. 2020, arXiv:2001.06782, algorithm 1). A
    gradient with a negative dot product with another one is projected onto the normal plane of that one; the others are
    visited in random order.

    >>> resolved(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]), torch.Generator())
    tensor([0.5000, 1.5000])

    Args:
        gradients: float T×N, of T tasks.
        generator: random generator of the orders.

    Returns:
        float N.
    """
    result, count = gradients.clone(), len(gradients)
    for i in range(count):
        for j in torch.randperm(count, generator=generator).tolist():
            against = result[i] @ gradients[j]
            if i != j and against < 0:
                result[i] -= against / gradients[j].square().sum() * gradients[j]
    return result.sum(0)


class MultiTaskModule(VisionModule):
    """Multi-task learning: one backbone with a head per task, trained jointly.

    Each task has the head, loss, metrics and predictions that it has alone: `ClassificationModule`,
    `SegmentationModule`, `DetectionModule` and, as ``reconstruction``, `AutoencodingModule`; the backbone's feature
    maps are computed once for all. Classification uses the mean of the last map; of data with several columns of
    classes, each column is a task with its own head, ``classification/COLUMN``.

    Metrics: those of each task under its name (``val/detection/ap``), and the mean of one metric per task as ``score``:
    accuracy, mean IoU, average precision, and SSIM, if images are large enough. At each logged step, it logs the
    loss weights and the cosine similarities of the tasks' gradients on the backbone.

    Args:
        data: description of the data; ``targets`` lists the tasks that they have targets for.
        backbone: the network that the tasks share.
        optimization: optimiser, schedule and regularisation.
        tasks: two or more of classification, segmentation, detection and reconstruction; by default, all that the data
            have targets for, and reconstruction.
        weighting: ``fixed``, by ``weights``; or ``uncertainty`` (Kendall, Gal & Cipolla 2018, arXiv:1705.07115,
            equation 10): the loss of a task is weighted by 1/σ², and log σ² is added, where log σ² is learned; it
            starts as the logarithm of the first loss, so that all weighted losses are 1 initially.
        weights: weights of the tasks' losses, by name; by default 1. The loss of reconstruction is averaged over the
            values of an image.
        pcgrad: remove conflicts between the tasks' gradients on the backbone; see `resolved`.
        decoder: computes classes of pixels from the feature maps; see `SegmentationModule`.
        detector: detects boxes in the feature maps; see `DetectionModule`.
        bottleneck: computes the code from the last feature map; see `AutoencodingModule`.
        image_decoder: decodes the code to an image, the ``decoder`` of `AutoencodingModule`.

    Raises:
        BackboneError: a task is unknown, the data have no targets for it, or there are fewer than two.
    """

    monitor = "val/score"
    mode = "max"

    takes = ("targets", "in_chans", "image_size", "fit")
    late_parts: ClassVar[Mapping[str, type]] = {"decoder": DenseDecoder, "detector": Detector}
    training_only = ("log_variances",)

    def __init__(
        self,
        data: DataSpec,
        backbone: Backbone = Backbone("resnet18"),
        optimization: Optimization | None = None,
        tasks: list[str] | None = None,
        weighting: Literal["fixed", "uncertainty"] = "fixed",
        weights: dict[str, float] | None = None,
        pcgrad: bool = False,
        decoder: Callable[[nn.Module, int], DenseDecoder] = UNet,
        detector: Callable[[nn.Module, int, int | str], Detector] = YOLO,
        bottleneck: Bottleneck | None = None,
        image_decoder: Decoder | None = None,
    ) -> None:
        targets = {**(data.targets or {}), "reconstruction": []}
        names = _chosen([*map(kind_of, targets)] if tasks is None else tasks, targets)
        super().__init__(data, backbone, optimization, "maps")
        self.targets, self.fit = {name: targets[name] for name in names}, data.fit
        self.weighting, self.pcgrad, self.weights = weighting, pcgrad, _factors(weighting, weights or {}, names)
        self._seen: tuple[Tensor, Maps] | None = None  # the current images and their feature maps
        shared = SharedBackbone(
            channels_last=self.channels_last, maps=self.maps, feature_info=self.backbone.feature_info
        )
        self.backbone.eval()  # heads infer shapes from it
        for name in names:
            classes = targets[name]
            spec = DataSpec(data.in_chans, data.image_size, len(classes), classes or None, fit=data.fit)
            task: Any
            if kind_of(name) == "classification":
                task = ClassificationModule(spec, shared)
            elif name == "segmentation":
                task = WholeSegmentation(spec, shared, decoder=decoder)
                task.fit = data.fit
                if any(side % task.multiple for side in self.size):
                    near = [task.multiple * max(1, round(side / task.multiple)) for side in self.size]
                    raise BackboneError(
                        f"Segmentation beside other tasks takes images whose sides {task.multiple} divides: --data.image_size "
                        f"{'x'.join(map(str, near[: len(set(self.size))]))}, not {data.image_size}."
                    )
            elif name == "detection":
                task = DetectionModule(spec, shared, detector=detector)
            else:
                task = AutoencodingModule(spec, shared, bottleneck=bottleneck, decoder=image_decoder, pca=False)
                task.answers.fit = data.fit
            self.add_module(name, task)  # as a submodule instead of in a list, so that Lightning sets its trainer
        self.backbone.train()
        heads = [getattr(task, "detector", None) or getattr(task, "decoder", None) for task in self.tasks.values()]
        pyramids = [head.pyramid for head in heads if isinstance(head, Detector | DenseDecoder)]
        if len(pyramids) == len(names):  # all other tasks read the last map
            skip_unread(self, *pyramids)
        self.needs = tuple(self._key(name, key) for name, task in self.tasks.items() for key in task.needs)
        self.answers = TaskAnswers({name: task.answers for name, task in self.tasks.items()})
        if weighting == "uncertainty":
            self.log_variances = nn.Parameter(torch.zeros(len(names)))

    @property
    def tasks(self) -> dict[str, VisionModule]:
        """The task modules by name."""
        return {name: cast(VisionModule, getattr(self, name)) for name in self.targets}

    @override
    def parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"tasks": list(dict.fromkeys(map(kind_of, self.targets)))}
        for name, own, ours in (
            ("segmentation", "decoder", "decoder"),
            ("detection", "detector", "detector"),
            ("reconstruction", "bottleneck", "bottleneck"),
            ("reconstruction", "decoder", "image_decoder"),
        ):
            if name in self.targets:
                parts[ours] = self.tasks[name].parts()[own]
        return parts

    @property
    @override
    def class_layers(self) -> dict[str, ClassRows]:
        return {}

    def _key(self, name: str, key: str) -> str:
        """Returns the key in a batch of what a task calls ``key``: each column of classes is a label of its own."""
        return f"{key}/{name.partition('/')[2]}" if "/" in name else key

    def _own(self, name: str, batch: Batch) -> Batch:
        """Returns a batch as a task reads it."""
        return batch | {key: batch[self._key(name, key)] for key in self.tasks[name].needs} if "/" in name else batch

    def maps(self, image: Tensor) -> Maps:
        """Returns the backbone's feature maps of images, uint8 B×C×H×W; cached for the current ones."""
        if self._seen is not None and self._seen[0] is image:
            return self._seen[1]
        return self.backbone(self.normalize(image))

    @contextmanager
    def seeing(self, image: Tensor) -> Iterator[None]:
        """Context in which all tasks share the feature maps of images, uint8 B×C×H×W."""
        self._seen = image, self.backbone(self.normalize(image))
        try:
            yield
        finally:
            self._seen = None

    def forward(self, image: Tensor) -> dict[str, Any]:
        """Applies all tasks to images, uint8 B×C×H×W; returns their outputs by name."""
        with self.seeing(image):
            return {name: task(image) for name, task in self.tasks.items()}

    def weighted(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights the losses of tasks, scalars by name."""
        scaled = {name: self._scale(name) * loss for name, loss in losses.items()}
        if self.weighting == "fixed":
            return {name: self.weights[name] * loss for name, loss in scaled.items()}
        spread = dict(zip(self.targets, self.log_variances, strict=True))
        return {name: (-spread[name]).exp() * loss + spread[name] for name, loss in scaled.items()}

    @override
    def losses(self, batch: Batch) -> Losses:
        with self.seeing(batch["image"]):
            terms = self.weighted(
                {name: task.losses(self._own(name, batch)).total for name, task in self.tasks.items()}
            )
        return Losses(terms)

    def _scale(self, name: str) -> float:
        """Returns the factor that makes a task's loss a mean: reconstruction sums over the values of an image."""
        return 1 / (self.in_chans * self.size[0] * self.size[1]) if name == "reconstruction" else 1.0

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        with self.seeing(batch["image"]):
            parts = {name: task.losses(self._own(name, batch)) for name, task in self.tasks.items()}
        losses = {name: part.total for name, part in parts.items()}
        if self.weighting == "uncertainty" and self.global_step == batch_idx == 0:
            first = torch.stack([self._scale(name) * loss.detach() for name, loss in losses.items()])
            self.log_variances.data = mean_over_processes(first).clamp(min=1e-6).log().to(self.log_variances)
        terms = self.weighted(losses)
        total = torch.stack([*terms.values()]).sum()
        for name, part in parts.items():
            self.means.note(f"train/{name}", part, batch)
        self.means.note("train", Losses({"loss": total}), batch)
        self.guard.note(self, total, batch, self.holds_gradients(batch_idx))
        first_of_step = batch_idx % self.trainer.accumulate_grad_batches == 0
        logged = first_of_step and self.global_step % settings_of(self.trainer).log_every_n_steps == 0
        learning = [parameter for parameter in self.backbone.parameters() if parameter.requires_grad]
        if learning and (logged or self.pcgrad):
            gradients = self._gradients(terms, learning)
            if logged:
                self._show(gradients)
            if self.pcgrad:
                total = total + self._correction(gradients, learning)
        return total + self.optimization.penalty(self.named_parameters())

    def _gradients(self, terms: Mapping[str, Tensor], learning: list[nn.Parameter]) -> Tensor:
        """Computes the gradient of each task on the backbone's trainable parameters, float T×N, averaged over all
        processes."""
        rows = []
        for term in terms.values():
            found = torch.autograd.grad(term, learning, retain_graph=True, allow_unused=True)
            pairs = zip(found, learning, strict=True)
            rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten().float() for g, p in pairs]))
        return mean_over_processes(torch.stack(rows))

    def _correction(self, gradients: Tensor, learning: list[nn.Parameter]) -> Tensor:
        """Returns a zero whose gradient changes the sum of the tasks' gradients to that without conflicts."""
        generator = torch.Generator().manual_seed(self.global_step)  # the same in all processes, and after a resume
        change = resolved(gradients, generator) - gradients.sum(0)
        parts = change.split([parameter.numel() for parameter in learning])
        product = torch.stack([(p * part.view_as(p)).sum() for p, part in zip(learning, parts, strict=True)]).sum()
        return product - product.detach()

    def _show(self, gradients: Tensor) -> None:
        """Logs the weights of the losses, and the cosine similarities of gradients, float T×N, on the backbone."""
        unit = F.normalize(gradients)
        figures = {
            f"train/gradient_cosine/{one}-{other}": float(unit[i] @ unit[j])
            for (i, one), (j, other) in combinations(enumerate(self.targets), 2)
        }
        if self.weighting == "uncertainty":
            weights = zip(self.targets, self.log_variances.detach(), strict=True)
            figures |= {f"train/weight/{name}": float((-spread).exp()) for name, spread in weights}
        self.publisher.figures(self.trainer, figures, self.global_step)

    def _measured(self, batch: Batch, stage: Stage) -> None:
        with self.seeing(batch["image"]):
            for name, task in self.tasks.items():
                self.means.note(f"{stage}/{name}", task.measure(self._own(name, batch), stage), batch)

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._measured(batch, "val")

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._measured(batch, "test")

    @override
    def report(self, stage: Stage) -> Report:
        whole, scores, means = Report(), [], self.means.latest
        for name, task in self.tasks.items():
            report = task.report(stage)
            whole.figures |= {f"{name}/{key}": value for key, value in report.figures.items()}
            whole.pictures |= {f"{name}/{key}": draw for key, draw in report.pictures.items()}
            whole.tables |= {f"{name}/{key}": table for key, table in report.tables.items()}
            key = f"{name}/{SCORED[kind_of(name)]}"
            scores += [float(one) for one in (whole.figures.get(key), means.get(f"{stage}/{key}")) if one is not None]
        losses = {
            name: means[key] for name in self.targets if (key := f"{stage}/{name}/loss") in means
        }  # some detectors have none
        if losses:
            whole.figures["loss"] = float(torch.stack([*self.weighted(losses).values()]).sum().detach())
        if scores:
            whole.figures["score"] = sum(scores) / len(scores)
        return whole

    @torch.inference_mode()
    @override
    def predict(self, batch: Batch) -> list[Answer]:
        """Returns for each image the predictions of each task by name; with segmentation or detection, also the
        ``size`` (height, width) of the image."""
        with self.seeing(batch["image"]):
            told = {name: task.predict(batch) for name, task in self.tasks.items()}
        answers = [dict(zip(told, each, strict=True)) for each in zip(*told.values(), strict=True)]
        sized = next((name for name in ("segmentation", "detection") if name in told), None)
        return [answer | {"size": answer[sized]["size"]} if sized else answer for answer in answers]

    def draw_samples(self, batch: dict[str, Tensor], columns: int = 8) -> NDArray[np.uint8]:
        """See `VisionModule.draw_samples`; one drawing per task with targets."""
        drawn = [
            task.draw_samples(self._own(name, batch), columns)
            for name, task in self.tasks.items()
            if name != "reconstruction"
        ]
        return stacked(drawn)

    # Lightning's hooks that are passed on to the tasks

    def on_train_start(self) -> None:
        """Calls the hook of each task."""
        super().on_train_start()
        for task in self.tasks.values():
            task.on_train_start()

    def on_train_end(self) -> None:
        """Calls the hook of each task."""
        super().on_train_end()
        for task in self.tasks.values():
            task.on_train_end()

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        for name, task in self.tasks.items():
            if isinstance(task, CalibratedModule):
                task.save_thresholds(checkpoint["state_dict"], f"{name}.")

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        for name, task in self.tasks.items():
            if isinstance(task, CalibratedModule):
                task.load_thresholds(checkpoint["state_dict"], f"{name}.")


def _chosen(names: list[str], targets: Mapping[str, list[str]]) -> list[str]:
    """Returns the tasks to learn, in a fixed order.

    Raises:
        BackboneError: see `MultiTaskModule`.
    """
    kinds = dict.fromkeys(map(kind_of, targets))
    for name in names:
        if name not in SCORED:
            near = get_close_matches(name, SCORED, 1)
            raise BackboneError(
                f"--model.tasks: there is no task {name!r}, but {', '.join(SCORED)}.{f' Did you mean {near[0]}?' if near else ''}"
            )
        if name not in kinds:
            remedy = {
                "classification": "data with a label for each image, such as ImageFolder, have them",
                "segmentation": "--data.masks true reads the outlines of objects, where they have some",
            }.get(name, "data with boxes, such as COCODetection, have them")
            raise BackboneError(
                f"--model.tasks: these data have no targets of {name}, but of {', '.join(kinds)}: {remedy}; or leave it out."
            )
    if len(chosen := [name for kind in SCORED if kind in names for name in targets if kind_of(name) == kind]) < 2:
        raise BackboneError(
            f"--model.tasks: several tasks are learned together, and {', '.join(chosen) or 'no task'} is "
            f"{'one' if chosen else 'none'}: name two or more of {', '.join(kinds)}; or train it alone, with its own pipeline."
        )
    return chosen


def _factors(weighting: str, given: Mapping[str, float], names: list[str]) -> dict[str, float]:
    """Returns the weights of the tasks' losses.

    Raises:
        BackboneError: a weight has no task or is not positive, or the weights are learned.
    """
    if given and weighting != "fixed":
        raise BackboneError(f"--model.weighting {weighting} finds the weights itself: leave --model.weights out.")
    for name, value in given.items():
        if name not in names:
            raise BackboneError(f"--model.weights: {name} is not among the tasks, which are {', '.join(names)}.")
        if not 0 < value < float("inf"):
            raise BackboneError(f"--model.weights.{name} must be a number above 0, not {value}.")
    return {name: given.get(name, 1.0) for name in names}


class TaskAnswers(Answers):
    """Predictions of several tasks by name.

    Args:
        tasks: drawing and storage of each task's predictions.
    """

    def __init__(self, tasks: Mapping[str, Answers]) -> None:
        self.tasks = dict(tasks)
        self.boxes = next(
            (name for name in ("detection", "segmentation") if name in tasks), None
        )  # task of the COCO annotations

    def draw(self, image: Image, answer: Answer) -> Image:
        """See `Answers.draw`; one drawing per task, below each other."""
        return stacked(
            page for name, task in self.tasks.items() for page in (written(name, 16), task.draw(image, answer[name]))
        )

    @override
    def pictures(self, answer: Answer) -> dict[str, PIL.Image.Image]:
        found = [task.pictures(answer[name]) for name, task in self.tasks.items()]
        return {suffix: picture for pictures in found for suffix, picture in pictures.items()}

    @override
    def categories(self) -> dict[int, str]:
        return self.tasks[self.boxes].categories() if self.boxes else {}

    @override
    def annotations(self, answer: Answer) -> list[dict[str, Any]]:
        return self.tasks[self.boxes].annotations(answer[self.boxes]) if self.boxes else []
