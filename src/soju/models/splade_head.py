"""The SPLADE head without the ``[B, S, V]`` logits: the largest logit of every text and term, tile by tile.

Shape letters: B = texts, N = tokens of all texts one after the other, H = hidden width, V = terms, T = terms of a tile,
E = entries of a sparse gradient.

The maximum over tokens commutes with the monotone ``log(1 + relu(x))``, so the head needs one signed maximum for each
text and term, and its gradient reaches one token for each: that is all that is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from soju.models import splade_cpu

TILE_NUMBERS = 3 << 20
"""Logits of a tile: 12 MiB in float32, what the last-level cache of a few cores holds beside the weights."""
DENSE_SHARE = {"cpu": 12, "cuda": 64}
"""One entry of a sparse gradient costs about as much as this many of a dense matrix product."""
ENTRY_NUMBERS = 1 << 24
"""Numbers gathered at a time where the sparse gradient is multiplied with torch's own operators."""

NUMBA_DTYPES = (torch.float32, torch.float64)


def signed_maxima(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, lengths_B: Tensor, *, tile: int | None = None
) -> Tensor:
    """Return the largest logit of each text for each term, before any ReLU.

    ``maxima_bv = max_n (hidden_n · weight_v) + bias_v`` over the tokens n of text b. The gradient goes to the first
    token that has the maximum, as with ``torch.max``. A text without tokens has the maximum 0 and no gradient: what
    masked logits give in `sentence_transformers`.

    Under autocast the products are in the autocast dtype; maxima, and sums of gradients, are at least float32. Cost of
    the backward pass is in proportion to the non-zero gradients while these are few, see `DENSE_SHARE`.

    Args:
        hidden_NH: Input of the output embedding for all tokens that are no padding, text after text, ``(N, H)``.
        weight_VH: Output embedding, ``(V, H)``; may be tied to the input embedding.
        bias_V: Bias of each term, ``(V,)``, or None.
        lengths_B: Number of tokens of each text, ``(B,)`` integers, with the sum N.
        tile: Terms to work on at a time; by default as many as the processor's cache likes.

    Returns:
        Signed logits, ``(B, V)`` float32 (float64 for float64 input).

    Raises:
        ValueError: If the shapes do not belong together, or the dtypes differ outside autocast.

    References:
        Formal et al. 2021, arXiv:2109.10086 (max pooling). Sparton, arXiv:2603.25011 (the same idea for GPUs).
    """
    _check(hidden_NH, weight_VH, bias_V, lengths_B)
    if tile is not None and tile < 1:
        raise ValueError(f"tile must be >= 1, got {tile}")
    lengths = lengths_B.detach().to("cpu", torch.int64)
    maxima_BV: Tensor = _SignedMaxima.apply(hidden_NH, weight_VH, bias_V, lengths, tile, product_dtype(hidden_NH))  # type: ignore[no-untyped-call]
    return maxima_BV


def splade_weights(maxima_BV: Tensor) -> Tensor:
    """Return ``log(1 + relu(maxima))`` and keep nothing else for the gradient ``exp(-weight) where weight > 0``.

    Args:
        maxima_BV: Signed maxima, ``(B, V)``.

    Returns:
        Term weights >= 0, ``(B, V)``.
    """
    weights_BV: Tensor = _SpladeWeights.apply(maxima_BV)  # type: ignore[no-untyped-call]
    return weights_BV


def product_dtype(hidden_NH: Tensor) -> torch.dtype:
    """Return the dtype a linear layer would multiply in at this place: that of autocast where it is on."""
    kind = hidden_NH.device.type
    if torch.is_autocast_enabled(kind) and hidden_NH.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return hidden_NH.dtype


