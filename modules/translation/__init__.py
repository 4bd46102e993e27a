"""Image-to-image translation: CycleGAN, StarGAN."""

from modules.networks.translators import ResidualTranslator, Translator
from modules.translation.module import TranslationModule

__all__ = ["ResidualTranslator", "TranslationModule", "Translator"]
