"""Train and use several tasks on one backbone: ``python -m pipelines.multi_task fit|validate|test|predict``."""

from pipelines.engine.task import Task

multi_task = Task("multi_task", "modules.MultiTaskModule", "datamodules.DigitTasks")

if __name__ == "__main__":
    multi_task.main()
