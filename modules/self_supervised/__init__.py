"""Learning from images without labels: what all views of an image have in common."""

from modules.self_supervised.methods import DINO, Method, VICReg
from modules.self_supervised.module import SelfSupervisedModule

__all__ = ["DINO", "Method", "SelfSupervisedModule", "VICReg"]
