"""Largest logits of each text, vocabulary tile by vocabulary tile, in buffers that are used again.

Shape letters: B = texts, S = tokens of the longest text, N = tokens of all texts one after the other, H = hidden width,
V = terms, T = terms of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soju.sparse import splade_loops

TILE_NUMBERS = 3 << 20
"""Logits of a tile: 12 MiB in float32, which the last-level cache of a few cores holds beside the tile's weights."""
TILE_NUMBERS_ELSEWHERE = 1 << 26
"""The same on other devices, where starting a kernel costs more than a cache saves: 128 MiB in half precision."""
NARROWEST_TILE = 1024
"""A matrix product over fewer terms than this wastes its start-up."""


class TileReducer:
    """Finds the maxima of one tile after the other."""

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
        """The smallest integers that count the tokens of the longest text."""
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
        """Lay texts of different lengths side by side, padded with -inf."""
        assert self._rows_BS is not None
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
