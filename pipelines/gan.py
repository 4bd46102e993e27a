"""Train GANs, ``python -m pipelines.gan fit|validate|test|predict|preview``; ``sample`` from one, ``dissect`` it, and
``enrich`` a classifier's training set with its images."""

from modules import GANModule
from pipelines.engine.task import Task
from pipelines.samples import dissect, enrich, sample

gan = Task("gan", GANModule, "datamodules.Digits", (sample, dissect, enrich))

if __name__ == "__main__":
    gan.main()
