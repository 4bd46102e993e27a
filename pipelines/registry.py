"""The model registry's commands: ``python -m pipelines.registry list|show|promote|demote|compare|load``."""

from collections.abc import Callable

from pipelines.engine.command import command
from pipelines.serving.promotion import compare, demote, list_models, promote, show
from pipelines.serving.registry import download

COMMANDS: dict[str, Callable[..., str]] = {
    "list": list_models, "show": show, "promote": promote, "demote": demote, "compare": compare, "load": download
}  # fmt: skip

if __name__ == "__main__":
    command(COMMANDS, name="registry")
