"""Images of one domain to another: CycleGAN, StarGAN."""

from modules.translation.module import TranslationModule
from modules.translation.translators import ResidualTranslator, Translator

__all__ = ["ResidualTranslator", "TranslationModule", "Translator"]
