"""What the lectures' networks share: one network with the methods that timm's models have."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

Side = int | tuple[int, int]  # timm gives the image size as a pair


class BackboneError(ValueError):
    """A backbone cannot be made; the message names what is wrong and the way out."""


def sides_of(img_size: Side) -> tuple[int, int]:
    """Height and width of images, in pixels."""
    return img_size if isinstance(img_size, tuple) else (img_size, img_size)


def side_of(img_size: Side) -> int:
    """The side of square images, in pixels.

    Raises:
        BackboneError: they are not square.
    """
    height, width = sides_of(img_size)
    if height != width:
        raise BackboneError(
            f"The network is made for square images, not for {height}×{width} pixels: set --data.image_size {min(height, width)}, "
            "or choose another --backbone, such as resnet18."
        )
    return height


class Network(nn.Module):
    """A convolutional part, fully connected layers, and a linear classifier, with the methods that timm's models have.

    Args:
        body: the layers of the convolutional part, by name, from the input on.
        neck: turns its result into a vector; the fully connected layers but the last.
        hidden: length of that vector.
        stages: name of a layer, its channels and its reduction of the side, for each level of the feature pyramid.
        num_classes: size of the classifier; 0 leaves the vector.
        drop_rate: dropout before the classifier.
    """

    def __init__(
        self,
        body: Mapping[str, nn.Module],
        neck: nn.Module,
        hidden: int,
        stages: Sequence[tuple[str, int, int]],
        num_classes: int,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self._body = tuple(body)
        for name, layer in body.items():
            self.add_module(name, layer)
        self.neck = neck
        self.head_drop = nn.Dropout(drop_rate)
        self.num_features = stages[-1][1] if stages else hidden
        self.head_hidden_size = hidden
        self.feature_info = [{"module": m, "num_chs": c, "reduction": r} for m, c, r in stages]
        self.reset_classifier(num_classes)

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the last layer; 0 removes it."""
        self.num_classes = num_classes
        self.fc = nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The layers from input to output, for layer-wise learning rates."""
        layers = [name for name in self._body if any(True for _ in getattr(self, name).parameters())]
        blocks = [(rf"^{name}\.", (depth,)) for depth, name in enumerate([*layers, "neck", "aux"])]
        return {"stem": r"^$", "blocks": blocks}

    def forward_features(self, image: Tensor) -> Tensor:
        """float B×C×S×S to the result of the convolutional part, float B×K×H×W."""
        for name in self._body:
            image = getattr(self, name)(image)
        return image

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """float B×K×H×W to float B×num_classes, or to the vector before the classifier."""
        features = self.head_drop(self.neck(features))
        return features if pre_logits else self.fc(features)

    def forward(self, image: Tensor) -> Tensor:
        """float B×C×S×S to float B×num_classes."""
        return self.forward_head(self.forward_features(image))
