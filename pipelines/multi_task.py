"""Train and use several tasks on one backbone: ``python -m pipelines.multi_task fit|validate|test|predict``."""

from modules import MultiTaskModule
from pipelines.engine.task import Task

multi_task = Task("multi_task", MultiTaskModule, "datamodules.DigitTasks")

if __name__ == "__main__":
    multi_task.main()
