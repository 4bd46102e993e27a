"""Train autoencoders, ``python -m pipelines.autoencoding fit|validate|test|predict|preview``, and use them:
``encode|decode|nearest``, and ``points``, a demonstration without images.
"""

from modules import AutoencodingModule
from pipelines.codes import decode, encode, nearest, points
from pipelines.engine.task import Task

autoencoding = Task("autoencoding", AutoencodingModule, "datamodules.Digits", (encode, decode, nearest, points))

if __name__ == "__main__":
    autoencoding.main()
