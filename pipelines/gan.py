"""Train GANs, ``python -m pipelines.gan fit|validate|test|predict|preview``; ``sample`` from one, ``dissect`` it, and
``enrich`` a classifier's training set with its images."""

from pipelines.engine.task import Task

gan = Task(
    "gan",
    "modules.GANModule",
    "datamodules.Digits",
    ("pipelines.samples.sample", "pipelines.samples.dissect", "pipelines.samples.enrich"),
)

if __name__ == "__main__":
    gan.main()
