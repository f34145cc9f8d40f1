"""Sparsity penalties. Shape letters: B = texts in the batch, V = terms in the vocabulary."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, distributed

TILE = 8192
"""Terms summed at a time; their (B, TILE) is small enough to be taken from memory already at hand."""


def flops(weights_BV: Tensor, *, term_cost_V: Tensor | None = None, across_ranks: bool = False) -> Tensor:
    """Penalise terms that many texts of a batch light up.

    ``sum over v of (c_v * mean over b of |w_bv|) ** 2``, all ``c_v = 1`` when no cost is given. A weight is pushed down
    in proportion to its term's mean, so common terms go first and posting lists even out.

    Args:
        weights_BV: Term weights after pooling, ``(B, V)``, any float dtype.
        term_cost_V: Relative cost of each term, ``(V,)``, unitless, >= 0, from `idf_term_cost`.
        across_ranks: Take the mean over the texts of all ranks, which must all call this. The value is then the same
            on every rank, and the average of their gradients, which is what DDP takes, is its exact gradient.

    Returns:
        Scalar, in squared weight units: what scoring one text of the batch against another costs, weighted. Summed in
        float32 at least.

    Raises:
        ValueError: If ``weights_BV`` is not ``(B, V)`` with B >= 1, or ``term_cost_V`` is not ``(V,)``.

    References:
        Paria et al. 2020, arXiv:2004.05665 (FLOPS). Geng et al. 2024, arXiv:2411.04403 (IDF-aware).
    """
    if weights_BV.ndim != 2 or len(weights_BV) == 0:
        raise ValueError(f"weights_BV must be (B, V) with B >= 1, got {tuple(weights_BV.shape)}")
    mean_V: Tensor = _MeanActivity.apply(weights_BV)  # type: ignore[no-untyped-call]
    if across_ranks and distributed.is_available() and distributed.is_initialized():
        mean_V = _mean_over_ranks(mean_V, len(weights_BV))
    if term_cost_V is not None:
        if term_cost_V.shape != mean_V.shape:
            raise ValueError(f"term_cost_V must be {tuple(mean_V.shape)}, got {tuple(term_cost_V.shape)}")
        mean_V = mean_V * term_cost_V
    return mean_V.square().sum()


def _mean_over_ranks(mean_V: Tensor, texts: int) -> Tensor:
    """Return the mean over all texts of all R ranks.

    A rank with n of the N texts contributes n / N of its mean; times R, because DDP divides the sum of the gradients by
    R. What the other ranks contribute, and that factor, are in the value alone.
    """
    totals = torch.cat([mean_V.detach() * texts, mean_V.new_tensor([texts])])
    distributed.all_reduce(totals)
    all_texts = totals[-1]
    own_V = mean_V * (distributed.get_world_size() * texts / all_texts)
    return own_V + (totals[:-1] / all_texts - own_V).detach()


class _MeanActivity(torch.autograd.Function):
    """The mean of |w| over the texts, ``(B, V)`` to ``(V,)``, with one (B, V) allocated: the gradient.

    At V 250,000 new memory is what a penalty costs, not arithmetic; plain autograd takes four of them.
    """

    @staticmethod
    def forward(ctx: Any, weights_BV: Tensor) -> Tensor:
        ctx.save_for_backward(weights_BV)
        dtype = torch.promote_types(weights_BV.dtype, torch.float32)
        tiles = torch.split(weights_BV, TILE, dim=1)
        return torch.cat([tile.abs().sum(dim=0, dtype=dtype) for tile in tiles]) / len(weights_BV)

    @staticmethod
    def backward(ctx: Any, gradient_V: Tensor) -> Tensor:
        (weights_BV,) = ctx.saved_tensors
        return weights_BV.sgn().mul_((gradient_V / len(weights_BV)).to(weights_BV.dtype))


def idf_term_cost(idf_V: Tensor, *, form: Literal["inverse", "direct"] = "inverse") -> Tensor:
    """Turn inverse document frequencies into costs for `flops`, with mean 1 so that its scale stays.

    Args:
        idf_V: ``(V,)``, > 0 and finite; high for rare terms.
        form: ``inverse`` costs 1/idf: common terms, which make long posting lists and say little, are punished.
            ``direct`` costs idf, as one published snippet does, and punishes rare terms; for comparison.

    Returns:
        Costs, ``(V,)`` float32, mean 1.

    Raises:
        ValueError: If an idf is not a finite number > 0, the shape is not ``(V,)`` with V >= 1, or `form` is unknown.
    """
    if form not in ("inverse", "direct"):
        raise ValueError(f'form must be "inverse" or "direct", got "{form}"')
    if idf_V.ndim != 1 or len(idf_V) == 0:
        raise ValueError(f"idf_V must be (V,) with V >= 1, got {tuple(idf_V.shape)}")
    usable_V = torch.isfinite(idf_V) & (idf_V > 0)
    if not bool(usable_V.all()):
        first = int((~usable_V).nonzero()[0])
        raise ValueError(f"idf of term {first} is {float(idf_V[first])}, not finite and > 0; smooth it first")
    cost_V = idf_V.double() if form == "direct" else 1 / idf_V.double()
    return (cost_V / cost_V.mean()).float()
