"""Train and use classifiers of several labels: ``python -m pipelines.multi_label fit|validate|test|predict``."""

from pipelines.engine.task import Task

multi_label = Task("multi_label", "modules.MultiLabelModule", "datamodules.DigitSets")

if __name__ == "__main__":
    multi_label.main()
