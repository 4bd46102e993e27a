"""The two players: a generator, and what turns a backbone into a discriminator; and how one of them is kept at rest."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrizations import _SpectralNorm, spectral_norm

from modules.decoders import Decoder
from modules.gan.objectives import Verdict


class Generator(nn.Module):
    """Makes images of noise, and of a class where it is conditional: the class's embedding goes with the noise.

    Args:
        decoder: the layers.
        latent_size: numbers of noise.
        num_classes: classes that one can ask for; 0 for none.
        in_chans: channels of the images.
        image_size: side of the images, in pixels.
    """

    def __init__(self, decoder: Decoder, latent_size: int, num_classes: int, in_chans: int, image_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes, latent_size) if num_classes else None
        decoder.build(((2 if num_classes else 1) * latent_size,), in_chans, image_size)
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
        image_size: side of the images, in pixels.
        code_size: numbers in the code.
        power: p, 1 or 2.
    """

    def __init__(
        self, decoder: Decoder, features: int, in_chans: int, image_size: int, code_size: int = 64, power: int = 2
    ) -> None:
        super().__init__()
        self.code = nn.Linear(features, code_size)
        decoder.build((code_size,), in_chans, image_size)
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
