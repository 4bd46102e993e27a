"""Train and use face embeddings.

``python -m pipelines.facenet fit|validate|test|predict|preview`` trains and measures;
``python -m pipelines.facenet enrol|identify|verify|cluster`` uses a registered model;
``python -m pipelines.facenet align`` cuts faces out of photographs for both, and ``landmarks`` writes where eyes, nose and mouth are.
"""

from modules import FaceNetModule
from pipelines.engine.task import Task
from pipelines.faces import align, cluster, enrol, identify, landmarks, verify

facenet = Task("facenet", FaceNetModule, "datamodules.ORL", (enrol, identify, verify, cluster, align, landmarks))

if __name__ == "__main__":
    facenet.main()
