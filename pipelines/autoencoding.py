"""Train autoencoders, ``python -m pipelines.autoencoding fit|validate|test|predict|preview``, and use them:
``encode|decode|nearest``, and ``points``, a demonstration without images.
"""

from pipelines.engine.task import Task

autoencoding = Task(
    "autoencoding",
    "modules.AutoencodingModule",
    "datamodules.Digits",
    ("pipelines.codes.encode", "pipelines.codes.decode", "pipelines.codes.nearest", "pipelines.codes.points"),
)

if __name__ == "__main__":
    autoencoding.main()
