"""Features of a fixed network: of its last layer, of each of its stages, of a data set."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

GRID = 1024  # numbers at most that `average_grid` leaves of an image or of a stage's maps


def pool(features: Any) -> Tensor:
    """What a backbone answers as one vector for each image, float B×D; of maps B×C×H×W the mean of the last."""
    last: Tensor = features[-1] if isinstance(features, list | tuple) else features
    return last.mean((2, 3)) if last.ndim == 4 else last


class SharedFeatures(nn.Module):
    """The backbone of one task among several that share one: it is given the maps, and hands on what the task looks at.

    Args:
        feature_info: channels and strides of the maps, as timm tells them.
        maps: hand on all maps; else the mean of the last one.
    """

    def __init__(self, feature_info: Any, maps: bool) -> None:
        super().__init__()
        self.feature_info, self.maps = feature_info, maps
        self.num_features = self.head_hidden_size = feature_info.channels()[-1]

    def get_classifier(self) -> nn.Module:
        """None: the maps have no last layer."""
        return nn.Identity()

    def reset_classifier(self, num_classes: int) -> None:
        """Nothing: there is none."""

    def forward_features(self, maps: list[Tensor]) -> Tensor:
        """The last map, float B×C×H×W."""
        return maps[-1]

    def forward(self, maps: list[Tensor]) -> list[Tensor] | Tensor:
        """Maps, a list of float B×C×H×W, as they are, or float B×C."""
        return maps if self.maps else pool(maps)


class Stages(nn.Module):
    """A backbone that tells what each of its stages makes of an image, after the image itself and before its answer.

    Args:
        backbone: what `create_backbone` makes, without ``features_only``.
    """

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone
        info = getattr(backbone.feature_info, "info", backbone.feature_info)
        self._channels = {level["module"]: level["num_chs"] for level in info}
        self._seen: dict[str, Tensor] = {}
        self.widths: dict[str, int] = {}  # numbers of each stage, by its name; known after the first image
        for name in self._channels:
            backbone.get_submodule(name).register_forward_hook(partial(self._note, name))

    def _note(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        maps = output[0] if isinstance(output, tuple) else output
        if maps.ndim == 4 and maps.shape[1] != self._channels[name]:
            maps = maps.permute(0, 3, 1, 2)
        self._seen[name] = average_grid(maps) if maps.ndim == 4 else maps.flatten(1, -2).mean(1)

    def forward(self, image: Tensor) -> Tensor:
        """float B×C×H×W to the numbers of all stages in a row, float B×D: maps are averaged to a grid, so that each stage
        has about a thousand numbers; of tokens the mean is taken."""
        answer = pool(self.backbone(image))
        named = {name: self._seen[name] for name in self._channels}
        stages = {"image": average_grid(image), **named, "answer": answer}
        self.widths = {name: value.shape[1] for name, value in stages.items()}
        return torch.cat(list(stages.values()), 1)


@torch.no_grad()
def extract(
    network: nn.Module, batches: Iterable[dict[str, Tensor]], normalize: Callable[[Tensor], Tensor]
) -> tuple[NDArray[np.float32], NDArray[np.int64] | None]:
    """What a fixed network makes of images.

    Args:
        network: a backbone; it is in evaluation mode meanwhile.
        batches: with ``image`` uint8 B×C×H×W, and ``label`` int64 B or none.
        normalize: makes the network's input of the images.

    Returns:
        Pooled features, float32 N×D, and the labels, int64 N, or None.
    """
    modes = {part: part.training for part in network.modules()}
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    network.eval()
    features, labels = [], []
    for batch in batches:
        features.append(pool(network(normalize(batch["image"].to(device)))).float().cpu().numpy())
        labels.append(batch.get("label"))
    for part, training in modes.items():
        part.training = training
    known = [label.numpy() for label in labels if label is not None]
    return np.concatenate(features), np.concatenate(known) if known else None


def average_grid(maps: Tensor) -> Tensor:
    """Averages maps, float B×C×H×W, to a grid of about a thousand numbers, float B×D."""
    side = max(1, int((GRID / maps.shape[1]) ** 0.5))
    return F.adaptive_avg_pool2d(maps, (min(side, maps.shape[2]), min(side, maps.shape[3]))).flatten(1)


class Grid(nn.Module):
    """`average_grid` as the network that `extract` asks."""

    def forward(self, image: Tensor) -> Tensor:
        """float B×C×H×W to float B×D."""
        return average_grid(image)
