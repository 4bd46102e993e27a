"""What is imported before it is used: PyTorch and its compiler take seconds, MLflow and scikit-learn one each."""

import subprocess
import sys
from typing import Any, cast

import pytest
import torch
import torchmetrics
from conftest import ROOT
from lightning import LightningModule
from lightning.pytorch.utilities import compile as compiled
from matplotlib.figure import Figure

COMPILER = {"torch._dynamo", "torch._inductor", "sympy", "torch.distributed.fsdp"}
HEAVY = {"torch", "lightning", "mlflow", "sklearn", "pandas", "albumentations", "optuna", "matplotlib", "torchvision"}
OPTIONAL = {"mlflow", "sklearn", "pandas", "captum", "supervision", "optuna", "faiss", "av", "onnx", "pytorch_metric_learning",
            "segmentation_models_pytorch", "gymnasium", "fastapi", "modules.gan", "modules.detection",
            "transformers", "scipy.signal", "matplotlib", "timm", "torchvision", *COMPILER}  # fmt: skip
WATCHED = """
import atexit, runpy, sys
atexit.register(lambda: print(*sys.modules, file=sys.stderr))
name, *sys.argv[1:] = sys.argv[1:]
sys.orig_argv = [sys.executable, "-m", name, *sys.argv[1:]]
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
        pytest.param("pipelines.classification fit --data ImageFolder --data.root gone", "There is no folder", OPTIONAL,
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


def test_what_asks_for_the_compiler_gets_it_once_something_is_compiled() -> None:
    assert type(torch.compiler.__spec__.loader).__name__ == type(compiled.__spec__.loader).__name__ == "Deferring"
    module = LightningModule()
    with pytest.raises(ValueError, match="is required to be a `OptimizedModule`"):
        compiled.from_compiled(module)
    optimized = cast(Any, torch.compile(module, backend="eager"))
    assert compiled.from_compiled(optimized) is module
    assert compiled.to_uncompiled(optimized) is module

    @torch.compiler.disable
    def traced(value: torch.Tensor) -> bool:
        return torch.compiler.is_dynamo_compiling()

    assert torch.compile(lambda value: traced(value), backend="eager")(torch.ones(1)) is False


def test_a_metric_draws_itself() -> None:
    metric = torchmetrics.classification.BinaryAccuracy()
    metric.update(torch.tensor([1, 0]), torch.tensor([1, 1]))
    figure, _ = metric.plot()
    assert isinstance(figure, Figure)
    both = torchmetrics.MetricCollection([torchmetrics.MeanMetric(), torchmetrics.SumMetric()])
    with pytest.raises(ValueError, match="to be a matplotlib axis object"):
        both.plot(torch.tensor(1.0), ax=cast(Any, 1), together=True)
