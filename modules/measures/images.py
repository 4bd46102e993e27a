"""Reconstruction losses, and quality metrics of an image compared with a reference."""

import difflib
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from typing_extensions import override

from modules.networks.backbones import create_backbone, normalization
from modules.networks.parts import Part, within

SSIM_SIDE = 11  # side of its window in pixels, the smallest valid image size


def psnr(image: Tensor, target: Tensor) -> Tensor:
    """Computes the peak signal-to-noise ratio of each pair of images, float B×… in [0, 1], in decibels, float B; at
    most 100.

    >>> psnr(torch.full((1, 3, 8, 8), 0.6), torch.full((1, 3, 8, 8), 0.5))
    tensor([20.0000])
    """
    ratio = peak_signal_noise_ratio(image, target, 1.0, reduction="none", dim=tuple(range(1, image.ndim)))
    return ratio.clamp_max(100.0)


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Computes KL(N(mean, variance) ‖ N(0, 1)) of each element, in nats (Kingma & Welling 2014, arXiv:1312.6114,
    appendix B).

    >>> gaussian_kl(torch.tensor([0.0, 2.0]), torch.zeros(2))
    tensor([0., 2.])
    """
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


def ssim(image: Tensor, target: Tensor) -> Tensor:
    """Computes the structural similarity of each pair of images, float B×C×H×W in [0, 1], as float B (Wang et al. 2004,
    doi:10.1109/TIP.2003.819861): the mean over all positions where the Gaussian window of 11 pixels fits in.

    >>> ssim(torch.zeros(2, 1, 16, 16), torch.zeros(2, 1, 16, 16))
    tensor([1., 1.])
    """
    _, places = structural_similarity_index_measure(
        image, target, data_range=1.0, reduction="none", return_full_image=True
    )
    rim = SSIM_SIDE // 2  # where the library's window extends over the edge
    return places[..., rim:-rim, rim:-rim].flatten(1).mean(1)


class ReconstructionLoss(Part):
    """Base class of losses that compare a decoder's output with the original image."""

    nats = False  # whether the loss is a negative log-likelihood
    least = 1  # smallest side of the images, in pixels
    discrete = False  # whether that is the likelihood of one of the 256 levels of uint8

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Computes the loss of each image, summed over its values.

        Args:
            output: output of the decoder, float B×C×H×W.
            target: float B×C×H×W in [0, 1].

        Returns:
            float B.
        """
        raise NotImplementedError

    def image(self, output: Tensor) -> Tensor:
        """Converts the decoder's output to images, float B×C×H×W in [0, 1]."""
        return output.clamp(0, 1)


class MSE(ReconstructionLoss):
    """Σ(x̂ − x)²; up to a constant the negative log-likelihood of N(x̂, ½).

    >>> MSE()(torch.full((1, 1, 2, 2), 0.5), torch.zeros(1, 1, 2, 2))
    tensor([1.])
    """

    @override
    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().flatten(1).sum(1)


class L1(ReconstructionLoss):
    """Σ|x̂ − x|.

    >>> L1()(torch.full((1, 1, 2, 2), 0.5), torch.zeros(1, 1, 2, 2))
    tensor([2.])
    """

    @override
    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).abs().flatten(1).sum(1)


class BCE(ReconstructionLoss):
    """−Σ x log p + (1 − x) log(1 − p) with p the sigmoid of the output, in nats.

    For black-and-white images it is the negative log-likelihood of a Bernoulli distribution per pixel. Grey values are
    used as probabilities, as is usual; the loss is then an expectation, whose minimum is the entropy, above zero.

    >>> BCE().image(torch.zeros(1, 1, 1, 1)).item()
    0.5
    """

    nats = True

    @override
    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(output, target, reduction="none").flatten(1).sum(1)

    @override
    def image(self, output: Tensor) -> Tensor:
        return output.sigmoid()


class DiscretizedLogistic(ReconstructionLoss):
    """Negative log-likelihood, in nats, of the 256 levels of uint8 under a logistic distribution around the output; the
    outermost levels include the tails (Kingma et al. 2016, arXiv:1606.04934, appendix C). The scale is learned, shared
    by all pixels. The resulting bits per dimension are comparable with those of a lossless code.
    """

    nats = discrete = True

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(-2.5))

    @override
    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        inverse, half = (-self.log_scale).exp(), 0.5 / 255
        upper, lower = (target + half - output) * inverse, (target - half - output) * inverse
        inside = (upper.sigmoid() - lower.sigmoid()).clamp_min(1e-12).log()
        black, white = F.logsigmoid(upper), F.logsigmoid(-lower)
        log_p = torch.where(target < half, black, torch.where(target > 1 - half, white, inside))
        return -log_p.flatten(1).sum(1)


class SSIM(ReconstructionLoss):
    """Σ of w (1 − SSIM) + (1 − w) |x̂ − x| (Zhao et al. 2017, doi:10.1109/TCI.2016.2644865, with one scale).

    Args:
        share: w, in [0, 1]. Without the second term, brightness drifts.
    """

    least = SSIM_SIDE

    def __init__(self, share: float = 0.84) -> None:
        super().__init__()
        within("share", share, 0, 1)
        self.share = share

    @override
    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        far = (output - target).abs().flatten(1).sum(1)
        return self.share * target[0].numel() * (1 - ssim(output, target)) + (1 - self.share) * far


