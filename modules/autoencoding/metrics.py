"""Principal component analysis as a linear baseline of autoencoders."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class PrincipalComponents:
    """The optimal linear autoencoder in squared error (Baldi & Hornik 1989), fitted by scikit-learn.

    Args:
        images: float N×D.
        size: size of the code, less than N and D.
    """

    def __init__(self, images: NDArray[np.float32], size: int) -> None:
        from sklearn.decomposition import PCA  # only here: it takes a second to import

        solver = "covariance_eigh" if images.shape[1] <= 2048 else "randomized"
        fitted = PCA(size, svd_solver=solver, random_state=0).fit(images)
        self.mean = torch.from_numpy(fitted.mean_.astype(np.float32))
        self.components = torch.from_numpy(fitted.components_.astype(np.float32))

    def __call__(self, image: Tensor) -> Tensor:
        """Reconstructs float B×C×H×W."""
        mean, components = self.mean.to(image.device), self.components.to(image.device)
        flat = (image.flatten(1) - mean) @ components.mT @ components + mean
        return flat.view(image.shape).clamp(0, 1)
