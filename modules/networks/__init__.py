"""Networks from the literature that timm does not have, registered with timm."""

from modules.networks import registered  # noqa: F401
from modules.networks.base import BackboneError, MissingCodeError, Network
from modules.networks.discriminators import EqualizedConv2d, at_level

__all__ = ["BackboneError", "EqualizedConv2d", "MissingCodeError", "Network", "at_level"]
