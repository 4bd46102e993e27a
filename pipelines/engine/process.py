"""How a command's process starts and ends: without imports and clearing up that take seconds and serve nothing."""

import ast
import atexit
import gc
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import find_spec
from itertools import takewhile
from types import ModuleType
from typing import Any, cast

from typing_extensions import override

# Packages that gather names from their parts. Lightning needs two classes of torchmetrics, which for metrics of texts and sounds
# imports transformers and half of SciPy.
GATHERING = ("torchmetrics", "torchmetrics.functional", "torchmetrics.utilities")


class Deferring(SourceFileLoader):
    """Lets a package import each name that it gathers from its parts when it is first used."""

    @classmethod
    def find_spec(cls, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        """Finds the packages in `GATHERING` for the import system."""
        spec = PathFinder.find_spec(name, path, target) if name in GATHERING else None
        if spec and spec.origin:
            spec.loader = cls(name, spec.origin)
        return spec

    @override
    def exec_module(self, module: ModuleType) -> None:
        """Executes the package down to its first import from its own parts, without ``if`` blocks, which patch other libraries; names
        from the parts are imported by `look_up`, and one that is defined further below executes the whole package."""
        tree = ast.parse(self.get_data(self.path))
        parts = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.names[0].name != "*"]
        parts = [node for node in parts if node.module and node.module.partition(".")[0] == self.name.partition(".")[0]]
        places = {each.asname or each.name: (str(node.module), each.name) for node in parts for each in node.names}

        def look_up(name: str) -> Any:
            place, own = places.get(name, ("", name))
            if place not in ("", self.name):
                vars(module)[name] = getattr(import_module(place), own)
            elif place or (name[:2] != "__" and find_spec(f"{self.name}.{name}")):
                import_module(f"{self.name}.{name}")
            elif name == "__all__" or name[:2] != "__":
                vars(module).pop("__getattr__", None)
                SourceFileLoader.exec_module(self, module)
            if name not in vars(module):
                raise AttributeError(f"module {self.name!r} has no attribute {name!r}")
            return vars(module)[name]

        above = [node for node in takewhile(lambda node: node not in parts, tree.body) if not isinstance(node, ast.If)]
        exec(compile(ast.Module(above, []), self.path, "exec"), vars(module))
        vars(module)["__getattr__"] = look_up


def is_command() -> bool:
    """Whether this process was started by ``python -m pipelines…``, so that nobody else's code runs in it."""
    return " ".join(sys.orig_argv).partition(" -m ")[2].startswith("pipelines")


@contextmanager
def importing() -> Iterator[None]:
    """Context without garbage collection, which takes a fifth of the time of imports and finds nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def ending() -> Iterator[None]:
    """Context of all that the process of a command does. It ends the process as the interpreter does, with its threads, what is
    registered with `atexit`, and its streams, but leaves its memory to the system: freeing that object by object takes the
    interpreter a second.
    """
    if not is_command():
        yield
        return
    code: Any = None
    try:
        yield
    except SystemExit as end:
        code = end.code
        if not (code is None or isinstance(code, int)):
            raise
    cast(Any, threading)._shutdown()  # as the processes of multiprocessing end
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code or 0)
