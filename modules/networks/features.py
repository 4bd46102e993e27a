"""Feature extraction with a frozen network: from its last layer or from each of its stages."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from modules.networks.backbones import computed_whole

GRID = 1024  # maximum number of values that `average_grid` keeps of an image or of a stage's feature maps


def pool(features: Any) -> Tensor:
    """Pools a backbone's output to one vector per image, float B×D; for maps B×C×H×W, the mean of the last."""
    last: Tensor = features[-1] if isinstance(features, list | tuple) else features
    return last.mean((2, 3)) if last.ndim == 4 else last


class SharedFeatures(nn.Module):
    """Stand-in for the backbone of a task that shares it with others: it takes the feature maps and returns those that
    the task uses.

    Args:
        feature_info: channels and strides of the maps, in timm's format.
        maps: return all maps; otherwise the mean of the last one.
    """

    def __init__(self, feature_info: Any, maps: bool) -> None:
        super().__init__()
        self.feature_info, self.maps = feature_info, maps
        self.num_features = self.head_hidden_size = feature_info.channels()[-1]

    def get_classifier(self) -> nn.Module:
        """Returns an identity, since the maps have no last layer."""
        return nn.Identity()

    def reset_classifier(self, num_classes: int) -> None:
        """Does nothing, since there is no last layer."""

    def forward_features(self, maps: list[Tensor]) -> Tensor:
        """Returns the last map, float B×C×H×W."""
        return maps[-1]

    def forward(self, maps: list[Tensor]) -> list[Tensor] | Tensor:
        """Returns the maps, a list of float B×C×H×W, or the mean of the last one, float B×C."""
        return maps if self.maps else pool(maps)


class Stages(nn.Module):
    """A backbone that returns the features of all its stages, between the image itself and its output.

    Args:
        backbone: a network of `create_backbone`, without ``features_only``.
    """

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone
        info = getattr(backbone.feature_info, "info", backbone.feature_info)
        self._channels = {level["module"]: level["num_chs"] for level in info}
        self._seen: dict[str, Tensor] = {}
        self.widths: dict[str, int] = {}  # number of features of each stage by name; known after the first forward pass
        for name in self._channels:
            backbone.get_submodule(name).register_forward_hook(partial(self._note, name))

    def _note(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        maps = output[0] if isinstance(output, tuple) else output
        if maps.ndim == 4 and maps.shape[1] != self._channels[name]:
            maps = maps.permute(0, 3, 1, 2)
        self._seen[name] = average_grid(maps) if maps.ndim == 4 else maps.flatten(1, -2).mean(1)

    def forward(self, image: Tensor) -> Tensor:
        """Computes the concatenated features of all stages, float B×D, from float B×C×H×W: feature maps are averaged to
        a grid of about a thousand values per stage; tokens are averaged."""
        answer = pool(self.backbone(image))
        named = {name: self._seen[name] for name in self._channels}
        stages = {"image": average_grid(image), **named, "answer": answer}
        self.widths = {name: value.shape[1] for name, value in stages.items()}
        return torch.cat(list(stages.values()), 1)


@torch.no_grad()
def extract(
    network: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    normalize: Callable[[Tensor], Tensor],
    join: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.int64] | None]:
    """Extracts the features of images with a frozen network.

    Args:
        network: a backbone; put into evaluation mode meanwhile.
        batches: batches with ``image`` uint8 B×C×H×W, and optionally ``label`` int64 B.
        normalize: converts images to the network's input.
        join: fuses the features with the tabular inputs, ``tabular`` of a batch; None for none.

    Returns:
        Pooled features, float32 N×D, and the labels, int64 N, or None.
    """
    modes = {part: part.training for part in network.modules()}
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    network.eval()
    features, labels = [], []
    for batch in batches:
        with computed_whole(network):
            found = pool(network(normalize(batch["image"].to(device))))
        found = join(found, batch["tabular"].to(device)) if join else found
        features.append(found.float().cpu().numpy())
        labels.append(batch.get("label"))
    for part, training in modes.items():
        part.training = training
    known = [label.numpy() for label in labels if label is not None]
    return np.concatenate(features), np.concatenate(known) if known else None


def average_grid(maps: Tensor) -> Tensor:
    """Averages feature maps, float B×C×H×W, to a grid of about a thousand values, float B×D."""
    side = max(1, int((GRID / maps.shape[1]) ** 0.5))
    return F.adaptive_avg_pool2d(maps, (min(side, maps.shape[2]), min(side, maps.shape[3]))).flatten(1)


class Grid(nn.Module):
    """`average_grid` as a network, for `extract`."""

    def forward(self, image: Tensor) -> Tensor:
        """Averages float B×C×H×W to float B×D."""
        return average_grid(image)
