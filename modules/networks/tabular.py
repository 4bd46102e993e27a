"""Tabular inputs: standardised, and fused with the features of an image."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modules.networks.backbones import take_head
from modules.spec import DataSpec
from modules.views import Views

HIDDEN = 64  # units of the hidden layer


class Standardization(nn.Module):
    """Standardises quantities to mean 0 and standard deviation 1 over the training set, and back; stored with the
    weights.

    Args:
        mean: mean of each quantity, K.
        std: standard deviation of each quantity, K; 1 for a constant one.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, value: Tensor) -> Tensor:
        """Standardises float B×K."""
        return (value - self.mean) / self.std

    def undo(self, value: Tensor) -> Tensor:
        """Converts float B×K back to the units of the data."""
        return value * self.std + self.mean


class LateFusion(nn.Module):
    """Late fusion: concatenates the features of an image with its standardised tabular inputs and a hidden ReLU layer of these, like the
    wide and the deep part of Cheng et al. 2016 (arXiv:1606.07792), for a linear head.

    Args:
        data: names, means and standard deviations of the tabular inputs.
    """

    def __init__(self, data: DataSpec) -> None:
        super().__init__()
        count = len(data.tabular_names or ())
        mean, std = (
            torch.tensor(given or [other] * count)
            for given, other in ((data.tabular_mean, 0.0), (data.tabular_std, 1.0))
        )
        self.scaling = Standardization(mean, std)
        self.hidden = nn.Sequential(nn.Linear(count, HIDDEN), nn.ReLU())
        self.width = count + HIDDEN

    def forward(self, features: Tensor, tabular: Tensor | None = None) -> Tensor:
        """Concatenates both.

        Args:
            features: float B×D.
            tabular: float32 B×V; None for the means of the training set.

        Returns:
            float B×(D + ``width``).
        """
        values = self.scaling.mean.expand(len(features), -1) if tabular is None else tabular
        scaled = self.scaling(values)
        return torch.cat([features, scaled, self.hidden(scaled)], 1)


def fuse(module: Any, data: DataSpec) -> None:
    """Gives a module ``head``, a linear layer on its backbone's features, and ``fusion``, the `LateFusion` before it; None
    without tabular inputs."""
    module.head = take_head(module.backbone, data.num_classes)
    module.fusion = LateFusion(data) if data.tabular_names else None
    if module.fusion is not None:
        if any(name.endswith("_x") for name in data.tabular_names or ()):  # they would have to be mirrored, too
            module.views = Views("a network with keypoints as input", possible=False)
        module.needs = (*module.needs, "tabular")
        module.head = nn.Linear(module.head.in_features + module.fusion.width, data.num_classes)


def headed(module: Any, image: Tensor, tabular: Tensor | None) -> Tensor:
    """Applies the backbone and the head of a module with `fuse`.

    Args:
        module: the module.
        image: normalised images, float B×C×H×W.
        tabular: see `LateFusion.forward`.
    """
    features = module.backbone(image)
    said: Tensor = module.head(features if module.fusion is None else module.fusion(features, tabular))
    return said


def inputs_of(module: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs of a module with `fuse` beside the image, by name."""
    return {} if module.fusion is None else {"tabular": batch["tabular"]}
