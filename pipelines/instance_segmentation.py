"""Train and use instance segmentation: ``python -m pipelines.instance_segmentation fit|validate|test|predict``."""

from modules import InstanceSegmentationModule
from pipelines.engine.task import Task

instance_segmentation = Task("instance_segmentation", InstanceSegmentationModule, "datamodules.DigitScenes")

if __name__ == "__main__":
    instance_segmentation.main()
