"""Feature extractors for metrics that compare sets of images."""

import hashlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.networks import BackboneError
from modules.networks.backbones import create_backbone, normalization
from modules.networks.weights import read_weights, registered_files
from modules.spec import sides

CHUNK = 64  # images per forward pass; fixed, so that features do not depend on the number of images
OWN = "lenet5"  # network to train if no extractor is named
FEATURES = 96  # maximum number of features of a trained extractor: the Fréchet distance is cubic in it
JUDGE = "convnet"  # network to train as a classifier of translated images


class Seen(NamedTuple):
    """Output of an extractor.

    Args:
        features: float32 N×F.
        probabilities: float32 N×K, the class probabilities of all heads side by side; None without a classifier.
    """

    features: Tensor
    probabilities: Tensor | None


class Extractor:
    """A frozen feature extractor that is not one of a module's parameters. Its name is part of the metrics' names.

    Args:
        name: name of the extractor.
        network: maps float B×C×H×W in [0, 1] to float B×F.
        head: classifier, maps float B×F to float B×K; or None.
        size: height and width that the network expects, in pixels; other images are resized.
        sizes: number of classes of each head that K consists of; by default, a single head.
    """

    def __init__(
        self, name: str, network: nn.Module, head: nn.Module | None, size: tuple[int, int], sizes: Sequence[int] = ()
    ) -> None:
        self.name, self.size, self.sizes = name, size, list(sizes)
        self.network = network.eval().requires_grad_(False)
        self.head = head if head is None else head.eval().requires_grad_(False)

    @property
    def digest(self) -> str:
        """Hexadecimal hash of the weights; metrics are only comparable between extractors with the same one."""
        parts = [self.network] + ([self.head] if self.head is not None else [])
        tensors = [value.cpu().contiguous() for part in parts for value in part.state_dict().values()]
        return hashlib.blake2b(b"".join(t.numpy().tobytes() for t in tensors), digest_size=8).hexdigest()

    @torch.inference_mode()
    def __call__(self, image: Tensor) -> Seen:
        """Extracts features of images.

        Args:
            image: uint8 N×C×S×S.

        Returns:
            Features and class probabilities, on the device of the images.
        """
        self.network.to(image.device)
        features, probabilities = [], []
        with torch.autocast(image.device.type, enabled=False):
            for chunk in image.split(CHUNK):
                x = _scaled(chunk.contiguous().float() / 255, self.size)
                features.append(self.network(x).flatten(1))
                if self.head is not None:
                    logits = self.head.to(image.device)(features[-1])
                    answers = logits.split(self.sizes or logits.shape[1], 1)
                    probabilities.append(torch.cat([answer.softmax(1) for answer in answers], 1))
        return Seen(torch.cat(features), torch.cat(probabilities) if probabilities else None)


