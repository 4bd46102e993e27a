"""How commands end: a mistake is one paragraph and exit code 2."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import NoReturn

import torch
from jsonargparse import ArgumentError
from lightning.pytorch import callbacks
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from mlflow.exceptions import MlflowException
from requests import RequestException
from rich.console import Console

import datamodules
from pipelines.engine.terminal import quieten
from pipelines.tracking.redaction import redact


def refuse(message: str) -> NoReturn:
    """Ends the command with exit code 2 and one paragraph, which says what is wrong and what to give instead."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {message}", style="red", markup=False)
    sys.exit(2)


@contextmanager
def mistakes(*kinds: type[Exception]) -> Iterator[None]:
    """What every command runs in: a mistake of the user's is told as `refuse` does; what is none stays an error.

    Args:
        kinds: errors that are mistakes; by default those that a command which trains nothing raises of itself.
    """
    quieten()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be text
    kinds = kinds or (ValueError, OSError, MlflowException, RequestException)
    ours: tuple[type[Exception], ...] = (*kinds, MisconfigurationException)
    try:
        yield
    except BrokenPipeError:  # as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)
    except ArgumentError as error:
        refuse(_plain(str(error)))
    except (MlflowException, RequestException) as error:
        if not isinstance(error, kinds):
            raise
        refuse(redact(str(error)))  # they may name the server with its login
    except ours as error:
        refuse(str(error))
    except RuntimeError as error:
        if "conditioned on metric" not in str(error):  # what EarlyStopping says of a monitor that there is not
            raise
        refuse(" ".join(str(error).split()))
    except ValueError as error:  # jsonargparse wraps what a constructor raises
        if not isinstance(error.__cause__, ours):
            raise
        refuse(str(error.__cause__))


KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "dict": "a mapping", "list": "a list"}


def _plain(message: str) -> str:
    """What jsonargparse says of an option, in a sentence that names the option, the value and the way out."""
    see = " See --help, or --data.help NAME."
    option = "--" + ".".join(re.findall('Parser key "([^"]+)"', message))
    if out := re.search(r"Input should be ([\w ]*?-?[\d.]*)\s*\[type=\w+, input_value='?(.+?)'?, input_type", message):
        bound, value = out.groups()  # jsonargparse takes a bound out of the text that is the value itself
        bound = bound if bound[-1:].isdigit() or "valid" in bound else f"{bound.strip()} {value}"
        return f"{option} must be {bound}, not {value}."
    if lacking := re.search(r"the following arguments are required: ([\w, ]+)", message):
        return f"{option} also needs {' and '.join(f'{option}.{name}' for name in lacking[1].split(', '))}.{see}"
    if surplus := re.search(r"Option '([\w.]+)' is not accepted", message):
        owner = re.findall(r"class_path '(?:\w+\.)*(\w+)'", message[: surplus.start()])
        return f"There is no {option}.{surplus[1]}{f': {owner[-1]} has no such setting' if owner else ''}.{see}"
    given = re.search(r"(?:Given|Got) value: (?!N)(.+?)(?:\. Got value.*)?$", message, re.MULTILINE)
    kinds = [KINDS[kind] for kind in re.findall(r"Expected a <class '(\w+)'>", message) if kind in KINDS]
    choices = ", ".join(re.findall(r"Expected a typing\.Literal\[(.*?)\]", message)).replace("'", "")
    name = re.search(r"Expected a dot import path string: ([\w.]+)", message)
    if name and kinds in ([], [KINDS["list"]]):
        known = [
            each for place in (datamodules, torch.optim, torch.optim.lr_scheduler, callbacks) for each in dir(place)
        ]
        near = get_close_matches(name[1], known, 1)
        where = message.partition(":")[0] if option == "--" else option
        return f"There is no {name[1]} for {where}.{f' Did you mean {near[0]}?' if near else ''}{see}"
    if given and (kinds or choices):
        wanted = " or ".join([*dict.fromkeys(kinds), *([f"one of {choices}"] if choices else [])])
        return f"{option} must be {wanted}, not {given[1]}.{see}"
    return " ".join(message.split()) + see
