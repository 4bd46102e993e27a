"""Generative adversarial networks."""

from modules.gan.module import AdversarialAdam, AdversarialOptimization, Constant, GANModule
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

__all__ = [
    "R1",
    "AdversarialAdam",
    "AdversarialOptimization",
    "BoundaryEquilibrium",
    "Constant",
    "EnergyBased",
    "GANModule",
    "GradientPenalty",
    "Hinge",
    "LeastSquares",
    "NonSaturating",
    "Objective",
    "Regularizer",
    "Wasserstein",
]
