"""Train and measure few-shot recognition: ``python -m pipelines.few_shot fit|validate|test|predict|preview``."""

from modules import FewShotModule
from pipelines.engine.task import Task

few_shot = Task("few_shot", FewShotModule, "datamodules.Glyphs")

if __name__ == "__main__":
    few_shot.main()
