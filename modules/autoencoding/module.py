"""Autoencoders of images."""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure
from typing_extensions import override

from modules.answers import Answer, Answers
from modules.autoencoding.bottlenecks import Bottleneck, Code, Plain, Variational, VectorQuantized
from modules.autoencoding.metrics import PrincipalComponents
from modules.autoencoding.parts import Noise, Penalty
from modules.autoencoding.pictures import filter_tiles, plane, rows_of
from modules.base import Stage, VisionModule
from modules.callbacks.means import Losses
from modules.callbacks.publish import Report
from modules.measures.images import MSE, SSIM_SIDE, ReconstructionLoss, psnr, ssim
from modules.measures.per_stage import PerStage
from modules.networks import BackboneError
from modules.networks.backbones import freeze_unreached
from modules.networks.decoders import Decoder, TransposedConvolutions
from modules.networks.parts import Draws, describe
from modules.optimization import Optimization, total_steps
from modules.pictures.sheets import sheet, to_uint8
from modules.spec import Backbone, DataSpec
from modules.training_data import given_data, share

PICTURED = 12  # number of images drawn
PLOTTED = 2000  # number of codes in the scatter plot
PCA_VALUES = 50_000_000  # maximum number of values of training images for PCA: 200 MB
MS_SSIM_SIDE = 161  # side of the smallest images with five scales, in pixels
GREY = (114, 114, 114)  # colour of the padding
ACTIVE = 0.01  # variance of the mean from which a latent unit is active (Burda et al. 2016, arXiv:1509.00519)


