"""The two players: a generator, and what turns a backbone into a discriminator; and how one of them is kept at rest."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrizations import _SpectralNorm, spectral_norm

from modules.adversarial.objectives import Verdict
from modules.networks.backbones import create_backbone
from modules.networks.decoders import Decoder
from modules.networks.parts import Part, within
from modules.spec import sides


class Encoder(Part):
    """Finds the noise that an image may have been made of, which makes a VAE-GAN of a GAN (Larsen et al. 2016,
    arXiv:1512.09300): a normal distribution, whose mean and logarithm of the variance are linear in a backbone's features.

    The generator becomes the decoder of a variational autoencoder, whose reconstruction is compared in the discriminator's
    features, ½‖f(x̂) − f(x)‖² / σ², where σ² is their variance over a batch of real images: the paper's are batch-normalised,
    and where they are small no code would pay for itself. The encoder minimises this and the divergence from N(0, 1), the generator this times
    ``weight`` and its own loss for images of noise and for reconstructions, from which the encoder learns nothing.

    Args:
        backbone: what `modules.create_backbone` takes, such as the encoder of a registered autoencoder
            (``models:/name@alias``).
        pretrained: start it from published weights.
        backbone_options: further arguments of the backbone.
        weight: γ of the paper.
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
        """Makes the layers.

        Args:
            latent_size: dimensions of the noise.
            in_chans: channels of the images.
            image_size: of the images; see `modules.spec.sides`.
        """
        net: Any = create_backbone(
            self.backbone, self.pretrained, in_chans, image_size, 0, **(self.backbone_options or {})
        )
        # From here on it is what it was made as, so that it can be made again without the registry.
        self.backbone, self.pretrained = net.recipe["backbone"], False
        self.backbone_options = net.recipe["backbone_options"]
        for name in ("mean", "std"):
            value = torch.tensor(net.pretrained_cfg[name], dtype=torch.float32)
            value = value if len(value) == in_chans else value.mean().repeat(in_chans)
            self.register_buffer(name, value.view(-1, 1, 1))
        self.network = net
        self.code = nn.Linear(getattr(net, "head_hidden_size", net.num_features), 2 * latent_size)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 B×C×S×S to mean and logarithm of the variance, float B×latent_size each."""
        mean, log_variance = self.code(self.network((image.float() / 255 - self.mean) / self.std)).float().chunk(2, 1)
        return mean, log_variance


class Generator(nn.Module):
    """Makes images of noise, and of a class where it is conditional: the class's embedding goes with the noise.

    Args:
        decoder: the layers.
        latent_size: dimensions of the noise.
        num_classes: classes that one can ask for; 0 for none.
        in_chans: channels of the images.
        image_size: of the images; see `modules.spec.sides`.
        encoder: finds the noise of an image, which only a VAE-GAN does; it learns with the generator.
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
        """Makes images.

        Args:
            noise: float B×latent_size from N(0, 1).
            label: int64 B, where the generator is conditional.

        Returns:
            float B×C×S×S in [-1, 1].
        """
        if self.embedding is not None:
            assert label is not None
            noise = torch.cat([noise, self.embedding(label)], 1)
        return self.decoder(noise).tanh()


class Score(nn.Module):
    """A linear score of features; where it is conditional, the projection on the class's embedding is added
    (Miyato & Koyama 2018, arXiv:1802.05637).

    Args:
        features: length of the features.
        num_classes: classes, 0 for none.
    """

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, 1)
        self.embedding = nn.Embedding(num_classes, features) if num_classes else None
        if self.embedding is not None:
            nn.init.normal_(self.embedding.weight, 0, features**-0.5)

    def forward(self, features: Tensor, image: Tensor, label: Tensor | None) -> Verdict:
        """float B×F to a verdict."""
        score = self.linear(features)[:, 0]
        if self.embedding is not None:
            assert label is not None
            score = score + (self.embedding(label) * features).sum(1)
        return Verdict(score.float(), features)


class Energy(nn.Module):
    """The error of an autoencoder whose encoder is the backbone: the mean over an image's values of |x̂ − x|^p.

    Args:
        decoder: from features to images.
        features: length of the features.
        in_chans: channels of the images.
        image_size: of the images; see `modules.spec.sides`.
        code_size: numbers in the code.
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
        """float B×F and the float B×C×S×S that they are of, to a verdict."""
        code = self.code(features)
        error = (self.decoder(code).float() - image.float()).abs() ** self.power
        return Verdict(error.flatten(1).mean(1), code)


def normalize_spectrum(module: nn.Module) -> None:
    """Divides the weights of all linear layers and convolutions by their largest singular value, which one step of the
    power method follows at each forward pass in training (Miyato et al. 2018, arXiv:1802.05957)."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.Embedding):
            spectral_norm(layer)


@contextmanager
def at_rest(*players: nn.Module) -> Iterator[None]:
    """The player whose turn it is not: gradients flow through it, but neither its parameters nor its buffers change.

    Batch normalisation goes by the batch as in training, without counting it; spectral normalisation keeps its vectors.
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
    """Moves an exponential moving average of parameters and statistics one step on; counters are copied."""
    for mean, value in zip(average.state_dict().values(), player.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(value.to(mean.dtype), 1 - decay)
        else:
            mean.copy_(value)
