"""The loops of the SPLADE head that torch has no fast operator for, on the CPU.

Shape letters: B = texts, N = tokens of all texts one after the other, H = hidden width, V = terms, T = terms of a tile.

Every loop works on a range ``first`` to ``last`` of the columns or rows that it writes. Ranges are disjoint and each
number in them is made by one thread in one order, so results do not depend on how many threads there are, nothing is
locked and nothing is added up afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Positions = NDArray[np.signedinteger]
Offsets = NDArray[np.int64]

SERIAL = 1 << 18
"""Loops over fewer numbers than this are not worth handing a share to a second thread, which takes about 50 µs."""
LINE = 16
"""Threads meet at multiples of this many columns: a cache line of float32."""
SHARES = 4
"""Shares of rows for each thread, because some hold more entries than others."""
TERMS_IN_CACHE = 1024
"""Rows of the output embedding that stay in the cache while the texts go through them."""


def usable(tensor: torch.Tensor) -> bool:
    """Return whether these loops can work where the tensor is; torch's own operators serve other devices."""
    return tensor.device.type == "cpu"


def reduce_tile(
    logits_NT: Floats, offsets: Offsets, maxima_BV: Floats, argmax_BV: Positions | None, start: int
) -> None:
    """Write the largest logit of every text and term of a tile, and which of the text's tokens has it.

    The first token wins a tie and NaN is the largest number, as with ``torch.max``. Texts without tokens are left
    alone.

    Args:
        logits_NT: Logits of one tile, ``(N, T)``.
        offsets: Where each text starts, ``(B + 1,)``.
        maxima_BV: Columns ``start`` to ``start + T`` are written.
        argmax_BV: Likewise, counted from the text's first token. None when no gradient will be asked for.
        start: First term of the tile.
    """
    columns = logits_NT.shape[1]
    if argmax_BV is None:
        _share_out(_max, columns, LINE, logits_NT.size, logits_NT, offsets, maxima_BV, start)
    else:
        _share_out(_max_and_argmax, columns, LINE, logits_NT.size, logits_NT, offsets, maxima_BV, argmax_BV, start)


def add_outer_products(
    gradient_BV: Floats,
    argmax_BV: Positions,
    offsets: Offsets,
    factor: Floats,
    sums: Floats,
    *,
    into_terms: bool,
) -> None:
    """Multiply the gradient of the logits, which has one entry a text and term, with one factor of the logits.

    For every ``g = gradient[b, v]`` other than 0, where n is the token that has the maximum:
    ``sums[v] += g * factor[n]`` into terms, ``sums[n] += g * factor[v]`` otherwise. Rows that no entry reaches are not
    touched.

    Args:
        gradient_BV: Gradient of the maxima; 0 for texts without tokens.
        argmax_BV: Tokens that have the maxima, counted from the text's first.
        offsets: Where each text starts, ``(B + 1,)``.
        factor: Hidden states ``(N, H)`` into terms, the output embedding ``(V, H)`` otherwise.
        sums: Added to: ``(V, H)`` into terms, ``(N, H)`` otherwise.
        into_terms: Which of the two factors' gradients to sum.
    """
    task = _add_into_terms if into_terms else _add_into_tokens
    texts, terms = gradient_BV.shape
    work = int(np.count_nonzero(gradient_BV)) * factor.shape[1]
    # By terms into terms, by texts into tokens: a term's row, and the rows of a text's tokens, have one thread each.
    _share_out(task, terms if into_terms else texts, 1, work, gradient_BV, argmax_BV, offsets, factor, sums)


def scatter_tile(
    gradient_BV: Floats, argmax_BV: Positions, offsets: Offsets, start: int, logits_gradient_NT: Floats
) -> None:
    """Lay the gradient of the logits of one tile out as a dense ``(N, T)`` matrix."""
    logits_gradient_NT.fill(0)
    _scatter(gradient_BV, argmax_BV, offsets, start, logits_gradient_NT)


