"""Names of the forms in which files are written and faces are cut."""

from typing import Literal

FileFormat = Literal["coco", "voc", "yolo", "csv"]
AnswerFormat = Literal["coco", "yolo", "mot"]
FaceForm = Literal["arcface", "dlib", "facenet"]
