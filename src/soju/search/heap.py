"""Which k results are best so far? A heap in two arrays whose root is the worst kept one, for compiled loops.

Worse means a lower score, then a later chunk. Loops elsewhere hold compiled copies of these: after a change here, clear
the ``__pycache__`` of this folder.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Array = NDArray[Any]


@njit(cache=True, nogil=True, inline="always")
def worse(score: float, chunk: int, other_score: float, other_chunk: int) -> bool:
    """Return whether a result is worse than another one."""
    return bool(score < other_score or (score == other_score and np.uintp(chunk) > np.uintp(other_chunk)))


@njit(cache=True, nogil=True)
def push(scores: Array, chunks: Array, size: int, score: float, chunk: int) -> int:
    """Offer a chunk to a heap of ``size`` results in arrays of length k; return the heap's new size."""
    if size < len(scores):
        at = size
        while at > 0:
            parent = (at - 1) // 2
            if worse(scores[parent], chunks[parent], score, chunk):
                break
            scores[at], chunks[at] = scores[parent], chunks[parent]
            at = parent
        scores[at], chunks[at] = score, chunk
        return size + 1
    if worse(scores[0], chunks[0], score, chunk):
        sink(scores, chunks, size, 0, score, chunk)
    return size


@njit(cache=True, nogil=True)
def sink(scores: Array, chunks: Array, size: int, at: int, score: float, chunk: int) -> None:
    """Put a result, which must not be worse than the one it replaces, at a place of the heap."""
    while 2 * at + 1 < size:
        child = 2 * at + 1
        if child + 1 < size and worse(scores[child + 1], chunks[child + 1], scores[child], chunks[child]):
            child += 1
        if not worse(scores[child], chunks[child], score, chunk):
            break
        scores[at], chunks[at] = scores[child], chunks[child]
        at = child
    scores[at], chunks[at] = score, chunk


@njit(cache=True, nogil=True)
def best_first(scores: Array, chunks: Array, size: int) -> None:
    """Sort the heap in place; it is a heap no longer."""
    for last in range(size - 1, 0, -1):
        score, chunk = scores[last], chunks[last]
        scores[last], chunks[last] = scores[0], chunks[0]
        sink(scores, chunks, last, 0, score, chunk)
