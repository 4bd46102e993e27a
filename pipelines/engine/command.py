"""Command lines from function signatures, and errors in one paragraph with exit code 2."""

import inspect
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from difflib import get_close_matches
from types import FrameType
from typing import Any, NoReturn

from jsonargparse import ArgumentError, ArgumentParser
from rich.console import Console

from pipelines.engine.process import ending
from pipelines.engine.terminal import quieten
from pipelines.tracking.redaction import redact


class UsageError(ValueError):
    """The command cannot be carried out as given; the message says how to correct it."""


def command(
    function: Callable[..., Any] | dict[str, Callable[..., Any]],
    args: Sequence[str] | None = None,
    name: str | None = None,
) -> None:
    """Runs a function as a command. Its options, their types and the help come from its signature and docstring.

    A parameter without a default is a positional argument, ``paths`` or ``sets`` one that takes several; a keyword-only
    one is an option. A text that the function gives is printed, a whole number is the exit code.

    Args:
        function: what to run; or several by their subcommands' names.
        args: the command line; None takes the process's own.
        name: what is started, after ``python -m pipelines.``; by default the function's name.
    """
    name = name or str(getattr(function, "__name__", ""))
    with ending() if args is None else nullcontext(), mistakes(name), orderly():
        if callable(function):
            parser = _parser(function, name)
            given = parser.instantiate(parser.parse_args(args))
        else:
            parser = ArgumentParser(exit_on_error=False, prog=f"python -m pipelines.{name}")
            subcommands = parser.add_subcommands()
            for key, one in function.items():
                subcommands.add_subcommand(key, _parser(one, f"{name} {key}"), help=_about(one))
            chosen = parser.instantiate(parser.parse_args(args))
            function, given = function[chosen.subcommand], chosen[chosen.subcommand]
        result = function(**given)
        if isinstance(result, str):
            print(result)
        elif isinstance(result, int):
            sys.exit(result)


def _parser(function: Callable[..., Any], name: str) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False, prog=f"python -m pipelines.{name}", description=_about(function))
    parameters = inspect.signature(function).parameters
    if "data" in parameters:
        from pipelines.engine.settings import read_former_names

        know_data()
        read_former_names()
    options = {key for key, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY}
    several = {"paths": str, "sets": str, "numbers": int}
    several = {key: kind for key, kind in several.items() if key in parameters}
    parser.add_function_arguments(function, as_group=False, as_positional=True, skip={*several, *options})
    for key, kind in several.items():
        some = "+" if parameters[key].default is inspect.Parameter.empty else "*"
        told = re.search(rf"^    {key}: (.*(?:\n {{8}}.*)*)", inspect.getdoc(function) or "", re.M)
        parser.add_argument(key, nargs=some, type=kind, help=" ".join(told[1].split()) if told else None)
    if options:
        others = {*parameters} - options
        parser.add_function_arguments(function, as_group=False, as_positional=False, skip={*others}, sub_configs=True)
    return parser


def know_data(*names: str) -> None:
    """Imports the files of data modules: jsonargparse knows a class by its name only then.

    Args:
        names: of classes, of which others than Fovea's own are passed over; by default all.
    """
    import datamodules

    for name in datamodules.__all__:
        if not names or name in names:
            getattr(datamodules, name)


def _about(function: Callable[..., Any]) -> str:
    return (inspect.getdoc(function) or "").split("\n\n")[0]


