"""Train and use regression of quantities: ``python -m pipelines.regression fit|validate|test|predict``."""

from pipelines.engine.task import Task

regression = Task("regression", "modules.RegressionModule", "datamodules.DigitSums")

if __name__ == "__main__":
    regression.main()
