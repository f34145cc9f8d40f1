"""Block-max pruning: the documents that score highest, exactly, without adding up every posting.

Blocks of eight hold similar chunks. The largest impact of each term in each block bounds the score of the block's
chunks; blocks are scored by falling bound until no bound reaches the worst kept score.

Why the result is the exact engine's, to the last document:

1. A stored impact is off by less than one of its term's 65,535 steps, so a score is off by less than one step of every
   query term, and two scores come closer, or further apart, by less than twice that: ``rounding``.
2. A bound is rounded up, and ``slack`` covers additions in another order; no chunk scores above its block's bound.
3. A chunk whose rounded score lies below ``floor``, the k-th score less all such errors, is not among the best k.
   Blocks whose bound lies below it are skipped; every other chunk is scored, and kept as *near* while it reaches it.
4. So the best k are among the near chunks. Where more are near than found, they are scored again from the posting
   lists, in the exact engine's order and precision. Where they are too many, the exact engine takes over.

Shape letters: V = terms, C = chunks, N = blocks, T = terms of a query.
"""

from __future__ import annotations

import threading
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from soju.core.errors import IntegrityError
from soju.search import exact as heap
from soju.search.block_layout import BlockShape, Layout, arrange
from soju.search.exact import ExactEngine
from soju.search.postings import Postings

Array = NDArray[Any]

# numba compiles these into the loops and notices changes of a loop's own file alone: in another file, a changed number
# would leave old machine code in the cache. The layout gets them as arguments.
BLOCK = 8
"""Chunks of a block: fewer make tighter bounds, and more of them."""
GROUP = 64
"""Blocks whose largest bound is remembered; rows are padded to whole groups."""
IMPACT_STEPS, BOUND_STEPS = 65_535, 255
"""An impact is a share of its term's largest in so many steps; a bound has 1 for 257 of them."""
BY_BOUND = 64
"""Blocks that are looked for by falling bound. After them the k-th score hardly rises, and going through all bounds
once takes less time than looking for more."""
MOST_LEFT = 1 / 8
"""Where more than this share of the blocks is left then, adding up posting lists takes less time."""
SUM_ERROR = 1.2e-7
"""Of a sum of n float32 >= 0, n times this is more than what adding in another order changes."""
TINY = 1e-30
"""Below every score above 0: the smallest are `SMALLEST_SHARE` of an impact's step."""
SMALLEST_SHARE = 1e-20
"""A term worth less than this share of the worthiest one would vanish in float32."""
CACHED = 2048
"""Bounds that stay in the first cache while rows are added to them."""
LINE = 16
"""Postings of a cache line, where they are pairs of 16 bits."""
FOLDER = "block-max"
_ROOM = 256
"""Chunks that may come close to the k-th, in addition to 4 k."""


class Blocks(NamedTuple):
    """Chunks by block, as in `Layout`."""

    chunks: Array
    offsets: Array
    postings: Array
    documents: Array
    """Document of each chunk, ``(C,)``."""
    one_chunk_each: bool
    """Whether every document has one chunk."""


class Maxima(NamedTuple):
    """What each block holds at most, as in `Layout`."""

    row_of: Array
    rows: Array
    list_offsets: Array
    list_blocks: Array
    list_maxima: Array


class Scratch(NamedTuple):
    """Room to work in, one for each thread."""

    query: Array
    """What a step of each term's impact is worth, ``(V,)`` float32: zeros, before a search and after it."""
    bounds: Array
    """Largest score that each block's chunks can have, ``(N,)`` float32, padded to whole groups."""
    groups: Array
    """Largest bound of each group, to find the largest of all without looking at each: its bits, int32."""


class Results(NamedTuple):
    """What is kept while blocks are scored."""

    scores: Array
    """Scores of the best documents so far, a heap of at most k."""
    chunks: Array
    """Their best chunks."""
    near_scores: Array
    """Scores of all chunks that might be among the best if impacts were not rounded."""
    near_chunks: Array
    """Those chunks."""