def refuse(message: str) -> NoReturn:
    """Exits with code 2 and one paragraph that says what is wrong and how to correct it."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {message}", style="red", markup=False)
    sys.exit(2)


@contextmanager
def orderly() -> Iterator[None]:
    """Context in which SIGTERM ends a command as Ctrl-C does, closing files and runs, with exit code 143."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def act(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(number, before)  # a second one does not wait
        sys.exit(143)

    before = signal.signal(signal.SIGTERM, act)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def mistakes(name: str, *kinds: type[Exception]) -> Iterator[None]:
    """Context for every command: user errors end as in `refuse`; any other error propagates.

    Args:
        name: what is started, after ``python -m pipelines.``
        kinds: errors that are mistakes; by default those that a command which trains nothing raises of itself.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        with explained(name, *kinds):
            yield
    except BrokenPipeError:  # as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and not isinstance(end.__context__, KeyboardInterrupt):
            raise
        sys.exit(130)
    except UsageError as error:
        refuse(str(error))


@contextmanager
def explained(name: str, *kinds: type[Exception]) -> Iterator[None]:
    """Context that turns user errors into a one-paragraph `UsageError`; any other error propagates."""
    quieten()
    try:
        yield
    except (BrokenPipeError, UsageError):
        raise
    except ArgumentError as error:
        raise UsageError(_plain(str(error), name)) from None
    except _of_mlflow() as error:
        if kinds and not isinstance(error, kinds):
            raise
        raise UsageError(redact(str(error))) from None  # they may name the server with its login
    except _taken(kinds) as error:
        raise UsageError(_said(error)) from None
    except RuntimeError as error:
        if "Error(s) in loading state_dict" in str(error):
            raise UsageError(
                "The weights do not fit this network, although its settings are the same, so its code must have changed. Restore the "
                f"code with which they were trained, or start again with another --output. ({' '.join(str(error).split())[:300]})"
            ) from error
        if "conditioned on metric" not in str(error):  # what EarlyStopping says of a monitor that there is not
            raise
        raise UsageError(" ".join(str(error).split())) from None
    except ValueError as error:  # jsonargparse wraps what a constructor raises
        if not isinstance(error.__cause__, _taken(kinds)):
            raise
        raise UsageError(_said(error.__cause__)) from None


def _taken(kinds: tuple[type[Exception], ...]) -> tuple[type[Exception], ...]:
    """The errors that are mistakes; see `mistakes`."""
    kinds = kinds or (ValueError, OSError, *_of_mlflow())
    return (*kinds, *_imported("lightning.pytorch.utilities.exceptions", "MisconfigurationException"))


def _of_mlflow() -> tuple[type[Exception], ...]:
    return (*_imported("mlflow.exceptions", "MlflowException"), *_imported("requests", "RequestException"))


def _imported(module: str, error: str) -> list[type[Exception]]:
    """An error of a library's; none where that is not imported, as then nothing can have raised it."""
    return [getattr(sys.modules[module], error)] if module in sys.modules else []


def _said(error: BaseException) -> str:
    """Message of an error; for an `OSError`, which file cannot be used and why."""
    if not isinstance(error, OSError) or error.errno is None or not isinstance(error.filename, str):
        return str(error)
    path = os.path.abspath(error.filename)
    if isinstance(error, FileExistsError) and not os.path.isdir(path):
        return f"{path} is a file, where a folder is needed: give another."
    if isinstance(error, NotADirectoryError):
        return f"{path} cannot be a folder, since a file lies where a folder above it should be: give another."
    return f"{path} cannot be used: {error.strerror}."


WORDS = {
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "a valid integer.*": "a whole number",
    "a valid number.*": "a number",
}
KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "dict": "a mapping", "list": "a list"}
WRITTEN = {"a list": "Write it in brackets and quotes, as '[a, b]'.", "a mapping": "Write it in quotes, with a space after each colon, as '{a: 1}'."}  # fmt: skip


