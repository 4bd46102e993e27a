"""Exportable networks that answer with a number for each class, label, quantity or action."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import Dim
from typing_extensions import TypeVar, override

from modules import (
    ClassificationModule,
    MultiLabelModule,
    QLearningModule,
    RegressionModule,
    SegmentationModule,
    SequenceModule,
)
from modules.networks.dense_decoders import covering
from pipelines.serving.exports.base import Exported, copied, generator, replaced, text

L = TypeVar("L", bound=ClassificationModule | MultiLabelModule | RegressionModule | SegmentationModule)


class _Labels(Exported[L]):
    """Base class whose outputs are probabilities if preprocessing is included, otherwise logits. Tabular inputs, if the
    module has any, are the second input."""

    fusion: Any  # of the image and tabular inputs

    @override
    def take(self, module: L) -> None:
        self.backbone, self.head = copied(module.backbone), deepcopy(module.head)
        if getattr(module, "fusion", None) is not None:
            self.fusion, self.inputs = deepcopy(module.fusion), ("image", "tabular")
        self.outputs = ("probabilities" if self.pixels else "logits",)
        self.meaning = f"{self.outputs[0]} float32 B×{module.num_classes}"

    @override
    def accepts(self, module: L) -> str:
        names = module.tabular_names
        return super().accepts(module) + (f", tabular float32 B×{len(names)} ({', '.join(names)})" if names else "")

    @override
    def example(self, module: L, count: int) -> tuple[Tensor, ...]:
        image = super().example(module, count)
        if "tabular" not in self.inputs:
            return image
        scaling = self.fusion.scaling
        noise = torch.randn((count, len(scaling.mean)), generator=generator(count))
        return *image, scaling.undo(noise.to(scaling.mean.device))

    @override
    def expected(self, module: L, image: Tensor, *tabular: Tensor) -> tuple[Tensor, ...]:
        return self._told(module(image, *tabular))

    @override
    def answer(self, image: Tensor, *tabular: Tensor) -> tuple[Tensor, ...]:
        if "tabular" not in self.inputs:
            return super().answer(image)
        return self._told(self.head(self.fusion(self.backbone(image), *tabular)))

    @override
    def stand_in(self, module: L, run: Callable[..., list[Tensor]]) -> bool:
        return replaced(module, lambda *given, **beside: self._logits(run(*given, **beside)[0]))

    def _logits(self, told: Tensor) -> Tensor:
        return told.clamp_min(1e-12).log() if self.pixels else told


class ExportedClassifier(_Labels[ClassificationModule]):
    """Class probabilities if preprocessing is included, otherwise logits; float32 B×K."""


class ExportedMultiLabel(_Labels[MultiLabelModule]):
    """Probability of each label if preprocessing is included, otherwise logits; float32 B×K."""

    @override
    def _told(self, logits: Tensor) -> tuple[Tensor, ...]:
        return (logits.sigmoid() if self.pixels else logits,)

    @override
    def _logits(self, told: Tensor) -> Tensor:
        return told.logit(1e-7) if self.pixels else told


class ExportedSequence(_Labels[SequenceModule]):
    """Class probabilities for clips of pixels, otherwise logits; float32 B×K. A clip shorter than T frames may be
    padded with anything; ``length`` int64 B is its number of frames."""

    inputs = ("image", "length")

    @override
    def take(self, module: SequenceModule) -> None:
        super().take(module)
        assert self.picture.frames is not None
        self.frames = self.picture.frames
        self.norm, self.recurrent = deepcopy(module.norm), deepcopy(module.recurrent)

    @override
    def accepts(self, module: SequenceModule) -> str:
        start, _, end = super().accepts(module).partition("B×")
        return f"{start}B×{self.frames}×{end}, length int64 B"

    @override
    def example(self, module: SequenceModule, count: int) -> tuple[Tensor, ...]:
        size = (count, self.frames, module.in_chans, *module.size)
        length = self.frames - torch.arange(count) % self.frames
        return torch.randint(256, size, dtype=torch.uint8, generator=generator(count)), length

    @override
    def given(self, image: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        filled = F.pad(
            image, (0, 0, 0, 0, 0, 0, 0, self.frames - image.shape[1])
        )  # a batch is as long as its longest clip
        return super().given(filled, *more)

    @override
    def expected(self, module: SequenceModule, image: Tensor, length: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return self._told(module(image, length))

    @override
    def answer(self, image: Tensor, length: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        features = self.norm(self.backbone(image.flatten(0, 1))).unflatten(0, (-1, self.frames))
        states = self.recurrent(features)[0]  # what comes after a clip's end does not change what was before
        last = (length - 1)[:, None, None].expand(-1, 1, states.shape[2])
        return self._told(self.head(states.gather(1, last)[:, 0]))


class ExportedSegmenter(_Labels[SegmentationModule]):
    """Class probabilities of each pixel if preprocessing is included, otherwise logits; float32 B×K×S×S."""

    @override
    def take(self, module: SegmentationModule) -> None:
        if any(side % module.multiple for side in module.size):
            raise ValueError(
                f"images of {module.image_size} pixels are not a multiple of the network's {module.multiple}"
            )
        self.backbone, self.head, self.size = copied(module.backbone), copied(module.decoder), module.size
        self.outputs = ("probabilities" if self.pixels else "logits",)
        if self.dynamic:
            self.step = module.multiple
            self.free = {2: self.step * Dim("rows"), 3: self.step * Dim("columns")}
        self.meaning = f"{self.outputs[0]} float32 B×{module.num_classes}×{'H×W' if self.free else text(module)}"

    @override
    def answer(self, image: Tensor, *tabular: Tensor) -> tuple[Tensor, ...]:
        size = image.shape[2:] if self.free else self.size  # among several tasks, it is given maps
        for axis in self.free:  # other sides are refused: without the module's padding, they would get other answers
            image = image.unflatten(axis, (-1, self.step)).flatten(axis, axis + 1)
        return self._told(covering(self.head(self.backbone(image)), size, size))


class ExportedRegression(_Labels[RegressionModule]):
    """Quantities in their own units, float32 B×K."""

    @override
    def take(self, module: RegressionModule) -> None:
        super().take(module)
        self.scaling, self.outputs = deepcopy(module.scaling), ("values",)
        self.meaning = f"values float32 B×{module.num_classes}"

    @override
    def expected(self, module: RegressionModule, image: Tensor, *tabular: Tensor) -> tuple[Tensor, ...]:
        return (module(image, *tabular),)

    @override
    def _told(self, logits: Tensor) -> tuple[Tensor, ...]:
        return (self.scaling.undo(logits),)

    @override
    def _logits(self, told: Tensor) -> Tensor:
        return told


class ExportedQLearning(Exported[QLearningModule]):
    """Action values, float32 B×A."""

    outputs = ("q_values",)

    @override
    def take(self, module: QLearningModule) -> None:
        self.backbone, self.head = copied(module.backbone), deepcopy(module.head)
        self.meaning = f"values float32 B×{module.num_classes}"

    @override
    def accepts(self, module: QLearningModule) -> str:
        return super().accepts(module).replace("uint8", "float32" if self.picture.numbers else "uint8")

    @override
    def example(self, module: QLearningModule, count: int) -> tuple[Tensor, ...]:
        (image,) = super().example(module, count)
        return (image / 128 - 1 if self.picture.numbers else image,)

    @override
    def _told(self, logits: Tensor) -> tuple[Tensor, ...]:
        return (logits,)
