"""Train and use regression of quantities: ``python -m pipelines.regression fit|validate|test|predict``."""

from modules import RegressionModule
from pipelines.engine.task import Task

regression = Task("regression", RegressionModule, "datamodules.DigitSums")

if __name__ == "__main__":
    regression.main()
