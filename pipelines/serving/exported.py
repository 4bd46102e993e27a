"""Exportable networks, one class for each task: inference only, without the training parts."""

import itertools
import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.export import Dim
from typing_extensions import override

from datamodules.options import Preprocessing
from modules import VisionModule
from modules.autoencoding.module import encoded
from modules.translation.translators import SharedTranslator
from pipelines.serving.fitting import Fitting


class Exported(nn.Module):
    """Base class of exportable networks. For a classifier: probabilities if preprocessing is included, otherwise
    logits.

    Args:
        module: the trained module; it stays as it is.
        preprocessing: how a picture becomes its input.
        pixels: pixels in, uint8 or of more than 8 bits float32 in [0, 1], else normalised float32 in.
        fitted: pictures of any size in, which are made of the size that the network takes.
        dynamic: images of any height and width in, as they are.

    Raises:
        ValueError: the module's parts or settings are not exported, or its pictures not fitted.
    """

    scale: Tensor
    shift: Tensor
    inputs: tuple[str, ...] = ("image",)  # names of what `forward` takes
    free: Mapping[int, Any] = {}  # dimensions of images that may have any size, beside the first
    step: int = 1  # what divides their sides
    any_size: ClassVar[Mapping[int, Any]] = {
        2: Dim("height", min=2),
        3: Dim("width", min=2),
    }  # of pictures to be fitted
    outputs: tuple[str, ...]  # names of what `forward` answers with
    meaning: str  # of them

    def __init__(
        self,
        module: VisionModule,
        preprocessing: Preprocessing,
        pixels: bool,
        fitted: bool = False,
        dynamic: bool = False,
    ) -> None:
        super().__init__()
        self.pixels, self.picture, self.dynamic = pixels, preprocessing, dynamic
        self.fitting = Fitting(preprocessing) if fitted else None
        self.register_buffer("scale", module.scale.clone())
        self.register_buffer("shift", module.shift.clone())
        self.take(module)
        if fitted and (self.free or self.inputs[0] != "image"):
            raise ValueError("it does not take pictures of one size: leave --with_preprocessing out")
        if dynamic and not self.free:
            raise ValueError("its input has one size: leave --dynamic out")
        self.eval().requires_grad_(False)

    def take(self, module: Any) -> None:
        """Takes the inference parts from the module and defines the outputs."""
        raise NotImplementedError

    def accepts(self, module: VisionModule) -> str:
        """Names of the inputs of `forward`."""
        size = "H×W" if self.free or self.fitting else _text(module)
        size += f", both multiples of {self.step}" * bool(self.free and self.step > 1)
        values = "uint8" if module.bit_depth == 8 else f"float32 in [0, 1], 1 being {(1 << module.bit_depth) - 1},"
        return f"{values if self.pixels else 'normalised float32'} B×{module.in_chans}×{size}"

    def sizes(self) -> tuple[Any, ...]:
        """Dimensions of the inputs that may have any size."""
        batch = Dim("batch")
        more = tuple({0: batch} for _ in self.inputs[1:])
        first = {0: batch, **self.free, **(self.any_size if self.fitting else {})}
        return (first, more) if more else (first,)

    def example(self, module: Any, count: int) -> tuple[Tensor, ...]:
        """Reproducible random inputs of the module."""
        height, width = module.size
        if self.fitting:  # one that is larger, or in parts
            height, width = (2 * height + 5, width + 7) if count == 1 else (height + 3, width // 2 + 1)
        if self.free and count == 1:
            height, width = height + self.step, width + 2 * self.step
        size = (count, module.in_chans, height, width)
        if module.bit_depth > 8:
            return (torch.rand(size, generator=_generator(count)),)
        return (torch.randint(256, size, dtype=torch.uint8, generator=_generator(count)),)

    def given(self, image: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        """Converts inputs of the module to those of `forward`."""
        return image if self.pixels else self._normalised(image).contiguous(), *more

    def wanted(self, module: Any, image: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        """Expected outputs of `forward`, computed by the module itself."""
        if self.fitting is None:
            return self.expected(module, image, *more)
        return self.placed(self.expected(module, self.fitting(image).byte(), *more), image)

    def expected(self, module: Any, image: Tensor) -> tuple[Tensor, ...]:
        """Expected outputs for images that already have the network's size."""
        return self._told(module(image))

    def placed(self, answers: tuple[Tensor, ...], picture: Tensor) -> tuple[Tensor, ...]:
        """Converts outputs for resized images to those for the original pictures: coordinates are in the original's
        pixels."""
        return answers

    def stand_in(self, module: Any, run: Callable[..., list[Tensor]]) -> bool:
        """Replaces the module's network by an exported file, to evaluate the file with the module's metrics.

        Args:
            module: it is changed.
            run: the file as a function of the module's inputs and, by name, of others that may be left out; gives `outputs`.

        Returns:
            Whether the module is measured by what this says; by itself, not.
        """
        return False

    def answer(self, image: Tensor) -> tuple[Tensor, ...]:
        """Outputs for normalised images; the first dimension is the batch."""
        backbone: Any = self.backbone
        head: Any = self.head
        return self._told(head(backbone(image)))

    def _told(self, logits: Tensor) -> tuple[Tensor, ...]:
        return (logits.softmax(1) if self.pixels else logits,)

    def _normalised(self, image: Tensor) -> Tensor:
        return image.float() * self.scale + self.shift

    def forward(self, image: Tensor, *more: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Computes `outputs` from `inputs`."""
        seen = image if self.fitting is None else self.fitting(image)
        answers = self.answer(self._normalised(seen) if self.pixels else seen, *more)
        if self.fitting is not None:
            answers = self.placed(answers, image)
        return answers if len(answers) > 1 else answers[0]


def copied(part: Any) -> Any:
    """Makes a tensor contiguous, so that programs which read the file need not know torch's memory formats."""
    return deepcopy(part).to(memory_format=torch.contiguous_format)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _text(module: VisionModule) -> str:
    return "×".join(map(str, module.size))


class ExportedClassifier(Exported):
    """Class probabilities if preprocessing is included, otherwise logits; float32 B×K. Tabular inputs, if
    the module has any, are the second input."""

    @override
    def take(self, module: Any) -> None:
        self.backbone, self.head = copied(module.backbone), deepcopy(module.head)
        if getattr(module, "fusion", None) is not None:
            self.fusion, self.inputs = deepcopy(module.fusion), ("image", "tabular")
        self.outputs = ("probabilities" if self.pixels else "logits",)
        self.meaning = f"{self.outputs[0]} float32 B×{module.num_classes}"

    @override
    def accepts(self, module: VisionModule) -> str:
        names = module.tabular_names
        return super().accepts(module) + (f", tabular float32 B×{len(names)} ({', '.join(names)})" if names else "")

    @override
    def example(self, module: Any, count: int) -> tuple[Tensor, ...]:
        image = super().example(module, count)
        if "tabular" not in self.inputs:
            return image
        scaling = self.fusion.scaling
        noise = torch.randn((count, len(scaling.mean)), generator=_generator(count))
        return *image, scaling.undo(noise.to(scaling.mean.device))

    @override
    def expected(self, module: Any, image: Tensor, *tabular: Tensor) -> tuple[Tensor, ...]:
        return self._told(module(image, *tabular))

    @override
    def answer(self, image: Tensor, *tabular: Tensor) -> tuple[Tensor, ...]:
        if "tabular" not in self.inputs:
            return super().answer(image)
        return self._told(self.head(self.fusion(self.backbone(image), *tabular)))

    @override
    def stand_in(self, module: Any, run: Callable[..., list[Tensor]]) -> bool:
        module.forward = lambda *given: self._logits(run(*given)[0])
        return True

    def _logits(self, told: Tensor) -> Tensor:
        return told.clamp_min(1e-12).log() if self.pixels else told


class ExportedMultiLabel(ExportedClassifier):
    """Probability of each label if preprocessing is included, otherwise logits; float32 B×K."""

    @override
    def _told(self, logits: Tensor) -> tuple[Tensor, ...]:
        return (logits.sigmoid() if self.pixels else logits,)

    @override
    def _logits(self, told: Tensor) -> Tensor:
        return told.logit(1e-7) if self.pixels else told


class ExportedRegression(Exported):
    """Quantities in their own units, float32 B×K."""

    outputs = ("values",)

    @override
    def take(self, module: Any) -> None:
        self.backbone, self.head = copied(module.backbone), deepcopy(module.head)
        self.scaling = deepcopy(module.scaling)
        self.meaning = f"values float32 B×{module.num_classes}"

    @override
    def _told(self, logits: Tensor) -> tuple[Tensor, ...]:
        return (self.scaling.undo(logits),)

    @override
    def expected(self, module: Any, image: Tensor) -> tuple[Tensor, ...]:
        return (module(image),)

    @override
    def stand_in(self, module: Any, run: Callable[..., list[Tensor]]) -> bool:
        module.forward = lambda *given: run(*given)[0]
        return True


class ExportedQLearning(Exported):
    """Action values, float32 B×A."""

    outputs = ("q_values",)

    @override
    def take(self, module: Any) -> None:
        self.backbone, self.head = copied(module.backbone), deepcopy(module.head)
        self.meaning = f"values float32 B×{module.num_classes}"

    @override
    def accepts(self, module: VisionModule) -> str:
        return super().accepts(module).replace("uint8", "float32" if self.picture.numbers else "uint8")

    @override
    def example(self, module: Any, count: int) -> tuple[Tensor, ...]:
        (image,) = super().example(module, count)
        return (image / 128 - 1 if self.picture.numbers else image,)

    @override
    def _told(self, logits: Tensor) -> tuple[Tensor, ...]:
        return (logits,)


class ExportedSequence(ExportedClassifier):
    """Class probabilities for clips of pixels, otherwise logits; float32 B×K. A clip shorter than T frames may be
    padded with anything; ``length`` int64 B is its number of frames."""

    inputs = ("image", "length")

    @override
    def take(self, module: Any) -> None:
        super().take(module)
        assert self.picture.frames is not None
        self.frames = self.picture.frames
        self.norm, self.recurrent = deepcopy(module.norm), deepcopy(module.recurrent)

    @override
    def accepts(self, module: VisionModule) -> str:
        start, _, end = super().accepts(module).partition("B×")
        return f"{start}B×{self.frames}×{end}, length int64 B"

    @override
    def example(self, module: Any, count: int) -> tuple[Tensor, ...]:
        size = (count, self.frames, module.in_chans, *module.size)
        length = self.frames - torch.arange(count) % self.frames
        return torch.randint(256, size, dtype=torch.uint8, generator=_generator(count)), length

    @override
    def expected(self, module: Any, image: Tensor, length: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return self._told(module(image, length))

    @override
    def answer(self, image: Tensor, length: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        features = self.norm(self.backbone(image.flatten(0, 1))).unflatten(0, (-1, self.frames))
        states = self.recurrent(features)[0]  # what comes after a clip's end does not change what was before
        last = (length - 1)[:, None, None].expand(-1, 1, states.shape[2])
        return self._told(self.head(states.gather(1, last)[:, 0]))


class ExportedSegmenter(ExportedClassifier):
    """Class probabilities of each pixel if preprocessing is included, otherwise logits; float32 B×K×S×S."""

    @override
    def take(self, module: Any) -> None:
        if any(side % module.multiple for side in module.size):
            raise ValueError(
                f"images of {module.image_size} pixels are not a multiple of the network's {module.multiple}"
            )
        self.backbone, self.head = copied(module.backbone), copied(module.decoder)
        self.outputs = ("probabilities" if self.pixels else "logits",)
        if self.dynamic:
            self.step = module.multiple
            self.free = {2: self.step * Dim("rows"), 3: self.step * Dim("columns")}
        self.meaning = f"{self.outputs[0]} float32 B×{module.num_classes}×{'H×W' if self.free else _text(module)}"


class ExportedFaceNet(Exported):
    """Embeddings of unit length, float32 B×D."""

    outputs = ("embedding",)

    @override
    def take(self, module: Any) -> None:
        self.backbone, self.head = copied(module.backbone), deepcopy(module.head)
        self.levels, self.mirror = module.levels, module.mirror
        told = "" if module.threshold is None else f", one person up to a squared distance of {module.threshold:.4f}"
        self.meaning = f"embedding float32 B×{module.head.out_features}{told}"

    @override
    def expected(self, module: Any, image: Tensor) -> tuple[Tensor, ...]:
        return (module(image),)

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

    @override
    def stand_in(self, module: Any, run: Callable[..., list[Tensor]]) -> bool:
        module.forward = lambda *given: run(*given)[0]
        return True


class ExportedFewShot(Exported):
    """Embeddings, float32 B×D. A class prototype is the mean over its support pictures; a picture belongs to the
    nearest one."""

    outputs = ("embedding",)

    @override
    def take(self, module: Any) -> None:
        self.backbone, self.unit = copied(module.backbone), getattr(module, "unit", False)
        self.meaning = f"embedding float32 B×{module.backbone.head_hidden_size}"

    @override
    def expected(self, module: Any, image: Tensor) -> tuple[Tensor, ...]:
        return (module(image),)

    @override
    def answer(self, image: Tensor) -> tuple[Tensor, ...]:
        found = self.backbone(image)
        return (nn.functional.normalize(found) if self.unit else found,)

    @override
    def stand_in(self, module: Any, run: Callable[..., list[Tensor]]) -> bool:
        module.forward = lambda *given: run(*given)[0]
        return True


class ExportedAutoencoder(Exported):
    """The code, and the reconstruction, float32 B×C×S×S in [0, 1]."""

    outputs = ("code", "reconstruction")

    @override
    def take(self, module: Any) -> None:
        self.backbone, self.bottleneck = copied(module.backbone), copied(module.bottleneck)
        self.decoder, self.loss = copied(module.decoder), deepcopy(module.loss)
        self.meaning = f"code of {module.bottleneck.size} numbers a place, reconstruction float32 B×{module.in_chans}×{_text(module)} in [0, 1]"

    @override
    def expected(self, module: Any, image: Tensor) -> tuple[Tensor, ...]:
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


class ExportedMaskedAutoencoder(Exported):
    """Mean of an image's patch tokens, float32 B×D."""

    outputs = ("code",)

    @override
    def take(self, module: Any) -> None:
        self.backbone, self.prefix = copied(module.backbone), module.visible.prefix
        self.meaning = f"code float32 B×{module.backbone.num_features}"

    @override
    def expected(self, module: Any, image: Tensor) -> tuple[Tensor, ...]:
        return (module.last_features(module.normalize(image))[:, self.prefix :].mean(1),)

    @override
    def answer(self, image: Tensor) -> tuple[Tensor, ...]:
        return (self.backbone.forward_features(image)[:, self.prefix :].mean(1),)


class ExportedPainter(Exported):
    """Base class of networks that output pictures, float32 in [0, 1]; normalised pixels lie in [-1, 1]."""

    outputs = ("picture",)

    @override
    def take(self, module: Any) -> None:
        self.scale, self.shift = torch.full_like(self.scale, 1 / 127.5), torch.full_like(self.shift, -1)
        self.painter = copied(module.average)
        self.meaning = f"picture float32 B×{module.in_chans}×{'H×W' if self.free else _text(module)} in [0, 1]"

    @override
    def expected(self, module: Any, *given: Tensor) -> tuple[Tensor, ...]:
        return (self._shown(module.average(given[0].float() / 127.5 - 1, *given[1:])),)

    @override
    def answer(self, *given: Tensor) -> tuple[Tensor, ...]:
        return (self._shown(self.painter(*given)),)

    def _shown(self, made: Tensor) -> Tensor:
        return ((made.float() + 1) / 2).clamp(0, 1)


class ExportedEnlarger(ExportedPainter):
    """Enlarged pictures, float32 in [0, 1], for images of any size."""

    free: Mapping[int, Any] = {2: Dim("rows", min=4), 3: Dim("columns", min=4)}

    @override
    def take(self, module: Any) -> None:
        super().take(module)
        self.meaning = f"picture float32 B×{module.in_chans}×{module.factor}H×{module.factor}W in [0, 1]"


class ExportedTranslator(ExportedPainter):
    """Images translated to ``domain`` (int64 B), float32 in [0, 1], same size as the input; height and width must be
    divisible by four."""

    inputs = ("image", "domain")
    step = 4
    free: Mapping[int, Any] = {2: 4 * Dim("rows", min=2), 3: 4 * Dim("columns", min=2)}

    @override
    def accepts(self, module: Any) -> str:
        return f"{super().accepts(module)}, domain int64 B, a number of {', '.join(_domains(module))}"

    @override
    def example(self, module: Any, count: int) -> tuple[Tensor, ...]:
        (image,) = super().example(module, count)
        return image, torch.arange(count) % math.prod(module.sizes)

    @override
    def answer(self, image: Tensor, domain: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        if isinstance(self.painter, SharedTranslator):
            return super().answer(image, domain)
        made = torch.stack([network(image) for network in self.painter.values()], 1).tanh()
        index = domain[:, None, None, None, None].expand(-1, 1, *made.shape[2:])
        return (self._shown(made.gather(1, index)[:, 0]),)


def _domains(module: Any) -> list[str]:
    """Names of the domains in the order of their indices."""
    return [" ".join(values) for values in itertools.product(*module.attributes.values())]


class ExportedGenerator(ExportedPainter):
    """Pictures generated from noise, N(0, 1), and from a class label if the generator is conditional."""

    @override
    def take(self, module: Any) -> None:
        super().take(module)
        self.painter.encoder = None
        self.inputs = ("noise", "label") if module.conditional else ("noise",)

    @override
    def accepts(self, module: Any) -> str:
        return f"noise float32 B×{module.latent_size} from N(0, 1)" + ", label int64 B" * module.conditional

    @override
    def example(self, module: Any, count: int) -> tuple[Tensor, ...]:
        noise = torch.randn(count, module.latent_size, generator=_generator(count))
        return (noise, torch.arange(count) % module.num_classes) if module.conditional else (noise,)

    @override
    def _normalised(self, image: Tensor) -> Tensor:
        return image

    @override
    def expected(self, module: Any, *given: Tensor) -> tuple[Tensor, ...]:
        return (self._shown(module.average(*given)),)


class ExportedStylizer(Exported):
    """Stylised pictures, float32 in [0, 1], same size as the input; height and width must be divisible by four."""

    step = 4
    free: Mapping[int, Any] = {2: 4 * Dim("rows"), 3: 4 * Dim("columns")}
    outputs = ("picture",)

    @override
    def take(self, module: Any) -> None:
        if any(side % 4 for side in module.size):
            raise ValueError(f"it was trained on images of {module.image_size} pixels, which is not a multiple of four")
        self.painter = copied(module.painter)
        self.meaning = f"picture float32 B×{module.in_chans}×H×W in [0, 1]"

    @override
    def answer(self, image: Tensor) -> tuple[Tensor, ...]:
        return (((self.painter(image) - self.shift) / (255 * self.scale)).clamp(0, 1),)

    @override
    def expected(self, module: Any, image: Tensor) -> tuple[Tensor, ...]:
        return (module(image),)
