"""The floors of the house: what may import what."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

FLOORS = {"modules": {"datamodules", "pipelines"}, "datamodules": {"modules", "pipelines"}}


def imported(nodes) -> set[str]:
    """The packages that are imported by some nodes of a syntax tree."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("floor", FLOORS)
def test_modules_and_datamodules_need_neither_each_other_nor_the_command_line_nor_mlflow(floor: str) -> None:
    files = sorted(Path(ROOT, floor).rglob("*.py"))
    assert len(files) > 10
    for file in files:
        tree = ast.parse(file.read_text())
        assert not imported(ast.walk(tree)) & FLOORS[floor], file
        assert "mlflow" not in imported(tree.body), file
