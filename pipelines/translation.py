"""Train image translation, ``python -m pipelines.translation fit|validate|test|predict|preview``, and ``translate`` with it."""

from modules import TranslationModule
from pipelines.engine.task import Task
from pipelines.samples import translate

translation = Task("translation", TranslationModule, "datamodules.DigitTextures", (translate,))

if __name__ == "__main__":
    translation.main()
