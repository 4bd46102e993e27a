"""Exportable networks that answer with an embedding or a code."""

from copy import deepcopy

import torch
from torch import Tensor, nn
from typing_extensions import override

from modules import AutoencodingModule, FaceNetModule, FewShotModule, MaskedAutoencodingModule, SelfSupervisedModule
from modules.autoencoding.module import encoded
from pipelines.serving.exports.base import Exported, Plain, copied, text


class ExportedFaceNet(Plain[FaceNetModule]):
    """Embeddings of unit length, float32 B×D."""

    outputs = ("embedding",)

    @override
    def take(self, module: FaceNetModule) -> None:
        self.backbone, self.head = copied(module.backbone), deepcopy(module.head)
        self.levels, self.mirror = module.levels, module.mirror
        told = "" if module.threshold is None else f", one person up to a squared distance of {module.threshold:.4f}"
        self.meaning = f"embedding float32 B×{module.head.out_features}{told}"

    @override
    def answer(self, image: Tensor) -> tuple[Tensor, ...]:
        embedding = self._embed(image)
        return (nn.functional.normalize(embedding + self._embed(image.flip(3))) if self.mirror else embedding,)

    def _embed(self, image: Tensor) -> Tensor:
        found = self.backbone(image)
        if self.levels:
            parts = [nn.functional.normalize(level.mean((2, 3))) for level in found[-self.levels :]]
            found = torch.cat(parts, 1)
        return nn.functional.normalize(self.head(found))


class ExportedFewShot(Plain[FewShotModule | SelfSupervisedModule]):
    """Embeddings, float32 B×D. A class prototype is the mean over its support pictures; a picture belongs to the
    nearest one."""

    outputs = ("embedding",)

    @override
    def take(self, module: FewShotModule | SelfSupervisedModule) -> None:
        self.backbone, self.unit = copied(module.backbone), getattr(module, "unit", False)
        self.meaning = f"embedding float32 B×{module.backbone.head_hidden_size}"

    @override
    def answer(self, image: Tensor) -> tuple[Tensor, ...]:
        found = self.backbone(image)
        return (nn.functional.normalize(found) if self.unit else found,)


class ExportedAutoencoder(Exported[AutoencodingModule]):
    """The code, and the reconstruction, float32 B×C×S×S in [0, 1]."""

    outputs = ("code", "reconstruction")

    @override
    def take(self, module: AutoencodingModule) -> None:
        self.backbone, self.bottleneck = copied(module.backbone), copied(module.bottleneck)
        self.decoder, self.loss = copied(module.decoder), deepcopy(module.loss)
        place = " a place" if len(module.bottleneck.shape) > 1 else ""
        self.meaning = f"code of {module.bottleneck.size} numbers{place}, reconstruction float32 B×{module.in_chans}×{text(module)} in [0, 1]"

    @override
    def expected(self, module: AutoencodingModule, image: Tensor) -> tuple[Tensor, ...]:
        code = module.encode(image).saved
        return code, module.decode(module.bottleneck.load(code))

    @override
    def answer(self, image: Tensor) -> tuple[Tensor, ...]:
        code = self.bottleneck(
            encoded(self.backbone, image, self.backbone.forward_features(image)), _Still(), 1.0
        ).saved
        return code, self.loss.image(self.decoder(self.bottleneck.load(code)).float())


class _Still:
    """Replaces sampling: the exported code of a distribution is its mean."""

    def normal(self, *shape: int) -> float:
        return 0.0


class ExportedMaskedAutoencoder(Exported[MaskedAutoencodingModule]):
    """Mean of an image's patch tokens, float32 B×D."""

    outputs = ("code",)

    @override
    def take(self, module: MaskedAutoencodingModule) -> None:
        self.backbone, self.prefix = copied(module.backbone), module.visible.prefix
        self.meaning = f"code float32 B×{module.backbone.num_features}"

    @override
    def expected(self, module: MaskedAutoencodingModule, image: Tensor) -> tuple[Tensor, ...]:
        return (module.last_features(module.normalize(image))[:, self.prefix :].mean(1),)

    @override
    def answer(self, image: Tensor) -> tuple[Tensor, ...]:
        return (self.backbone.forward_features(image)[:, self.prefix :].mean(1),)
