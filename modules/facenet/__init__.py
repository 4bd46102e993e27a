"""Face embeddings: the module, its losses and miners, and evaluation protocols."""

from modules.facenet.mining import CosFaceLoss, HardMiner, ProgressiveMiner, SemiHardMiner, TripletLoss
from modules.facenet.module import FaceNetModule

__all__ = ["CosFaceLoss", "FaceNetModule", "HardMiner", "ProgressiveMiner", "SemiHardMiner", "TripletLoss"]
