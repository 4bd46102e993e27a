"""The demo holds what the README says of it."""

import mlflow
import pytest

from pipelines.demo import demo


@pytest.mark.slow
def test_the_demo_reads_digits(capsys: pytest.CaptureFixture[str]) -> None:
    demo()
    (run,) = mlflow.search_runs(experiment_names=["classification"], max_results=1, output_format="list")
    assert run.data.metrics["test/accuracy"] > 0.95
    assert "pipelines.predict models:/digits-lenet5@champion" in " ".join(
        capsys.readouterr().out.replace("│", " ").split()
    )
