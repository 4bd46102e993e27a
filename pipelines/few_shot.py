"""Train and measure few-shot recognition: ``python -m pipelines.few_shot fit|validate|test|predict|preview``."""

from pipelines.engine.task import Task

few_shot = Task("few_shot", "modules.FewShotModule", "datamodules.Glyphs")

if __name__ == "__main__":
    few_shot.main()
