"""Arguments that every module takes: the description of its data, and the backbone that it is built on."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, Self

from modules.networks import BackboneError

VALUES = ("bit_depth", "channel_mean", "channel_std", "tabular_names")  # fields of `DataSpec` that every network needs
MOMENTS = ("tabular_mean", "tabular_std")  # fields of `DataSpec` that are stored with the weights
Strategy = Literal["scratch", "features", "finetune", "freeze_unfreeze"]
Transfer = Literal["scratch", "features", "finetune", "freeze_unfreeze", "auto"]


def sides(size: int | str) -> tuple[int, int]:
    """Returns height and width for an image size: the side of a square in pixels, or ``HEIGHTxWIDTH``.

    >>> sides(224), sides("240x320")
    ((224, 224), (240, 320))
    """
    height, _, width = str(size).lower().partition("x")
    return int(height), int(width or height)


@dataclass(frozen=True)
class DataSpec:
    """Description of the data that a network is built for. The command line fills it in from the data module.

    >>> DataSpec(in_chans=1, image_size=28, label_names=["cat", "dog"]).num_classes
    2
    >>> DataSpec(num_classes=3).names
    ['0', '1', '2']

    Args:
        in_chans: number of image channels.
        image_size: image size in training: the side of a square in pixels, or ``HEIGHTxWIDTH``; see `sides`.
        num_classes: number of classes; by default, the length of ``label_names``.
        label_names: names of the classes, by index; by default, the indices.
        class_weights: weight of each class in the loss; None for equal weights.
        target_mean: mean of each target quantity over the training set; None for 0.
        target_std: standard deviation of each target quantity; None for 1.
        observation_mean: mean of each number of an observation; None for 0, as for observations that are images.
        observation_std: standard deviation of each number of an observation; None for 1.
        attributes: attributes of the classes, with their values: the classes are all combinations, the last attribute
            varying fastest.
        fit: how images are resized to ``image_size``, needed to map predictions back to the original pixels: ``pad`` or
            ``stretch``.
        targets: for multi-task learning, the tasks that the images have targets for, with the class names of each.
        bit_depth: bits per pixel value; images with more than 8 bits are float32 in [0, 1] instead of uint8.
        channel_mean: mean of each channel, relative to the largest pixel value; None for that of the backbone.
        channel_std: standard deviation of each channel, relative to the largest pixel value.
        tabular_names: names of the tabular inputs (numbers given with each image); None for none.
        tabular_mean: mean of each tabular input over the training set; None for 0.
        tabular_std: standard deviation of each tabular input; None for 1.
    """

    in_chans: int = 3
    image_size: Any = 224
    num_classes: int = 0
    label_names: list[str] | None = None
    class_weights: list[float] | None = None
    target_mean: list[float] | None = None
    target_std: list[float] | None = None
    observation_mean: list[float] | None = None
    observation_std: list[float] | None = None
    attributes: dict[str, list[str]] | None = None
    fit: str = "pad"
    targets: dict[str, list[str]] | None = None
    bit_depth: int = 8
    channel_mean: list[float] | None = None
    channel_std: list[float] | None = None
    tabular_names: list[str] | None = None
    tabular_mean: list[float] | None = None
    tabular_std: list[float] | None = None

    def __post_init__(self) -> None:
        if not self.num_classes and self.label_names:
            object.__setattr__(self, "num_classes", len(self.label_names))

    @property
    def names(self) -> list[str]:
        """Name of each class."""
        return list(self.label_names or map(str, range(self.num_classes)))

    def check(self, task: str, square: bool = False, any_bands: bool = True, any_tabular: bool = True) -> None:
        """Checks that a task can be trained on such data.

        Args:
            task: its name, for the message.
            square: whether images must be square.
            any_bands: whether images may have other channels than 8-bit RGB or grey.
            any_tabular: whether there may be tabular inputs besides the image.

        Raises:
            BackboneError: it cannot; the message says which settings to change.
        """
        if square and not isinstance(self.image_size, int):
            raise BackboneError(
                f"{task} takes square images: --data.image_size {min(sides(self.image_size))}, not {self.image_size}."
            )
        if not any_bands and (self.in_chans not in (1, 3) or self.bit_depth > 8):
            raise BackboneError(
                f"{task} takes RGB or grey of 8 bits, not {self.in_chans} channels of {self.bit_depth}: leave --data.bits out, "
                "and give --data.in_chans 3 or 1. Classification, several labels, regression, segmentation, detection and "
                "autoencoding take others."
            )
        if not any_tabular and (names := self.tabular_names):
            raise BackboneError(
                f"{task} takes images alone, and these data have tabular inputs ({', '.join(names[:4])}, …): leave "
                "--data.tabular and --data.keypoints out. Classification, several labels and regression take them."
            )

    @classmethod
    def of(cls, data: object, properties: Iterable[str]) -> Self:
        """Creates the description from a data module.

        Args:
            data: the data module.
            properties: names of the fields to read: those in `VisionModule.takes`. `VALUES` and `MOMENTS` are always read.

        Raises:
            AttributeError: the data module does not have one of them.
        """
        values = {name: getattr(data, name) for name in (*VALUES, *MOMENTS) if hasattr(data, name)}
        return cls(**values, **{name: getattr(data, name) for name in properties})


@dataclass(frozen=True)
class Backbone:
    """The network that a task is built on, and how it is adapted.

    Args:
        name: any timm name, ``lenet5`` or another network of `modules.networks`, a file of weights, or a registered
            model (``models:/NAME@ALIAS``).
        pretrained: start from published weights.
        options: further arguments of the network, such as ``drop_rate``, ``drop_path_rate``, ``channels``,
            ``architecture`` (for a file of weights) or ``small_stem``.
        compile: compile it with ``torch.compile``.
        grad_checkpointing: recompute activations in the backward pass instead of storing them: allows larger batches,
            makes a step about a third slower, and gives the same result.
        channels_last: use the channels-last memory format; faster on most devices.
        transfer: how pretrained weights are adapted; None as in ``optimization``. ``scratch``: train from random
            weights. ``features``: keep the backbone frozen; a linear head is solved in closed form. ``finetune``: train
            all layers. ``freeze_unfreeze``: train the head alone for ``frozen_epochs`` or a fifth of the training, then
            unfreeze layer by layer from the top; the learning rate falls layer by layer, to a tenth of the head's at the
            first one, unless ``layer_decay`` is set. ``auto``: the better of ``features`` and ``finetune``.
    """

    name: str = "lenet5"
    pretrained: bool = False
    options: dict[str, Any] | None = None
    compile: bool = False
    grad_checkpointing: bool = False
    channels_last: bool = True
    transfer: Transfer | None = None


@dataclass(frozen=True)
class SharedBackbone(Backbone):
    """A backbone of feature maps that belongs to another module and is shared by several tasks.

    Args:
        maps: computes the feature maps, a list of float B×C×H×W, from images, uint8 B×C×H×W.
        feature_info: channels and strides of the maps, in timm's format.
    """

    maps: Callable[[Any], Any] | None = None
    feature_info: Any = None
