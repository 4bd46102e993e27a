"""Train and use semantic segmentation: ``python -m pipelines.segmentation fit|validate|test|predict``."""

from pipelines.engine.task import Task

segmentation = Task("segmentation", "modules.SegmentationModule", "datamodules.DigitMasks")

if __name__ == "__main__":
    segmentation.main()
