"""The SPLADE head without the ``[B, S, V]`` logits: the largest logit of every text and term, and weights from it.

Shape letters: B = texts, N = tokens of all texts one after the other, H = hidden width, V = terms.

The maximum over tokens commutes with the monotone ``log(1 + relu(x))``, so the head needs one signed maximum for each
text and term, and the gradient of each reaches one token: that is all that is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from soju.sparse.shared_gradient import lazy_zeros_like, offer_gradient, offered_gradient
from soju.sparse.splade_gradients import LogitsGradient
from soju.sparse.splade_tiles import TileReducer, product_dtype, tiles


def signed_maxima(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, lengths_B: Tensor, *, tile: int | None = None
) -> Tensor:
    """Return the largest logit of each text for each term, before any ReLU.

    ``maxima_bv = max_n (hidden_n · weight_v) + bias_v`` over the tokens n of text b. The gradient goes to the first
    token that has the maximum, as with ``torch.max``. A text without tokens has the maximum 0 and no gradient: what
    masked logits give in sentence-transformers.

    Under autocast the products are in the autocast dtype; maxima, and sums of gradients by entry, are at least float32.
    The backward pass costs in proportion to the gradients that are not 0 while these are few, and is deterministic. Not
    differentiable twice.

    Args:
        hidden_NH: Input of the output embedding for all tokens that are no padding, text after text, ``(N, H)``.
        weight_VH: Output embedding, ``(V, H)``; may be tied to the input embedding.
        bias_V: Bias of each term, ``(V,)``, or None.
        lengths_B: Number of tokens of each text, ``(B,)`` integers with the sum N.
        tile: Terms to work on at a time; by default as many as the processor's cache likes.

    Returns:
        Signed logits, ``(B, V)`` float32 (float64 for float64 input).

    Raises:
        ValueError: If the shapes do not belong together, or the dtypes differ outside autocast.

    References:
        Formal et al. 2021, arXiv:2109.10086 (max pooling). Sparton, arXiv:2603.25011 (the same idea on a GPU).
    """
    _check(hidden_NH, weight_VH, bias_V, lengths_B)
    if tile is not None and tile < 1:
        raise ValueError(f"tile must be >= 1, got {tile}")
    lengths_B = lengths_B.detach().to("cpu", torch.int64)
    inputs = [tensor for tensor in (hidden_NH, weight_VH, bias_V) if tensor is not None]
    learn = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    maxima_BV: Tensor = _SignedMaxima.apply(hidden_NH, weight_VH, bias_V, lengths_B, tile, learn)  # type: ignore[no-untyped-call]
    return maxima_BV


def splade_weights(maxima_BV: Tensor) -> Tensor:
    """Return ``log(1 + relu(maxima))`` and keep nothing but it for the gradient, ``exp(-weight)`` where weight > 0.

    Args:
        maxima_BV: Signed maxima, ``(B, V)``.

    Returns:
        Term weights >= 0, ``(B, V)``.
    """
    weights_BV: Tensor = _SpladeWeights.apply(maxima_BV)  # type: ignore[no-untyped-call]
    return weights_BV


class _SignedMaxima(torch.autograd.Function):
    """`signed_maxima`; saves its two factors and one small integer a text and term."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        lengths_B: Tensor,
        tile: int | None,
        learn: bool,
    ) -> Tensor:
        texts, terms = len(lengths_B), len(weight_VH)
        reducer = TileReducer(hidden_NH, weight_VH, lengths_B, tile=tile)
        maxima_BV = hidden_NH.new_empty(texts, terms, dtype=reducer.maxima_dtype)
        argmax_BV = None
        if learn:
            argmax_BV = hidden_NH.new_empty(texts, terms, dtype=reducer.argmax_dtype)
        for part in tiles(terms, reducer.width):
            reducer.reduce(part, maxima_BV, argmax_BV, start=part.start)
        if bias_V is not None:
            maxima_BV += bias_V  # after the maximum, with which adding a number to all tokens commutes
        if not lengths_B.all():
            maxima_BV[(lengths_B == 0).to(maxima_BV.device)] = 0
        ctx.save_for_backward(hidden_NH, weight_VH, argmax_BV, lengths_B)
        ctx.tile, ctx.dtype = reducer.width, product_dtype(hidden_NH)
        ctx.bias_dtype = None if bias_V is None else bias_V.dtype
        return maxima_BV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BV: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, argmax_BV, lengths_B = ctx.saved_tensors
        for_hidden, for_weight, for_bias, *_ = ctx.needs_input_grad
        if not lengths_B.all():
            gradient_BV = gradient_BV.masked_fill((lengths_B == 0).to(gradient_BV.device)[:, None], 0)
        gradient = LogitsGradient(gradient_BV.contiguous(), argmax_BV, lengths_B)
        sums_NH = torch.zeros_like(hidden_NH, dtype=gradient_BV.dtype) if for_hidden else None
        sums_VH = offered = offered_gradient(weight_VH) if for_weight else None
        if for_weight and sums_VH is None:
            sums_VH = lazy_zeros_like(weight_VH)
            offer_gradient(weight_VH, sums_VH)
        gradient.add_to(sums_NH, sums_VH, hidden_NH, weight_VH, tile=ctx.tile, dtype=ctx.dtype)
        bias_gradient_V = gradient_BV.sum(dim=0).to(ctx.bias_dtype) if for_bias else None
        hidden_gradient_NH = None if sums_NH is None else sums_NH.to(hidden_NH.dtype)
        return hidden_gradient_NH, (sums_VH if offered is None else None), bias_gradient_V, None, None, None


class _SpladeWeights(torch.autograd.Function):
    """`splade_weights`; saves its output."""

    @staticmethod
    def forward(ctx: Any, maxima_BV: Tensor) -> Tensor:
        weights_BV = maxima_BV.clamp(min=0).log1p_()
        ctx.save_for_backward(weights_BV)
        return weights_BV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BV: Tensor) -> Tensor:
        (weights_BV,) = ctx.saved_tensors
        return weights_BV.neg().exp_().mul_(gradient_BV).masked_fill_(weights_BV == 0, 0)


def _check(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, lengths_B: Tensor) -> None:
    """Refuse tensors that do not belong together."""
    if hidden_NH.ndim != 2 or weight_VH.ndim != 2 or hidden_NH.shape[1] != weight_VH.shape[1]:
        raise ValueError(
            f"hidden_NH and weight_VH must be (N, H) and (V, H), got {tuple(hidden_NH.shape)}, {tuple(weight_VH.shape)}"
        )
    if bias_V is not None and bias_V.shape != weight_VH.shape[:1]:
        raise ValueError(f"bias_V must be ({len(weight_VH)},), got {tuple(bias_V.shape)}")
    if lengths_B.ndim != 1 or bool((lengths_B < 0).any()) or int(lengths_B.sum()) != len(hidden_NH):
        raise ValueError(f"lengths_B must be >= 0 with the sum {len(hidden_NH)}, got the sum {int(lengths_B.sum())}")
    if not torch.is_autocast_enabled(hidden_NH.device.type) and hidden_NH.dtype != weight_VH.dtype:
        raise ValueError(f"hidden_NH is {hidden_NH.dtype} and weight_VH {weight_VH.dtype}; they must have one dtype")
