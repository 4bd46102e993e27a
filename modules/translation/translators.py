"""Generators conditioned on a domain, and the image pool."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from modules.networks.translators import Translator


def by_domain(networks: Sequence[Callable[[Tensor], Tensor]], image: Tensor, domain: Tensor) -> Tensor:
    """Applies to each image the network of its domain.

    Args:
        networks: one per domain.
        image: float B×C×H×W.
        domain: int64 B.
    """
    rows = [(domain == k).nonzero()[:, 0] for k in range(len(networks))]
    parts = [network(image[own]) for network, own in zip(networks, rows, strict=True) if len(own)]
    return torch.cat(parts)[torch.cat(rows).argsort()]


class SeparateTranslators(nn.ModuleDict):
    """A generator per domain (CycleGAN, Zhu et al. 2017, arXiv:1703.10593).

    Args:
        translators: one per domain, not built yet.
        in_chans: number of image channels.
    """

    def __init__(self, translators: Sequence[Translator], in_chans: int) -> None:
        for translator in translators:
            translator.build(in_chans, in_chans)
        super().__init__({str(k): translator for k, translator in enumerate(translators)})

    def forward(self, image: Tensor, domain: Tensor) -> Tensor:
        """Translates images into domains.

        Args:
            image: float B×C×H×W in [-1, 1].
            domain: target domains, int64 B.

        Returns:
            float B×C×H×W in [-1, 1].
        """
        return by_domain(list(self.values()), image, domain).tanh()


class SharedTranslator(nn.Module):
    """One generator for all domains, conditioned on the target by a constant plane for each value of each attribute, 1
    for the target's values and 0 for others (StarGAN, Choi et al. 2018, arXiv:1711.09020, section 4.2).

    Args:
        translator: not built yet.
        in_chans: number of image channels.
        sizes: number of values of each attribute; a domain is a combination, the last attribute varying fastest.
    """

    def __init__(self, translator: Translator, in_chans: int, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = list(sizes)
        translator.build(in_chans + sum(sizes), in_chans)
        self.translator = translator

    @override
    def forward(self, image: Tensor, domain: Tensor) -> Tensor:
        values = values_of(domain, self.sizes).unbind(1)
        wanted = torch.cat([F.one_hot(value, size) for value, size in zip(values, self.sizes, strict=True)], 1)
        planes = wanted.to(image.dtype)[:, :, None, None].expand(-1, -1, *image.shape[2:])
        return self.translator(torch.cat([image, planes], 1)).tanh()


def values_of(domain: Tensor, sizes: Sequence[int]) -> Tensor:
    """Converts domains, int64 B, to attribute values, int64 B×A."""
    return torch.stack(torch.unravel_index(domain, tuple(sizes)), 1)


def domain_of(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """Converts attribute values, int64 B×A, to domains, int64 B."""
    domain = torch.zeros_like(values[:, 0])
    for value, size in zip(values.unbind(1), sizes, strict=True):
        domain = domain * size + value
    return domain


class ImagePool:
    """History of generated images. In the discriminator's turn each new image is exchanged for an earlier one with
    probability ½, so that the discriminator does not forget them at once (Shrivastava et al. 2017, arXiv:1612.07828,
    section 2.3).

    Args:
        size: number of images kept per domain; 0 returns the new ones.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.kept: dict[int, list[Tensor]] = {}

    def exchange(self, image: Tensor, domain: Tensor, draws: Tensor) -> Tensor:
        """Adds new images, and returns as many of the same domains.

        Args:
            image: uint8 B×C×H×W.
            domain: int64 B.
            draws: float B×2, uniform in [0, 1): decides whether an image is exchanged, and for which one.
        """
        if not self.size:
            return image
        given = []
        for new, where, (whether, which) in zip(image, domain.tolist(), draws.tolist(), strict=True):
            kept = self.kept.setdefault(where, [])
            given.append(new)
            if len(kept) < self.size:
                kept.append(new.clone())
            elif whether < 0.5:
                place = int(which * self.size)
                given[-1], kept[place] = kept[place].to(new.device), new.clone()
        return torch.stack(given)

    def state(self) -> dict[int, Tensor]:
        """Returns the state for a checkpoint."""
        return {domain: torch.stack(kept).cpu() for domain, kept in self.kept.items()}

    def restore(self, state: dict[int, Tensor]) -> None:
        """Restores a `state`."""
        self.kept = {domain: list(kept) for domain, kept in state.items()}


def told(logits: Tensor, values: Tensor, sizes: Sequence[int]) -> Tensor:
    """Computes the cross-entropy of attributes, a scalar, summed over attributes and averaged over images.

    Args:
        logits: float B×K, of all values of the first attribute, then of the second, …
        values: true values, int64 B×A.
        sizes: number of values of each attribute.
    """
    answers = zip(logits.split(list(sizes), 1), values.unbind(1), strict=True)
    return torch.stack([F.cross_entropy(answer, value) for answer, value in answers]).sum()
