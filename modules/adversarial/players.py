"""Generator, discriminator heads and encoder of adversarial training."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrizations import _SpectralNorm, spectral_norm

from modules.adversarial.objectives import Verdict
from modules.networks.backbones import create_backbone, normalization
from modules.networks.decoders import Decoder
from modules.networks.parts import Part, within
from modules.spec import sides


class Encoder(Part):
    """Encodes an image as noise, which turns a GAN into a VAE-GAN (Larsen et al. 2016, arXiv:1512.09300): a normal
    distribution whose mean and log variance are linear in a backbone's features.

    The generator becomes the decoder of a variational autoencoder. Reconstructions are compared in the discriminator's
    feature space, ½‖f(x̂) − f(x)‖² / σ², where σ² is the variance of the features over a batch of real images: the
    paper's features are batch-normalised, and with small ones no code would be worth its divergence. The encoder
    minimises this plus the KL divergence from N(0, 1); the generator minimises it times ``weight``, plus its own loss
    on generated images and reconstructions, from which the encoder gets no gradient.

    Args:
        backbone: name, as in `modules.create_backbone`, such as the encoder of a registered autoencoder
            (``models:/name@alias``).
        pretrained: start from published weights.
        backbone_options: further arguments of the backbone.
        weight: γ in the paper.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: str = "convnet",
        pretrained: bool = False,
        backbone_options: dict[str, Any] | None = None,
        weight: float = 0.001,
    ) -> None:
        super().__init__()
        within("weight", weight, 1e-12)
        self.backbone, self.pretrained, self.backbone_options = backbone, pretrained, backbone_options
        self.weight = weight

    def build(self, latent_size: int, in_chans: int, image_size: int | str) -> None:
        """Creates the layers.

        Args:
            latent_size: dimensions of the noise.
            in_chans: number of image channels.
            image_size: size of the images; see `modules.spec.sides`.
        """
        net: Any = create_backbone(
            self.backbone, self.pretrained, in_chans, image_size, 0, **(self.backbone_options or {})
        )
        # Replaced by the recipe, so that it can be recreated without the registry.
        self.backbone, self.pretrained = net.recipe["backbone"], False
        self.backbone_options = net.recipe["backbone_options"]
        for name, value in zip(("mean", "std"), normalization(net, in_chans), strict=True):
            self.register_buffer(name, value.view(-1, 1, 1))
        self.network = net
        self.code = nn.Linear(getattr(net, "head_hidden_size", net.num_features), 2 * latent_size)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Computes mean and log variance, float B×latent_size each, from images, uint8 B×C×H×W."""
        mean, log_variance = self.code(self.network((image.float() / 255 - self.mean) / self.std)).float().chunk(2, 1)
        return mean, log_variance


class Generator(nn.Module):
    """Generates images from noise, and from a class if it is conditional: the class embedding is concatenated to the
    noise.

    Args:
        decoder: layers of the generator.
        latent_size: dimensions of the noise.
        num_classes: number of classes of a conditional generator; 0 for none.
        in_chans: number of image channels.
        image_size: size of the images; see `modules.spec.sides`.
        encoder: encodes an image as noise, only for a VAE-GAN; trained with the generator.
    """

    def __init__(
        self,
        decoder: Decoder,
        latent_size: int,
        num_classes: int,
        in_chans: int,
        image_size: int | str,
        encoder: Encoder | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        if encoder is not None:
            encoder.build(latent_size, in_chans, image_size)
        self.embedding = nn.Embedding(num_classes, latent_size) if num_classes else None
        decoder.build(((2 if num_classes else 1) * latent_size,), in_chans, sides(image_size))
        self.decoder = decoder

    def forward(self, noise: Tensor, label: Tensor | None = None) -> Tensor:
        """Generates images.

        Args:
            noise: float B×latent_size from N(0, 1).
            label: int64 B, if the generator is conditional.

        Returns:
            float B×C×H×W in [-1, 1].
        """
        if self.embedding is not None:
            assert label is not None
            noise = torch.cat([noise, self.embedding(label)], 1)
        return self.decoder(noise).tanh()


class Score(nn.Module):
    """A linear score of features; if it is conditional, the projection onto the class embedding is added (Miyato &
    Koyama 2018, arXiv:1802.05637).

    Args:
        features: number of features.
        num_classes: number of classes, 0 for none.
    """

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, 1)
        self.embedding = nn.Embedding(num_classes, features) if num_classes else None
        if self.embedding is not None:
            nn.init.normal_(self.embedding.weight, 0, features**-0.5)

    def forward(self, features: Tensor, image: Tensor, label: Tensor | None) -> Verdict:
        """Computes a verdict from features, float B×F."""
        score = self.linear(features)[:, 0]
        if self.embedding is not None:
            assert label is not None
            score = score + (self.embedding(label) * features).sum(1)
        return Verdict(score.float(), features)


class Energy(nn.Module):
    """The error of an autoencoder whose encoder is the backbone: the mean of |x̂ − x|^p over the values of an image.

    Args:
        decoder: decodes features to images.
        features: number of features.
        in_chans: number of image channels.
        image_size: size of the images; see `modules.spec.sides`.
        code_size: size of the code.
        power: p, 1 or 2.
    """

    def __init__(
        self, decoder: Decoder, features: int, in_chans: int, image_size: int | str, code_size: int = 64, power: int = 2
    ) -> None:
        super().__init__()
        self.code = nn.Linear(features, code_size)
        decoder.build((code_size,), in_chans, sides(image_size))
        self.decoder, self.power = decoder, power

    def forward(self, features: Tensor, image: Tensor, label: Tensor | None) -> Verdict:
        """Computes a verdict from features, float B×F, and their images, float B×C×H×W."""
        code = self.code(features)
        error = (self.decoder(code).float() - image.float()).abs() ** self.power
        return Verdict(error.flatten(1).mean(1), code)


def normalize_spectrum(module: nn.Module) -> None:
    """Applies spectral normalisation to all linear layers and convolutions: weights are divided by their largest
    singular value, estimated by one power iteration per forward pass in training (Miyato et al. 2018,
    arXiv:1802.05957)."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.Embedding):
            spectral_norm(layer)


@contextmanager
def at_rest(*players: nn.Module) -> Iterator[None]:
    """Freezes players while it is another's turn: gradients flow through them, but neither parameters nor buffers
    change.

    Batch normalisation uses batch statistics as in training, without updating the running ones; spectral normalisation
    keeps its vectors.
    """
    layers = [layer for player in players for layer in player.modules()]
    held = [p for player in players for p in player.parameters() if p.requires_grad]
    counting = [
        layer for layer in layers if isinstance(layer, _BatchNorm) and layer.track_running_stats and layer.training
    ]
    following = [layer for layer in layers if isinstance(layer, _SpectralNorm) and layer.training]
    for parameter in held:
        parameter.requires_grad_(False)
    for layer in counting:
        layer.track_running_stats = False
    for norm in following:
        norm.training = False
    try:
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_()
        for layer in counting:
            layer.track_running_stats = True
        for norm in following:
            norm.training = True


@torch.no_grad()
def follow(average: nn.Module, player: nn.Module, decay: float) -> None:
    """Updates an exponential moving average of parameters and buffers; counters are copied."""
    for mean, value in zip(average.state_dict().values(), player.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(value.to(mean.dtype), 1 - decay)
        else:
            mean.copy_(value)
