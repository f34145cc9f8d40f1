"""The SPLADE head without logits: the largest logit of every text and term, the weights from it, and the gradients.

Shape letters: B = texts, S = tokens of the longest text, N = tokens of all texts one after the other, H = hidden width,
V = terms, T = terms of a tile, E = entries of a gradient that are not 0, R = rows that are summed into, U = distinct
rows.

A stock head builds ``(B, S, V)`` logits, takes ``log(1 + relu(x))`` of each and then the maximum over tokens. The
maximum commutes with that monotone function, so one signed maximum a text and term is enough, and its gradient reaches
one token: maximum and token are all that is kept. The vocabulary is worked through in tiles, in buffers that are used
again.

The gradient of ``hidden_NH @ weight_VH.T`` then has one entry a text and term. Two ways lead to the gradients of both
factors: entry by entry, at a cost in proportion to the entries, and tile by tile with dense matrix products, at a cost
in proportion to ``N * V``; the cheaper one is taken. Neither uses atomics, so the same input gives the same bits.

Last in the file: the uses of a tied weight in one backward pass (the head for each batch, the embedding of each batch)
share one gradient. Autograd would fill one as large as the weight for every use and add them up: of 250,000 terms and
width 1024 that is a gigabyte each.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from soju.sparse import splade_loops

TILE_NUMBERS = 3 << 20
"""Logits of a tile: 12 MiB in float32, which the last-level cache of a few cores holds together with its weights."""
TILE_NUMBERS_ELSEWHERE = 1 << 26
"""The same on other devices, where starting a kernel costs more than a cache saves: 128 MiB in half precision."""
NARROWEST_TILE = 1024
"""A matrix product over fewer terms than this wastes its start-up."""
CELLS_PER_ENTRY = 12
"""An entry costs as much as this many cells of a dense product (CPU: 8 to 18, measured for H 384 and 1024)."""
CELLS_PER_ENTRY_WITH_TORCH = 64
"""The same where entries are gathered with torch's own operators: a cautious guess."""
GATHERED_NUMBERS = 1 << 24
"""Numbers gathered at a time there: 64 MiB in float32."""
NUMPY_DTYPES = {torch.float32: np.float32, torch.float64: np.float64}


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
        tile: Terms to work on at a time; by default as many as suit the processor's cache.

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
    """Return ``log(1 + relu(maxima))`` and keep nothing but it for the gradient, ``exp(-weight)`` where weight > 0."""
    weights_BV: Tensor = _SpladeWeights.apply(maxima_BV)  # type: ignore[no-untyped-call]
    return weights_BV


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
        argmax_BV = hidden_NH.new_empty(texts, terms, dtype=reducer.argmax_dtype) if learn else None
        for part in tiles(terms, reducer.width):
            reducer.reduce(part, maxima_BV, argmax_BV, start=part.start)
        if bias_V is not None:
            # Once a text instead of once a token: rounding is monotone, so max_n(x_n) + b and max_n(x_n + b) are equal.
            maxima_BV += bias_V
        if not lengths_B.all():
            # After the bias, which must not reach these texts; the reducer leaves arbitrary memory in their rows.
            maxima_BV[(lengths_B == 0).to(maxima_BV.device)] = 0
        ctx.save_for_backward(hidden_NH, weight_VH, argmax_BV, lengths_B)
        # Autocast may be off when the backward pass runs; the products' dtype is decided here, once.
        ctx.tile, ctx.dtype = reducer.width, product_dtype(hidden_NH)
        ctx.bias_dtype = None if bias_V is None else bias_V.dtype
        return maxima_BV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BV: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, argmax_BV, lengths_B = ctx.saved_tensors
        for_hidden, for_weight, for_bias, *_ = ctx.needs_input_grad
        if not lengths_B.all():
            # Their argmax is arbitrary memory; a 0 here is what keeps it from being used as an index.
            gradient_BV = gradient_BV.masked_fill((lengths_B == 0).to(gradient_BV.device)[:, None], 0)
        gradient = LogitsGradient(gradient_BV.contiguous(), argmax_BV, lengths_B)
        sums_NH = torch.zeros_like(hidden_NH, dtype=gradient_BV.dtype) if for_hidden else None
        sums_VH = offered = offered_gradient(weight_VH) if for_weight else None
        if for_weight and sums_VH is None:
            sums_VH = lazy_zeros_like(weight_VH)
            # Offered while still empty: autograd runs no other use of the weight before this one returns.
            offer_gradient(weight_VH, sums_VH)
        gradient.add_to(sums_NH, sums_VH, hidden_NH, weight_VH, tile=ctx.tile, dtype=ctx.dtype)
        bias_gradient_V = gradient_BV.sum(dim=0).to(ctx.bias_dtype) if for_bias else None
        hidden_gradient_NH = None if sums_NH is None else sums_NH.to(hidden_NH.dtype)
        # None where the sums went into a gradient that an earlier use returned: autograd has that one already.
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
        # d/dx log(1 + x) = 1 / (1 + x) = exp(-log(1 + x)). The mask is the gradient of the ReLU and comes last, because
        # exp(-0) is 1: without it every inactive term would learn.
        (weights_BV,) = ctx.saved_tensors
        return weights_BV.neg().exp_().mul_(gradient_BV).masked_fill_(weights_BV == 0, 0)


