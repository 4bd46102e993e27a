"""What a network is given: what its data are like, and the backbone that it is built on."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, Self

VALUES = ("bit_depth", "channel_mean", "channel_std")  # of `DataSpec`, which every network has to know
Strategy = Literal["scratch", "features", "finetune", "freeze_unfreeze"]
Transfer = Literal["scratch", "features", "finetune", "freeze_unfreeze", "auto"]


def sides(size: int | str) -> tuple[int, int]:
    """Height and width of images of a size: the side of a square in pixels, or ``HEIGHTxWIDTH``.

    >>> sides(224), sides("240x320")
    ((224, 224), (240, 320))
    """
    height, _, width = str(size).lower().partition("x")
    return int(height), int(width or height)


@dataclass(frozen=True)
class DataSpec:
    """What a network has to know of its data. The command line asks the data module for it.

    >>> DataSpec(in_chans=1, image_size=28, label_names=["cat", "dog"]).num_classes
    2
    >>> DataSpec(num_classes=3).names
    ['0', '1', '2']

    Args:
        in_chans: channels of the images.
        image_size: of the images in training: the side of squares in pixels, or ``HEIGHTxWIDTH``; see `sides`.
        num_classes: number of classes; by default, that of ``label_names``.
        label_names: their names, in the order of their numbers; by default, the numbers.
        class_weights: what each class weighs in the loss; None for the same.
        target_mean: mean of each quantity over the images to train on; None for 0.
        target_std: standard deviation of each; None for 1.
        observation_mean: mean of each number of an observation; None for 0, as where it is a picture.
        observation_std: standard deviation of each; None for 1.
        attributes: what the classes differ in, and its values: classes are all combinations, the last attribute changing
            fastest.
        fit: how images are fitted into ``image_size``, so that what is found can be told in their own pixels: ``pad`` or
            ``stretch``.
        targets: for several tasks at once, those whose targets the images have, and the names of each one's classes.
        bit_depth: bits of the images' values; above 8 images are float32 in [0, 1] instead of uint8.
        channel_mean: mean of each channel, as a share of the largest value; None takes the backbone's.
        channel_std: standard deviation of each channel, likewise.
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

    def __post_init__(self) -> None:
        if not self.num_classes and self.label_names:
            object.__setattr__(self, "num_classes", len(self.label_names))

    @property
    def names(self) -> list[str]:
        """A name for each class."""
        return list(self.label_names or map(str, range(self.num_classes)))

    @classmethod
    def of(cls, data: Any, properties: Iterable[str]) -> Self:
        """What a data module says of itself.

        Args:
            data: the data module.
            properties: names of fields of this class; those that a task's module `VisionModule.takes`. `VALUES` are taken too.

        Raises:
            AttributeError: the data do not have one of them.
        """
        values = {name: getattr(data, name) for name in VALUES if hasattr(data, name)}
        return cls(**values, **{name: getattr(data, name) for name in properties})


@dataclass(frozen=True)
class Backbone:
    """The network that a task is built on, and how it is adapted.

    Args:
        name: any timm name, ``lenet5`` and the other networks of `modules.networks`, a file of weights, or a registered
            model (``models:/NAME@ALIAS``).
        pretrained: start from published weights.
        options: further arguments of the network, such as ``drop_rate``, ``drop_path_rate``, ``channels``,
            ``architecture`` (of a file of weights) or ``small_stem``.
        compile: compile it with ``torch.compile``.
        grad_checkpointing: compute its activations a second time in the backward pass instead of keeping them: larger batches
            fit, a step takes about a third longer, and the result is the same.
        channels_last: memory order of images and kernels; the faster one on most devices.
        transfer: how it is adapted; None as ``optimization`` says. ``scratch``: from random weights.
            ``features``: it stays as it is; where the head is linear, it is solved for. ``finetune``: all layers learn, the
            first at a tenth of the head's rate, unless ``layer_decay`` says otherwise. ``freeze_unfreeze``: first the head,
            for ``frozen_epochs`` or else a fifth of the training, then, one after the other down to the first, the layers,
            with the rates of ``finetune``. ``auto``: measures and chooses.
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
    """A backbone of feature maps that another module has, and that several tasks are built on.

    Args:
        maps: gives the backbone's maps, a list of float B×C×H×W, of images, uint8 B×C×H×W.
        feature_info: channels and strides of the maps, as timm tells them.
    """

    maps: Callable[[Any], Any] | None = None
    feature_info: Any = None
