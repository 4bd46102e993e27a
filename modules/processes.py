"""Communication between the processes of a distributed training; a single process needs none."""

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather


def alone() -> bool:
    """Whether there is only one process."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def mean_over_processes(value: Tensor) -> Tensor:
    """Averages a tensor over all processes, e.g. the normaliser of a loss; no gradient flows through it."""
    if alone():
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()


def gathered(values: Tensor) -> Tensor:
    """Gathers the values of all processes, B×… to (W·B)×…, in the order of a single process, with their gradients.

    Every process computes the same loss of all values. Gathering sums the gradients of all processes, and DDP divides
    the parameters' gradients by the number of processes, so the result is the gradient of that loss.
    """
    if alone():
        return values
    each = cast(tuple[Tensor, ...], all_gather(values.contiguous()))
    return torch.stack(each, 1).flatten(0, 1)
