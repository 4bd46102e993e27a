"""Networks from the literature that timm does not have."""

from modules.networks.base import BackboneError, MissingCodeError, Network
from modules.networks.discriminators import EqualizedConv2d, at_level

__all__ = ["BackboneError", "EqualizedConv2d", "MissingCodeError", "Network", "at_level"]
