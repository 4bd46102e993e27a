"""Features of images as points in the plane."""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modules.base import VisionModule
from modules.inspection.taps import tapped


@torch.no_grad()
def pooled_features(module: VisionModule, images: Tensor, batch_size: int = 64) -> NDArray[np.float32]:
    """What the backbone makes of images uint8 N×C×S×S: float N×K, of a feature pyramid the mean of its last maps."""
    parts = []
    with tapped(module, []):
        for batch in images.split(batch_size):
            features = module.backbone(module.normalize(batch.to(module.device)))
            features = features[-1].mean((2, 3)) if isinstance(features, list | tuple) else features
            parts.append(features.float().flatten(1).cpu())
    return torch.cat(parts).numpy()


def project(features: NDArray[np.float32], method: Literal["pca", "tsne"] = "pca") -> NDArray[np.float32]:
    """Lays points float N×K out in the plane, float N×2, by PCA or t-SNE (van der Maaten & Hinton 2008)."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if method == "tsne" and len(features) > 3:
        return TSNE(perplexity=min(30, (len(features) - 1) / 3), init="pca", random_state=0).fit_transform(features)
    flat = PCA(min(2, *features.shape), random_state=0).fit_transform(features)
    return np.pad(flat, ((0, 0), (0, 2 - flat.shape[1])))
