"""Autoencoders of images and of points."""

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
from modules.measures.images import BCE, L1, MSE, SSIM, DiscretizedLogistic, Perceptual, ReconstructionLoss
from modules.networks.decoders import Decoder, Dense, TransposedConvolutions, UpsampledConvolutions

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
