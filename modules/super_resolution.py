"""Single-image super-resolution."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import override

from modules.adversarial.base import AdversarialModule, AdversarialOptimization, as_float, as_uint8
from modules.adversarial.objectives import NonSaturating, Objective, Verdict
from modules.adversarial.players import Score
from modules.answers import Answer, MadeAnswers
from modules.base import Stage
from modules.callbacks.means import Losses
from modules.callbacks.publish import Report
from modules.measures.extractors import extractor_name
from modules.measures.images import MSE, SSIM_SIDE, FixedFeatures, ReconstructionLoss, perceptual_distance, psnr, ssim
from modules.networks import BackboneError
from modules.networks.decoders import Norm, normalization
from modules.networks.parts import Part, describe, upgrade, within
from modules.networks.translators import in_pieces
from modules.networks.weights import read_weights, registered_files
from modules.optimization import WarmupCosine
from modules.pictures.sheets import as_address, sheet
from modules.ranges import NonNegative, PositiveInt
from modules.spec import Backbone, DataSpec

PICTURED = 4  # number of images drawn
DETAIL = 96  # side of the drawn crop of an image, in pixels
TILE = 256  # side of the tiles of a large image, in pixels


def resized(image: Tensor, factor: float) -> Tensor:
    """Resizes uint8 B×C×H×W with Pillow's bicubic filter (a = −½), antialiased if it is reduced, to uint8."""
    side = [round(length * factor) for length in image.shape[-2:]]
    larger = F.interpolate(image.float(), side, mode="bicubic", antialias=True, align_corners=False)
    return larger.round().clamp(0, 255).byte()


def luma(image: Tensor) -> Tensor:
    """Converts uint8 B×C×H×W to ITU-R BT.601's luma, float B×1×H×W from 16 to 235; grey images are returned
    unchanged."""
    if image.shape[1] == 1:
        return image.float()
    weights = torch.tensor([65.481, 128.553, 24.966], device=image.device).view(-1, 1, 1) / 255
    return (image.float() * weights).sum(1, keepdim=True) + 16


def quality(image: Tensor, truth: Tensor, shave: int) -> dict[str, Tensor]:
    """Computes PSNR and SSIM of the luma without a border, as in the super-resolution literature, each float B.

    Args:
        image: uint8 B×C×H×W.
        truth: uint8 B×C×H×W.
        shave: width of the border, in pixels.
    """
    one, other = (luma(x)[..., shave:-shave, shave:-shave] / 255 for x in (image, truth))
    figures = {"psnr_y": psnr(one, other)}
    if min(one.shape[-2:]) >= SSIM_SIDE:
        figures["ssim_y"] = ssim(one, other)
    return figures


class SRResNet(Part):
    """SRResNet: residual blocks at low resolution, followed by sub-pixel convolutions that each double the size (Ledig
    et al. 2017, arXiv:1609.04802, figure 4). Accepts images of any size.

    Args:
        width: channels.
        blocks: number of residual blocks.
        norm: normalisation; ``batch`` as published, better without (Lim et al. 2017, arXiv:1707.02921).
        factor: upscaling factor, a power of two.
        bicubic: predict the residual of bicubic upsampling (Kim et al. 2016, arXiv:1511.04587), which needs a fraction
            of the steps; not in the published network.
    """

    def __init__(
        self,
        width: PositiveInt = 64,
        blocks: PositiveInt = 16,
        norm: Norm = "none",
        factor: int = 4,
        bicubic: bool = True,
    ) -> None:
        super().__init__()
        within("width", width, 1)
        within("blocks", blocks, 0)
        self.width, self.blocks, self.norm, self.factor, self.bicubic = width, blocks, norm, factor, bicubic
        if factor < 2 or factor & (factor - 1):
            raise BackboneError(f"factor of a part must be a power of two, not {factor}.")

    def build(self, channels: int) -> None:
        """Creates the layers for images with this number of channels."""
        width = self.width
        self.first = nn.Sequential(nn.Conv2d(channels, width, 9, padding=4), nn.PReLU())
        self.body = nn.Sequential(*(_Residual(width, self.norm) for _ in range(self.blocks)))
        self.merge = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), normalization(self.norm, width))
        layers: list[nn.Module] = []
        for _ in range(int(math.log2(self.factor))):
            layers += [nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2), nn.PReLU()]
        self.larger = nn.Sequential(*layers)
        self.last = nn.Conv2d(width, channels, 9, padding=4)
        if self.bicubic:  # starts with bicubic upsampling
            nn.init.zeros_(self.last.weight)
            nn.init.zeros_(cast(Tensor, self.last.bias))

    @property
    def reach(self) -> int:
        """Radius of the receptive field, in pixels of the small image."""
        scales = int(math.log2(self.factor))
        far = 4 + 2 * self.blocks + 1 + sum(0.5**scale for scale in range(scales)) + 4 / self.factor
        return math.ceil(far)  # larger than the bicubic filter's 2

    def forward(self, image: Tensor) -> Tensor:
        """Upscales float B×C×H×W in [-1, 1] to float B×C×fH×fW, mostly in [-1, 1]."""
        x = self.first(image)
        x = self.last(self.larger(x + self.merge(self.body(x))))
        if self.bicubic:
            side = [self.factor * length for length in image.shape[-2:]]
            x = x + F.interpolate(image.float(), side, mode="bicubic", antialias=True)
        return x