# Forward: maxima of one tile after the other.


class TileReducer:
    """Finds the largest logits of one tile of the vocabulary after the other."""

    def __init__(self, hidden_NH: Tensor, weight_VH: Tensor, lengths_B: Tensor, *, tile: int | None = None) -> None:
        self._hidden_NH = hidden_NH.to(product_dtype(hidden_NH)).contiguous()
        self._weight_VH = weight_VH
        self._offsets = text_offsets(lengths_B)
        self._longest = int(lengths_B.max()) if len(lengths_B) else 0
        terms = len(weight_VH)
        self._with_loops = splade_loops.usable(hidden_NH)
        numbers = TILE_NUMBERS if self._with_loops else TILE_NUMBERS_ELSEWHERE
        self.width = min(tile or tile_width(len(hidden_NH), terms, numbers), terms)
        # One row more than there are tokens: it stands for padding where texts are laid side by side.
        self._buffer = self._hidden_NH.new_empty((len(hidden_NH) + 1) * self.width)
        self._rows_BS = None if self._with_loops else padded_rows(lengths_B).to(hidden_NH.device)

    @property
    def maxima_dtype(self) -> torch.dtype:
        """What maxima are kept in: at least float32."""
        return torch.promote_types(self._hidden_NH.dtype, torch.float32)

    @property
    def argmax_dtype(self) -> torch.dtype:
        """The smallest integers that count the tokens of the longest text; the last has the number longest - 1."""
        return torch.int16 if self._longest <= 32_768 else torch.int32

    def reduce(self, terms: slice, maxima_BV: Tensor, argmax_BV: Tensor | None, *, start: int) -> None:
        """Write the largest logits of ``terms``, without bias, and the tokens that have them.

        What is written for texts without tokens means nothing.

        Args:
            terms: At most `width` terms.
            maxima_BV: Written from column ``start`` on; contiguous, in `maxima_dtype`.
            argmax_BV: Likewise, tokens counted from the text's first; None when they are not needed.
            start: First column to write.
        """
        tokens, width = len(self._hidden_NH), terms.stop - terms.start
        # The last tile is narrower: it takes the front of the buffer, so that its rows are contiguous like the others'.
        buffer_NT = self._buffer[: (tokens + 1) * width].view(tokens + 1, width)
        weight_TH = self._weight_VH[terms].to(self._hidden_NH.dtype)
        torch.mm(self._hidden_NH, weight_TH.t(), out=buffer_NT[:tokens])
        if self._with_loops:
            logits_NT = buffer_NT[:tokens].to(maxima_BV.dtype).numpy()
            argmax = None if argmax_BV is None else argmax_BV.numpy()
            splade_loops.reduce_tile(logits_NT, self._offsets, maxima_BV.numpy(), argmax, start)
        else:
            self._reduce_with_torch(buffer_NT, maxima_BV[:, start : start + width], argmax_BV, start)

    def _reduce_with_torch(self, buffer_NT: Tensor, maxima_BT: Tensor, argmax_BV: Tensor | None, start: int) -> None:
        """Lay texts of different lengths side by side, padded with -inf, which is no text's maximum."""
        assert self._rows_BS is not None
        # In every tile anew: the row after the tokens lies elsewhere in the buffer when the last tile is narrower.
        buffer_NT[-1] = -torch.inf
        logits_BST = buffer_NT.index_select(0, self._rows_BS.flatten()).view(*self._rows_BS.shape, maxima_BT.shape[1])
        if argmax_BV is None:
            maxima_BT.copy_(logits_BST.amax(dim=1))
            return
        maxima, argmax = logits_BST.max(dim=1)
        maxima_BT.copy_(maxima)
        argmax_BV[:, start : start + maxima_BT.shape[1]] = argmax


