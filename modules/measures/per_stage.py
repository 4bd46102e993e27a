"""Metrics per evaluation stage, and a metric that collects embeddings."""

from collections.abc import Callable
from typing import Generic, TypeVar, cast

from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override

M = TypeVar("M", bound=nn.Module)


class PerStage(nn.ModuleDict, Generic[M]):
    """One metric for each evaluation stage.

    Args:
        make: creates the metric of a stage, ``val`` or ``test``.
    """

    def __init__(self, make: Callable[[str], M]) -> None:
        super().__init__({stage: make(stage) for stage in ("val", "test")})

    @override
    def __getitem__(self, key: str) -> M:
        return cast(M, super().__getitem__(key))


class Gathered(Metric):
    """Collects the embeddings of a whole split from all processes, in the order of the data."""

    full_state_update = False
    embedding: list[Tensor]
    identity: list[Tensor]
    index: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("embedding", "identity", "index"):
            self.add_state(name, [], "cat")

    def update(self, embedding: Tensor, identity: Tensor, index: Tensor) -> None:
        """Adds a batch: embeddings float B×D, identities int64 B, indices int64 B."""
        self.embedding.append(embedding)
        self.identity.append(identity)
        self.index.append(index)

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns embeddings, identities and indices of all samples, sorted by index."""
        embedding, identity, index = (dim_zero_cat(getattr(self, k)) for k in ("embedding", "identity", "index"))
        order = index.argsort()
        return embedding[order], identity[order], index[order]
