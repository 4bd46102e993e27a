"""Train and use detectors: ``python -m pipelines.detection fit|validate|test|predict``."""

from modules import DetectionModule
from pipelines.engine.task import Task

detection = Task("detection", DetectionModule, "datamodules.DigitScenes")

if __name__ == "__main__":
    detection.main()