def _share_out(task: Callable[..., None], count: int, multiple: int, work: int, *arguments: Any) -> None:
    """Run ``task(*arguments, first, last)`` over ranges of ``count`` things, on as many threads as torch uses."""
    threads = torch.get_num_threads()
    shares = min(threads * (SHARES if multiple == 1 else 1), count // multiple)
    if threads == 1 or shares < 2 or work < SERIAL:
        task(*arguments, 0, count)
        return
    edges = [count * share // shares // multiple * multiple for share in range(shares)] + [count]
    # Threads, not numba's parallel loops: those bring a thread pool of their own, which competes with torch's. The
    # loops are compiled without the interpreter's lock (`nogil`), or they would run one after the other.
    pool = _pool(threads, os.getpid())
    for done in [pool.submit(task, *arguments, first, last) for first, last in pairwise(edges)]:
        done.result()


@lru_cache(maxsize=1)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Return threads of this process: a fork inherits the object, not its threads."""
    return ThreadPoolExecutor(threads, thread_name_prefix="splade-head")


@njit(cache=True, nogil=True)
def _max_and_argmax(
    logits_NT: Floats, offsets: Offsets, maxima_BV: Floats, argmax_BV: Positions, start: int, first: int, last: int
) -> None:
    # Comparing rounds nothing, so the maximum is exact. Tokens outside, terms inside: the inner loop reads a row of
    # logits and writes two short rows that stay in the cache, all contiguous, so it compiles to vector instructions.
    for b in range(len(offsets) - 1):
        if offsets[b + 1] == offsets[b]:
            continue
        best_T = maxima_BV[b, start + first : start + last]
        token_T = argmax_BV[b, start + first : start + last]
        # Starts from the first token whatever its logits are; starting from -inf would be one more pass over the row.
        best_T[:] = logits_NT[offsets[b], first:last]
        token_T[:] = 0
        # Tokens ascend and `>` is strict: the first of equal tokens keeps the maximum, as torch.max does. With `>=`, or
        # tokens in another order, values would stay and gradients would reach other tokens.
        for n in range(offsets[b] + 1, offsets[b + 1]):
            token = token_T.dtype.type(n - offsets[b])
            row_T = logits_NT[n, first:last]
            for t in range(last - first):
                # `x != x` holds for NaN alone, which is passed on; it may not come under fastmath, where it would be
                # compiled away. `|` and the conditional assignments have no branch, which vector instructions need.
                better = (row_T[t] > best_T[t]) | (row_T[t] != row_T[t])
                best_T[t] = row_T[t] if better else best_T[t]
                token_T[t] = token if better else token_T[t]


@njit(cache=True, nogil=True)
def _max(logits_NT: Floats, offsets: Offsets, maxima_BV: Floats, start: int, first: int, last: int) -> None:
    # `_max_and_argmax` without tokens. The same comparison, or a model would encode otherwise than it was trained.
    for b in range(len(offsets) - 1):
        if offsets[b + 1] == offsets[b]:
            continue
        best_T = maxima_BV[b, start + first : start + last]
        best_T[:] = logits_NT[offsets[b], first:last]
        for n in range(offsets[b] + 1, offsets[b + 1]):
            row_T = logits_NT[n, first:last]
            for t in range(last - first):
                better = (row_T[t] > best_T[t]) | (row_T[t] != row_T[t])
                best_T[t] = row_T[t] if better else best_T[t]


# Below, "contract" lets a product and a sum be rounded once, as one instruction: nearer to the exact sum than rounding
# twice. It does not let the compiler change the order of sums, as full fastmath would.


@njit(cache=True, nogil=True, fastmath={"contract"})
def _add_into_terms(
    gradient_BV: Floats,
    argmax_BV: Positions,
    offsets: Offsets,
    hidden_NH: Floats,
    sums_VH: Floats,
    first: int,
    last: int,
) -> None:
    # Terms outside: the row of a term, the larger matrix by far, is fetched once and all its texts are added to it in
    # ascending order, which is the order of every sum. The inner loop is over the width: no number is added to twice in
    # it, so it is compiled to vector instructions without touching that order.
    for v in range(first, last):
        for b in range(gradient_BV.shape[0]):
            gradient = gradient_BV[b, v]
            # Skips most of the work, and the argmax of texts without tokens, which is arbitrary memory.
            if gradient != 0:
                hidden_H = hidden_NH[offsets[b] + argmax_BV[b, v]]
                sum_H = sums_VH[v]
                for h in range(len(sum_H)):
                    sum_H[h] += gradient * hidden_H[h]


@njit(cache=True, nogil=True, fastmath={"contract"})
def _add_into_tokens(
    gradient_BV: Floats,
    argmax_BV: Positions,
    offsets: Offsets,
    weight_VH: Floats,
    sums_NH: Floats,
    first: int,
    last: int,
) -> None:
    # Blocks of terms outside: their rows of the output embedding are in the cache for all texts of this thread. Blocks
    # ascend and so do the terms within one, so a token's sum runs over ascending terms however long a block is.
    for start in range(0, gradient_BV.shape[1], TERMS_IN_CACHE):
        stop = min(start + TERMS_IN_CACHE, gradient_BV.shape[1])
        for b in range(first, last):
            for v in range(start, stop):
                gradient = gradient_BV[b, v]
                if gradient != 0:
                    weight_H = weight_VH[v]
                    sum_H = sums_NH[offsets[b] + argmax_BV[b, v]]
                    for h in range(len(sum_H)):
                        sum_H[h] += gradient * weight_H[h]


@njit(cache=True, nogil=True)
def _scatter(
    gradient_BV: Floats, argmax_BV: Positions, offsets: Offsets, start: int, logits_gradient_NT: Floats
) -> None:
    for b in range(gradient_BV.shape[0]):
        # A text without tokens has arbitrary memory for its argmax, and would overwrite an entry of its neighbour.
        if offsets[b + 1] > offsets[b]:
            for t in range(logits_gradient_NT.shape[1]):
                # Assigned, not added: the tokens of two texts are different rows, and a text has one entry a term.
                logits_gradient_NT[offsets[b] + argmax_BV[b, start + t], t] = gradient_BV[b, start + t]
