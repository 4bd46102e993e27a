"""Images with a class for each pixel: composed scenes, and the formats in which people keep theirs."""

from datamodules.segmentation.base import SegmentationDataModule
from datamodules.segmentation.files import COCOSegmentation, MaskFolder, VOCSegmentation
from datamodules.segmentation.scenes import DigitMasks

__all__ = ["COCOSegmentation", "DigitMasks", "MaskFolder", "SegmentationDataModule", "VOCSegmentation"]
