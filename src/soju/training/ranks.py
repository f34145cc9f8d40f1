"""What the ranks of a distributed run agree on; without a process group there is one rank and nothing to agree on."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import distributed

from soju.core.errors import UserError

T = TypeVar("T")


def ranks_on_cpu() -> bool:
    """Tell whether torchrun started several processes on a machine without a GPU.

    accelerate and transformers must be told (``cpu``, ``use_cpu``), or each process would train alone.
    """
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available()


def join_ranks() -> None:
    """Form one group of the processes that torchrun started; call it before anything is shared between them."""
    PartialState(cpu=ranks_on_cpu())


def largest(values: list[int], device: torch.device) -> list[int]:
    """Return the largest of each value over all ranks: one small message."""
    if not _several():
        return values
    tensor = torch.tensor(values, device=device)
    distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX)
    result: list[int] = tensor.tolist()
    return result


def from_all(value: T) -> list[T]:
    """Return the value of every rank, in order."""
    if not _several():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def on_main_process(act: Callable[[], T]) -> T:
    """Call a function on rank 0; its result, or its `UserError`, is every rank's.

    Args:
        act: Touches files or decides something. What it returns can be pickled.

    Returns:
        Its result.

    Raises:
        UserError: What `act` raised.
    """
    if not _several():
        return act()
    outcome: list[Any] = [None, None]
    if distributed.get_rank() == 0:
        try:
            outcome[0] = act()
        except UserError as error:
            outcome[1] = error
    distributed.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