def _scaled(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes float B×C×H×W to another height and width."""
    if tuple(image.shape[2:]) == size:
        return image
    return F.interpolate(image, size, mode="bilinear", antialias=True, align_corners=False)


class _Normalized(nn.Module):
    """A backbone preceded by the normalisation that it expects."""

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: Any, in_chans: int) -> None:
        super().__init__()
        mean, std = normalization(backbone, in_chans)
        self.register_buffer("mean", mean.view(-1, 1, 1))
        self.register_buffer("std", std.view(-1, 1, 1))
        self.backbone: Any = backbone

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.backbone((x - self.mean) / self.std))


class _Projection(nn.Module):
    """Projection of pixels onto principal components."""

    mean: Tensor
    components: Tensor

    def __init__(self, mean: Tensor, components: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("components", components)

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - self.mean) @ self.components


def extractor_name(address: str | None, num_classes: int) -> str:
    """Returns the name of an extractor in the names of metrics.

    Args:
        address: address of a `named_extractor`, or None.
        num_classes: number of classes of the data, 0 without labels.

    >>> extractor_name("models:/digits-lenet@champion", 10), extractor_name(None, 10)
    ('digits_lenet', 'lenet5')
    """
    if address is None:
        return OWN if num_classes else "pca"
    return re.sub(r"\W+", "_", address.removeprefix("models:/").partition("@")[0]).strip("_")


def named_extractor(address: str, in_chans: int, image_size: int | str) -> Extractor:
    """Loads an extractor chosen by the user.

    Args:
        address: a registered model (``models:/name@alias``), preferably of a classifier, or a timm name with published
            weights.
        in_chans: number of image channels.
        image_size: size of the images; see `modules.spec.sides`.

    Raises:
        BackboneError: it cannot be loaded, or takes images with other channels.
    """
    name = extractor_name(address, 0)
    if not address.startswith("models:/"):
        backbone = create_backbone(address, True, in_chans, image_size)
        return Extractor(name, _Normalized(backbone, in_chans), None, sides(image_size))
    description, file = registered_files(address)
    saved = description["module"]
    if saved.get("in_chans", in_chans) != in_chans:
        raise BackboneError(
            f"{address} takes images with {saved['in_chans']} channels, but these have {in_chans}: name another "
            "extractor."
        )
    size = saved.get("image_size", image_size)
    backbone = create_backbone(address, in_chans=in_chans, image_size=size)
    weights = read_weights(file, whole=True)
    head = None
    if {"head.weight", "head.bias"} <= weights.keys() and weights["head.weight"].ndim == 2:
        rows, columns = weights["head.weight"].shape
        head = nn.Linear(columns, rows)
        head.load_state_dict({"weight": weights["head.weight"], "bias": weights["head.bias"]})
    return Extractor(name, _Normalized(backbone, in_chans), head, sides(size))


def own_extractor(
    image: Tensor,
    label: Tensor | None,
    num_classes: int | Sequence[int],
    state: dict[str, Tensor] | None,
    name: str = OWN,
    steps: int = 400,
    shift: int = 0,
) -> Extractor:
    """Creates an extractor from the data: a small network trained for a few seconds on labelled images, or, without
    labels, a projection onto the first 32 principal components of the pixels.

    Args:
        image: uint8 N×C×S×S, training images; with ``state`` only their shape is used.
        label: int64 N, or N×Q for several classification heads; None without labels.
        num_classes: number of classes of each head.
        state: weights of an extractor created earlier, to restore it.
        name: timm name of the network.
        steps: training steps.
        shift: maximum random shift of the training images, in pixels.
    """
    channels, (height, width) = image.shape[1], image.shape[2:]
    side = max(12, height, width)  # its images are squares
    sizes = [num_classes] if isinstance(num_classes, int) else list(num_classes)
    if label is None or not sum(sizes):
        if state is None:
            values = (image.flatten(1).double() / 255).cpu()
            mean = values.mean(0)
            _, vectors = torch.linalg.eigh((values - mean).T @ (values - mean))
            size = min(32, values.shape[1])
            state = {"mean": mean.float(), "components": vectors[:, -size:].flip(1).float()}
        return Extractor("pca", _Projection(state["mean"], state["components"]), None, (height, width))
    # A trainer that only evaluates is in inference mode, whose tensors cannot be trained.
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        torch.manual_seed(0)
        backbone: Any = create_backbone(name, in_chans=channels, image_size=side)
        network: nn.Module = _Normalized(backbone, channels)
        length = backbone.head_hidden_size
        if length > FEATURES:
            network, length = nn.Sequential(network, nn.Linear(length, FEATURES), nn.ReLU()), FEATURES
        head = nn.Linear(length, sum(sizes))
        whole = nn.Sequential(network, head)
        if state is not None:
            whole.load_state_dict(state)
        else:
            _train(whole, image, label.view(len(label), -1), sizes, side, steps, shift)
    return Extractor(name, network, head, (side, side), sizes)


def _train(
    network: nn.Module, image: Tensor, label: Tensor, sizes: list[int], side: int, steps: int, shift: int
) -> None:
    """Trains a classifier in a few seconds; deterministic on machines of the same kind."""
    network.to(image.device).train()
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    order = np.random.default_rng(0)
    indices = np.concatenate([order.permutation(len(image)) for _ in range(-(-steps * CHUNK // len(image)))])
    with torch.enable_grad(), torch.autocast(image.device.type, enabled=False):
        for step in range(steps):
            chosen = torch.from_numpy(indices[step * CHUNK : (step + 1) * CHUNK]).to(image.device)
            x = _scaled(image[chosen].float() / 255, (side, side))
            if shift:
                moves = order.integers(-shift, shift + 1, 2).tolist()
                x = F.pad(x, (shift,) * 4, mode="replicate").roll(moves, (2, 3))[..., shift:-shift, shift:-shift]
            answers = zip(network(x).split(sizes, 1), label[chosen].unbind(1), strict=True)
            loss = torch.stack([F.cross_entropy(answer, truth) for answer, truth in answers]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def state_of(extractor: Extractor) -> dict[str, Tensor]:
    """Returns the weights of an extractor of `own_extractor`, from which it can be restored."""
    if extractor.head is None:
        return {key: value.cpu() for key, value in extractor.network.state_dict().items()}
    return {key: value.cpu() for key, value in nn.Sequential(extractor.network, extractor.head).state_dict().items()}
