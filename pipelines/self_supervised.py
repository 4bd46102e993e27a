"""Learn from images without labels: ``python -m pipelines.self_supervised fit|validate|test|predict|preview``."""

from pipelines.engine.task import Task

self_supervised = Task("self_supervised", "modules.SelfSupervisedModule", "datamodules.Digits")

if __name__ == "__main__":
    self_supervised.main()
