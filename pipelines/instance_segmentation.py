"""Train and use instance segmentation: ``python -m pipelines.instance_segmentation fit|validate|test|predict``."""

from pipelines.engine.task import Task

instance_segmentation = Task("instance_segmentation", "modules.InstanceSegmentationModule", "datamodules.DigitScenes")

if __name__ == "__main__":
    instance_segmentation.main()
