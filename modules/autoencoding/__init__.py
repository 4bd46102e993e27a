"""Autoencoders: images, or points, to codes and back."""

from modules.autoencoding.bottlenecks import Bottleneck, Code, Plain, TopK, Variational, VectorQuantized
from modules.autoencoding.masked import MaskedAutoencodingModule
from modules.autoencoding.module import AutoencodingModule
from modules.autoencoding.parts import (
    Contractive,
    GaussianNoise,
    KLSparsity,
    L1Sparsity,
    Masking,
    Noise,
    Penalty,
    SaltAndPepper,
)
from modules.autoencoding.points import PointAutoencoder
from modules.decoders import Decoder, Dense, TransposedConvolutions, UpsampledConvolutions
from modules.reconstruction import (
    BCE,
    L1,
    MSE,
    SSIM,
    DiscretizedLogistic,
    Perceptual,
    ReconstructionLoss,
)

__all__ = [
    "BCE",
    "L1",
    "MSE",
    "SSIM",
    "AutoencodingModule",
    "Bottleneck",
    "Code",
    "Contractive",
    "Decoder",
    "Dense",
    "DiscretizedLogistic",
    "GaussianNoise",
    "KLSparsity",
    "L1Sparsity",
    "MaskedAutoencodingModule",
    "Masking",
    "Noise",
    "Penalty",
    "Perceptual",
    "Plain",
    "PointAutoencoder",
    "ReconstructionLoss",
    "SaltAndPepper",
    "TopK",
    "TransposedConvolutions",
    "UpsampledConvolutions",
    "Variational",
    "VectorQuantized",
]
