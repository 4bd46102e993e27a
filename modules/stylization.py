"""Fast neural style transfer: one style in a single pass (Johnson et al. 2016, arXiv:1603.08155)."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any, ClassVar, Self, cast

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from modules.answers import Answer, MadeAnswers
from modules.base import Stage, VisionModule
from modules.callbacks.means import Losses
from modules.callbacks.publish import Report
from modules.measures.images import FixedFeatures
from modules.networks import BackboneError
from modules.networks.parts import describe, within
from modules.networks.translators import ResidualTranslator, in_pieces
from modules.optimization import Optimization
from modules.pictures.sheets import Image, as_address, sheet, stacked
from modules.ranges import NonNegative, PositiveInt
from modules.spec import Backbone, DataSpec
from modules.style import StyleObjective
from modules.training_data import given_data

PICTURED = 4  # number of images drawn
LEAST = 8  # minimum side of the input, in pixels
VALUES = 2**27  # maximum number of values in the largest feature map; larger images are processed tile by tile
TILE = 512  # side of the tiles, in pixels; a multiple of four
SAMPLES, SAMPLE = 4, 256  # samples along each side for instance-norm statistics, and their side in pixels


class Painter(nn.Module):
    """Adds the output of a translator to an image; initially zero.

    Args:
        translator: not built yet.
        in_chans: number of image channels.
    """

    def __init__(self, translator: ResidualTranslator, in_chans: int) -> None:
        super().__init__()
        translator.build(in_chans, in_chans)
        self.translator = translator
        last = cast(nn.Conv2d, translator.layers[-1])
        nn.init.zeros_(last.weight)
        nn.init.zeros_(cast(Tensor, last.bias))

    def forward(self, image: Tensor) -> Tensor:
        """Stylises normalised images, float B×C×H×W with sides of at least eight pixels."""
        return image + self.translator(image)


class StylizationModule(VisionModule):
    """Style transfer with a network that applies one style to any image in a single pass (Johnson et al. 2016).

    The loss is that of `StyleObjective`: content, style and total variation, computed from the features of a frozen
    network. This is the ``backbone``, which is not stored after training. The painter starts from the image itself and
    learns a residual; in the paper it generates the whole image.

    Instance normalisation takes its statistics from the whole image. Large images are processed tile by tile, without
    seams, with statistics of samples that are spread evenly over the image: the memory does not grow with it.

    Metrics: ``loss`` and its three weighted terms.

    Args:
        data: description of the data.
        backbone: the network whose features are compared.
        optimization: optimiser, schedule and regularisation of the painter.
        translator: layers of the painter.
        style: file of the style image; needed for training only.
        style_size: longer side of the style image in training, in pixels, which determines the scale of the style.
        style_layers: layers of the style loss; by default those of the paper for VGG19, otherwise all stages.
        content_layer: layer of the content loss; by default conv4_2 for VGG19, otherwise the last stage up to stride 8.
        content_weight: α.
        style_weight: β.
        variation_weight: weight of total variation, which smooths the result.

    Raises:
        BackboneError: the backbone cannot be created or has no such layers, or the style image cannot be read.
    """

    series: ClassVar[tuple[str, ...]] = ("val/stylized",)
    training_only: ClassVar[tuple[str, ...]] = ("backbone.",)

    def __init__(
        self,
        data: DataSpec,
        backbone: Backbone = Backbone("vgg19", pretrained=True),
        optimization: Optimization | None = None,
        translator: ResidualTranslator | None = None,
        style: str | None = None,
        style_size: PositiveInt = 256,
        style_layers: list[str] | None = None,
        content_layer: str | None = None,
        content_weight: NonNegative = 1.0,
        style_weight: NonNegative = 30.0,
        variation_weight: NonNegative = 100.0,
    ) -> None:
        if backbone.transfer is not None:
            raise BackboneError(
                f"--model.backbone.transfer {backbone.transfer} is for backbones that learn; here it only compares "
                "pictures: leave it out."
            )
        super().__init__(data, backbone, optimization, "maps")
        self.backbone.requires_grad_(False).eval()  # also if a trainer does not change modes
        self.answers = MadeAnswers(max(self.size))
        net = translator or ResidualTranslator(32, 5)
        self.painter = Painter(net, data.in_chans)
        self.width, self.reach, self.translator = net.width, net.reach, describe(net)
        if self.channels_last:
            self.painter.to(memory_format=torch.channels_last)
        self.layers = style_layers, content_layer
        self.weights = (content_weight, style_weight, variation_weight)
        for name, value in zip(("content_weight", "style_weight", "variation_weight"), self.weights, strict=True):
            within(name, value, 0)
        within("style_size", style_size, 16)
        self.style = None if style is None else _read(style, style_size, data.in_chans)
        if self.style is not None:
            try:
                self._comparing(torch.zeros(1, data.in_chans, *self.size))
            except ValueError as error:
                raise BackboneError(str(error)) from None
        self._objective: StyleObjective | None = None

    @override
    def parts(self) -> dict[str, Any]:
        return {"translator": self.translator}

    @override
    def train(self, mode: bool = True) -> Self:
        """Sets the training mode, except for the backbone."""
        super().train(mode)
        self.backbone.eval()
        return self

    @override
    def setup(self, stage: str) -> None:
        if self.style is None and stage != "predict":
            raise BackboneError(
                "Which style should be used? Name the file of a picture: --model.style FILE. A registered "
                "model does not contain its style: measure it with stylization test --output FOLDER_OF_ITS_TRAINING."
            )
        super().setup(stage)

    def _comparing(self, content: Tensor) -> StyleObjective:
        """Creates the objective, on the device of the given images, float B×C×H×W in [0, 1]."""
        features = FixedFeatures(self.backbone.recipe["backbone"], network=self.backbone)
        style = cast(Tensor, self.style).to(content.device)
        return StyleObjective(features, content[:1], style, *self.layers, self.weights)

    def paint(self, image: Tensor) -> Tensor:
        """Stylises uint8 B×C×H×W, with sides of at least eight pixels, as float of the same shape, mostly in [0, 1]."""
        return self._as_float(self.painter(self.normalize(image)))

    def _as_float(self, image: Tensor) -> Tensor:
        return (image.float() - self.shift) / (255 * self.scale)

    def forward(self, image: Tensor) -> Tensor:
        """Stylises uint8 B×C×H×W as float B×C×H×W in [0, 1]."""
        return self.paint(image).clamp(0, 1)

    @override
    def losses(self, batch: dict[str, Tensor]) -> Losses:
        content = batch["image"].float() / 255
        if self._objective is None:  # created after the backbone's weights are loaded from a checkpoint
            self._objective = self._comparing(content)
        _, *parts = self._objective(self.paint(batch["image"]), content)
        names = ("content", "style", "variation")
        return Losses({name: weight * part for name, weight, part in zip(names, self.weights, parts, strict=True)})

    @override
    def report(self, stage: Stage) -> Report:
        report, data = Report(), given_data(self.trainer)
        if data is not None:
            report.pictures["stylized"] = lambda: self._beside(data.samples(stage, PICTURED)["image"])
        return report

    def _beside(self, image: Tensor) -> Image:
        """Draws images above their stylised versions."""
        made = self.stylize(image.to(self.device)).cpu()
        return stacked(sheet(part, len(part), heading=name) for name, part in (("image", image), ("stylized", made)))

    # Inference

    @torch.inference_mode()
    def stylize(self, image: Tensor) -> Tensor:
        """Stylises images; large ones tile by tile.

        Args:
            image: uint8 B×C×H×W of any size.

        Returns:
            uint8 B×C×H×W.
        """
        height, width = image.shape[-2:]
        if min(height, width) < LEAST:
            rim = (0, max(0, LEAST - width), 0, max(0, LEAST - height))
            image = F.pad(image.float(), rim, mode="replicate").byte()
        if self.width * height * width <= VALUES:
            made = as_uint8(self.paint(image))
        else:
            made = torch.cat([in_pieces(self._settled(one), one, TILE, self.reach) for one in image.split(1)])
        return made[..., :height, :width]

    def _settled(self, image: Tensor) -> Callable[[Tensor], Tensor]:
        """Returns a function that stylises tiles of an image, uint8 1×C×H×W, with the statistics of the whole image."""
        painter = deepcopy(self.painter)
        for name, layer in [*painter.named_modules()]:
            if isinstance(layer, nn.InstanceNorm2d):  # batch norm computes statistics over samples and keeps them
                kept = nn.BatchNorm2d(layer.num_features, layer.eps, momentum=1.0, affine=False, device=image.device)
                painter.set_submodule(name, kept)
        rows, columns = (torch.linspace(0, max(0, side - SAMPLE), SAMPLES).int().tolist() for side in image.shape[2:])
        samples = [image[..., y : y + SAMPLE, x : x + SAMPLE] for y in rows for x in columns]
        painter.train()(self.normalize(torch.cat(samples)))
        painter.eval()
        return lambda piece: as_uint8(self._as_float(painter(self.normalize(piece))))

    @override
    def predict(self, batch: dict[str, Tensor]) -> list[Answer]:
        """Returns ``pictures`` of each image with ``stylized``, of the same size, a PNG as a ``data:`` URL."""
        made = self.stylize(batch["image"]).permute(0, 2, 3, 1).cpu().numpy()
        return [{"pictures": {"stylized": as_address(picture)}} for picture in made]


def _read(file: str, size: int, channels: int) -> Tensor:
    """Reads an image, float 1×C×H×W in [0, 1], resized to a longer side.

    Raises:
        BackboneError: it cannot be read.
    """
    try:
        with PIL.Image.open(file) as opened:
            picture = PIL.ImageOps.exif_transpose(opened).convert("RGB" if channels == 3 else "L")
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        why = "there is no such file" if isinstance(error, FileNotFoundError) else "it cannot be read as a picture"
        raise BackboneError(f"--model.style {file}: {why}. Name the file of the style picture.") from None
    width, height = (max(1, round(side * size / max(picture.size))) for side in picture.size)
    pixels = np.array(picture.resize((width, height), PIL.Image.Resampling.LANCZOS)).reshape(height, width, channels)
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255


def as_uint8(image: Tensor) -> Tensor:
    """Converts float in [0, 1] to uint8."""
    return (image * 255).round().clamp(0, 255).byte()
