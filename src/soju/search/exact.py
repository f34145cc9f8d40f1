"""The documents that score highest, exactly: term at a time over posting lists. The reference for every other engine.

A result is worse than another when its score is lower or, of equal ones, when its chunk comes later; so results never
depend on the machine. The best so far are a heap in two arrays whose root is the worst kept one. Loops in
`soju.search.block_max` hold compiled copies of the heap's: after a change here, clear this folder's ``__pycache__``.

Shape letters: C = chunks, T = terms of a query.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from soju.search.postings import Postings

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


_BLOCK = 256


class ExactEngine:
    """Scores every chunk that shares a term with the query and keeps the best chunk of the best k documents.

    One float32 for each chunk is held for each thread. Equal scores rank by document order, so results never depend on
    the machine. Numba code without the interpreter lock; the first call of a process loads it from the cache.

    Args:
        postings: Posting lists of C chunks.
        documents_C: Document number of each chunk, rising, ``(C,)`` int32.
    """

    def __init__(self, postings: Postings, documents_C: NDArray[np.int32]) -> None:
        self._postings = postings
        self._documents_C = documents_C
        self._local = threading.local()

    def search(
        self, terms_T: NDArray[np.int32], weights_T: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return the best chunk of each of the k best documents, best first."""
        scores_C = self._scores()
        postings = self._postings
        _accumulate(postings.offsets, postings.numbers, postings.impacts, terms_T, weights_T, scores_C)
        size = min(k, len(scores_C))
        best_scores, best_chunks = np.empty(size, dtype=np.float32), np.empty(size, dtype=np.int32)
        found = _best_documents(scores_C, self._documents_C, best_scores, best_chunks)
        return best_chunks[:found], best_scores[:found]

    def _scores(self) -> NDArray[np.float32]:
        scores = getattr(self._local, "scores", None)
        if scores is None:
            padded = -(-self._postings.chunks // _BLOCK) * _BLOCK
            scores = self._local.scores = np.zeros(padded, dtype=np.float32)
        return scores


@njit(cache=True, nogil=True)
def _accumulate(offsets: Array, chunks: Array, impacts: Array, terms: Array, weights: Array, scores: Array) -> None:
    """Add each term's share to the scores of its chunks."""
    # Terms in the query's order, in float32: this is what a score is, to the last bit. `SparseIndex` and block-max add
    # up in the same order and precision; another order here, or float64, would part equal scores and move ties.
    for t in range(len(terms)):
        weight = weights[t]
        for p in range(offsets[terms[t]], offsets[terms[t] + 1]):
            # Unsigned, so that numba needs no check for a negative index.
            scores[np.uintp(chunks[p])] += weight * impacts[p]


@njit(cache=True, nogil=True, fastmath=True)
def _highest(scores: Array, start: int) -> float:
    # fastmath lets the maximum be taken of several numbers at once; scores are finite, so the result is the same.
    highest = np.float32(0)
    for i in range(_BLOCK):
        highest = max(highest, scores[start + i])
    return float(highest)


@njit(cache=True, nogil=True)
def _best_documents(scores: Array, documents: Array, best_scores: Array, best_chunks: Array) -> int:
    """Write the best chunk of each of the k best documents, best first; zero `scores` for the next query."""
    # Documents rise with chunks, so a document's chunks lie together and its best one is known when the next begins.
    # Whole pieces without a score above the worst kept one are passed over; that is most of them, most of the time.
    # `scores` is padded to whole pieces with zeros, which are never above it.
    size, k = 0, len(best_scores)
    threshold = np.float32(0)
    document, chunk, score = -1, -1, np.float32(0)
    for start in range(0, len(scores), _BLOCK):
        if _highest(scores, start) > threshold:
            for c in range(start, start + _BLOCK):
                if scores[c] <= threshold:  # ties with the worst kept lose: they come later
                    continue
                if documents[c] == document:
                    if scores[c] > score:
                        score, chunk = scores[c], c
                    continue
                if chunk >= 0:
                    size = push(best_scores, best_chunks, size, score, chunk)
                threshold = best_scores[0] if size == k else np.float32(0)
                document, chunk, score = documents[c], c, scores[c]
        scores[start : start + _BLOCK] = 0  # while it is in the cache
    if chunk >= 0:
        size = push(best_scores, best_chunks, size, score, chunk)
    # Chunks rise with documents, so the chunk number breaks ties by document order.
    best_first(best_scores, best_chunks, size)
    return size
