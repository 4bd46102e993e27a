"""Train image translation, ``python -m pipelines.translation fit|validate|test|predict|preview``, and ``translate`` with it."""

from pipelines.engine.task import Task

translation = Task(
    "translation", "modules.TranslationModule", "datamodules.DigitTextures", ("pipelines.samples.translate",)
)

if __name__ == "__main__":
    translation.main()
