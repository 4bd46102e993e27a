"""Generative adversarial networks."""

from modules.gan.adversarial import AdversarialAdam, AdversarialModule, AdversarialOptimization, Constant
from modules.gan.module import GANModule
from modules.gan.objectives import (
    R1,
    BoundaryEquilibrium,
    EnergyBased,
    GradientPenalty,
    Hinge,
    LeastSquares,
    NonSaturating,
    Objective,
    Regularizer,
    Wasserstein,
)
from modules.gan.players import Encoder
from modules.gan.super_resolution import SRResNet, SuperResolutionModule, SuperResolutionOptimization
from modules.gan.translation import TranslationModule
from modules.gan.translators import ResidualTranslator, Translator

__all__ = [
    "R1",
    "AdversarialAdam",
    "AdversarialModule",
    "AdversarialOptimization",
    "BoundaryEquilibrium",
    "Constant",
    "Encoder",
    "EnergyBased",
    "GANModule",
    "GradientPenalty",
    "Hinge",
    "LeastSquares",
    "NonSaturating",
    "Objective",
    "Regularizer",
    "ResidualTranslator",
    "SRResNet",
    "SuperResolutionModule",
    "SuperResolutionOptimization",
    "TranslationModule",
    "Translator",
    "Wasserstein",
]
