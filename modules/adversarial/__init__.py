"""Common parts of adversarial tasks: alternating optimisation, objectives, players, health checks."""

from modules.adversarial.base import AdversarialAdam, AdversarialModule, AdversarialOptimization, Constant
from modules.adversarial.objectives import (
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
from modules.adversarial.players import Encoder

__all__ = [
    "R1",
    "AdversarialAdam",
    "AdversarialModule",
    "AdversarialOptimization",
    "BoundaryEquilibrium",
    "Constant",
    "Encoder",
    "EnergyBased",
    "GradientPenalty",
    "Hinge",
    "LeastSquares",
    "NonSaturating",
    "Objective",
    "Regularizer",
    "Wasserstein",
]
