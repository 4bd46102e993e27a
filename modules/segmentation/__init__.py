"""Semantic segmentation: the module, its decoders and losses."""

from modules.networks.dense_decoders import FPN, DeepLabV3, DeepLabV3Plus, DenseDecoder, SegFormer, UNet
from modules.segmentation.losses import CrossEntropy, Dice, Focal, Loss, Lovasz, Mixture
from modules.segmentation.module import SegmentationModule

__all__ = [
    "FPN",
    "CrossEntropy",
    "DeepLabV3",
    "DeepLabV3Plus",
    "DenseDecoder",
    "Dice",
    "Focal",
    "Loss",
    "Lovasz",
    "Mixture",
    "SegFormer",
    "SegmentationModule",
    "UNet",
]
