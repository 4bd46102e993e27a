"""Learn from images without labels: ``python -m pipelines.self_supervised fit|validate|test|predict|preview``."""

from modules import SelfSupervisedModule
from pipelines.engine.task import Task

self_supervised = Task("self_supervised", SelfSupervisedModule, "datamodules.Digits")

if __name__ == "__main__":
    self_supervised.main()