def encoded(backbone: Any, image: Tensor, features: Tensor) -> Tensor:
    """Converts an encoder's last features to a feature map.

    Args:
        backbone: the encoder.
        image: normalised images, float B×C×H×W.
        features: output of ``forward_features`` for the images.

    Returns:
        float B×K×H×W, or B×K for an encoder without feature maps.
    """
    if features is image:  # an MLP
        return cast(Tensor, backbone(image))
    if features.ndim == 3:  # a transformer's tokens
        features = features[:, getattr(backbone, "num_prefix_tokens", 0) :].mT
        patch = round(math.sqrt(image.shape[2] * image.shape[3] / features.shape[2]))
        return features.unflatten(2, (image.shape[2] // patch, image.shape[3] // patch))
    if str(getattr(backbone, "output_fmt", "NCHW")).endswith("NHWC"):
        return features.permute(0, 3, 1, 2)
    return features


class UnitStatistics(Metric):
    """Exact sums over samples and processes of the units' means and divergences, and of the codebook usage.

    Args:
        units: size of the code.
        entries: size of the codebook, or 0.
    """

    count: Tensor
    mean: Tensor
    square: Tensor
    kl: Tensor
    used: Tensor

    def __init__(self, units: int, entries: int) -> None:
        super().__init__()
        self.add_state("count", torch.tensor(0.0, dtype=torch.float64), "sum")
        for name in ("mean", "square", "kl"):
            self.add_state(name, torch.zeros(units, dtype=torch.float64), "sum")
        self.add_state("used", torch.zeros(entries, dtype=torch.float64), "sum")

    def update(self, code: Code) -> None:
        """Adds a batch."""
        mean = code.mean.detach().flatten(1).double()
        self.count += len(mean)
        self.mean += mean.sum(0)
        self.square += mean.square().sum(0)
        if code.kl is not None:
            self.kl += code.kl.detach().flatten(1).double().sum(0)
        if len(self.used):
            self.used += torch.bincount(code.saved.flatten(), minlength=len(self.used))

    def compute(self) -> dict[str, Tensor]:
        """Returns per unit the ``mean``, the ``variance`` of its mean and the ``kl``; and the ``perplexity`` of the
        codebook."""
        mean = self.mean / self.count
        share = self.used / self.used.sum().clamp_min(1)
        perplexity = (-(share * share.clamp_min(1e-12).log()).sum()).exp()
        return {"mean": mean, "variance": self.square / self.count - mean**2, "kl": self.kl / self.count,
                "perplexity": perplexity}  # fmt: skip


class AutoencodingModule(VisionModule):
    """Autoencoder: an encoder, a bottleneck and a decoder. The choice of parts determines the variant.

    | kind | parts |
    |---|---|
    | plain | the defaults |
    | denoising | ``noise``: `GaussianNoise`, `SaltAndPepper` or `Masking` |
    | sparse | ``bottleneck``: `Plain` with ``torch.nn.ReLU``; ``penalty``: `L1Sparsity`; or with `TopK`; or with a sigmoid and `KLSparsity` |
    | contractive | ``penalty``: `Contractive` |
    | variational | ``bottleneck``: `Variational`; ``loss``: `BCE` or `DiscretizedLogistic` |
    | vector-quantised | ``bottleneck``: `VectorQuantized` |

    The loss is the reconstruction loss, summed over the values of an image and averaged over images, plus the loss of
    the bottleneck; it is the same in validation. (A mean over all values would make the KL divergence of a variational
    autoencoder outweigh the reconstruction.) The penalty is added in training only.

    Metrics for values in [0, 1]: MSE, PSNR (averaged over images), SSIM from 11 pixels on and MS-SSIM from 161, each
    also for PCA with a code of as many bits, fitted to the training set without augmentation; and the size of the code
    in bits per pixel.

    Args:
        data: description of the data; ``label_names``, or those of the trainer's data module, colour the plot of codes.
        backbone: the encoder, such as ``convnet`` or ``mlp``. Its last features before pooling are used.
        bottleneck: computes the code from the features; by default 32 numbers.
        decoder: decodes the code to an image; by default transposed convolutions.
        loss: the reconstruction loss; by default the squared error.
        noise: noise added to the input, in training and evaluation.
        penalty: penalty added to the loss in training.
        pca: compare with principal component analysis.
        optimization: optimiser, schedule and regularisation.

    Raises:
        BackboneError: the backbone cannot be created, or a part does not fit the images.
    """

    any_bands = True

    def __init__(
        self,
        data: DataSpec,
        backbone: Backbone = Backbone("convnet"),
        optimization: Optimization | None = None,
        bottleneck: Bottleneck | None = None,
        decoder: Decoder | None = None,
        loss: ReconstructionLoss | None = None,
        noise: Noise | None = None,
        penalty: Penalty | None = None,
        pca: bool = True,
    ) -> None:
        super().__init__(data, backbone, optimization)
        self.pca = pca
        self.bottleneck = bottleneck or Plain()
        self.decoder = decoder or TransposedConvolutions()
        self.loss = loss or MSE()
        self.noise, self.penalty = noise, penalty
        # Compiled code does not support double backward.
        self.compiles_features = penalty is None or not penalty.needs_input_gradient
        if min(self.size) < self.loss.least:
            raise BackboneError(
                f"The loss {type(self.loss).__name__} needs images of at least {self.loss.least} pixels a side, not {data.image_size}: "
                "set --data.image_size, or choose another --model.loss."
            )
        self.bottleneck.build(self._probe())
        self.decoder.build(self.bottleneck.shape, data.in_chans, self.size)
        if self.channels_last:
            self.to(memory_format=torch.channels_last)
        units = math.prod(self.bottleneck.shape)
        statistics = UnitStatistics(units, self.bottleneck.entries)
        self.statistics = PerStage(lambda _: statistics.clone())
        self.answers = CodeAnswers(self._drawn, self.size)
        self._components: PrincipalComponents | None = None
        self._kept = 0  # batches of the evaluation so far
        self._pictured: list[tuple[Tensor, Tensor]] = []
        self._plotted: list[tuple[Tensor, Tensor | None]] = []
        self._steps = 0.0  # of the whole training

    def _probe(self) -> tuple[int, ...]:
        """Returns the shape of an image's features, and freezes the layers of the backbone that come after them."""
        self.backbone.eval()
        with torch.inference_mode(False), torch.enable_grad():
            features = self.features(self.normalize(torch.zeros(1, self.in_chans, *self.size)))
            freeze_unreached(self.backbone, [features])
        self.backbone.train()
        return tuple(features.shape[1:])

    @override
    def parts(self) -> dict[str, Any]:
        return {name: describe(getattr(self, name)) for name in ("bottleneck", "decoder", "loss", "noise", "penalty")}

    def features(self, image: Any) -> Tensor:
        """Computes the encoder's last features from normalised images, float B×C×H×W: float B×K×H×W, or B×K without a
        feature map."""
        return encoded(self.backbone, image, self.last_features(image))

    def encode(self, image: Tensor) -> Code:
        """Encodes images without noise, uint8 B×C×H×W."""
        return cast(Code, self.bottleneck(self.features(self.normalize(image)), Draws(image, False), 1.0))

    def decode(self, code: Tensor) -> Tensor:
        """Decodes codes in the format of `Bottleneck.load` to images, float B×C×H×W in [0, 1]."""
        return self.loss.image(self.decoder(code).float())

    def forward(self, image: Tensor) -> Tensor:
        """Reconstructs images, uint8 B×C×H×W, as float B×C×H×W in [0, 1]."""
        code = self.encode(image)
        return self.decode(self.bottleneck.load(code.saved))

    def on_train_start(self) -> None:
        """Stores the length of the training."""
        super().on_train_start()
        self._steps = total_steps(self.trainer)

    @override
    def losses(self, batch: dict[str, Tensor]) -> Losses:
        draws = Draws(batch["image"], True)
        seen, target = self._seen(batch["image"], draws)
        if self.penalty is not None and self.penalty.needs_input_gradient:
            seen = seen.detach().requires_grad_()
        given = self._given(batch["image"], seen, target)
        code = self.bottleneck(self.features(given), draws, self.global_step / self._steps if self._steps else 1.0)
        loss = (self.loss(self.decoder(code.value).float(), target) + code.loss).mean()
        if self.penalty is None:
            return Losses({"loss": loss})
        penalty = self.penalty(code.value, given)
        return Losses({"loss": loss + penalty}, {"penalty": penalty})

    @override
    def measure(self, batch: dict[str, Tensor], stage: Stage) -> Losses:
        draws = Draws(batch["image"], False)
        seen, target = self._seen(batch["image"], draws)
        code = self.bottleneck(self.features(self._given(batch["image"], seen, target)), draws, 1.0)
        output = self.decoder(code.value).float()
        reconstruction = self.loss(output, target)
        if code.kl is not None:  # evaluated on the stored code, the mean
            output = self.decoder(code.mean).float()
        figures = self._figures(seen, target, code, self.loss.image(output), reconstruction)
        self.statistics[stage].update(code)
        with self.publisher.optional(f"{stage}/reconstructions"):
            self._keep(stage, seen, target, code, batch.get("label"))
        return Losses({"loss": (reconstruction + code.loss).mean()}, figures)

    def _seen(self, image: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Returns the encoder's input and the target, both float B×C×H×W in [0, 1]."""
        target = image.float() / self.full
        return target if self.noise is None else self.noise(target, draws), target

    def _given(self, image: Tensor, seen: Tensor, target: Tensor) -> Any:
        """Normalises the input of the backbone, from the uint8 images and the result of `_seen`."""
        return self.normalize(image if seen is target else seen * self.full)

    def _keep(self, stage: Stage, seen: Tensor, target: Tensor, code: Code, label: Tensor | None) -> None:
        """Keeps a few images and more codes to draw, spread evenly over the split, which may be sorted by class."""
        done, self._kept = self._kept, self._kept + 1
        pictured, plotted = (share(self.trainer, stage, done, many, len(target)) for many in (PICTURED, PLOTTED))
        if len(chosen := pictured.to(target.device)):
            self._pictured.append((target[chosen], seen[chosen]))
        if len(chosen := plotted.to(target.device)):
            named = label[chosen].cpu() if label is not None else None
            self._plotted.append((code.mean[chosen].flatten(1).float().cpu(), named))

    def _figures(
        self, seen: Tensor, target: Tensor, code: Code, output: Tensor, reconstruction: Tensor
    ) -> dict[str, Tensor]:
        """Computes the means of metrics over a batch."""
        figures, dimensions = self._quality(output, target), target[0].numel()
        if self.noise is not None:
            figures |= {f"{key}_input": value for key, value in self._quality(seen.clamp(0, 1), target).items()}
        if (components := self._principal_components()) is not None:
            figures |= {f"{key}_pca": value for key, value in self._quality(components(seen), target).items()}
        figures["reconstruction"] = reconstruction.mean()
        if code.kl is not None:
            kl = code.kl.flatten(1).sum(1)
            figures["kl"] = kl.mean()
            if self.loss.nats:
                figures["elbo"] = -(reconstruction + kl).mean()
                if self.loss.discrete:
                    figures["bits_per_dim"] = -figures["elbo"] / dimensions / math.log(2)
        if isinstance(self.bottleneck, Plain) and self.bottleneck.activation is not None:
            threshold = 0.1 if isinstance(self.bottleneck.activation, nn.Sigmoid) else 0.0
            figures["activity"] = (code.value.abs() > threshold).float().mean()
        return figures

    def _quality(self, image: Tensor, target: Tensor) -> dict[str, Tensor]:
        figures = {"mse": F.mse_loss(image, target), "psnr": psnr(image, target).mean()}
        if min(self.size) >= SSIM_SIDE:
            figures["ssim"] = ssim(image, target).mean()
        if min(self.size) >= MS_SSIM_SIDE:
            figures["ms_ssim"] = multiscale_structural_similarity_index_measure(image, target, data_range=1.0)
        return figures

    def _principal_components(self) -> PrincipalComponents | None:
        """Fits them once per process; returns None if disabled or without data to fit."""
        data, size = given_data(self.trainer), int(self.bottleneck.bits // 16)
        if self._components is None and self.pca and data is not None:
            dimensions = self.in_chans * math.prod(self.size)
            count = min(len(data.sources["train"]), PCA_VALUES // dimensions)
            self.pca = 0 < size < min(count, dimensions)
            if self.pca:
                image = data.samples("train", count)["image"]
                self._components = PrincipalComponents((image.flatten(1).float() / self.full).numpy(), size)
        return self._components

    @override
    def report(self, stage: Stage) -> Report:
        values = {key: value.cpu() for key, value in self.statistics[stage].compute().items()}
        self.statistics[stage].reset()
        report = Report({"bits_per_pixel": self.bottleneck.bits / math.prod(self.size)})
        if self.bottleneck.entries:
            report.figures["perplexity"] = values["perplexity"].float()
        if isinstance(self.bottleneck, Variational):
            active = values["variance"] > ACTIVE
            report.figures["active_units"] = active.sum().float()
            columns = zip(values["kl"].tolist(), values["variance"].tolist(), active.tolist(), strict=True)
            rows = [[k, kl, variance, "yes" if on else "no"] for k, (kl, variance, on) in enumerate(columns)]
            report.tables["units"] = ["unit", "kl", "variance of its mean", "active"], rows
        pictured, plotted = self._pictured, self._plotted
        self._kept, self._pictured, self._plotted = 0, [], []
        if self.trainer.is_global_zero and pictured:
            with torch.inference_mode(), self.publisher.optional(f"{stage}/reconstructions"):
                report.pictures = self._pictures(pictured, plotted, values)
        return report

    def _pictures(
        self,
        pictured: list[tuple[Tensor, Tensor]],
        plotted: list[tuple[Tensor, Tensor | None]],
        values: dict[str, Tensor],
    ) -> dict[str, Callable[[], NDArray[np.uint8]]]:
        target, seen = (torch.cat(parts) for parts in zip(*pictured, strict=True))
        draws = Draws((target * 255).round().byte(), False)
        code = self.bottleneck(self.features(self.normalize(seen * self.full)), draws, 1.0)
        means = self.bottleneck.load(code.saved)
        rows = {"image": to_uint8(target)} | ({"input": to_uint8(seen)} if self.noise is not None else {})
        rows["output"] = to_uint8(self.decode(means))
        if self._components is not None:
            rows["PCA"] = to_uint8(self._components(seen))
        drawn: dict[str, Callable[[], NDArray[np.uint8]]] = {"reconstructions": lambda: rows_of(rows)}
        if len(means) >= 2:
            drawn["interpolation"] = lambda: self._interpolation(means)
        codes = torch.cat([codes for codes, _ in plotted]).numpy()
        names: Sequence[str] = self.label_names or getattr(given_data(self.trainer), "label_names", [])
        labels = [label for _, label in plotted if label is not None]
        named = torch.cat(labels).numpy() if labels and len(names) > 1 else None
        drawn["codes"] = lambda: plane(codes, named, names)
        first = next((layer for layer in self.backbone.modules() if isinstance(layer, nn.Conv2d)), None)
        if first is not None and first.kernel_size[0] > 1:
            drawn["filters"] = lambda: filter_tiles(first.weight[:64])
        if len(self.bottleneck.shape) == 1:
            drawn["units"] = lambda: self._unit_pictures(values)
        if isinstance(self.bottleneck, Variational):
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(64, *self.bottleneck.shape, generator=generator).to(self.device)
            drawn["samples"] = lambda: sheet(to_uint8(self.decode(noise)))
            if len(self.bottleneck.shape) == 1:
                drawn["traversals"] = lambda: self._traversals(means[0], values["kl"])
        return drawn

    def sample(self, count: int, seed: int = 0) -> Tensor:
        """Generates images with a variational autoencoder: decodes samples of N(0, 1), float count×C×H×W in [0, 1]."""
        generator = torch.Generator().manual_seed(seed)
        return self.decode(torch.randn(count, *self.bottleneck.shape, generator=generator).to(self.device))

    def _interpolation(self, codes: Tensor, steps: int = 9) -> NDArray[np.uint8]:
        """Draws a row per pair of images: a linear interpolation between their codes."""
        pairs = codes[: len(codes) // 2 * 2].unflatten(0, (-1, 2))
        shares = torch.linspace(0, 1, steps, device=codes.device).view(1, steps, *(1,) * (codes.ndim - 1))
        between = torch.lerp(pairs[:, :1], pairs[:, 1:], shares).flatten(0, 1)
        if isinstance(self.bottleneck, VectorQuantized):
            between = self.bottleneck.load(self.bottleneck.quantize(between))
        return sheet(to_uint8(self.decode(between)), steps)

    def _unit_pictures(self, values: dict[str, Tensor]) -> NDArray[np.uint8]:
        """Draws the change of the mean code's image when each unit is raised by two standard deviations."""
        mean, spread = (values[key].float().to(self.device) for key in ("mean", "variance"))
        chosen = spread.argsort(descending=True)[:64].sort().values  # those with the largest variance
        base = mean[None]
        raised = base + torch.diag(2 * spread.clamp_min(1e-12).sqrt())[chosen]
        return filter_tiles(self.decoder(raised).float() - self.decoder(base).float())

    def _traversals(self, code: Tensor, kl: Tensor, steps: int = 9) -> NDArray[np.uint8]:
        """Draws a row for each of the eight units with the largest KL divergence: from −3 to 3, with the others
        fixed."""
        chosen = kl.argsort(descending=True)[:8].to(code.device)
        rows = code.repeat(len(chosen), steps, 1)
        for row, unit in enumerate(chosen.tolist()):
            rows[row, :, unit] = torch.linspace(-3, 3, steps, device=code.device)
        return sheet(to_uint8(self.decode(rows.flatten(0, 1))), steps)

    @torch.inference_mode()
    @override
    def predict(self, batch: dict[str, Tensor]) -> list[Answer]:
        """Returns the ``mse`` and ``psnr`` of the reconstruction of each image, and its ``code`` as nested lists.

        No noise is added to the images: a denoising autoencoder is applied to noisy images directly.
        """
        image = batch["image"]
        saved = self.encode(image).saved
        target, made = image.float() / self.full, self.decode(self.bottleneck.load(saved))
        errors = (made - target).square().flatten(1).mean(1).tolist()
        codes = saved if saved.dtype == torch.int64 else saved.double().mul(1e5).round().div(1e5)
        return [
            {"mse": round(mse, 6), "psnr": round(ratio, 3), "code": code}
            for mse, ratio, code in zip(errors, psnr(made, target).tolist(), codes.tolist(), strict=True)
        ]

    @torch.inference_mode()
    def _drawn(self, code: list[Any]) -> NDArray[np.uint8]:
        """Reconstructs an image from a ``code`` of `predict`, uint8 H×W×C."""
        saved = torch.tensor([code], device=self.device)
        return cast(NDArray[np.uint8], to_uint8(self.decode(self.bottleneck.load(saved)))[0])


class CodeAnswers(Answers):
    """Predicted codes, and the quality of the reconstructions.

    Args:
        decode: decodes a code to an image.
        size: height and width of images, in pixels.
    """

    fit = "crop"  # how images were resized to the input; see `DataSpec`

    def __init__(self, decode: Callable[[list[Any]], NDArray[np.uint8]], size: tuple[int, int]) -> None:
        self.decode, self.size = decode, size

    def draw(self, image: NDArray[np.uint8], answer: Answer) -> NDArray[np.uint8]:
        """See `Answers.draw`; the resized image next to its reconstruction."""
        shown, size = Image.fromarray(super().draw(image, answer)), self.size[::-1]
        if self.fit == "pad":
            shown = ImageOps.pad(shown, size, color=GREY, centering=(0, 0))
        else:
            shown = shown.resize(size) if self.fit == "stretch" else ImageOps.fit(shown, size)
        heading = f"PSNR {answer['psnr']:.1f} dB"
        return sheet([np.asarray(shown), self.decode(answer["code"])], heading=heading, side=max(112, *self.size))
