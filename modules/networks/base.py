"""Base class of the networks that are registered with timm."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

Side = int | tuple[int, int]  # timm passes the image size as a pair


class BackboneError(ValueError):
    """A backbone cannot be created; the message names the cause and the way out."""


class MissingCodeError(BackboneError):
    """A network needs code that cannot be imported here; the message names it."""


def sides_of(img_size: Side) -> tuple[int, int]:
    """Returns height and width of images, in pixels."""
    return img_size if isinstance(img_size, tuple) else (img_size, img_size)


def side_of(img_size: Side) -> int:
    """Returns the side of square images, in pixels.

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
    """A convolutional part, fully connected layers and a linear classifier, with the methods of timm's models. Subclasses
    take ``num_classes`` and ``drop_rate`` as here; ``in_chans``, the channels of the input; and, where layers depend on it,
    ``img_size``, its side, or its height and width, in pixels.

    Args:
        body: layers of the convolutional part by name, in order.
        neck: flattens the feature map, and has the fully connected layers except the last.
        hidden: size of the neck's output.
        stages: name of a layer, its channels and its reduction, for each level of the feature pyramid.
        num_classes: size of the classifier; 0 for none.
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
        """Returns the last layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the last layer; 0 removes it."""
        self.num_classes = num_classes
        self.fc = nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Returns the layers from input to output, for layer-wise learning rates."""
        layers = [name for name in self._body if any(True for _ in getattr(self, name).parameters())]
        blocks = [(rf"^{name}\.", (depth,)) for depth, name in enumerate([*layers, "neck", "aux"])]
        return {"stem": r"^$", "blocks": blocks}

    def forward_features(self, image: Tensor) -> Tensor:
        """Computes the feature map of the convolutional part, float B×K×H×W, from float B×C×S×S."""
        for name in self._body:
            image = getattr(self, name)(image)
        return image

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Computes logits, float B×num_classes, or the features before the classifier, from float B×K×H×W."""
        features = self.head_drop(self.neck(features))
        return features if pre_logits else self.fc(features)

    def forward(self, image: Tensor) -> Tensor:
        """Computes logits, float B×num_classes, from float B×C×S×S."""
        return self.forward_head(self.forward_features(image))
