"""Train masked autoencoders: ``python -m pipelines.masked_autoencoding fit|validate|test|predict|preview``."""

from modules import MaskedAutoencodingModule
from pipelines.engine.task import Task

masked_autoencoding = Task("masked_autoencoding", MaskedAutoencodingModule, "datamodules.Digits")

if __name__ == "__main__":
    masked_autoencoding.main()
