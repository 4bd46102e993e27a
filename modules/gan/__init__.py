"""Generative adversarial networks."""

from modules.gan.module import GANModule

__all__ = ["GANModule"]
