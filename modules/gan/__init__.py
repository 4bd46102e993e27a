"""Images made from noise."""

from modules.gan.module import GANModule

__all__ = ["GANModule"]
