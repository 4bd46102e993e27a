"""How networks are told of which domain an image shall be, and the pool of images."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from modules.networks.translators import Translator


def by_domain(networks: Sequence[Callable[[Tensor], Tensor]], image: Tensor, domain: Tensor) -> Tensor:
    """Each image through the network of its domain.

    Args:
        networks: one for each domain.
        image: float B×C×H×W.
        domain: int64 B.
    """
    rows = [(domain == k).nonzero()[:, 0] for k in range(len(networks))]
    parts = [network(image[own]) for network, own in zip(networks, rows, strict=True) if len(own)]
    return torch.cat(parts)[torch.cat(rows).argsort()]


class SeparateTranslators(nn.ModuleDict):
    """A network for each domain, which makes images of it (CycleGAN, Zhu et al. 2017, arXiv:1703.10593).

    Args:
        translators: not built yet, one for each domain.
        in_chans: channels of the images.
    """

    def __init__(self, translators: Sequence[Translator], in_chans: int) -> None:
        for translator in translators:
            translator.build(in_chans, in_chans)
        super().__init__({str(k): translator for k, translator in enumerate(translators)})

    def forward(self, image: Tensor, domain: Tensor) -> Tensor:
        """Makes images of a domain.

        Args:
            image: float B×C×H×W in [-1, 1].
            domain: which it shall be, int64 B.

        Returns:
            float B×C×H×W in [-1, 1].
        """
        return by_domain(list(self.values()), image, domain).tanh()


class SharedTranslator(nn.Module):
    """One network for all domains, which is told the wanted one by a plane for each value of each attribute, 1 where it is
    wanted and 0 elsewhere (StarGAN, Choi et al. 2018, arXiv:1711.09020, 4.2).

    Args:
        translator: not built yet.
        in_chans: channels of the images.
        sizes: values of each attribute; a domain is a combination, the last attribute changing fastest.
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
    """The value of each attribute, int64 B×A, of domains int64 B."""
    return torch.stack(torch.unravel_index(domain, tuple(sizes)), 1)


def domain_of(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """The domains, int64 B, that have these values of attributes, int64 B×A."""
    domain = torch.zeros_like(values[:, 0])
    for value, size in zip(values.unbind(1), sizes, strict=True):
        domain = domain * size + value
    return domain


class ImagePool:
    """Images that a generator made before. In the discriminator's turn each new one is, with probability ½, exchanged for
    one of them, so that what the generator did does not go out of sight at once (Shrivastava et al. 2017,
    arXiv:1612.07828, 2.3).

    Args:
        size: images kept of each domain; 0 hands the new ones on.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.kept: dict[int, list[Tensor]] = {}

    def exchange(self, image: Tensor, domain: Tensor, draws: Tensor) -> Tensor:
        """Takes new images in, and gives as many of the same domains out.

        Args:
            image: uint8 B×C×H×W.
            domain: int64 B.
            draws: float B×2, uniform in [0, 1): whether and for which one each is exchanged.
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
        """What a checkpoint keeps."""
        return {domain: torch.stack(kept).cpu() for domain, kept in self.kept.items()}

    def restore(self, state: dict[int, Tensor]) -> None:
        """Goes on where `state` was taken."""
        self.kept = {domain: list(kept) for domain, kept in state.items()}


def told(logits: Tensor, values: Tensor, sizes: Sequence[int]) -> Tensor:
    """The cross-entropy of what is said of attributes, a scalar: the sum over attributes, the mean over images.

    Args:
        logits: float B×K, for all values of the first attribute, then of the second, …
        values: the true ones, int64 B×A.
        sizes: values of each attribute.
    """
    answers = zip(logits.split(list(sizes), 1), values.unbind(1), strict=True)
    return torch.stack([F.cross_entropy(answer, value) for answer, value in answers]).sum()