class _Residual(nn.Sequential):
    def __init__(self, width: int, norm: Norm) -> None:
        super().__init__(
            nn.Conv2d(width, width, 3, padding=1), normalization(norm, width), nn.PReLU(),
            nn.Conv2d(width, width, 3, padding=1), normalization(norm, width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


@dataclass
class SuperResolutionOptimization(AdversarialOptimization):
    """Training settings of a generator with ground truth, with or without a discriminator.

    Args:
        optimizer: any optimiser of torch or timm; each player gets one.
        lr_scheduler: any schedule of torch, stepped with the generator.
    """

    optimizer: OptimizerCallable = torch.optim.Adam
    lr_scheduler: LRSchedulerCallable = WarmupCosine


class SuperResolutionModule(AdversarialModule):
    """Super-resolution by a factor of four, or that of the generator (Ledig et al. 2017, arXiv:1609.04802).

    ``adversarial: 0`` is SRResNet: only the generator is trained, with ``content`` as its loss; with the squared error
    its images are the mean of all plausible ones, and therefore blurred. Above 0 it is SRGAN: a discriminator
    distinguishes upscaled images from real ones, and ``content`` compares the features of a network (`Perceptual`). It
    is best started from an SRResNet (``start``).

    Small images are computed from the large ones with the antialiased bicubic filter, on the device, so any data can be
    used; images have ``image_size`` in training, and any size in evaluation and prediction.

    Metrics on the BT.601 luma without a border as wide as the factor, compared with bicubic upsampling: ``psnr_y``, and
    ``ssim_y`` if images are large enough; and, if ``similarity`` names a network, ``perceptual_NAME`` on all channels,
    lower for more similar images: the distance of LPIPS without its learned weights, not comparable between networks.
    The best checkpoint has the highest PSNR, or, for an SRGAN with such a network, the lowest distance.

    Args:
        data: description of the data; ``image_size`` is that of the large images.
        backbone: the discriminator; ``compile`` compiles both players.
        generator: the upscaling network.
        content: content loss between upscaled and large images; divided by the number of values.
        adversarial: weight of the generator's adversarial loss; 0 for none.
        objective: losses of both players; by default the non-saturating loss.
        start: a registered super-resolution model to continue from, with its generator (``models:/name@alias``).
        similarity: network of the perceptual metric: a timm name with published weights, or a registered model.
        optimization: optimisers and schedules of both players.

    Raises:
        BackboneError: the backbone cannot be created, or parts are incompatible.
    """

    training_only: ClassVar[tuple[str, ...]] = ("generator.",)

    def __init__(
        self,
        data: DataSpec,
        backbone: Backbone = Backbone("dcgan"),
        optimization: SuperResolutionOptimization | None = None,
        generator: SRResNet | None = None,
        content: ReconstructionLoss | None = None,
        adversarial: NonNegative = 0.0,
        objective: Objective | None = None,
        start: str | None = None,
        similarity: str | None = None,
    ) -> None:
        super().__init__(data, backbone, optimization or SuperResolutionOptimization())
        self.answers = MadeAnswers(max(self.size))
        within("adversarial", adversarial, 0)
        self.weight = adversarial
        self.content, self.objective = content or MSE(), objective or NonSaturating()
        if self.content.nats:
            raise BackboneError(
                f"{type(self.content).__name__} compares probabilities, not images: choose MSE, L1, SSIM or Perceptual."
            )
        if self.objective.energy:
            raise BackboneError("The objective's score is an autoencoder's error: choose another one here.")
        self.head = Score(getattr(self.backbone, "head_hidden_size", self.backbone.num_features), 0)
        net = generator or SRResNet()
        net.build(data.in_chans)
        self.factor = net.factor
        if any(side % net.factor or side < 2 * net.factor for side in self.size):
            raise BackboneError(
                f"The sides of --data.image_size must be multiples of {net.factor}, {2 * net.factor} at least, not {data.image_size}."
            )
        if start is not None:
            _load(net, start)
        self.play(net)
        self.similarity = similarity
        self._features: FixedFeatures | None = None
        if similarity is not None:
            self._features = FixedFeatures(similarity, not similarity.startswith("models:/"))
            self._distance = f"perceptual_{extractor_name(similarity, 0)}"
        gan = adversarial > 0 and similarity is not None
        self.monitor = f"val/{self._distance}" if gan else "val/psnr_y"
        self.mode = "min" if gan else "max"
        self._pictured: list[list[NDArray[np.uint8]]] = []

    @override
    def parts(self) -> dict[str, Any]:
        return {"generator": describe(self.generator)}

    # The players

    def discriminate(self, image: Tensor) -> Verdict:
        """Applies the discriminator to normalised images, float B×C×H×W."""
        return cast(Verdict, self.head(self.backbone(image), image, None))

    @override
    def discriminator_losses(self, batch: dict[str, Tensor], *key: int) -> dict[str, Tensor]:
        if not self.weight:
            return {}
        with torch.no_grad():
            fake = self.as_input(self.generator(as_float(resized(batch["image"], 1 / self.factor))))
        verdicts = self.discriminate(self.normalize(batch["image"])), self.discriminate(fake)
        self.accuracy(*verdicts)
        return {"discriminator_loss": self.objective.discriminator(*verdicts)}

    @override
    def generator_losses(self, batch: dict[str, Tensor], *key: int) -> dict[str, Tensor]:
        truth = batch["image"]
        made = self.generator(as_float(resized(truth, 1 / self.factor))).float()
        losses = {"loss": self._far(made, truth)}
        if self.weight:
            losses["adversarial"] = self.weight * self.objective.generator(self.discriminate(self.as_input(made)))
        return losses

    def _far(self, made: Tensor, truth: Tensor) -> Tensor:
        """Computes the content loss of generated images, float B×C×H×W in [-1, 1], against uint8."""
        return self.content((made + 1) / 2, truth.float() / 255).mean() / truth[0].numel()

    # Evaluation

    @override
    def measure(self, batch: dict[str, Tensor], stage: Stage) -> Losses:
        height, width = (length // self.factor * self.factor for length in batch["image"].shape[-2:])
        truth = batch["image"][..., :height, :width]
        low = resized(truth, 1 / self.factor)
        plain, output = resized(low, self.factor), self.average(as_float(low)).float()
        made = as_uint8(output)
        figures = quality(made, truth, self.factor)
        figures |= {f"{name}_bicubic": value for name, value in quality(plain, truth, self.factor).items()}
        if self._features is not None:
            wanted, *seen = (self._features(image.float() / 255) for image in (truth, made, plain))
            for name, maps in zip((self._distance, f"{self._distance}_bicubic"), seen, strict=True):
                figures[name] = perceptual_distance(maps, wanted)
        with self.publisher.optional(f"{stage}/enlarged"):
            left = PICTURED - len(self._pictured)
            for images in list(zip(low, plain, made, truth, strict=True))[:left]:
                self._pictured.append([image.permute(1, 2, 0).cpu().numpy() for image in images])
        return Losses({"loss": self._far(output, truth)}, {name: value.mean() for name, value in figures.items()})

    def report(self, stage: Stage) -> Report:
        """See `VisionModule.report`: a crop of some images, small, upscaled in two ways, and true."""
        rows, self._pictured = self._pictured, []
        return Report(pictures={"enlarged": lambda: self._details(rows)})

    def _details(self, rows: list[list[NDArray[np.uint8]]]) -> NDArray[np.uint8]:
        tiles = []
        for images in rows:
            for image, side in zip(images, (DETAIL // self.factor, DETAIL, DETAIL, DETAIL), strict=True):
                top, left = (max(0, (length - side) // 2) for length in image.shape[:2])
                tiles.append(image[top : top + side, left : left + side])
        return sheet(tiles, 4, ["small", "bicubic", "enlarged", "true"] * len(rows), side=2 * DETAIL)

    # Inference

    @torch.inference_mode()
    def enlarge(self, image: Tensor) -> Tensor:
        """Upscales images; large ones tile by tile.

        Args:
            image: uint8 B×C×H×W.

        Returns:
            uint8 B×C×fH×fW.
        """
        network = cast(SRResNet, self.average)
        return in_pieces(lambda piece: as_uint8(network(as_float(piece))), image, TILE, network.reach, self.factor)

    @override
    def predict(self, batch: dict[str, Tensor]) -> list[Answer]:
        """Returns for each image its upscaled ``size``, height and width, and ``pictures`` with ``enlarged``, a PNG as
        a ``data:`` URL."""
        made = self.enlarge(batch["image"]).permute(0, 2, 3, 1).cpu().numpy()
        return [{"size": list(image.shape[:2]), "pictures": {"enlarged": as_address(image)}} for image in made]


def _load(net: SRResNet, address: str) -> None:
    """Loads the weights of a registered generator.

    Raises:
        BackboneError: it is not such a model, or has another architecture.
    """
    description, file = registered_files(address)
    saved, mine = upgrade(description["module"].get("generator") or {}), describe(net)
    if saved != mine:
        other = f"is {saved}, this one is {mine}" if saved else "there is none"
        raise BackboneError(
            f"--model.start needs a super-resolution model with the same generator; that of {address} {other}."
        )
    weights = {
        key.removeprefix("average."): v for key, v in read_weights(file, whole=True).items() if "average." in key
    }
    net.load_state_dict(weights)
