"""The pages: each command and each piece of code in them is understood by what it is for."""

import ast
import doctest
import importlib.util
import inspect
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jsonargparse
import lightning as L
import mlflow.cli
import pytest
import yaml
from conftest import ROOT

import datamodules
import modules

PAGES = [ROOT / "README.md", *sorted(Path(ROOT, "docs").glob("*.md"))]
STARTS = re.compile(
    r"^(\.venv/bin/)?(python -m |mlflow |pip |make\b|srun |torchrun |sbatch )|^(pipelines|benchmarks)\.\w+"
)
STAND_INS = {  # what a reader puts in
    "RECIPE": "configs/classification/lenet5_digits.yaml",
    "RECIPE.yaml": "configs/classification/lenet5_digits.yaml",
    "configs/classification/RECIPE": "configs/classification/lenet5_digits.yaml",
    "configs/detection/RECIPE": "configs/detection/yolo_digit_scenes.yaml",
    "configs/autoencoding/RECIPE": "configs/autoencoding/fashion_mnist_code32.yaml",
    "configs/super_resolution/RECIPE": "configs/super_resolution/srresnet_photographs.yaml",
    "A": "1",
    "B": "2",
}


def blocks(page: Path) -> Iterator[str]:
    """What is set as code: fenced and indented blocks, and what stands between single backticks."""
    text = re.sub(r"^```mermaid\n.*?^```", "", page.read_text(), flags=re.M | re.S)  # a picture
    fenced = re.compile(r"^```.*?\n(.*?)^```", re.M | re.S)
    yield from fenced.findall(text)
    text = fenced.sub("", text)
    for block in re.findall(r"(?:^ {4,}\S.*\n?(?:^[ ]*\n(?= {4}))?)+", text, re.M):
        yield "\n".join(line[4:] for line in block.splitlines())
    yield from re.findall(r"`([^`\n]+)`", text)


def commands(page: Path) -> list[str]:
    """The command lines on a page, those that go on in the next line in one piece."""
    lines = "\n".join(blocks(page)).replace("\\\n", " ").splitlines()
    return list(dict.fromkeys(line.strip() for line in lines if STARTS.match(line.strip()) and "-m …" not in line))


def words(command: str) -> list[str]:
    """The arguments of a command, with something in the place of what the reader puts in."""
    found = []
    # Brackets in no quotes are around what may be left out.
    plain = re.sub(r"(\"[^\"]*\")|[\[\]]", lambda found: found[1] or " ", command)
    for word in shlex.split(plain, comments=True):
        if word not in ("…", "..."):
            found.append(STAND_INS.get(word, word.replace("…", "x")))
    return found


def code(page: Path) -> list[str]:
    return [block for block in blocks(page) if re.search(r"^(from|import) \w+", block, re.M)]


COMMANDS = [(page.name, line) for page in PAGES for line in commands(page)]


def check_mlflow(given: list[str]) -> None:
    """That MLflow understands a command, and that the project has what it is asked to run."""
    command: Any = mlflow.cli.cli
    while given and isinstance(command, click.Group):
        command = command.get_command(click.Context(command), given.pop(0))
    if not given:
        return
    options = command.make_context("", list(given)).params
    if "entry_point" in options:
        assert options["env_manager"] == "local", "conda is not everywhere"
        entry = yaml.safe_load(Path(ROOT, "MLproject").read_text())["entry_points"][options["entry_point"]]
        assert {pair.split("=")[0] for pair in options["param_list"]} <= set(entry["parameters"])
        assert all(Path(ROOT, pair[7:]).is_file() for pair in options["param_list"] if pair.startswith("config="))


class Understood(BaseException):
    """A command's arguments were."""


