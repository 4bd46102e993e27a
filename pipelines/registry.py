"""The model registry's commands: ``python -m pipelines.registry list|show|promote|demote|compare|load``."""

from typing import Any

from jsonargparse import auto_cli

from pipelines.engine.command import mistakes
from pipelines.serving.registry import compare, demote, download, overview, promote, show

if __name__ == "__main__":
    commands: Any = {"list": overview, "show": show, "promote": promote, "demote": demote, "compare": compare}
    commands["load"] = download
    with mistakes():
        print(auto_cli(commands, as_positional=True))
