"""A class for each pixel: the module, its decoders and losses."""

from modules.networks.dense_decoders import FPN, Decoder, DeepLabV3Plus, SegFormer, UNet
from modules.segmentation.losses import CrossEntropy, Dice, Focal, Loss, Lovasz, Mixture
from modules.segmentation.module import SegmentationModule

__all__ = [
    "FPN",
    "CrossEntropy",
    "Decoder",
    "DeepLabV3Plus",
    "Dice",
    "Focal",
    "Loss",
    "Lovasz",
    "Mixture",
    "SegFormer",
    "SegmentationModule",
    "UNet",
]
