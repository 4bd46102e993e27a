"""Command lines and recipes before parsing: expansion, imports, and completion from an earlier training."""

import argparse
import importlib.util
import json
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pipelines.engine.command import UsageError
from pipelines.engine.folders import is_training
from pipelines.engine.settings import written

LOOKS = ("validate", "test", "predict", "preview")  # they change nothing of a training
MACHINE = (  # settings of the machine that trained, which need not be the one that evaluates
    "--trainer.accelerator=auto",
    "--trainer.devices=auto",
    "--trainer.num_nodes=1",
    "--trainer.strategy=auto",
)


def expand(args: Sequence[str]) -> list[str]:
    """Reverses the quoting that `mlflow run` applies to arguments.

    The value of ``--args`` is split as a shell would split it, though by no shell, and an option with an empty value
    counts as not given.
    """
    result: list[str] = []
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        if arg == "--args" and rest:
            result += words(rest.pop(0))
        elif arg.startswith("--") and "=" not in arg and rest and rest[0] == "":
            rest.pop(0)
        else:
            result.append(arg)
    return result


def words(args: str) -> list[str]:
    """Splits the value of ``--args`` into arguments.

    Raises:
        UsageError: a quotation in it does not end.
    """
    try:
        return shlex.split(args)
    except ValueError as error:
        raise UsageError(
            f"--args {args!r} cannot be divided into words, as a quotation in it does not end: {error}."
        ) from None


def recipes(args: Sequence[str]) -> list[str]:
    """The values of ``--config``, which need not be files."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    return list(parser.parse_known_args(args)[0].config)


def contents(args: Sequence[str]) -> dict[str, Any]:
    """Contents of a command line's recipes, by file name."""
    return {file: written(yaml.safe_load(Path(file).read_text())) for file in recipes(args) if os.path.isfile(file)}


def last_of(args: Sequence[str], *options: str) -> dict[str, str | None]:
    """The last value that a command line gives for each of some options, such as ``--output``; None if it gives
    none."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in options:
        parser.add_argument(option)
    return vars(parser.parse_known_args(args)[0])


def import_code(args: Sequence[str]) -> None:
    """Imports the modules of ``--import``, from the command line or its recipes, of which the last counts, so that their
    networks and classes can be named.

    Raises:
        UsageError: it cannot be imported.
    """

    def recipe(file: str) -> Any:
        return contents(["--config", file]).get(file, {}).get("import", "")

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-c", "--config", dest="named", action="append", type=recipe)
    parser.add_argument("--import", dest="named", action="append", type=yaml.safe_load)
    try:
        given = [named for named in parser.parse_known_args(args)[0].named or [] if named != ""]
    except yaml.YAMLError as error:
        raise UsageError(f"--import is not valid YAML: {error}. Write several files as '[a.py, b.py]'.") from None
    for name in each_of(given[-1] if given else None):
        _import(name)


def each_of(given: Any) -> list[str]:
    """The files and modules of a value of ``--import``."""
    return [str(name) for name in (given if isinstance(given, list) else [given]) if name]


def _import(given: str) -> None:
    """Imports a file under its name without ``.py``, or an installed module.

    Raises:
        UsageError: that fails.
    """
    file, name = Path(given).absolute(), given
    if file.suffix == ".py":
        name = file.stem
        if not file.is_file():
            raise UsageError(f"--import {given}: there is no such file. Say where it is now with --import.")
        if not name.isidentifier():
            raise UsageError(
                f"--import {given}: {name} is not a valid name for a module; rename it, for example to "
                f"{file.with_stem('my_code').name}."
            )
        if str(file.parent) not in sys.path:
            sys.path.append(str(file.parent))
        importlib.invalidate_caches()
        spec = importlib.util.find_spec(name)
        known = (spec and spec.origin) or ""  # no file if the module is built in, or has moved since it was imported
        if not os.path.isfile(known) or not file.samefile(known):
            raise UsageError(
                f"--import {given}: Python knows another module {name}{f' ({known})' if known else ''}; give the file a name of its own, or "
                "start Python anew if it was moved."
            )
    try:
        importlib.import_module(name)
    except Exception as error:  # it is somebody's code
        *_, last = traceback.extract_tb(error.__traceback__)
        where = f" ({last.filename}, line {last.lineno})" if last.filename == str(file) else ""
        raise UsageError(f"--import {given}: {type(error).__name__}: {' '.join(str(error).split())}{where}.") from error


def class_of(option: str, args: Sequence[str], default: str) -> str:
    """Name or path of the class that a command line or its recipes select; the last one counts.

    Args:
        option: of what, such as ``data`` or ``model.detector``.
        args: the command line.
        default: the class where none is given.
    """

    def given(text: str) -> str | None:
        settings = yaml.safe_load(text)
        return settings.get("class_path") if isinstance(settings, dict) else settings

    def recipe(text: str) -> str | None:
        settings = yaml.safe_load(Path(text).read_text() if os.path.isfile(text) else text)
        for key in option.split("."):
            settings = settings.get(key) if isinstance(settings, dict) else None
        return given(str(settings)) if settings is not None else None

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-c", "--config", dest="named", action="append", type=recipe)
    parser.add_argument(f"--{option}", f"--{option}.class_path", dest="named", action="append", type=given)
    try:
        named = parser.parse_known_args(args)[0].named or []
    except (argparse.ArgumentError, OSError, ValueError, yaml.YAMLError):
        return default  # whoever reads the command line for good says what is wrong
    return next((name for name in reversed(named) if isinstance(name, str)), default)


def _are_settings(text: str) -> bool:
    """Whether a text is settings themselves instead of a file's name."""
    try:
        return isinstance(yaml.safe_load(text), dict)
    except yaml.YAMLError:
        return text.lstrip().startswith("{")  # the parser says what is wrong with it


