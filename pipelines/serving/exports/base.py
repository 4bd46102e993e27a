"""What all exportable networks share: their inputs, their outputs, and what they are compared with."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any, ClassVar, Generic

import torch
from torch import Tensor, nn
from torch.export import Dim
from typing_extensions import TypeVar, override

from datamodules.options import Preprocessing
from modules import VisionModule
from pipelines.serving.fitting import Fitting

M = TypeVar("M", bound=VisionModule, default=Any)


class Exported(nn.Module, Generic[M]):
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
    backbone: Any
    head: Any
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
        module: M,
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

    def take(self, module: M) -> None:
        """Takes the inference parts from the module and defines the outputs."""
        raise NotImplementedError

    def accepts(self, module: M) -> str:
        """Names of the inputs of `forward`."""
        size = "H×W" if self.free or self.fitting else text(module)
        size += f", both multiples of {self.step}" * bool(self.free and self.step > 1)
        values = "uint8" if module.bit_depth == 8 else f"float32 in [0, 1], 1 being {(1 << module.bit_depth) - 1},"
        return f"{values if self.pixels else 'normalised float32'} B×{module.in_chans}×{size}"

    def sizes(self) -> tuple[Any, ...]:
        """Dimensions of the inputs that may have any size."""
        batch = Dim("batch")
        more = tuple({0: batch} for _ in self.inputs[1:])
        first = {0: batch, **self.free, **(self.any_size if self.fitting else {})}
        return (first, more) if more else (first,)

    def example(self, module: M, count: int) -> tuple[Tensor, ...]:
        """Reproducible random inputs of the module."""
        height, width = module.size
        if self.fitting:  # one that is larger, or in parts
            height, width = (2 * height + 5, width + 7) if count == 1 else (height + 3, width // 2 + 1)
        if self.free and count == 1:
            height, width = height + self.step, width + 2 * self.step
        size = (count, module.in_chans, height, width)
        if module.bit_depth > 8:
            return (torch.rand(size, generator=generator(count)),)
        return (torch.randint(256, size, dtype=torch.uint8, generator=generator(count)),)

    def given(self, image: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        """Converts inputs of the module to those of `forward`."""
        return image if self.pixels else self._normalised(image).contiguous(), *more

    def wanted(self, module: M, image: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        """Expected outputs of `forward`, computed by the module itself."""
        if self.fitting is None:
            return self.expected(module, image, *more)
        return self.placed(self.expected(module, self.fitting(image).byte(), *more), image)

    def expected(self, module: M, image: Tensor) -> tuple[Tensor, ...]:
        """Expected outputs for images that already have the network's size."""
        return self._told(module(image))

    def placed(self, answers: tuple[Tensor, ...], picture: Tensor) -> tuple[Tensor, ...]:
        """Converts outputs for resized images to those for the original pictures: coordinates are in the original's
        pixels."""
        return answers

    def stand_in(self, module: M, run: Callable[..., list[Tensor]]) -> bool:
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
        return self._told(self.head(self.backbone(image)))

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


def generator(seed: int) -> torch.Generator:
    """Generator of the random inputs of an example."""
    return torch.Generator().manual_seed(seed)


def text(module: VisionModule) -> str:
    """Height and width of the module's images."""
    return "×".join(map(str, module.size))


def replaced(module: Any, forward: Callable[..., Any]) -> bool:
    """Replaces a module's network by a function; see `Exported.stand_in`."""
    module.forward = forward
    return True


class Plain(Exported[M]):
    """Base class of networks whose output is what the module itself returns for an image."""

    @override
    def expected(self, module: M, image: Tensor) -> tuple[Tensor, ...]:
        return (module(image),)

    @override
    def stand_in(self, module: M, run: Callable[..., list[Tensor]]) -> bool:
        return replaced(module, lambda *given: run(*given)[0])
