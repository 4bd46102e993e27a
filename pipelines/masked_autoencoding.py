"""Train masked autoencoders: ``python -m pipelines.masked_autoencoding fit|validate|test|predict|preview``."""

from pipelines.engine.task import Task

masked_autoencoding = Task("masked_autoencoding", "modules.MaskedAutoencodingModule", "datamodules.Digits")

if __name__ == "__main__":
    masked_autoencoding.main()
