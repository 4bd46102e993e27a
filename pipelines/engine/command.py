"""How commands end: a mistake is one paragraph and exit code 2."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from jsonargparse import ArgumentError
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from mlflow.exceptions import MlflowException
from requests import RequestException
from rich.console import Console

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


def _plain(message: str) -> str:
    """What jsonargparse says, without what it says about types that are not asked for."""
    if out := re.search(r"Input should be ([\w ]*?-?[\d.]*)\s*\[type=\w+, input_value='?(.+?)'?, input_type", message):
        bound, value = out.groups()  # jsonargparse takes a bound out of the text that is the value itself
        bound = bound if bound[-1:].isdigit() or "valid" in bound else f"{bound.strip()} {value}"
        option = ".".join(re.findall('Parser key "([^"]+)"', message))
        return f"--{option} must be {bound}, not {value}."
    lines = [line.strip(" -") for line in message.splitlines()]
    dull = (
        "Does not validate",
        "Subtypes:",
        "Errors:",
        "Given value type",
        "Given value: N",
        "Expected a <class 'NoneType'>",
    )
    return " ".join(line for line in lines if line and not line.startswith(dull)) + " See --help, or --data.help NAME."
