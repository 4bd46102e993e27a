"""Train and use super-resolution, SRResNet and SRGAN: ``python -m pipelines.super_resolution fit|validate|test|predict``."""

from pipelines.engine.task import Task

super_resolution = Task("super_resolution", "modules.SuperResolutionModule", "datamodules.Photographs")

if __name__ == "__main__":
    super_resolution.main()