def _plain(message: str, command: str) -> str:
    """Rewrites an error message of jsonargparse as a sentence with the option, the value and how to correct it."""
    option = "--" + ".".join(re.findall('Parser key "([^"]+)"', message))
    see = f" See python -m pipelines.{command} --help{', or --data.help NAME' if option.startswith('--data') else ''}."
    if out := re.search(r"Input should be ([^\[]*?)\s*\[type=\w+, input_value='?(.+?)'?, input_type", message):
        bound, value = out.groups()  # jsonargparse takes a bound out of the text that is the value itself
        if bound.strip() == "less than inf" or (bound.strip() == "less than" and value == "inf"):
            return f"{option} must be a finite number, not {value}."
        bound = bound if bound[-1:].isdigit() or "valid" in bound else f"{bound.strip()} {value}"
        for said, word in WORDS.items():
            bound = re.sub(said, word, bound)
        if option.endswith("image_size") and "<class 'str'>" in message and not re.fullmatch(r"\d+x\d+", value):
            bound += " of pixels, at least 1, or HEIGHTxWIDTH such as 240x320"
        if words := re.search(r"Expected a typing\.Literal\[(.*?)\]", message[out.end() :]):
            bound += f" or {words[1].replace(chr(39), '')}"
        return f"{option} must be {bound}, not {value}."
    if lacking := re.search(r"the following arguments are required: ([\w.]+\w(?:, [\w.]+\w)*)", message):
        names = lacking[1].split(", ")
        if option != "--":
            return f"{option} also needs {' and '.join(f'{option}.{name}' for name in names)}.{see}"
        verb = f"{command} {names[0].rpartition('.')[0]}".strip()
        needed = " and ".join(name.rpartition(".")[2] for name in names)
        return f"{verb} also needs {needed}. See python -m pipelines.{verb} --help."
    if wrong := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
        choices = wrong[2].replace("'", "")
        near = get_close_matches(wrong[1], choices.split(", "), 1)
        return f"{command} has no {wrong[1]}, but {choices}.{f' Did you mean {near[0]}?' if near else ''}"
    if bare := re.search(r"argument (?:-\w, |-\w/)?(--[\w.]+).*: expected (?:one|at least one) argument", message):
        return f"{bare[1]}, or a setting below it, has no value: write {bare[1]} VALUE.{see}"
    if "was not provided" in message:
        return f"What should {command} do?{see}"
    if strange := re.search(r"unrecognized arguments: (.*)", message):
        return f"{command} does not know what to do with {strange[1]}.{see}"
    if absent := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        return (
            f"There is no {absent[1]}.{absent[2]} for {option if option != '--' else message.partition(':')[0]}.{see}"
        )
    if surplus := re.search(r"Option '([\w.]+)' is not accepted", message):
        return _surplus(option, surplus[1], message[: surplus.start()], message[surplus.end() :]) + see
    if several := re.search(r"Multiple subclasses with name (\w+)\. .*?: ([\w., ]+?)\.(?:\s|$)", message):
        return f"There are several {several[1]} for {option}: write one of {several[2]}."
    if other := re.search(r"list\[str\].*?Expected a <class 'str'>\. Got value: (\S+)", message, re.DOTALL):
        return f'{option} must be a list of texts, and YAML reads {other[1]} as none: put it in quotes, as \'["2020", "yes"]\'.{see}'
    given = re.search(
        r"(?:Given|Got) value: (?!(?:None|Nested\w*|Namespace)\b)(.+?)(?:\. Got value.*)?$", message, re.MULTILINE
    )
    kinds = [KINDS[kind] for kind in re.findall(r"Expected a <class '(\w+)'>", message) if kind in KINDS]
    choices = ", ".join(re.findall(r"Expected a typing\.Literal\[(.*?)\]", message)).replace("'", "")
    name = re.search(r"Expected a dot import path string: ([\w.]+)", message)
    if name and kinds in ([], [KINDS["list"]]):
        import torch
        from lightning.pytorch import callbacks

        import datamodules

        places = [torch.optim, torch.optim.lr_scheduler, callbacks]
        places += [module for path, module in [*sys.modules.items()] if path.startswith("modules.")]
        known = {each.lower(): each for each in datamodules.__all__} | {
            each.lower(): each for place in places for each, kind in [*vars(place).items()] if isinstance(kind, type)
        }
        near = [known[each] for each in get_close_matches(name[1].lower(), known, 1)]
        where = message.partition(":")[0] if option == "--" else option
        if name[1] in near:
            return f"{name[1]} is not what {command} takes for {where}.{see}"
        return f"There is no {name[1]} for {where}.{f' Did you mean {near[0]}?' if near else ''}{see}"
    if given and (kinds or choices):
        wanted = " or ".join([*dict.fromkeys(kinds), *([f"one of {choices}"] if choices else [])])
        written = "".join(f" {how}" for kind, how in WRITTEN.items() if [kind] == kinds)
        return f"{option} must be {wanted}, not {given[1]}.{written}{see}"
    return " ".join(re.sub('Parser key "([^"]+)"', r"--\1", message).split()) + see


def _surplus(option: str, setting: str, before: str, after: str) -> str:
    """That a class has no such setting, or that none was named which could have it; what jsonargparse said before and after."""
    owner = re.findall(r"class_path '([\w.]+)'", before) or re.findall(r"\(class_path='([\w.]+)'", after)[:1]
    if not owner:
        return f"There is no {option}.{setting}."
    place, _, name = owner[-1].rpartition(".")
    kind = getattr(sys.modules.get(place), name, None)
    if f"{name}'>" in before and isinstance(kind, type) and kind.__subclasses__():  # of several, none was chosen
        return f"There is no {option}.{setting} before {option} is named: {option} NAME {option}.{setting} VALUE."
    near = get_close_matches(setting, inspect.signature(kind).parameters, 1) if isinstance(kind, type) else []
    meant = f" Did you mean {option}.{near[0]}?" if near else ""
    return f"There is no {option}.{setting}: {name} has no such setting.{meant}"