def product_dtype(hidden_NH: Tensor) -> torch.dtype:
    """Return the dtype a linear layer would multiply in at this place: that of autocast where it is on."""
    kind = hidden_NH.device.type
    if torch.is_autocast_enabled(kind) and hidden_NH.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return hidden_NH.dtype


def tile_width(tokens: int, terms: int, numbers: int = TILE_NUMBERS) -> int:
    """Return how many terms to work on at a time, so that a tile holds about so many ``numbers``."""
    return max(1, min(terms, max(NARROWEST_TILE, numbers // max(tokens, 1) // 64 * 64)))


def tiles(terms: int, width: int) -> Iterator[slice]:
    """Yield the slices of the vocabulary."""
    for start in range(0, terms, width):
        yield slice(start, min(start + width, terms))


def text_offsets(lengths_B: Tensor) -> NDArray[np.int64]:
    """Return where each text starts, and the last one ends: ``(B + 1,)``."""
    offsets = np.zeros(len(lengths_B) + 1, np.int64)
    np.cumsum(lengths_B.numpy(), out=offsets[1:])
    return offsets


def padded_rows(lengths_B: Tensor) -> Tensor:
    """Return the row of each text's tokens ``(B, S)``, and beyond a text's end the row after the last token."""
    place_S = torch.arange(max(1, int(lengths_B.max()) if len(lengths_B) else 1))
    starts_B = lengths_B.cumsum(0) - lengths_B
    return torch.where(place_S < lengths_B[:, None], starts_B[:, None] + place_S, int(lengths_B.sum()))


# Backward: gradients of both factors of the logits.


@dataclass(frozen=True)
class LogitsGradient:
    """The gradient of ``hidden_NH @ weight_VH.T``: one entry a text and term, at the token that has the maximum."""

    gradient_BV: Tensor
    """Gradient of the maxima, contiguous, at least float32; 0 for texts without tokens."""
    argmax_BV: Tensor
    """Tokens that have the maxima, counted from the text's first."""
    lengths_B: Tensor
    """Tokens of each text, on the CPU."""

    def add_to(
        self,
        sums_NH: Tensor | None,
        sums_VH: Tensor | None,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        *,
        tile: int,
        dtype: torch.dtype,
    ) -> None:
        """Add the gradients of both factors.

        Args:
            sums_NH: For the hidden states, in the gradient's dtype; None when it is not wanted.
            sums_VH: For the output embedding, in its dtype; None when it is not wanted.
            hidden_NH: The hidden states.
            weight_VH: The output embedding.
            tile: Terms of a tile, for dense products.
            dtype: What dense products are multiplied in.
        """
        entries = int(torch.count_nonzero(self.gradient_BV))
        cells = len(hidden_NH) * len(weight_VH)
        # The loops multiply in one dtype; a weight in half precision has a gradient in float32 and goes another way.
        with_loops = splade_loops.usable(hidden_NH) and self.gradient_BV.dtype == weight_VH.dtype
        if entries * (CELLS_PER_ENTRY if with_loops else CELLS_PER_ENTRY_WITH_TORCH) > cells:
            self._tile_by_tile(hidden_NH.to(dtype), weight_VH, sums_NH, sums_VH, tile)
        elif with_loops:
            self._with_loops(hidden_NH, weight_VH, sums_NH, sums_VH)
        else:
            self._with_torch(hidden_NH, weight_VH, sums_NH, sums_VH)

    def _with_loops(self, hidden_NH: Tensor, weight_VH: Tensor, sums_NH: Tensor | None, sums_VH: Tensor | None) -> None:
        entries = self.gradient_BV.numpy(), self.argmax_BV.numpy(), text_offsets(self.lengths_B)
        if sums_NH is not None:
            weight = weight_VH.detach().contiguous().numpy()
            splade_loops.add_outer_products(*entries, weight, sums_NH.numpy(), into_terms=False)
        if sums_VH is not None:
            hidden = hidden_NH.detach().to(sums_VH.dtype).contiguous().numpy()
            splade_loops.add_outer_products(*entries, hidden, sums_VH.numpy(), into_terms=True)

    def _with_torch(self, hidden_NH: Tensor, weight_VH: Tensor, sums_NH: Tensor | None, sums_VH: Tensor | None) -> None:
        # Of the transposed matrix, so that entries come term by term: `_add_rows` needs ascending rows.
        term_E, text_E = self.gradient_BV.t().nonzero().unbind(dim=1)
        gradient_E = self.gradient_BV[text_E, term_E]
        token_E = self._starts_B()[text_E] + self.argmax_BV[text_E, term_E].long()
        if sums_VH is not None:
            _add_rows(sums_VH, term_E, gradient_E, hidden_NH, token_E)
        if sums_NH is not None:
            # Stable: entries of one token stay in the order of terms, so they are summed in the same order every time.
            token_E, order_E = token_E.sort(stable=True)
            _add_rows(sums_NH, token_E, gradient_E[order_E], weight_VH, term_E[order_E])

    def _tile_by_tile(
        self, hidden_NH: Tensor, weight_VH: Tensor, sums_NH: Tensor | None, sums_VH: Tensor | None, tile: int
    ) -> None:
        tokens, dtype = len(hidden_NH), hidden_NH.dtype
        buffer = torch.empty(tokens * tile, dtype=self.gradient_BV.dtype, device=hidden_NH.device)
        # Tiles ascend: every tile adds to all of sums_NH, and another order of tiles would be another order of sums.
        for part in tiles(len(weight_VH), tile):
            gradient_NT = buffer[: tokens * (part.stop - part.start)].view(tokens, -1)
            self._scatter(part, gradient_NT)
            product_NT = gradient_NT.to(dtype)
            if sums_NH is not None:
                _add_product(sums_NH, product_NT, weight_VH[part].to(dtype))
            if sums_VH is not None:
                _add_product(sums_VH[part], product_NT.t(), hidden_NH)

    def _scatter(self, part: slice, gradient_NT: Tensor) -> None:
        """Lay the gradient of one tile out as a dense matrix: no two entries meet, since a text has one a term."""
        if splade_loops.usable(gradient_NT):
            entries = self.gradient_BV.numpy(), self.argmax_BV.numpy(), text_offsets(self.lengths_B)
            splade_loops.scatter_tile(*entries, part.start, gradient_NT.numpy())
            return
        # Texts without tokens would write into the first row of the next text.
        held = (self.lengths_B > 0).to(gradient_NT.device)
        token_BT = (self._starts_B()[:, None] + self.argmax_BV[:, part].long())[held]
        gradient_NT.zero_().scatter_(0, token_BT, self.gradient_BV[:, part][held])

    def _starts_B(self) -> Tensor:
        return (self.lengths_B.cumsum(0) - self.lengths_B).to(self.gradient_BV.device)


def _add_product(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left @ right`` in place, also to sums of another dtype."""
    if sums.dtype == left.dtype:
        sums.addmm_(left, right)
    else:
        sums += left @ right


def _add_rows(sums_RH: Tensor, row_E: Tensor, gradient_E: Tensor, factor: Tensor, index_E: Tensor) -> None:
    """Add ``gradient[e] * factor[index[e]]`` to ``sums[row[e]]`` for every entry; rows must ascend."""
    step = max(1, GATHERED_NUMBERS // factor.shape[1])
    for start in range(0, len(row_E), step):
        part = slice(start, start + step)
        products_EH = gradient_E[part, None] * factor[index_E[part]]
        row_U, sum_UH = sum_rows(row_E[part], products_EH)
        # Rows are distinct within a step, so index_add_ adds one value to each and no order is left open. A row that a
        # step's end cuts in two is added to twice, one step after the other.
        sums_RH.index_add_(0, row_U, sum_UH.to(sums_RH.dtype))


def sum_rows(row_N: Tensor, values_NH: Tensor) -> tuple[Tensor, Tensor]:
    """Add up the values of equal rows, which must ascend; return the distinct rows ``(U,)`` and their sums ``(U, H)``.

    Summed in order, without atomics: the same bits every time.
    """
    row_U, count_U = torch.unique_consecutive(row_N, return_counts=True)
    return row_U, torch.segment_reduce(values_NH, "sum", lengths=count_U, unsafe=True)


# One gradient for all uses of a tied weight. The first use to run in a backward pass offers the gradient it is about to
# return; every later one adds its rows to that and returns None, which autograd takes for zero.

_offers: dict[tuple[int, int], weakref.ref[Tensor]] = {}
"""By backward pass and weight. The reference is weak, so that an offer ends when autograd lets go of the tensor: when
the gradient of a use that is not ours came first, autograd adds ours to that and drops it. Nor may an offer keep it
alive, or autograd would have to copy it into ``.grad``."""


def offered_gradient(weight: Tensor) -> Tensor | None:
    """Return the gradient that an earlier use of the weight has offered in this backward pass, to be added to."""
    offer = _offers.get(_offer_key(weight))
    return None if offer is None else offer()


def offer_gradient(weight: Tensor, gradient: Tensor) -> None:
    """Let later uses of the weight add to the gradient that is about to be returned to autograd.

    Nothing else may hold on to ``gradient``.
    """
    if torch.is_grad_enabled():  # a graph of the backward pass is built, in which nothing may change in place
        return
    key = _offer_key(weight)
    _offers[key] = weakref.ref(gradient, lambda _: _offers.pop(key, None))


def _offer_key(weight: Tensor) -> tuple[int, int]:
    return torch._C._current_graph_task_id(), id(weight)


def lazy_zeros_like(weight: Tensor) -> Tensor:
    """Return zeros; on the CPU the system maps their pages when they are first written: untouched rows cost nothing."""
    if weight.device.type == "cpu" and weight.dtype in NUMPY_DTYPES:
        return torch.from_numpy(np.zeros(tuple(weight.shape), NUMPY_DTYPES[weight.dtype]))
    return torch.zeros_like(weight)


class TiedEmbedding(nn.Embedding):
    """An embedding that takes the place of another, with its weight, and adds to a gradient offered for that weight."""

    def __init__(self, embedding: nn.Embedding) -> None:
        # On "meta" nothing is allocated and no random number drawn for a weight that is replaced at once.
        super().__init__(
            embedding.num_embeddings, embedding.embedding_dim, padding_idx=embedding.padding_idx, device="meta"
        )
        self.weight = embedding.weight
        self.train(embedding.training)

    @staticmethod
    def can_replace(embedding: nn.Module) -> bool:
        """Return whether an embedding is a plain one, whose look-up and gradient `TiedEmbedding` repeats exactly."""
        return type(embedding) is nn.Embedding and not (
            embedding.sparse or embedding.scale_grad_by_freq or embedding.max_norm
        )

    def forward(self, input: Tensor) -> Tensor:
        """Look ids up."""
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(input)
        embedded: Tensor = _Lookup.apply(self.weight, input, self.padding_idx)  # type: ignore[no-untyped-call]
        return embedded


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
            # Not offered to later uses: the head of a batch runs before its look-up, so with a head there is an offer.
            sums_VH = lazy_zeros_like(weight_VH)
        # Stable, so that the occurrences of an id are summed in the order of the tokens.
        id_N, order_N = ids.flatten().sort(stable=True)
        if ctx.padding_id is not None:
            kept_N = id_N != ctx.padding_id
            id_N, order_N = id_N[kept_N], order_N[kept_N]
        if len(id_N):
            row_U, sum_UH = sum_rows(id_N, gradient.flatten(0, -2)[order_N].to(sums_VH.dtype))
            sums_VH.index_add_(0, row_U, sum_UH)
        return (sums_VH if offered is None else None), None, None
