"""How a command's process starts and ends: without imports and clearing up that take seconds and serve nothing."""

import ast
import atexit
import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import find_spec
from inspect import isfunction
from itertools import takewhile
from types import ModuleType
from typing import Any, cast

from typing_extensions import override

# Packages that gather names from their parts. Lightning needs two classes of torchmetrics, which for metrics of texts and sounds
# imports transformers and half of SciPy.
GATHERING = ("torchmetrics", "torchmetrics.functional", "torchmetrics.utilities")

# Types and functions that every metric of torchmetrics imports to draw itself; matplotlib comes with them.
DRAWING = ("torchmetrics.utilities.plot",)

# PyTorch's compiler takes as long to import as PyTorch itself: modules that ask it whether something was compiled, and the one that
# keeps functions from being compiled.
COMPILER = "torch._dynamo"
ASKING = ("lightning.fabric.wrappers", "lightning.pytorch.utilities.compile", "torchvision.ops.roi_align")
KEEPING = ("torch.compiler",)


class Late:
    """Stands for a class or function of a package that is imported when it is called. Nothing is an instance of a class before
    that."""

    def __init__(self, package: str, find: Callable[[], Any]) -> None:
        self.package, self.find = package, find

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls it."""
        return self.find()(*args, **kwargs)

    def __instancecheck__(self, instance: Any) -> bool:
        return self.package in sys.modules and isinstance(instance, self.find())


def named(place: str, name: str) -> Any:
    """Imports a name from a module."""
    return getattr(import_module(place), name)


class Deferring(SourceFileLoader):
    """Lets modules import what they name, but seldom use, when it is first used."""

    @classmethod
    def find_spec(cls, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        """Finds the modules listed above for the import system."""
        spec = PathFinder.find_spec(name, path, target) if name in GATHERING + DRAWING + ASKING + KEEPING else None
        if spec and spec.origin:
            spec.loader = cls(name, spec.origin)
        return spec

    @override
    def exec_module(self, module: ModuleType) -> None:
        """Executes a module as the list asks for that it is in."""
        ways = {KEEPING: self._keep, ASKING: self._ask, DRAWING: self._draw, GATHERING: self._gather}
        next(way for names, way in ways.items() if self.name in names)(module)

    def _keep(self, module: ModuleType) -> None:
        """Executes the module; of a function that is not to be compiled, the compiler hears when it is first called, as it does of
        PyTorch's own."""
        super().exec_module(module)
        plain = vars(module)["disable"]

        def disable(function: Any = None, recursive: bool = True, *, reason: str | None = None) -> Any:
            if COMPILER in sys.modules or not isfunction(function):
                return plain(function, recursive, reason=reason)
            return named("torch._compile", "_disable_dynamo")(function, recursive)

        vars(module)["disable"] = disable

    def _ask(self, module: ModuleType) -> None:
        """Executes the module with a `Late` for each name of the compiler's."""
        tree = ast.parse(self.get_data(self.path))
        imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
        asked = [node for node in imports if str(node.module).startswith(COMPILER)]
        for place, name in [(str(node.module), each.name) for node in asked for each in node.names]:
            vars(module)[name] = Late(COMPILER, partial(named, place, name))
        tree.body = [node for node in tree.body if node not in asked]
        exec(compile(tree, self.path, "exec"), vars(module))

    def _draw(self, module: ModuleType) -> None:
        """Gives out a `Late` for each name, the first of which that is used executes the module."""

        def find(name: str) -> Any:
            if vars(module).pop("__getattr__", None):
                SourceFileLoader.exec_module(self, module)
            return vars(module)[name]

        def look_up(name: str) -> Any:
            if name[:2] == "__":
                raise AttributeError(f"module {self.name!r} has no attribute {name!r}")
            return Late("matplotlib", partial(find, name))

        vars(module)["__getattr__"] = look_up

    def _gather(self, module: ModuleType) -> None:
        """Executes the package down to its first import from its own parts, without ``if`` blocks, which patch other libraries; names
        from the parts are imported by `look_up`, and one that is defined further below executes the whole package."""
        tree = ast.parse(self.get_data(self.path))
        parts = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.names[0].name != "*"]
        parts = [node for node in parts if node.module and node.module.partition(".")[0] == self.name.partition(".")[0]]
        places = {each.asname or each.name: (str(node.module), each.name) for node in parts for each in node.names}

        def look_up(name: str) -> Any:
            place, own = places.get(name, ("", name))
            if place not in ("", self.name):
                vars(module)[name] = named(place, own)
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
    """Context without garbage collection, which takes a fifth of the time of imports and finds nothing. What was imported by a
    command is left out of later collections, too: it stays to the end."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_command():
            gc.freeze()
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
