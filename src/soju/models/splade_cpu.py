"""The two loops of the SPLADE head that torch has no fast operator for, on the CPU.

Shape letters: B = texts, N = tokens of all texts one after the other, H = hidden width, V = terms, T = terms of a tile.
Both loops are split over columns, never over texts: each number is summed by one thread in one order, so that results
do not depend on how many threads there are.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Positions = NDArray[np.signedinteger]

SERIAL = 1 << 18
"""Loops over fewer numbers than this are not worth the hand-over to a second thread (about 50 µs)."""


def reduce_tile(logits_NT: Floats, offsets: Positions, maxima_BT: Floats, argmax_BT: Positions | None) -> None:
    """Write the largest logit of every text and term, and which of the text's tokens has it.

    The first token wins a tie and NaN is the largest number, as with ``torch.max``. Texts without tokens are left
    alone.

    Args:
        logits_NT: Logits of one tile, ``(N, T)``, rows contiguous.
        offsets: Where each text starts, ``(B + 1,)`` int64.
        maxima_BT: Written, ``(B, T)``, rows contiguous.
        argmax_BT: Written, ``(B, T)``, counted from the text's first token. None when no gradient will be asked for.
    """
    terms = logits_NT.shape[1]
    if argmax_BT is None:
        _over_columns(lambda first, last: _max(logits_NT, offsets, maxima_BT, first, last), terms, logits_NT.size)
        return
    _over_columns(
        lambda first, last: _max_and_argmax(logits_NT, offsets, maxima_BT, argmax_BT, first, last),
        terms,
        logits_NT.size,
    )


def add_outer_products(
    gradient_BV: Floats,
    argmax_BV: Positions,
    offsets: Positions,
    hidden_NH: Floats,
    weight_VH: Floats,
    hidden_gradient_NH: Floats | None,
    weight_gradient_VH: Floats | None,
) -> None:
    """Add the products of the sparse gradient of the logits, one entry a text and term, with both factors.

    ``hidden_gradient[n] += g * weight[v]`` and ``weight_gradient[v] += g * hidden[n]`` for every ``g = gradient[b, v]``
    other than 0, with ``n`` the token that `reduce_tile` found. Rows of terms without a gradient are never touched.

    Args:
        gradient_BV: Gradient of the maxima, ``(B, V)``.
        argmax_BV: Tokens that have the maxima, ``(B, V)``.
        offsets: Where each text starts, ``(B + 1,)``.
        hidden_NH: The left factor, ``(N, H)``.
        weight_VH: The right factor, ``(V, H)``.
        hidden_gradient_NH: Added to, unless None.
        weight_gradient_VH: Added to, unless None.
    """
    width = hidden_NH.shape[1]
    work = np.count_nonzero(gradient_BV) * width
    if weight_gradient_VH is not None:
        _over_columns(
            lambda first, last: _add_to_weight(
                gradient_BV, argmax_BV, offsets, hidden_NH, weight_gradient_VH, first, last
            ),
            width,
            work,
        )
    if hidden_gradient_NH is not None:
        _over_columns(
            lambda first, last: _add_to_hidden(
                gradient_BV, argmax_BV, offsets, weight_VH, hidden_gradient_NH, first, last
            ),
            width,
            work,
        )


def scatter_tile(gradient_BT: Floats, argmax_BT: Positions, offsets: Positions, logits_gradient_NT: Floats) -> None:
    """Lay the sparse gradient of one tile out as a dense ``(N, T)`` matrix."""
    logits_gradient_NT.fill(0)
    _scatter(gradient_BT, argmax_BT, offsets, logits_gradient_NT)


def _over_columns(task: Callable[[int, int], None], columns: int, work: int) -> None:
    """Run ``task(first, last)`` over ranges of columns, on as many threads as torch uses."""
    threads = min(torch.get_num_threads(), max(1, columns // 16))
    if threads == 1 or work < SERIAL:
        task(0, columns)
        return
    # Ranges start at multiples of 16 columns: a cache line of float32.
    edges = [columns * i // threads // 16 * 16 for i in range(threads)] + [columns]
    pool = _pool(threads - 1)
    others: list[Future[None]] = [pool.submit(task, edges[i], edges[i + 1]) for i in range(1, threads)]
    task(edges[0], edges[1])
    for other in others:
        other.result()


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="splade-head")


@njit(cache=True, nogil=True)
def _max_and_argmax(
    logits_NT: Floats, offsets: Positions, maxima_BT: Floats, argmax_BT: Positions, first: int, last: int
) -> None:
    for b in range(len(offsets) - 1):
        start = offsets[b]
        if offsets[b + 1] == start:
            continue
        best_T = maxima_BT[b, first:last]
        token_T = argmax_BT[b, first:last]
        best_T[:] = logits_NT[start, first:last]
        token_T[:] = 0
        for n in range(start + 1, offsets[b + 1]):
            token = token_T.dtype.type(n - start)
            row_T = logits_NT[n, first:last]
            for t in range(last - first):
                better = (row_T[t] > best_T[t]) | (row_T[t] != row_T[t])
                best_T[t] = row_T[t] if better else best_T[t]
                token_T[t] = token if better else token_T[t]


@njit(cache=True, nogil=True)
def _max(logits_NT: Floats, offsets: Positions, maxima_BT: Floats, first: int, last: int) -> None:
    for b in range(len(offsets) - 1):
        start = offsets[b]
        if offsets[b + 1] == start:
            continue
        best_T = maxima_BT[b, first:last]
        best_T[:] = logits_NT[start, first:last]
        for n in range(start + 1, offsets[b + 1]):
            row_T = logits_NT[n, first:last]
            for t in range(last - first):
                better = (row_T[t] > best_T[t]) | (row_T[t] != row_T[t])
                best_T[t] = row_T[t] if better else best_T[t]


@njit(cache=True, nogil=True, fastmath={"contract"})
def _add_to_weight(
    gradient_BV: Floats,
    argmax_BV: Positions,
    offsets: Positions,
    hidden_NH: Floats,
    weight_gradient_VH: Floats,
    first: int,
    last: int,
) -> None:
    for v in range(gradient_BV.shape[1]):
        for b in range(gradient_BV.shape[0]):
            gradient = gradient_BV[b, v]
            if gradient != 0 and offsets[b + 1] > offsets[b]:
                hidden_H = hidden_NH[offsets[b] + argmax_BV[b, v], first:last]
                sum_H = weight_gradient_VH[v, first:last]
                for h in range(last - first):
                    sum_H[h] += gradient * hidden_H[h]


@njit(cache=True, nogil=True, fastmath={"contract"})
def _add_to_hidden(
    gradient_BV: Floats,
    argmax_BV: Positions,
    offsets: Positions,
    weight_VH: Floats,
    hidden_gradient_NH: Floats,
    first: int,
    last: int,
) -> None:
    for v in range(gradient_BV.shape[1]):
        for b in range(gradient_BV.shape[0]):
            gradient = gradient_BV[b, v]
            if gradient != 0 and offsets[b + 1] > offsets[b]:
                weight_H = weight_VH[v, first:last]
                sum_H = hidden_gradient_NH[offsets[b] + argmax_BV[b, v], first:last]
                for h in range(last - first):
                    sum_H[h] += gradient * weight_H[h]


@njit(cache=True, nogil=True)
def _scatter(gradient_BT: Floats, argmax_BT: Positions, offsets: Positions, logits_gradient_NT: Floats) -> None:
    for b in range(gradient_BT.shape[0]):
        if offsets[b + 1] > offsets[b]:
            for t in range(gradient_BT.shape[1]):
                logits_gradient_NT[offsets[b] + argmax_BT[b, t], t] = gradient_BT[b, t]
