"""Decoders of semantic segmentation: from the feature maps of a backbone to the logits of all pixels.

Their layers come from segmentation-models-pytorch; the strides of their inputs are chosen here, so that they fit any
backbone.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from segmentation_models_pytorch.decoders.deeplabv3.decoder import DeepLabV3PlusDecoder
from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
from segmentation_models_pytorch.decoders.segformer.decoder import SegformerDecoder
from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import ASPP
from typing_extensions import override

from modules.networks import BackboneError
from modules.networks.pyramid import Pyramid, aligned
from modules.ranges import PositiveInt, ShareBelowOne


class DenseDecoder(nn.Module):
    """Base class of decoders. A subclass defines the layers between the feature maps and the last layer.

    Args:
        backbone: created with ``features_only``; only its ``feature_info`` is read.
        num_classes: number of classes.
        strides: strides of the feature maps to use.
        width: input channels of the last layer.
        kernel: kernel size of the last layer, 1 or 3.
        options: the subclass's own arguments, from which it is recreated.
    """

    doubles: ClassVar[bool] = False  # whether it enlarges a map by the ratio of strides, not to the next one's size

    def __init__(
        self,
        backbone: Any,
        num_classes: int,
        strides: Sequence[int],
        width: int,
        kernel: int,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.options = dict(options)
        self.pyramid = Pyramid(backbone, strides)
        self.last = nn.Conv2d(width, num_classes, kernel, padding=kernel // 2)

    @property
    def channels(self) -> list[int]:
        """Channels of the image and of the feature maps, as the library's decoders expect them."""
        return [3, *self.pyramid.channels]

    def decode(self, features: list[Tensor]) -> Tensor:
        """Decodes features, a placeholder of the image's size and the maps, finest first, to float B×width×h×w."""
        raise NotImplementedError

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Computes logits of the image's size, float B×K×H×W, from all feature maps of the backbone; smaller by a border where
        its convolutions have no padding."""
        maps = self.pyramid(features)
        if self.doubles:
            maps = aligned(maps, self.pyramid.strides)
        height, width = (side * self.pyramid.strides[0] for side in maps[0].shape[2:])
        image = maps[0][:, :1, :1, :1].expand(-1, -1, height, width)  # only its size is used
        logits = self.last(self.decode([image, *maps]))
        if tuple(logits.shape[2:]) == (height, width):
            return logits
        return F.interpolate(logits, (height, width), mode="bilinear", align_corners=False)


def covering(logits: Tensor, size: Sequence[int], padded: Sequence[int]) -> Tensor:
    """Cuts logits to an image's size; before, enlarges those that convolutions without padding left too small for it.

    Args:
        logits: of a decoder, float B×K×h×w.
        size: height and width of the image.
        padded: height and width that the backbone was given, which are not smaller.

    Returns:
        Float B×K×H×W.
    """
    height, width = size
    if logits.shape[2] < height or logits.shape[3] < width:
        logits = F.interpolate(logits, tuple(padded), mode="bilinear", align_corners=False)
    return logits[:, :, :height, :width]


def _strides(backbone: Any) -> list[int]:
    """Returns the strides of a backbone's feature maps, ascending.

    Raises:
        BackboneError: they are not powers of two, as with patches of 14 pixels.
    """
    strides = sorted(set(backbone.feature_info.reduction()))
    if any(stride & (stride - 1) for stride in strides):
        raise BackboneError(
            f"The maps of this backbone have the strides {strides}, which are not powers of two: choose another "
            "backbone, or for a ViT another patch size, such as --model.backbone.options.patch_size 16."
        )
    return strides


def _four_strides(backbone: Any) -> list[int]:
    """Returns the four coarsest strides of a backbone, completed with finer and coarser ones if there are fewer."""
    strides = _strides(backbone)[-4:]
    while len(strides) < 4:
        strides = [strides[0] // 2, *strides] if strides[0] > 4 else [*strides, 2 * strides[-1]]
    return strides


class UNet(DenseDecoder):
    """U-Net (Ronneberger et al. 2015, arXiv:1505.04597): upsamples step by step to the image's size, with a skip
    connection from the backbone's map of the same size at each step.

    Args:
        widths: channels of each step, coarsest first; one for each stride of the backbone. Default: 256, halved at each
            step.
        norm: ``batchnorm``, or ``instancenorm``, which does not depend on the batch.

    Raises:
        BackboneError: the number of widths is wrong.
    """

    def __init__(
        self, backbone: Any, num_classes: int, widths: list[int] | None = None, norm: str = "batchnorm"
    ) -> None:
        strides = _strides(backbone)
        strides = strides if len(strides) > 1 else _four_strides(backbone)  # a plain ViT has only one
        options = {"widths": widths, "norm": norm}
        if widths is not None and len(widths) != len(strides):
            raise BackboneError(
                f"--model.decoder.widths takes a number for each stride of the backbone, {strides}, not {len(widths)} numbers."
            )
        widths = widths or [max(16, 256 >> i) for i in range(len(strides))]
        super().__init__(backbone, num_classes, strides, widths[-1], 3, options)
        self.net = UnetDecoder(self.channels, widths, n_blocks=len(strides), use_norm=norm)

    @override
    def decode(self, features: list[Tensor]) -> Tensor:
        return self.net(features)


class FPN(DenseDecoder):
    """The semantic branch of panoptic FPN (Kirillov et al. 2019, arXiv:1901.02446): the maps of a feature pyramid, each
    upsampled to the finest one's size, and added.

    Args:
        width: channels of the pyramid; a multiple of 64, since the branches have half as many, a multiple of 32.
        dropout: fraction of channels dropped in training.

    Raises:
        BackboneError: the width is not a multiple of 64.
    """

    doubles = True

    def __init__(self, backbone: Any, num_classes: int, width: PositiveInt = 256, dropout: ShareBelowOne = 0.2) -> None:
        if width % 64:
            raise BackboneError(f"--model.decoder.width of FPN must be a multiple of 64, not {width}.")
        options = {"width": width, "dropout": dropout}
        super().__init__(backbone, num_classes, _four_strides(backbone), width // 2, 1, options)
        self.net = FPNDecoder(self.channels, 4, width, width // 2, dropout)

    @override
    def decode(self, features: list[Tensor]) -> Tensor:
        return self.net(features)


class DeepLabV3(DenseDecoder):
    """DeepLabV3 (Chen et al. 2017, arXiv:1706.05587), from torchvision: dilated convolutions of several rates on the
    coarsest map, upsampled to the image. ``--model.backbone.options.output_stride 8`` keeps a ResNet's last stages at that
    stride, as published.

    Args:
        width: channels.
        rates: three dilation rates.
    """

    def __init__(
        self, backbone: Any, num_classes: int, width: PositiveInt = 256, rates: tuple[int, int, int] = (12, 24, 36)
    ) -> None:
        options = {"width": width, "rates": list(rates)}
        super().__init__(backbone, num_classes, _strides(backbone)[-1:], width, 1, options)
        conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.net = nn.Sequential(
            ASPP(self.pyramid.channels[0], [*rates], width), conv, nn.BatchNorm2d(width), nn.ReLU()
        )

    @override
    def decode(self, features: list[Tensor]) -> Tensor:
        return self.net(features[1])


class DeepLabV3Plus(DenseDecoder):
    """DeepLabV3+ (Chen et al. 2018, arXiv:1802.02611): dilated convolutions of several rates on the map at stride 16,
    refined with the map at stride 4. With ``--model.backbone.options.output_stride 16``, which keeps a ResNet's last stage at
    that stride, and ``strides`` of ``[4, 16]`` it reads that stage, as published.

    Args:
        width: channels.
        rates: three dilation rates.
        dropout: fraction of values dropped in training.
        strides: strides of the fine and of the coarse map, the latter two or four times the former. Default: the finest of the
            backbone's four coarsest strides, and four times that.

    Raises:
        BackboneError: the strides are others.
    """

    doubles = True

    def __init__(
        self,
        backbone: Any,
        num_classes: int,
        width: PositiveInt = 256,
        rates: tuple[int, int, int] = (12, 24, 36),
        dropout: ShareBelowOne = 0.5,
        strides: tuple[int, int] | None = None,
    ) -> None:
        finest = _four_strides(backbone)[0]
        used = list(strides or (finest, 4 * finest))
        if used[1] not in (2 * used[0], 4 * used[0]):
            raise BackboneError(
                f"--model.decoder.strides of DeepLabV3Plus are [4, 16] as published, or others of which the second is two or four times "
                f"the first, not {used}."
            )
        options = {"width": width, "rates": list(rates), "dropout": dropout, "strides": strides and used}
        super().__init__(backbone, num_classes, used, width, 1, options)
        image, fine, coarse = self.channels
        upsampling = 4 * used[1] // used[0]  # the library's 16 enlarges the coarse map four times, its 8 twice
        self.net = DeepLabV3PlusDecoder([image, fine, fine, coarse], 4, width, rates, upsampling, True, dropout)

    @override
    def decode(self, features: list[Tensor]) -> Tensor:
        image, fine, coarse = features
        return self.net([image, fine, fine, coarse])


class SegFormer(DenseDecoder):
    """SegFormer's decoder (Xie et al. 2021, arXiv:2105.15203): a linear layer for each map, and one over all of them.

    Args:
        width: channels.
    """

    def __init__(self, backbone: Any, num_classes: int, width: PositiveInt = 256) -> None:
        super().__init__(backbone, num_classes, _four_strides(backbone), width, 1, {"width": width})
        self.net = SegformerDecoder(self.channels, 4, width)

    @override
    def decode(self, features: list[Tensor]) -> Tensor:
        height, width = features[1].shape[2:]
        return self.net([features[0][:, :, :1, :1].expand(-1, -1, 4 * height, 4 * width), *features[1:]])