class FixedFeatures:
    """Feature maps of a frozen network that is not part of a module's parameters and checkpoints.

    Args:
        backbone: name, as in `modules.create_backbone`.
        pretrained: load published weights.
        backbone_options: further arguments of the network, such as ``out_indices``.
        network: an existing network to use; not modified.
    """

    def __init__(
        self, backbone: str, pretrained: bool = False, backbone_options: dict[str, Any] | None = None,
        network: nn.Module | None = None,
    ) -> None:  # fmt: skip
        self.backbone, self.pretrained, self.backbone_options = backbone, pretrained, backbone_options
        self._network: Any = network

    def network(self, image: Tensor) -> Any:
        """Returns the network, created for images of the size of the first ones, float B×C×H×W, on the device of
        these."""
        if self._network is None:
            channels, height, width = image.shape[1:]
            size = height if height == width else f"{height}x{width}"
            network: Any = create_backbone(
                self.backbone, self.pretrained, channels, size, features_only=True, **(self.backbone_options or {})
            )
            self._network = network.eval().requires_grad_(False)
        return self._network.to(image.device)

    def __call__(self, image: Tensor) -> list[Tensor]:
        """Computes feature maps, float B×K×h×w each, of images, float B×C×H×W in [0, 1]."""
        network = self.network(image)
        mean, std = (value.view(-1, 1, 1).to(image.device) for value in normalization(network, image.shape[1]))
        return cast(list[Tensor], network((image - mean) / std))

    def named(self, image: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """Computes the feature maps of named layers, float B×K×h×w each, of images, float B×C×H×W in [0, 1]. Layers are
        stages of the pyramid or any others.

        Raises:
            ValueError: a layer does not exist or outputs no maps, or the network does not accept the images.
        """
        network, seen, hooks = self.network(image), dict[str, Tensor](), []
        levels, known = network.feature_info.module_name(), dict(network.named_modules())

        def hook(name: str, layer: nn.Module, given: Any, maps: Any) -> Any:
            seen[name] = maps
            return maps.clone() if isinstance(maps, Tensor) else None  # the next layer may modify it in place

        for name in {*layers} - {*levels}:
            spelt = [n for n in (name, name.replace(".", "_"), f"model.{name}") if name and n in known]
            if not spelt:
                near = difflib.get_close_matches(name, [*levels, *known], 3, 0.4)
                hint = f"; near are {', '.join(near)}" if near else ""
                raise ValueError(f"{self.backbone} has no layer {name!r}; its stages are {', '.join(levels)}{hint}.")
            hooks.append(known[spelt[0]].register_forward_hook(partial(hook, name)))
        try:
            seen |= dict(zip(levels, self(image), strict=True))
        except (RuntimeError, AssertionError, ValueError) as error:
            size, why = f"{image.shape[3]}×{image.shape[2]}", str(error).partition("\n")[0]
            raise ValueError(f"{self.backbone} does not accept images of {size} pixels: {why}") from None
        finally:
            for handle in hooks:
                handle.remove()
        for name in layers:
            if not isinstance(seen.get(name), Tensor) or seen[name].ndim != 4:
                raise ValueError(f"The layer {name} of {self.backbone} does not output maps: name another one.")
        return {name: seen[name] for name in layers}


def perceptual_distance(one: list[Tensor], other: list[Tensor]) -> Tensor:
    """Computes the distance of images in feature space: the squared distance of unit vectors at each position, averaged
    over positions and summed over levels (Zhang et al. 2018, arXiv:1801.03924, equation 1 without the learned weights).

    Args:
        one: feature maps of `FixedFeatures`, float B×K×h×w each.
        other: feature maps of the images to compare with.

    Returns:
        float B.

    >>> perceptual_distance([torch.ones(1, 4, 2, 2)], [3 * torch.ones(1, 4, 2, 2)])
    tensor([0.])
    """
    pairs = [
        (F.normalize(a.float(), eps=1e-10), F.normalize(b.float(), eps=1e-10)) for a, b in zip(one, other, strict=True)
    ]
    return torch.stack([(a - b).square().sum(1).flatten(1).mean(1) for a, b in pairs]).sum(0)


class Perceptual(ReconstructionLoss):
    """Σ(x̂ − x)² plus the squared distance in the feature space of a frozen network (Johnson et al. 2016,
    arXiv:1603.08155, equation 2): averaged over each level of its pyramid, summed over the levels, times the number of
    values of the image.

    Args:
        backbone: name of the network, as in `modules.create_backbone`.
        pretrained: load published weights.
        weight: weight of the second term.
        backbone_options: further arguments of the network, such as ``out_indices``.
        unit: compare unit vectors (`perceptual_distance`), so that no strong channel dominates.
    """

    def __init__(
        self,
        backbone: str,
        pretrained: bool = False,
        weight: float = 1.0,
        backbone_options: dict[str, Any] | None = None,
        unit: bool = False,
    ) -> None:
        super().__init__()
        self.backbone, self.pretrained, self.weight = backbone, pretrained, weight
        self.backbone_options, self.unit = backbone_options, unit
        self._features = FixedFeatures(backbone, pretrained, backbone_options)

    @override
    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self._features(target)
        maps = self._features(output)
        if self.unit:
            far = perceptual_distance(maps, wanted)
        else:
            pairs = zip(maps, wanted, strict=True)
            far = torch.stack([(one - other).square().flatten(1).mean(1) for one, other in pairs]).sum(0)
        return (output - target).square().flatten(1).sum(1) + self.weight * target[0].numel() * far