def parsed(name: str, given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts a module as a user does, up to where it has understood its arguments: only the carrying out is left away.

    Raises:
        Understood: it has.
        SystemExit: it refuses them, or prints its help.
    """
    parse = jsonargparse.ArgumentParser.parse_args

    def stop(self: jsonargparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        parse(self, *args, **kwargs)
        raise Understood

    with monkeypatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(jsonargparse.ArgumentParser, "parse_args", stop)
        patch.setattr("pipelines.engine.start.with_start", lambda args, kind: (args, None))  # there is no such model
        patch.setattr(sys, "argv", [name, *given])
        runpy.run_module(name, run_name="__main__", alter_sys=True)


def test_the_pages_have_commands_and_code_that_are_found() -> None:
    assert len(COMMANDS) > 60
    assert {page.name for page in PAGES if not commands(page)} <= {"gallery.md", "results.md"}
    assert sum(len(code(page)) for page in PAGES) >= 5


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{page}: {line[:90]}" for page, line in COMMANDS])
def test_a_command_on_a_page_is_understood(
    page: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *given = words(line)
    name = name.removeprefix(".venv/bin/")
    if name in ("srun", "torchrun"):  # whose own arguments come first
        name, given = "python", given[given.index("-m") :]
    if name == "sbatch":  # the job's file, and what `python -m pipelines` takes
        assert (ROOT / given[0]).is_file()
        name, given = f"pipelines.{given[1]}", given[2:]
    if name == "make":
        targets = re.findall(r"^(\w+):", Path(ROOT, "Makefile").read_text(), re.M)
        assert {word for word in given if "=" not in word} <= set(targets)
        return
    if name == "pip":
        assert given[0] == "install"
        return
    if name == "mlflow":
        check_mlflow(given)
        return
    if name == "python":
        assert given.pop(0) == "-m"
        name = given.pop(0)
    if name == "pipelines" and not given:
        return  # the list of all
    assert importlib.util.find_spec(name), f"{page} starts {name}, which is not there"
    if any(word.startswith("outputs/") for word in given) and "--config" not in given:
        recipe = f"configs/{name.split('.')[-1]}/folder.yaml"  # which a training's folder has
        given[1:1] = ["--config", recipe] if Path(ROOT, recipe).is_file() else []
    if name.startswith("benchmarks.") or name == "pipelines.demo":
        return  # minutes, without arguments that could be wrong
    with pytest.raises((Understood, SystemExit)) as end:
        parsed(name, given, monkeypatch)
    said = capsys.readouterr()
    asks = any(word.endswith("help") for word in given)
    assert isinstance(end.value, Understood) or (asks and end.value.code == 0), said.err


def test_a_command_with_a_mistake_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for line in ("fit --data Digits --model.mixupp 0.2", "fit --config configs/classification/gone.yaml", "train"):
        with pytest.raises(SystemExit) as end:
            parsed("pipelines.classification", line.split(), monkeypatch)
        assert end.value.code == 2


def test_the_options_that_the_pages_name_are_there() -> None:
    places = {"data": datamodules, "model": modules}
    known = {kind: {name: getattr(place, name) for name in place.__all__} for kind, place in places.items()}
    known["trainer"] = {"Trainer": L.Trainer}
    named = {
        (kind, name) for page in PAGES for kind, name in re.findall(r"--(data|model|trainer)\.(\w+)", page.read_text())
    }
    assert len(named) > 50
    for kind, names in known.items():
        base = {"data": datamodules.VisionDataModule, "model": modules.VisionModule, "trainer": L.Trainer}[kind]
        classes = [value for value in names.values() if inspect.isclass(value) and issubclass(value, base)]
        taken = {parameter for one in classes for parameter in inspect.signature(one).parameters} | {"help"}
        assert {name for of, name in named if of == kind} - taken == set()


def test_the_tests_that_a_page_names_are_there() -> None:
    defined = {
        name
        for file in Path(ROOT, "tests").glob("test_*.py")
        for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    named = [name for page in PAGES for name in re.findall(r"`(?:test_\w+\.py::)?(test_\w+)(?:…)?`", page.read_text())]
    assert len(named) > 40
    assert not [name for name in named if not any(each.startswith(name) for each in defined)]


CODE = [(page.name, block) for page in PAGES for block in code(page)]


@pytest.mark.parametrize(("page", "block"), CODE, ids=[f"{page} {k}" for k, (page, _) in enumerate(CODE)])
def test_what_code_on_a_page_imports_is_there(page: str, block: str) -> None:
    imports = [node for node in ast.parse(block).body if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(imports, []), page, "exec"), {})


@pytest.mark.parametrize(("page", "block"), CODE, ids=[f"{page} {k}" for k, (page, _) in enumerate(CODE)])
def test_code_on_a_page_runs(page: str, block: str) -> None:
    if "Trainer(" not in block:
        pytest.skip("it is about a registered model")
    short = ("max_epochs=1, limit_train_batches=2, limit_val_batches=1, logger=False, enable_checkpointing=False, "
             "accelerator='cpu'")  # fmt: skip
    there = block.replace("FashionMNIST", "Digits")  # which comes with the packages
    there = there.replace("pool=0)", "pool=0, judge_steps=10)")
    exec(compile(re.sub(r"max_epochs=\d+", short, there), page, "exec"), {})


def test_examples_in_docstrings_give_what_they_say() -> None:
    """Of all modules that are imported with the two packages, with their own names."""
    found = 0
    for name, module in sorted(sys.modules.items()):
        if name.split(".")[0] in ("modules", "datamodules"):
            result = doctest.testmod(module)
            assert not result.failed, f"{name}: run python -m doctest on it"
            found += result.attempted
    assert found > 50
