"""Train and use classifiers: ``python -m pipelines.classification fit|validate|test|predict``."""

from pipelines.engine.task import Task

classification = Task("classification", "modules.ClassificationModule", "datamodules.Digits")

if __name__ == "__main__":
    classification.main()
