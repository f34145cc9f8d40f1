"""Gradients of the two factors of logits when only the largest logit of each text and term has one.

Shape letters: B = texts, N = tokens of all texts one after the other, H = hidden width, V = terms, T = terms of a tile,
E = entries of the gradient that are not 0.

Two ways to the same sums: entry by entry, at a cost in proportion to the entries, and tile by tile with dense matrix
products, at a cost in proportion to ``N * V``. Neither uses atomics, so the same input gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from soju.sparse import splade_loops
from soju.sparse.shared_gradient import sum_rows
from soju.sparse.splade_tiles import text_offsets, tiles

CELLS_PER_ENTRY = 12
"""An entry costs as much as this many cells of a dense product (CPU: 8 to 18, measured for H 384 and 1024)."""
CELLS_PER_ENTRY_WITH_TORCH = 64
"""The same where entries are gathered with torch's own operators: a cautious guess."""
GATHERED_NUMBERS = 1 << 24
"""Numbers gathered at a time there: 64 MiB in float32."""


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
            sums_NH: For the left factor, in the gradient's dtype; None when it is not wanted.
            sums_VH: For the right factor, in that factor's dtype; None when it is not wanted.
            hidden_NH: The left factor.
            weight_VH: The right factor.
            tile: Terms of a tile, for dense products.
            dtype: What dense products are multiplied in.
        """
        entries = int(torch.count_nonzero(self.gradient_BV))
        cells = len(hidden_NH) * len(weight_VH)
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
        term_E, text_E = self.gradient_BV.t().nonzero().unbind(dim=1)
        gradient_E = self.gradient_BV[text_E, term_E]
        token_E = self._starts_B()[text_E] + self.argmax_BV[text_E, term_E].long()
        if sums_VH is not None:
            add_rows(sums_VH, term_E, gradient_E, hidden_NH, token_E)
        if sums_NH is not None:
            token_E, order_E = token_E.sort(stable=True)
            add_rows(sums_NH, token_E, gradient_E[order_E], weight_VH, term_E[order_E])

    def _tile_by_tile(
        self, hidden_NH: Tensor, weight_VH: Tensor, sums_NH: Tensor | None, sums_VH: Tensor | None, tile: int
    ) -> None:
        tokens, dtype = len(hidden_NH), hidden_NH.dtype
        buffer = torch.empty(tokens * tile, dtype=self.gradient_BV.dtype, device=hidden_NH.device)
        for part in tiles(len(weight_VH), tile):
            gradient_NT = buffer[: tokens * (part.stop - part.start)].view(tokens, -1)
            self._scatter(part, gradient_NT)
            product_NT = gradient_NT.to(dtype)
            if sums_NH is not None:
                add_product(sums_NH, product_NT, weight_VH[part].to(dtype))
            if sums_VH is not None:
                add_product(sums_VH[part], product_NT.t(), hidden_NH)

    def _scatter(self, part: slice, gradient_NT: Tensor) -> None:
        """Lay the gradient of one tile out as a dense matrix."""
        if splade_loops.usable(gradient_NT):
            entries = self.gradient_BV.numpy(), self.argmax_BV.numpy(), text_offsets(self.lengths_B)
            splade_loops.scatter_tile(*entries, part.start, gradient_NT.numpy())
            return
        held = (self.lengths_B > 0).to(gradient_NT.device)
        token_BT = (self._starts_B()[:, None] + self.argmax_BV[:, part].long())[held]
        gradient_NT.zero_().scatter_(0, token_BT, self.gradient_BV[:, part][held])

    def _starts_B(self) -> Tensor:
        return (self.lengths_B.cumsum(0) - self.lengths_B).to(self.gradient_BV.device)


def add_product(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left @ right`` in place, also to sums of another dtype."""
    if sums.dtype == left.dtype:
        sums.addmm_(left, right)
    else:
        sums += left @ right


def add_rows(sums_RH: Tensor, row_E: Tensor, gradient_E: Tensor, factor: Tensor, index_E: Tensor) -> None:
    """Add ``gradient[e] * factor[index[e]]`` to ``sums[row[e]]`` for every entry.

    Args:
        sums_RH: Added to.
        row_E: Rows of ``sums_RH``, ascending.
        gradient_E: One number an entry.
        factor: ``(rows, H)``.
        index_E: Rows of ``factor``.
    """
    step = max(1, GATHERED_NUMBERS // factor.shape[1])
    for start in range(0, len(row_E), step):
        part = slice(start, start + step)
        products_EH = gradient_E[part, None] * factor[index_E[part]]
        row_U, sum_UH = sum_rows(row_E[part], products_EH)
        sums_RH.index_add_(0, row_U, sum_UH.to(sums_RH.dtype))