def tile_width(tokens: int, terms: int) -> int:
    """Return how many terms to work on at a time."""
    return max(1, min(terms, max(1024, TILE_NUMBERS // max(tokens, 1) // 64 * 64)))


def tiles(terms: int, width: int) -> Iterator[slice]:
    """Yield the slices of the vocabulary."""
    for start in range(0, terms, width):
        yield slice(start, min(start + width, terms))


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype maxima and sums of gradients are kept in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


class TileReducer:
    """Finds maxima of one tile after the other in buffers it uses again."""

    def __init__(self, hidden_NH: Tensor, weight_VH: Tensor, lengths: Tensor, width: int, dtype: torch.dtype) -> None:
        self.hidden_NH = hidden_NH.to(dtype).contiguous()
        self.weight_VH = weight_VH
        self.lengths = lengths
        self.on_cpu = hidden_NH.device.type == "cpu"
        self.offsets = _offsets(lengths)
        tokens = len(hidden_NH)
        # The last row stands for padding where texts of different lengths are laid side by side.
        self.buffer = torch.empty((tokens + 1) * width, dtype=dtype, device=hidden_NH.device)
        self.padded_index = None if self.on_cpu else _padded_index(lengths, tokens).to(hidden_NH.device)

    def reduce(self, terms: slice, maxima_BT: Tensor, argmax_BT: Tensor | None) -> None:
        """Write the maxima of a tile, without the bias; texts without tokens are left alone on the CPU."""
        tokens, width = len(self.hidden_NH), terms.stop - terms.start
        buffer_NT = self.buffer[: (tokens + 1) * width].view(tokens + 1, width)
        weight_TH = self.weight_VH[terms].to(self.hidden_NH.dtype)
        torch.mm(self.hidden_NH, weight_TH.t(), out=buffer_NT[:tokens])
        if self.on_cpu:
            logits_NT = buffer_NT[:tokens].to(maxima_BT.dtype).numpy()
            argmax = None if argmax_BT is None else argmax_BT.numpy()
            splade_cpu.reduce_tile(logits_NT, self.offsets, maxima_BT.numpy(), argmax)
        else:
            self._reduce_with_torch(buffer_NT, maxima_BT, argmax_BT)

    def _reduce_with_torch(self, buffer_NT: Tensor, maxima_BT: Tensor, argmax_BT: Tensor | None) -> None:
        assert self.padded_index is not None
        buffer_NT[-1] = -torch.inf
        padded_BST = buffer_NT.index_select(0, self.padded_index.flatten()).view(*self.padded_index.shape, -1)
        if argmax_BT is None:
            maxima_BT.copy_(padded_BST.amax(dim=1))
            return
        maxima, argmax = padded_BST.max(dim=1)
        maxima_BT.copy_(maxima)
        argmax_BT.copy_(argmax)


class _SignedMaxima(torch.autograd.Function):
    """`signed_maxima`; saves its two factors and one small integer a text and term."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        lengths: Tensor,
        tile: int | None,
        dtype: torch.dtype,
    ) -> Tensor:
        texts, terms, device = len(lengths), len(weight_VH), hidden_NH.device
        width = min(tile or tile_width(len(hidden_NH), terms), terms)
        maxima_BV = torch.empty(texts, terms, dtype=sum_dtype(dtype), device=device)
        argmax_BV = None
        if any(ctx.needs_input_grad[:3]):
            longest = int(lengths.max()) if texts else 0
            argmax_BV = torch.empty(
                texts, terms, dtype=torch.int16 if longest <= 32_768 else torch.int32, device=device
            )
        reducer = TileReducer(hidden_NH, weight_VH, lengths, width, dtype)
        for part in tiles(terms, width):
            reducer.reduce(part, maxima_BV[:, part], None if argmax_BV is None else argmax_BV[:, part])
        if bias_V is not None:
            maxima_BV += bias_V
        if not lengths.all():
            maxima_BV[(lengths == 0).to(device)] = 0
        ctx.save_for_backward(hidden_NH, weight_VH, argmax_BV, lengths)
        ctx.width, ctx.dtype, ctx.bias_dtype = width, dtype, None if bias_V is None else bias_V.dtype
        return maxima_BV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BV: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, argmax_BV, lengths = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        if not lengths.all():
            gradient_BV = gradient_BV.masked_fill((lengths == 0).to(gradient_BV.device)[:, None], 0)
        bias_gradient_V = gradient_BV.sum(dim=0).to(ctx.bias_dtype) if wanted[2] else None
        factors = _Factors(hidden_NH, weight_VH, gradient_BV.contiguous(), argmax_BV, lengths)
        hidden_gradient_NH, weight_gradient_VH = factors.gradients(
            hidden=wanted[0], weight=wanted[1], width=ctx.width, dtype=ctx.dtype
        )
        return hidden_gradient_NH, weight_gradient_VH, bias_gradient_V, None, None, None


class _Factors:
    """Gradients of ``hidden_NH @ weight_VH.T`` where the gradient of the product has one entry a text and term."""

    def __init__(
        self, hidden_NH: Tensor, weight_VH: Tensor, gradient_BV: Tensor, argmax_BV: Tensor, lengths: Tensor
    ) -> None:
        self.hidden_NH, self.weight_VH = hidden_NH, weight_VH
        self.gradient_BV, self.argmax_BV = gradient_BV, argmax_BV
        self.lengths, self.offsets = lengths, _offsets(lengths)

    def gradients(
        self, *, hidden: bool, weight: bool, width: int, dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of both factors, None for one that is not wanted."""
        if not (hidden or weight):
            return None, None
        total = sum_dtype(self.hidden_NH.dtype)
        hidden_NH = torch.zeros_like(self.hidden_NH, dtype=total) if hidden else None
        weight_VH = _lazy_zeros_like(self.weight_VH) if weight else None
        device = self.hidden_NH.device.type
        entries = int(torch.count_nonzero(self.gradient_BV))
        cells = len(self.hidden_NH) * len(self.weight_VH)
        if entries * DENSE_SHARE.get(device, DENSE_SHARE["cuda"]) > cells:
            self._dense(hidden_NH, weight_VH, width, dtype)
        elif device == "cpu" and total == self.weight_VH.dtype:
            splade_cpu.add_outer_products(
                self.gradient_BV.numpy(),
                self.argmax_BV.numpy(),
                self.offsets,
                self.hidden_NH.to(total).contiguous().numpy(),
                self.weight_VH.detach().numpy(),
                None if hidden_NH is None else hidden_NH.numpy(),
                None if weight_VH is None else weight_VH.numpy(),
            )
        else:
            self._sparse_with_torch(hidden_NH, weight_VH)
        return None if hidden_NH is None else hidden_NH.to(self.hidden_NH.dtype), weight_VH

    def _dense(
        self, hidden_sum_NH: Tensor | None, weight_sum_VH: Tensor | None, width: int, dtype: torch.dtype
    ) -> None:
        """Lay the gradient of the logits out tile by tile and use two matrix products."""
        hidden_NH = self.hidden_NH.to(dtype)
        tokens = len(hidden_NH)
        buffer = torch.empty(tokens * width, dtype=self.gradient_BV.dtype, device=hidden_NH.device)
        starts_B = torch.from_numpy(self.offsets[:-1]).to(hidden_NH.device)[:, None]
        for part in tiles(len(self.weight_VH), width):
            logits_NT = buffer[: tokens * (part.stop - part.start)].view(tokens, -1)
            if logits_NT.device.type == "cpu":
                splade_cpu.scatter_tile(
                    self.gradient_BV[:, part].numpy(), self.argmax_BV[:, part].numpy(), self.offsets, logits_NT.numpy()
                )
            else:
                token_BT = (starts_B + self.argmax_BV[:, part].long())[self.lengths.to(starts_B.device) > 0]
                gradient_BT = self.gradient_BV[:, part][self.lengths.to(starts_B.device) > 0]
                logits_NT.zero_().scatter_(0, token_BT, gradient_BT)
            product_NT = logits_NT.to(dtype)
            if hidden_sum_NH is not None:
                hidden_sum_NH += product_NT @ self.weight_VH[part].to(dtype)
            if weight_sum_VH is not None:
                if weight_sum_VH.dtype == dtype:
                    torch.mm(product_NT.t(), hidden_NH, out=weight_sum_VH[part])
                else:
                    weight_sum_VH[part] = product_NT.t() @ hidden_NH

    def _sparse_with_torch(self, hidden_sum_NH: Tensor | None, weight_sum_VH: Tensor | None) -> None:
        """Sum the rows of the other factor over sorted entries: no atomics, so the same result every time."""
        term_E, text_E = self.gradient_BV.t().nonzero().unbind(dim=1)
        gradient_E = self.gradient_BV[text_E, term_E]
        starts_B = torch.from_numpy(self.offsets[:-1]).to(text_E.device)
        token_E = starts_B[text_E] + self.argmax_BV[text_E, term_E].long()
        if weight_sum_VH is not None:
            _add_rows(weight_sum_VH, term_E, gradient_E, self.hidden_NH, token_E)
        if hidden_sum_NH is not None:
            token_E, order_E = token_E.sort(stable=True)
            _add_rows(hidden_sum_NH, token_E, gradient_E[order_E], self.weight_VH, term_E[order_E])


def _add_rows(sum_RH: Tensor, row_E: Tensor, gradient_E: Tensor, factor_H: Tensor, index_E: Tensor) -> None:
    """Add ``gradient[e] * factor[index[e]]`` to ``sum[row[e]]``; rows ascend."""
    step = max(1, ENTRY_NUMBERS // factor_H.shape[1])
    for start in range(0, len(row_E), step):
        part = slice(start, start + step)
        rows_U, counts_U = torch.unique_consecutive(row_E[part], return_counts=True)
        products_EH = gradient_E[part, None] * factor_H[index_E[part]]
        sums_UH = torch.segment_reduce(products_EH, "sum", lengths=counts_U, unsafe=True)
        # Every row occurs once, so the order of additions is fixed.
        sum_RH.index_add_(0, rows_U, sums_UH.to(sum_RH.dtype))


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


def _offsets(lengths: Tensor) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return where each text starts, ``(B + 1,)``."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths.numpy(), out=offsets[1:])
    return offsets


def _padded_index(lengths: Tensor, padding: int) -> Tensor:
    """Return the row of each text's tokens, ``(B, S)``, and ``padding`` beyond its last."""
    longest = max(1, int(lengths.max()) if len(lengths) else 1)
    place_S = torch.arange(longest)
    starts_B = lengths.cumsum(0) - lengths
    return torch.where(place_S < lengths[:, None], starts_B[:, None] + place_S, padding)


def _lazy_zeros_like(weight_VH: Tensor) -> Tensor:
    """Return zeros; on the CPU the system maps their pages when they are first written: untouched rows cost nothing."""
    if weight_VH.device.type == "cpu" and weight_VH.dtype in NUMBA_DTYPES:
        return torch.from_numpy(np.zeros(tuple(weight_VH.shape), np.dtype(str(weight_VH.dtype).removeprefix("torch."))))
    return torch.zeros_like(weight_VH)
