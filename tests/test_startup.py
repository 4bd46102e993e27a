"""What is imported before it is used: PyTorch takes seconds, MLflow and scikit-learn one each."""

import subprocess
import sys

import pytest
import torch
import torchmetrics
from conftest import ROOT

HEAVY = {"torch", "lightning", "mlflow", "sklearn", "pandas", "albumentations", "optuna", "matplotlib", "torchvision"}
OPTIONAL = {"mlflow", "sklearn", "pandas", "captum", "supervision", "optuna", "faiss", "av", "onnx", "pytorch_metric_learning",
            "segmentation_models_pytorch", "faster_coco_eval", "gymnasium", "fastapi", "modules.gan", "modules.detection",
            "transformers", "scipy.signal"}  # fmt: skip
WATCHED = """
import atexit, runpy, sys
atexit.register(lambda: print(*sys.modules, file=sys.stderr))
name, *sys.argv[1:] = sys.argv[1:]
runpy.run_module(name, run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("line", "said", "absent"),
    [
        ("fovea", "", HEAVY),
        ("pipelines.facenet --help", "enrol, identify", HEAVY),
        ("pipelines.facenet fti", "Did you mean fit?", HEAVY),
        ("pipelines.classification fit --config gone.yaml", "--config gone.yaml: there is no such file", HEAVY),
        ("pipelines.predict --help", "--batch_size", HEAVY),
        ("pipelines.predict models:/nobody@champion --batchsize 3", "does not know what to do with --batchsize", HEAVY),
        pytest.param("pipelines.predict models:/nobody@champion .", "No model 'nobody' is registered",
                     HEAVY - {"mlflow", "pandas"}, marks=pytest.mark.slow),
        pytest.param("pipelines.classification fit --data.rot X", "There is no --data.rot", OPTIONAL,
                     marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_what_is_not_needed_is_not_imported(line: str, said: str, absent: set[str]) -> None:
    command = [sys.executable, "-c", WATCHED, *line.split()]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    *_, imported = ended.stderr.splitlines()
    assert said in " ".join((ended.stdout + ended.stderr).split())
    assert not absent & {*imported.split()}


def test_a_package_whose_names_are_imported_later_has_them_all() -> None:
    assert type(torchmetrics.__spec__.loader).__name__ == "Deferring"
    assert torchmetrics.F1Score is torchmetrics.classification.f_beta.F1Score
    assert torchmetrics.functional.accuracy(torch.tensor([1, 0]), torch.tensor([1, 1]), "binary") == 0.5
    with pytest.raises(AttributeError, match="'torchmetrics' has no attribute 'Acuracy'"):
        _ = torchmetrics.Acuracy
