"""Train and use face embeddings.

``python -m pipelines.facenet fit|validate|test|predict|preview`` trains and measures;
``python -m pipelines.facenet enrol|identify|verify|cluster`` uses a registered model;
``python -m pipelines.facenet align`` cuts faces out of photographs for both, and ``landmarks`` writes where eyes, nose and mouth are.
"""

from pipelines.engine.task import Task

facenet = Task(
    "facenet",
    "modules.FaceNetModule",
    "datamodules.ORL",
    (
        "pipelines.faces.enrol",
        "pipelines.faces.identify",
        "pipelines.faces.verify",
        "pipelines.faces.cluster",
        "pipelines.alignment.align",
        "pipelines.alignment.landmarks",
    ),
)

if __name__ == "__main__":
    facenet.main()
