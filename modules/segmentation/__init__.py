"""A class for each pixel, or a mask for each object: the modules, decoders, losses."""

from modules.segmentation.decoders import FPN, Decoder, DeepLabV3Plus, SegFormer, UNet
from modules.segmentation.instance import InstanceSegmentationModule, MaskRCNN
from modules.segmentation.losses import CrossEntropy, Dice, Focal, Loss, Lovasz, Mixture
from modules.segmentation.module import SegmentationModule

__all__ = [
    "FPN",
    "CrossEntropy",
    "Decoder",
    "DeepLabV3Plus",
    "Dice",
    "Focal",
    "InstanceSegmentationModule",
    "Loss",
    "Lovasz",
    "MaskRCNN",
    "Mixture",
    "SegFormer",
    "SegmentationModule",
    "UNet",
]
