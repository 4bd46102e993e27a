"""Self-supervised learning from views of images."""

from modules.self_supervised.methods import DINO, Method, VICReg
from modules.self_supervised.module import SelfSupervisedModule

__all__ = ["DINO", "Method", "SelfSupervisedModule", "VICReg"]
