"""Train and use feed-forward style transfer: ``python -m pipelines.stylization fit|validate|test|predict``."""

from pipelines.engine.task import Task

stylization = Task("stylization", "modules.StylizationModule", "datamodules.Photographs")

if __name__ == "__main__":
    stylization.main()
