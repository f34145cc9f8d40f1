"""One gradient for a weight that is used several times, as output and input embedding, and for several batches.

By default every use of a weight makes a gradient as large as the weight, which autograd then adds up: for a tied
embedding of 250,000 terms and width 1024 that is a gigabyte to fill and to add for each use. Here the first use to run
in a backward pass offers its gradient, and every later one adds its few rows to it and returns nothing.

Shape letters: N = tokens, H = hidden width, V = terms.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_offers: dict[tuple[int, int], weakref.ref[Tensor]] = {}
"""By backward pass and weight. The reference is weak, so that an offer ends when autograd lets go of the tensor: when
the gradient of a use that is not ours came first, autograd adds ours to that and drops it. Nor may an offer keep it
alive, or autograd would have to copy it into ``.grad``."""

NUMPY_DTYPES = {torch.float32: np.float32, torch.float64: np.float64}


def offered_gradient(weight: Tensor) -> Tensor | None:
    """Return the gradient that an earlier use of the weight has offered in this backward pass, to be added to."""
    offer = _offers.get(_key(weight))
    return None if offer is None else offer()


def offer_gradient(weight: Tensor, gradient: Tensor) -> None:
    """Let later uses of the weight add to the gradient that is about to be returned to autograd.

    Args:
        weight: What the gradient is for.
        gradient: All of its gradient from this use; nothing else may hold on to it.
    """
    if torch.is_grad_enabled():  # a graph of the backward pass is built, in which nothing may change in place
        return
    key = _key(weight)
    _offers[key] = weakref.ref(gradient, lambda _: _offers.pop(key, None))


def _key(weight: Tensor) -> tuple[int, int]:
    return torch._C._current_graph_task_id(), id(weight)


def lazy_zeros_like(weight: Tensor) -> Tensor:
    """Return zeros; on the CPU the system maps their pages when they are first written: untouched rows cost nothing."""
    if weight.device.type == "cpu" and weight.dtype in NUMPY_DTYPES:
        return torch.from_numpy(np.zeros(tuple(weight.shape), NUMPY_DTYPES[weight.dtype]))
    return torch.zeros_like(weight)


def sum_rows(row_N: Tensor, values_NH: Tensor) -> tuple[Tensor, Tensor]:
    """Add up the values of equal rows.

    Args:
        row_N: Row of each value, ascending.
        values_NH: The values.

    Returns:
        The distinct rows and their sums. Summed in order, without atomics: the same bits every time.
    """
    row_U, count_U = torch.unique_consecutive(row_N, return_counts=True)
    return row_U, torch.segment_reduce(values_NH, "sum", lengths=count_U, unsafe=True)


class TiedEmbedding(nn.Embedding):
    """An embedding whose gradient is added to the one that the output embedding has offered."""

    def forward(self, input: Tensor) -> Tensor:
        """Look ids up."""
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(input)
        embedded: Tensor = _Lookup.apply(self.weight, input, self.padding_idx)  # type: ignore[no-untyped-call]
        return embedded


def share_gradient(embedding: nn.Module) -> None:
    """Make a plain embedding a `TiedEmbedding`, in place; leave any other kind alone."""
    if type(embedding) is nn.Embedding and not (embedding.sparse or embedding.scale_grad_by_freq or embedding.max_norm):
        embedding.__class__ = TiedEmbedding


class _Lookup(torch.autograd.Function):
    """Rows of a weight by id; its backward pass adds rows to a gradient that is there already."""

    @staticmethod
    def forward(ctx: Any, weight_VH: Tensor, ids: Tensor, padding_id: int | None) -> Tensor:
        ctx.save_for_backward(weight_VH, ids)
        ctx.padding_id = padding_id
        return nn.functional.embedding(ids, weight_VH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        weight_VH, ids = ctx.saved_tensors
        sums_VH = offered = offered_gradient(weight_VH)
        if sums_VH is None:
            sums_VH = lazy_zeros_like(weight_VH)
        id_N, order_N = ids.flatten().sort(stable=True)
        if ctx.padding_id is not None:
            kept_N = id_N != ctx.padding_id
            id_N, order_N = id_N[kept_N], order_N[kept_N]
        if len(id_N):
            row_U, sum_UH = sum_rows(id_N, gradient.flatten(0, -2)[order_N].to(sums_VH.dtype))
            sums_VH.index_add_(0, row_U, sum_UH)
        return (sums_VH if offered is None else None), None, None