def check_recipes(args: Sequence[str]) -> None:
    """Checks that the files given with ``--config`` are recipes.

    Raises:
        UsageError: one is none.
    """
    for file in recipes(args):
        if not os.path.exists(file) and not _are_settings(file):
            raise UsageError(f"--config {file}: there is no such file. Recipes are in configs/.")
        if not os.path.isfile(file):
            continue
        try:
            settings = yaml.safe_load(Path(file).read_text())
            json.dumps(settings, default=str, skipkeys=True)  # refuses what contains itself
        except OSError as error:
            raise UsageError(f"--config {file} cannot be read ({error.strerror}).") from None
        except UnicodeDecodeError:
            weights = (
                " Weights go with --ckpt_path, or with --start." if file.endswith((".ckpt", ".safetensors")) else ""
            )
            raise UsageError(f"--config {file} is not text in UTF-8: give a recipe in YAML.{weights}") from None
        except (ValueError, RecursionError):
            raise UsageError(
                f"--config {file} is not a recipe: a part of it contains itself, or is nested too deeply."
            ) from None
        except yaml.YAMLError as error:
            raise UsageError(f"--config {file} is not valid YAML: {' '.join(str(error).split())}.") from None
        if not isinstance(settings, dict):
            raise UsageError(f"--config {file} is not a recipe: it has no settings such as model: and trainer: in it.")
        for part in ("model", "trainer"):
            if not isinstance(settings.get(part) or {}, dict):
                raise UsageError(f"--config {file}: {part} has settings by their names, not {settings[part]!r}.")


def with_recipe(args: Sequence[str]) -> list[str]:
    """Adds the recipe of the evaluated training to an evaluation's arguments, unless one is given."""
    verb, *rest = args
    if verb not in LOOKS or recipes(rest):
        return [*args]
    checkpoint, output = last_of(rest, "--ckpt_path", "--output").values()
    folders = [Path(checkpoint).parent] if checkpoint else []
    folders += [Path(output)] if output else []
    training = next((f for f in folders if (f / "config.yaml").exists() and is_training(f)), None)
    if training is None:
        return [*args]
    unset = [f"--{name}=null" for name in ("run_name", "register", "output", "start")]
    own = ["--config", str(training / "config.yaml"), *unset, *MACHINE]
    best = training / "best.ckpt"
    return [verb, *own, f"--ckpt_path={best if verb != 'preview' and best.exists() else 'null'}", *rest]
