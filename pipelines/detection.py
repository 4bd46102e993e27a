"""Train and use detectors: ``python -m pipelines.detection fit|validate|test|predict``."""

from pipelines.engine.task import Task

detection = Task("detection", "modules.DetectionModule", "datamodules.DigitScenes")

if __name__ == "__main__":
    detection.main()
