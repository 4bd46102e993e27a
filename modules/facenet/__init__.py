"""Embeddings of faces: the module, its loss and miners, and the protocols that measure it."""

from modules.facenet.mining import HardMiner, ProgressiveMiner, SemiHardMiner, TripletLoss
from modules.facenet.module import FaceNetModule

__all__ = ["FaceNetModule", "HardMiner", "ProgressiveMiner", "SemiHardMiner", "TripletLoss"]
