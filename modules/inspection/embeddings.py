"""Image features."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modules.base import VisionModule
from modules.inspection.taps import tapped


@torch.no_grad()
def pooled_features(module: VisionModule, images: Tensor, batch_size: int = 64) -> NDArray[np.float32]:
    """Computes the backbone's features of images, uint8 N×C×H×W: float N×K; for a feature pyramid, the mean of the last
    map."""
    parts = []
    with tapped(module, []):
        for batch in images.split(batch_size):
            features = module.backbone(module.normalize(batch.to(module.device)))
            features = features[-1].mean((2, 3)) if isinstance(features, list | tuple) else features
            parts.append(features.float().flatten(1).cpu())
    return torch.cat(parts).numpy()
