"""Which documents score highest, exactly? Term at a time over posting lists; the reference for every other engine."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from soju.search.postings import Postings

_BLOCK = 256

Array = NDArray[Any]


class ExactEngine:
    """Scores every chunk that shares a term with the query and keeps the best chunk of the best k documents.

    One float32 for each chunk is held for each thread. Equal scores rank by document order, so results never depend on
    the machine. Numba code without the interpreter lock; the first call of a process loads it from the cache.

    Args:
        postings: Posting lists of C chunks.
        documents_C: Document number of each chunk, rising, ``(C,)`` int32.
    """

    name = "exact"

    def __init__(self, postings: Postings, documents_C: NDArray[np.int32]) -> None:
        self._postings = postings
        self._documents_C = documents_C
        self._local = threading.local()

    def search(
        self, terms_T: NDArray[np.int32], weights_T: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return the best chunk of each of the k best documents, best first.

        Args:
            terms_T: Terms of the query, each once.
            weights_T: Their weights, idf included.
            k: Most documents to return, >= 1.

        Returns:
            Chunk numbers and scores (sum of query weight times impact), both at most k long; documents that share no
            term with the query are left out.
        """
        scores_C = self._scores()
        postings = self._postings
        _accumulate(postings.offsets, postings.numbers, postings.impacts, terms_T, weights_T, scores_C)
        size = min(k, len(scores_C))
        best_scores, best_chunks = np.empty(size, dtype=np.float32), np.empty(size, dtype=np.int32)
        found = _best_documents(scores_C, self._documents_C, best_scores, best_chunks)
        # Chunks rise with documents, so the chunk number breaks ties by document order.
        order = np.lexsort((best_chunks[:found], -best_scores[:found]))
        return best_chunks[:found][order], best_scores[:found][order]

    def _scores(self) -> NDArray[np.float32]:
        scores = getattr(self._local, "scores", None)
        if scores is None:
            padded = -(-self._postings.chunks // _BLOCK) * _BLOCK
            scores = self._local.scores = np.zeros(padded, dtype=np.float32)
        return scores


@njit(cache=True, nogil=True)
def _accumulate(offsets: Array, chunks: Array, impacts: Array, terms: Array, weights: Array, scores: Array) -> None:
    for t in range(len(terms)):
        weight = weights[t]
        for p in range(offsets[terms[t]], offsets[terms[t] + 1]):
            # Unsigned, so that numba needs no check for a negative index.
            scores[np.uintp(chunks[p])] += weight * impacts[p]


@njit(cache=True, nogil=True, fastmath=True)
def _highest(scores: Array, start: int) -> float:
    highest = np.float32(0)
    for i in range(_BLOCK):
        highest = max(highest, scores[start + i])
    return float(highest)


@njit(cache=True, nogil=True)
def _best_documents(scores: Array, documents: Array, best_scores: Array, best_chunks: Array) -> int:
    """Fill a heap whose root is the worst kept chunk, one chunk a document; zero `scores` for the next query."""
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
                size = _push(best_scores, best_chunks, size, score, chunk)
                threshold = best_scores[0] if size == k else np.float32(0)
                document, chunk, score = documents[c], c, scores[c]
        scores[start : start + _BLOCK] = 0
    return _push(best_scores, best_chunks, size, score, chunk)


@njit(cache=True, nogil=True)
def _push(scores: Array, chunks: Array, size: int, score: float, chunk: int) -> int:
    """Offer one chunk to the heap; return the heap's new size. Worse means a lower score, then a later chunk."""
    k = len(scores)
    if chunk < 0 or (size == k and score <= scores[0]):
        return size
    if size < k:
        at = size
        while at > 0:
            parent = (at - 1) // 2
            if scores[parent] < score or (scores[parent] == score and chunks[parent] > chunk):
                break
            scores[at], chunks[at] = scores[parent], chunks[parent]
            at = parent
        scores[at], chunks[at] = score, chunk
        return size + 1
    at = 0
    while 2 * at + 1 < k:
        child = 2 * at + 1
        right = child + 1
        if right < k and (
            scores[right] < scores[child] or (scores[right] == scores[child] and chunks[right] > chunks[child])
        ):
            child = right
        if score < scores[child] or (score == scores[child] and chunk > chunks[child]):
            break
        scores[at], chunks[at] = scores[child], chunks[child]
        at = child
    scores[at], chunks[at] = score, chunk
    return size
