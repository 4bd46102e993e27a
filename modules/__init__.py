"""Lightning modules, one per task."""

from modules.autoencoding import AutoencodingModule, MaskedAutoencodingModule
from modules.base import VisionModule
from modules.classification import ClassificationModule
from modules.detection import DetectionModule
from modules.facenet import FaceNetModule
from modules.few_shot import FewShotModule
from modules.gan import GANModule
from modules.instance_segmentation import InstanceSegmentationModule
from modules.multi_label import MultiLabelModule
from modules.multi_task import MultiTaskModule
from modules.networks import BackboneError
from modules.networks.backbones import create_backbone
from modules.optimization import Optimization, WarmupCosine
from modules.q_learning import QLearningModule
from modules.regression import RegressionModule
from modules.segmentation import SegmentationModule
from modules.self_supervised import SelfSupervisedModule
from modules.sequences import SequenceModule
from modules.spec import Backbone, DataSpec
from modules.stylization import StylizationModule
from modules.super_resolution import SuperResolutionModule
from modules.translation import TranslationModule

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
