"""A metric for each stage of evaluation."""

from collections.abc import Callable
from typing import Generic, TypeVar, cast

from torch import nn
from typing_extensions import override

M = TypeVar("M", bound=nn.Module)


class PerStage(nn.ModuleDict, Generic[M]):
    """A metric for each stage of evaluation.

    Args:
        make: makes one of ``val`` or ``test``.
    """

    def __init__(self, make: Callable[[str], M]) -> None:
        super().__init__({stage: make(stage) for stage in ("val", "test")})

    @override
    def __getitem__(self, key: str) -> M:
        return cast(M, super().__getitem__(key))
