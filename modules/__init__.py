"""What learns: one module for each task."""

from modules.autoencoding import AutoencodingModule, MaskedAutoencodingModule
from modules.backbones import BackboneError, create_backbone
from modules.base import Optimization, VisionModule, WarmupCosine
from modules.classification import ClassificationModule
from modules.detection import DetectionModule

__all__ = [
    "AutoencodingModule",
    "BackboneError",
    "ClassificationModule",
    "DetectionModule",
    "MaskedAutoencodingModule",
    "Optimization",
    "VisionModule",
    "WarmupCosine",
    "create_backbone",
]
