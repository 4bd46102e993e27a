"""What learns: one module for each task."""

from modules.autoencoding import AutoencodingModule, MaskedAutoencodingModule
from modules.backbones import BackboneError, create_backbone
from modules.base import VisionModule
from modules.classification import ClassificationModule
from modules.detection import DetectionModule
from modules.facenet import FaceNetModule
from modules.gan import GANModule, SuperResolutionModule, TranslationModule
from modules.optimization import Optimization, WarmupCosine
from modules.segmentation import InstanceSegmentationModule, SegmentationModule

__all__ = [
    "AutoencodingModule",
    "BackboneError",
    "ClassificationModule",
    "DetectionModule",
    "FaceNetModule",
    "GANModule",
    "InstanceSegmentationModule",
    "MaskedAutoencodingModule",
    "Optimization",
    "SegmentationModule",
    "SuperResolutionModule",
    "TranslationModule",
    "VisionModule",
    "WarmupCosine",
    "create_backbone",
]
