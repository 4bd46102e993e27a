"""What the processes of a training have to know of each other; one process alone is all of them."""

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather


def alone() -> bool:
    """Whether there are no other processes."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes, such as what a loss is divided by; no gradient flows through it."""
    if alone():
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()


def gathered(values: Tensor) -> Tensor:
    """The values of all processes, B×… as (W·B)×… in the order that one process would see, with their gradients.

    Every process computes the same loss of all. The gathering adds up the gradients of all processes, and the averaging of
    parameters' gradients divides by their number, so that the result is the gradient of that loss.
    """
    if alone():
        return values
    each = cast(tuple[Tensor, ...], all_gather(values.contiguous()))
    return torch.stack(each, 1).flatten(0, 1)
