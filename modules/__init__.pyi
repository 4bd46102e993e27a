from .autoencoding import AutoencodingModule, MaskedAutoencodingModule
from .base import VisionModule
from .classification import ClassificationModule
from .detection import DetectionModule
from .facenet import FaceNetModule
from .few_shot import FewShotModule
from .gan import GANModule
from .instance_segmentation import InstanceSegmentationModule
from .multi_label import MultiLabelModule
from .multi_task import MultiTaskModule
from .networks import BackboneError
from .networks.backbones import create_backbone
from .optimization import Optimization, WarmupCosine
from .q_learning import QLearningModule
from .regression import RegressionModule
from .segmentation import SegmentationModule
from .self_supervised import SelfSupervisedModule
from .sequences import SequenceModule
from .spec import Backbone, DataSpec
from .stylization import StylizationModule
from .super_resolution import SuperResolutionModule
from .translation import TranslationModule

__all__ = [
    "AutoencodingModule",
    "Backbone",
    "BackboneError",
    "ClassificationModule",
    "DataSpec",
    "DetectionModule",
    "FaceNetModule",
    "FewShotModule",
    "GANModule",
    "InstanceSegmentationModule",
    "MaskedAutoencodingModule",
    "MultiLabelModule",
    "MultiTaskModule",
    "Optimization",
    "QLearningModule",
    "RegressionModule",
    "SegmentationModule",
    "SelfSupervisedModule",
    "SequenceModule",
    "StylizationModule",
    "SuperResolutionModule",
    "TranslationModule",
    "VisionModule",
    "WarmupCosine",
    "create_backbone",
]
