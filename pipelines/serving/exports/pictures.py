"""Exportable networks that answer with pictures."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim
from typing_extensions import TypeVar, override

from modules import GANModule, StylizationModule, SuperResolutionModule, TranslationModule
from modules.translation.translators import SharedTranslator
from pipelines.serving.exports.base import Exported, copied, generator, text

P = TypeVar("P", GANModule, SuperResolutionModule, TranslationModule)


class ExportedPainter(Exported[P]):
    """Base class of networks that output pictures, float32 in [0, 1]; normalised pixels lie in [-1, 1]."""

    outputs = ("picture",)

    @override
    def take(self, module: P) -> None:
        self.scale, self.shift = torch.full_like(self.scale, 1 / 127.5), torch.full_like(self.shift, -1)
        self.painter = copied(module.average)
        self.meaning = f"picture float32 B×{module.in_chans}×{'H×W' if self.free else text(module)} in [0, 1]"

    @override
    def expected(self, module: P, *given: Tensor) -> tuple[Tensor, ...]:
        return (self._shown(module.average(given[0].float() / 127.5 - 1, *given[1:])),)

    @override
    def answer(self, *given: Tensor) -> tuple[Tensor, ...]:
        return (self._shown(self.painter(*given)),)

    def _shown(self, made: Tensor) -> Tensor:
        return ((made.float() + 1) / 2).clamp(0, 1)


class ExportedEnlarger(ExportedPainter[SuperResolutionModule]):
    """Enlarged pictures, float32 in [0, 1], for images of any size."""

    free: Mapping[int, Any] = {2: Dim("rows", min=4), 3: Dim("columns", min=4)}

    @override
    def take(self, module: SuperResolutionModule) -> None:
        super().take(module)
        self.meaning = f"picture float32 B×{module.in_chans}×{module.factor}H×{module.factor}W in [0, 1]"


class ExportedTranslator(ExportedPainter[TranslationModule]):
    """Images translated to ``domain`` (int64 B), float32 in [0, 1], same size as the input; height and width must be
    divisible by four."""

    inputs = ("image", "domain")
    step = 4
    free: Mapping[int, Any] = {2: 4 * Dim("rows", min=2), 3: 4 * Dim("columns", min=2)}

    @override
    def accepts(self, module: TranslationModule) -> str:
        return f"{super().accepts(module)}, domain int64 B, a number of {', '.join(_domains(module))}"

    @override
    def example(self, module: TranslationModule, count: int) -> tuple[Tensor, ...]:
        (image,) = super().example(module, count)
        return image, torch.arange(count) % math.prod(module.sizes)

    @override
    def answer(self, image: Tensor, domain: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        if isinstance(self.painter, SharedTranslator):
            return super().answer(image, domain)
        made = torch.stack([network(image) for network in self.painter.values()], 1).tanh()
        index = domain[:, None, None, None, None].expand(-1, 1, *made.shape[2:])
        return (self._shown(made.gather(1, index)[:, 0]),)


def _domains(module: TranslationModule) -> list[str]:
    """Names of the domains in the order of their indices."""
    return [" ".join(values) for values in itertools.product(*module.attributes.values())]


class ExportedGenerator(ExportedPainter[GANModule]):
    """Pictures generated from noise, N(0, 1), and from a class label if the generator is conditional."""

    @override
    def take(self, module: GANModule) -> None:
        super().take(module)
        self.painter.encoder = None
        self.inputs = ("noise", "label") if module.conditional else ("noise",)

    @override
    def accepts(self, module: GANModule) -> str:
        return f"noise float32 B×{module.latent_size} from N(0, 1)" + ", label int64 B" * module.conditional

    @override
    def example(self, module: GANModule, count: int) -> tuple[Tensor, ...]:
        noise = torch.randn(count, module.latent_size, generator=generator(count))
        return (noise, torch.arange(count) % module.num_classes) if module.conditional else (noise,)

    @override
    def _normalised(self, image: Tensor) -> Tensor:
        return image

    @override
    def expected(self, module: GANModule, *given: Tensor) -> tuple[Tensor, ...]:
        return (self._shown(module.average(*given)),)


class ExportedStylizer(Exported[StylizationModule]):
    """Stylised pictures, float32 in [0, 1], same size as the input; height and width must be divisible by four."""

    step = 4
    free: Mapping[int, Any] = {2: 4 * Dim("rows"), 3: 4 * Dim("columns")}
    outputs = ("picture",)

    @override
    def take(self, module: StylizationModule) -> None:
        if any(side % 4 for side in module.size):
            raise ValueError(f"it was trained on images of {module.image_size} pixels, which is not a multiple of four")
        self.painter = copied(module.painter)
        self.meaning = f"picture float32 B×{module.in_chans}×H×W in [0, 1]"

    @override
    def answer(self, image: Tensor) -> tuple[Tensor, ...]:
        return (((self.painter(image) - self.shift) / (255 * self.scale)).clamp(0, 1),)

    @override
    def expected(self, module: StylizationModule, image: Tensor) -> tuple[Tensor, ...]:
        return (module(image),)