class BlockMaxEngine:
    """Finds the documents that the exact engine finds, and scores few chunks for it.

    Impacts are rounded to 16 bits, so every chunk whose score comes within the rounding of the k-th is remembered.
    Where there are more of these than k, they are scored again from the posting lists; where there are very many (equal
    scores, or an impact that dwarfs all others of its term), the exact engine takes over.

    Arrays are memory-mapped. Each thread holds a float32 for each term and for each block.

    Args:
        layout: As `build` writes it.
        postings: Posting lists of the segment.
        documents_C: Document number of each chunk, rising, ``(C,)`` int32.

    References:
        Mallia, Suel & Tonellotto 2024, Faster Learned Sparse Retrieval with Block-Max Pruning, arXiv:2405.01117. Here
        with blocks by k-means, rows and lists for frequent and rare terms, and the next block found by a tournament.
    """

    auto_up_to = 100
    """For more documents, adding up whole posting lists is as fast."""

    def __init__(self, layout: Layout, postings: Postings, documents_C: NDArray[np.int32]) -> None:
        self._largest_V = layout.largest
        self._maxima = Maxima(*(getattr(layout, name) for name in Maxima._fields))
        one_chunk_each = len(documents_C) == 0 or int(documents_C[-1]) + 1 == len(documents_C)
        self._blocks = Blocks(layout.chunks, layout.offsets, layout.postings, documents_C, one_chunk_each)
        self._postings = postings
        self._exact = ExactEngine(postings, documents_C)
        self._documents_C = documents_C
        self._local = threading.local()

    @classmethod
    def build(cls, folder: Path, postings: Postings, documents_C: NDArray[np.int32]) -> BlockMaxEngine:
        """Build the engine's files of a segment from its posting lists and return the engine.

        Memory: the files, about 9 bytes a posting (13 above 65,536 terms), and 256 bytes a term.
        """
        (folder / FOLDER).mkdir(exist_ok=True)
        layout = arrange(postings, BlockShape(BLOCK, GROUP, IMPACT_STEPS, BOUND_STEPS))
        for field in fields(layout):
            np.save(folder / FOLDER / f"{field.name}.npy", getattr(layout, field.name))
        del layout
        return cls.open(folder, postings, documents_C)

    @classmethod
    def open(cls, folder: Path, postings: Postings, documents_C: NDArray[np.int32]) -> BlockMaxEngine:
        """Map the engine's files of a segment."""
        path = folder / FOLDER
        try:
            held = {field.name: np.load(path / f"{field.name}.npy", mmap_mode="r") for field in fields(Layout)}
        except (OSError, ValueError, EOFError) as error:
            raise IntegrityError(f"{path}: cannot be read ({error}); build the index again") from None
        layout = Layout(**{name: np.asarray(array) for name, array in held.items()})
        found = len(layout.chunks), len(layout.largest)
        wanted = len(documents_C), len(postings.offsets) - 1
        if found != wanted:
            raise IntegrityError(
                f"{path}: holds {found[0]} chunks and {found[1]} terms, not {wanted[0]} and {wanted[1]}; build the "
                "index again"
            )
        return cls(layout, postings, documents_C)

    def search(
        self, terms_T: NDArray[np.int32], weights_T: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return the best chunk of each of the k best documents, best first."""
        size = min(k, len(self._documents_C))
        room = _ROOM + 4 * size
        results = Results(
            scores=np.empty(size, dtype=np.float32),
            chunks=np.empty(size, dtype=np.int32),
            near_scores=np.empty(room, dtype=np.float32),
            near_chunks=np.empty(room, dtype=np.int32),
        )
        if len(terms_T) == 0 or size == 0:
            return results.chunks[:0], results.scores[:0]
        found, near = best_documents(  # plain tuples reach compiled code 5 µs sooner than named ones
            terms_T, weights_T, self._largest_V, tuple(self._maxima), tuple(self._blocks), tuple(self._scratch()),
            tuple(results),
        )  # fmt: skip
        if near < 0:
            return self._exact.search(terms_T, weights_T, k)
        if near > found:
            return self._score_exactly(results.near_chunks[:near], terms_T, weights_T, k)
        return results.chunks[:found], results.scores[:found]

    def _score_exactly(
        self, chunks: NDArray[np.int32], terms_T: NDArray[np.int32], weights_T: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return the best of some chunks as the exact engine scores and orders them."""
        impacts = self._postings.weights(chunks, terms_T)
        scores = np.cumsum(weights_T * impacts, axis=1, dtype=np.float32)[:, -1]  # added in the exact engine's order
        order = np.lexsort((chunks, -scores))
        _, first = np.unique(self._documents_C[chunks[order]], return_index=True)
        best = order[np.sort(first)[:k]]
        return chunks[best], scores[best]

    def _scratch(self) -> Scratch:
        """Return this thread's room to work in."""
        scratch: Scratch | None = getattr(self._local, "scratch", None)
        if scratch is None:
            blocks = self._maxima.rows.shape[1]
            scratch = self._local.scratch = Scratch(
                query=np.zeros(len(self._largest_V), dtype=np.float32),
                bounds=np.zeros(blocks, dtype=np.float32),
                groups=np.zeros(blocks // GROUP, dtype=np.int32),
            )
        return scratch


@njit(cache=True, nogil=True)
def best_documents(
    query_terms: Array,
    query_weights: Array,
    largest: Array,
    maxima: Maxima,
    blocks: Blocks,
    scratch: Scratch,
    results: Results,
) -> tuple[int, int]:
    """Write the best chunk of each of the k best documents, and all chunks within rounding of the k-th or above it.

    It returns how many documents are best and how many chunks are near; the latter is -1 where they have no room, too
    many blocks would have to be scored, or float32 cannot hold weights so different: then the results mean nothing.
    """
    maxima, blocks, results = Maxima(*maxima), Blocks(*blocks), Results(*results)
    query, bounds, groups = scratch
    scale, rounding = _set_query(query_terms, query_weights, largest, query)
    if scale <= 0:  # nothing was written to `query`, which stays zeros for the next search
        return 0, -1
    sum_error = SUM_ERROR * (len(query_terms) + 8)
    _add_bounds(query_terms, query, 1 + sum_error, maxima, bounds)
    bits = bounds.view(np.int32)  # floats >= 0 order as their bits do, and compilers compare integers faster
    for group in range(len(groups)):
        groups[group] = _largest(bits[group * GROUP : (group + 1) * GROUP])
    size, near, floor = 0, 0, 0.0
    left = BY_BOUND
    block, bound = _take_highest(bounds, bits, groups)
    while left > 0 and bound > 0 and bound >= floor:
        # The next block is known before this one is scored, so that memory brings it meanwhile. Scoring can only raise
        # the floor, so the order of visits stays right; whether the next is still worth it is asked above.
        next_block, next_bound = _take_highest(bounds, bits, groups)
        _touch(blocks, next_block, groups)
        size, near, floor = _score_block(block, query, blocks, results, size, near, rounding, sum_error)
        block, bound, left = next_block, next_bound, left - 1
    bounds[block] = bound  # taken, not scored: it is one of the rest
    if left == 0 and near >= 0:
        size, near, floor = _score_rest(query, bounds, blocks, results, size, near, floor, rounding, sum_error)
    for t in range(len(query_terms)):  # not the whole array: V is far larger than T
        query[query_terms[t]] = 0
    if near >= 0:  # the floor rose since most were written down
        near = _keep_near(results, near, floor)
    heap.best_first(results.scores, results.chunks, size)
    for i in range(size):
        results.scores[i] *= scale
    return size, near


@njit(cache=True, nogil=True)
def _set_query(terms: Array, weights: Array, largest: Array, query: Array) -> tuple[float, float]:
    """Write what a step of each term's impact is worth, the worthiest term scaled to 1.

    It returns the scale, 0 where float32 cannot hold numbers so different, and by how much rounding can bring two
    scores closer or further apart.
    """
    scale, smallest = 0.0, np.inf
    for t in range(len(terms)):
        worth = np.float64(weights[t]) * np.float64(largest[terms[t]])
        if worth > 0:
            scale, smallest = max(scale, worth), min(smallest, worth)
    if scale == 0 or not np.isfinite(scale) or smallest < SMALLEST_SHARE * scale:
        return 0.0, 0.0
    rounding = 0.0
    for t in range(len(terms)):
        step = np.float64(weights[t]) * np.float64(largest[terms[t]]) / scale / IMPACT_STEPS
        query[terms[t]] = step  # so that a score is a sum of step times stored impact: no division in the loops
        rounding += 2 * step
    return scale, rounding


@njit(cache=True, nogil=True)
def _add_bounds(terms: Array, query: Array, slack: float, maxima: Maxima, bounds: Array) -> None:
    """Write the bound of each block's scores."""
    # Rare terms touch few blocks and are added one by one. Frequent ones have a row for all blocks; their rows are
    # added in pieces that stay in the first cache, all rows to one piece before the next. The order of additions
    # differs from that of scores, which `slack` covers.
    bounds[:] = 0
    frequent, frequent_steps = np.empty(len(terms), dtype=np.int64), np.empty(len(terms), dtype=np.float32)
    count = 0
    for t in range(len(terms)):
        term = terms[t]
        step = np.float32(query[term] * (IMPACT_STEPS / BOUND_STEPS) * slack)
        if maxima.row_of[term] >= 0:
            frequent[count], frequent_steps[count] = maxima.row_of[term], step
            count += 1
        else:
            start, stop = maxima.list_offsets[term], maxima.list_offsets[term + 1]
            _add_list(maxima.list_blocks[start:stop], maxima.list_maxima[start:stop], step, bounds)
    for start in range(0, len(bounds), CACHED):
        for f in range(count):
            _add_row(
                maxima.rows[frequent[f], start : start + CACHED], frequent_steps[f], bounds[start : start + CACHED]
            )


@njit(cache=True, nogil=True)
def _add_list(blocks: Array, maxima: Array, step: float, bounds: Array) -> None:
    for at in range(len(blocks)):
        bounds[np.uintp(blocks[at])] += step * np.float32(maxima[at])


@njit(cache=True, nogil=True, fastmath=True)
def _add_row(row: Array, step: float, bounds: Array) -> None:
    # fastmath is safe: each bound has additions of its own, which nothing reorders, and no number is infinite or NaN.
    for block in range(len(bounds)):
        bounds[block] += step * np.float32(row[block])


@njit(cache=True, nogil=True)
def _take_highest(bounds: Array, bits: Array, groups: Array) -> tuple[int, float]:
    """Return the block with the highest bound, and that bound, and set it to 0."""
    # Two levels: the highest of N / 64 groups, then its 64 blocks. Only that group's highest changes.
    highest = _largest(groups)
    group = _find(groups, 0, highest)
    block = _find(bits, group * GROUP, highest)
    bound = bounds[block]
    bounds[block] = 0
    groups[group] = _largest(bits[group * GROUP : (group + 1) * GROUP])
    return block, bound


@njit(cache=True, nogil=True)
def _largest(numbers: Array) -> int:
    largest = np.int32(0)
    for i in range(len(numbers)):
        largest = max(largest, numbers[i])
    return int(largest)


@njit(cache=True, nogil=True)
def _find(numbers: Array, start: int, wanted: int) -> int:
    """Return where ``wanted``, which is there, stands first from ``start`` on."""
    while numbers[start] != wanted:  # needs no end: the caller took `wanted` from these numbers
        start += 1
    return start


@njit(cache=True, nogil=True)
def _touch(blocks: Blocks, block: int, groups: Array) -> None:
    """Read a number of each cache line of a block, so that memory brings it while another block is scored."""
    last = min(len(blocks.chunks), (block + 1) * BLOCK)
    total = 0
    for p in range(blocks.offsets[min(last, block * BLOCK)], blocks.offsets[last], LINE):
        total += blocks.postings[p, 0]
    if total < 0:  # never, which the compiler does not know
        groups[0] = total


@njit(cache=True, nogil=True)
def _score(query: Array, postings: Array, start: int, stop: int) -> float:
    """Return the score of some postings, as four sums, because each addition waits for the one before."""
    # Terms that are not in the query have worth 0 in `query`: a look-up instead of a branch that is hard to predict.
    # Unsigned indices, so that numba needs no check for negative ones.
    a, b, c, d = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    p = np.uintp(start)
    for _ in range((stop - start) // 4):
        a += query[np.uintp(postings[p, 0])] * np.float32(postings[p, 1])
        b += query[np.uintp(postings[p + np.uintp(1), 0])] * np.float32(postings[p + np.uintp(1), 1])
        c += query[np.uintp(postings[p + np.uintp(2), 0])] * np.float32(postings[p + np.uintp(2), 1])
        d += query[np.uintp(postings[p + np.uintp(3), 0])] * np.float32(postings[p + np.uintp(3), 1])
        p += np.uintp(4)
    while p < np.uintp(stop):
        a += query[np.uintp(postings[p, 0])] * np.float32(postings[p, 1])
        p += np.uintp(1)
    return float((a + b) + (c + d))


@njit(cache=True, nogil=True)
def _score_rest(
    query: Array,
    bounds: Array,
    blocks: Blocks,
    results: Results,
    size: int,
    near: int,
    floor: float,
    rounding: float,
    sum_error: float,
) -> tuple[int, int, float]:
    """Offer the blocks that could still hold a result, in the order they lie; returns what `_score_block` does."""
    # Blocks that were scored have bound 0 and are never seen again.
    if np.count_nonzero(bounds >= np.float32(max(floor, TINY))) > MOST_LEFT * len(bounds):
        return size, -1, np.inf
    for block in range(len(bounds)):
        if bounds[block] >= max(floor, TINY):
            size, near, floor = _score_block(block, query, blocks, results, size, near, rounding, sum_error)
    return size, near, floor


@njit(cache=True, nogil=True)
def _score_block(
    block: int,
    query: Array,
    blocks: Blocks,
    results: Results,
    size: int,
    near: int,
    rounding: float,
    sum_error: float,
) -> tuple[int, int, float]:
    """Offer the chunks of a block; return how many documents are best, how many chunks near, and the least near score.

    When near chunks have no more room, it returns -1 of them and an infinite least score.
    """
    floor = _floor(results.scores, size, rounding, sum_error)
    for place in range(block * BLOCK, min(len(blocks.chunks), (block + 1) * BLOCK)):
        score = _score(query, blocks.postings, blocks.offsets[place], blocks.offsets[place + 1])
        if score <= 0 or score < floor:
            continue
        if near == len(results.near_chunks):  # the floor has risen since; drop what lies below it now
            near = _keep_near(results, near, floor)
            if near == len(results.near_chunks):
                return size, -1, np.inf
        chunk = blocks.chunks[place]
        results.near_scores[near], results.near_chunks[near] = score, chunk
        near += 1
        # One place in the heap for a document, with its best chunk, or k places would hold fewer than k documents.
        kept = -1
        if not blocks.one_chunk_each:
            kept = _place_of(blocks.documents[chunk], blocks.documents, results.chunks, size)
        if kept < 0:
            size = heap.push(results.scores, results.chunks, size, score, chunk)
        elif heap.worse(results.scores[kept], results.chunks[kept], score, chunk):
            heap.sink(results.scores, results.chunks, size, kept, score, chunk)
        floor = _floor(results.scores, size, rounding, sum_error)
    return size, near, floor


@njit(cache=True, nogil=True)
def _floor(scores: Array, size: int, rounding: float, sum_error: float) -> float:
    """Return the least score of a chunk that might belong to the best k documents if nothing were rounded."""
    if size < len(scores):  # anything may still belong to them
        return 0.0
    # Each of the two scores that are compared is off by `sum_error` here and once more in the exact engine's sum.
    return float(scores[0] * (1 - 4 * sum_error) - rounding)


@njit(cache=True, nogil=True)
def _keep_near(results: Results, near: int, floor: float) -> int:
    """Drop the chunks whose scores are near no longer; return how many stay."""
    kept = 0
    for i in range(near):
        if results.near_scores[i] >= floor:
            results.near_scores[kept], results.near_chunks[kept] = results.near_scores[i], results.near_chunks[i]
            kept += 1
    return kept


@njit(cache=True, nogil=True)
def _place_of(document: int, documents: Array, best_chunks: Array, size: int) -> int:
    """Return where a document is in the heap, or -1."""
    for at in range(size):
        if documents[best_chunks[at]] == document:
            return at
    return -1
