"""The compiled loops that search in blocks. Shape letters as in `soju.search.block_max`.

In what order do chunks with similar vectors lie side by side? K-means on vectors projected to few numbers.

Shape letters: V = terms, C = chunks, K = clusters, R = numbers a vector is projected to.

How are chunks laid out for block-max pruning? Similar ones side by side, with what each block holds at most.

Shape letters: V = terms, P = postings, C = chunks, N = blocks, L = (term, block) pairs in lists, F = terms with a row
for all blocks.

Which documents score highest, exactly, without adding up every posting? Block-max pruning.

Similar chunks lie side by side in blocks of eight. The largest impact of each term in each block bounds the score of
the block's chunks; blocks are scored by falling bound until no bound reaches the worst kept score.

Shape letters: V = terms, C = chunks, N = blocks, T = terms of a query.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from soju.core.errors import IntegrityError
from soju.core.progress import track
from soju.search import exact as heap
from soju.search.exact import ExactEngine
from soju.search.postings import Postings
from soju.search.weighting import idf

Array = NDArray[Any]

# numba's cache notices changes of a loop's own file alone: what is compiled in must stand here.
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


class Blocks(NamedTuple):
    """Chunks by block, as in `soju.search.block_max.Layout`."""

    chunks: Array
    offsets: Array
    postings: Array
    documents: Array
    """Document of each chunk, ``(C,)``."""
    one_chunk_each: bool
    """Whether every document has one chunk."""


class Maxima(NamedTuple):
    """What each block holds at most, as in `soju.search.block_max.Layout`."""

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
    if scale <= 0:
        return 0, -1
    sum_error = SUM_ERROR * (len(query_terms) + 8)
    _add_bounds(query_terms, query, 1 + sum_error, maxima, bounds)
    bits = bounds.view(np.int32)  # numbers >= 0 keep their order, and compilers compare integers faster
    for group in range(len(groups)):
        groups[group] = _largest(bits[group * GROUP : (group + 1) * GROUP])
    size, near, floor = 0, 0, 0.0
    left = BY_BOUND
    block, bound = _take_highest(bounds, bits, groups)
    while left > 0 and bound > 0 and bound >= floor:
        next_block, next_bound = _take_highest(bounds, bits, groups)
        _touch(blocks, next_block, groups)
        size, near, floor = _score_block(block, query, blocks, results, size, near, rounding, sum_error)
        block, bound, left = next_block, next_bound, left - 1
    bounds[block] = bound
    if left == 0 and near >= 0:
        size, near, floor = _score_rest(query, bounds, blocks, results, size, near, floor, rounding, sum_error)
    for t in range(len(query_terms)):
        query[query_terms[t]] = 0
    if near >= 0:
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
        query[terms[t]] = step
        rounding += 2 * step
    return scale, rounding


@njit(cache=True, nogil=True)
def _add_bounds(terms: Array, query: Array, slack: float, maxima: Maxima, bounds: Array) -> None:
    """Write the bound of each block's scores."""
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
    for block in range(len(bounds)):
        bounds[block] += step * np.float32(row[block])


@njit(cache=True, nogil=True)
def _take_highest(bounds: Array, bits: Array, groups: Array) -> tuple[int, float]:
    """Return the block with the highest bound, and that bound, and set it to 0."""
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
    while numbers[start] != wanted:
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
        if near == len(results.near_chunks):
            near = _keep_near(results, near, floor)
            if near == len(results.near_chunks):
                return size, -1, np.inf
        chunk = blocks.chunks[place]
        results.near_scores[near], results.near_chunks[near] = score, chunk
        near += 1
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
    if size < len(scores):
        return 0.0
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


_PROJECTED = 64
_CHUNKS_A_CLUSTER = 64
_MOST_CLUSTERS = 1600
_SAMPLE = 100_000
_GROUPED_AT_ONCE = 20_000


def similar_order(postings: Postings) -> NDArray[np.int32]:
    """Return the chunks by cluster, each once, ``(C,)``; within a cluster they keep their order.

    Vectors are weighted by idf, projected to 64 random directions, and clustered by cosine; centres are fitted to
    100,000 of them. Always the same for the same posting lists and machine; memory does not grow with them.
    """
    from sklearn.cluster import MiniBatchKMeans

    clusters = min(postings.chunks // _CHUNKS_A_CLUSTER, _MOST_CLUSTERS)
    if clusters < 2:
        return np.arange(postings.chunks, dtype=np.int32)
    idf_V = idf(postings.document_frequency, postings.chunks)
    directions_VR = np.random.default_rng(0).standard_normal((len(idf_V), _PROJECTED), dtype=np.float32)
    directions_VR *= idf_V[:, None]
    sample = np.concatenate([_project(postings, part, directions_VR) for part in _sampled(postings.chunks)])
    kmeans = MiniBatchKMeans(clusters, init="random", batch_size=8192, n_init=1, max_iter=5, random_state=0).fit(sample)
    cluster_C = np.empty(postings.chunks, dtype=np.int32)
    for part in track(list(_parts(postings.chunks, _GROUPED_AT_ONCE)), "Grouping similar passages"):
        cluster_C[part] = kmeans.predict(_project(postings, part, directions_VR))
    return np.argsort(cluster_C, kind="stable").astype(np.int32)


def _project(postings: Postings, part: slice, directions_VR: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return unit vectors of some chunks, zeros for those without terms."""
    projected_CR = np.asarray(postings.rows(part.start, part.stop) @ directions_VR)
    return projected_CR / np.maximum(np.linalg.norm(projected_CR, axis=1, keepdims=True), np.float32(1e-9))


def _sampled(chunks: int) -> Iterator[slice]:
    """Yield evenly spaced parts of about 100,000 chunks together."""
    parts = list(_parts(chunks, 2000))
    wanted = max(1, min(len(parts), _SAMPLE // 2000))
    return (parts[number * len(parts) // wanted] for number in range(wanted))


def _parts(chunks: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, chunks)) for start in range(0, chunks, size))


_ROWS = 50_000
_DENSE_SHARE = 1 / 16
"""Terms in more than this share of the blocks get a row with a number for every block: adding a whole row up takes less
time than looking so many blocks up."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What is on disk, each array in a file of its name. A place is a chunk's number in the order of blocks."""

    chunks: NDArray[np.int32]
    """Chunk at each place, ``(C,)``."""
    offsets: NDArray[np.int64]
    """Where the postings of each place start, ``(C + 1,)``."""
    postings: Array
    """Term, and impact in 65,535ths of the term's largest, of each posting, ``(P, 2)``: uint16 where terms fit, int32
    elsewhere. Terms rise within a place."""
    largest: NDArray[np.float32]
    """Largest impact of each term, ``(V,)``."""
    row_of: NDArray[np.int32]
    """Row of each term in ``rows``, or -1 for a term with a list, ``(V,)``."""
    rows: NDArray[np.uint8]
    """Largest impact of frequent terms in each block, in 255ths, rounded up, ``(F, N)`` padded to whole groups."""
    list_offsets: NDArray[np.int64]
    """Where the list of each term starts, ``(V + 1,)``."""
    list_blocks: NDArray[np.int32]
    """Blocks that hold the term, ``(L,)``."""
    list_maxima: NDArray[np.uint8]
    """Largest impact there, as in ``rows``, ``(L,)``."""


def arrange(postings: Postings) -> Layout:
    """Lay postings out by blocks of similar chunks, and summarise each block.

    Args:
        postings: Posting lists of a segment.

    Returns:
        The arrays, about 9 bytes a posting (13 above 65,536 terms).
    """
    chunks = similar_order(postings)
    largest = _largest_impacts(postings.offsets, postings.impacts)
    offsets, posting_P2 = _place(postings, chunks, largest)
    terms, blocks = len(largest), -(-len(chunks) // BLOCK)
    in_blocks_V = _count_blocks(offsets, posting_P2, terms, BLOCK)
    frequent = np.flatnonzero(in_blocks_V > _DENSE_SHARE * blocks)
    row_of = np.full(terms, -1, dtype=np.int32)
    row_of[frequent] = np.arange(len(frequent), dtype=np.int32)
    rows = np.zeros((len(frequent), -(-blocks // GROUP) * GROUP), dtype=np.uint8)
    in_blocks_V[frequent] = 0
    list_offsets = np.concatenate([[0], np.cumsum(in_blocks_V)])
    list_blocks = np.empty(list_offsets[-1], dtype=np.int32)
    list_maxima = np.empty(list_offsets[-1], dtype=np.uint8)
    steps = IMPACT_STEPS // BOUND_STEPS
    _summarise(offsets, posting_P2, row_of, rows, list_offsets, list_blocks, list_maxima, BLOCK, steps)
    return Layout(chunks, offsets, posting_P2, largest, row_of, rows, list_offsets, list_blocks, list_maxima)


def _place(postings: Postings, chunks: Array, largest: Array) -> tuple[Array, Array]:
    """Return the postings in the order of places, and where those of each place start."""
    place_C = np.empty_like(chunks)
    place_C[chunks] = np.arange(len(chunks), dtype=np.int32)
    parts = [slice(start, min(start + _ROWS, len(chunks))) for start in range(0, len(chunks), _ROWS)]
    offsets = np.zeros(len(chunks) + 1, dtype=np.int64)
    for part in parts:
        offsets[1 + place_C[part]] = np.diff(postings.rows(part.start, part.stop).indptr)
    np.cumsum(offsets, out=offsets)
    posting_P2 = np.empty((offsets[-1], 2), dtype=np.uint16 if len(largest) <= 1 << 16 else np.int32)
    for part in track(parts, "Blocks of passages"):
        rows = postings.rows(part.start, part.stop)
        _place_rows(rows.indptr, rows.indices, rows.data, place_C[part], offsets, largest, posting_P2, IMPACT_STEPS)
    return offsets, posting_P2


@njit(cache=True, nogil=True)
def _largest_impacts(offsets: Array, impacts: Array) -> Array:
    """Return the largest impact of each posting list, 0 for an empty one."""
    largest = np.zeros(len(offsets) - 1, dtype=np.float32)
    for term in range(len(largest)):
        for p in range(offsets[term], offsets[term + 1]):
            largest[term] = max(largest[term], impacts[p])
    return largest


@njit(cache=True, nogil=True)
def _place_rows(
    row_offsets: Array,
    row_terms: Array,
    row_impacts: Array,
    places: Array,
    offsets: Array,
    largest: Array,
    postings: Array,
    steps: int,
) -> None:
    """Write the postings of some chunks where their places are, impacts in so many steps of the term's largest."""
    for row in range(len(places)):
        to = offsets[places[row]]
        for p in range(row_offsets[row], row_offsets[row + 1]):
            term = row_terms[p]
            postings[to, 0] = term
            postings[to, 1] = max(1, np.rint(row_impacts[p] / largest[term] * steps))
            to += 1


@njit(cache=True, nogil=True)
def _count_blocks(offsets: Array, postings: Array, count: int, chunks_a_block: int) -> Array:
    """Return how many blocks hold each of ``count`` terms."""
    blocks = np.zeros(count, dtype=np.int64)
    seen_in = np.full(count, -1, dtype=np.int64)
    for place in range(len(offsets) - 1):
        block = place // chunks_a_block
        for p in range(offsets[place], offsets[place + 1]):
            term = postings[p, 0]
            if seen_in[term] != block:
                seen_in[term] = block
                blocks[term] += 1
    return blocks


@njit(cache=True, nogil=True)
def _summarise(
    offsets: Array,
    postings: Array,
    row_of: Array,
    rows: Array,
    list_offsets: Array,
    list_blocks: Array,
    list_maxima: Array,
    chunks_a_block: int,
    steps: int,
) -> None:
    """Write the largest impact of each term in each block into the term's row or list, ``steps`` to 1, rounded up."""
    end = list_offsets[:-1].copy()
    seen_in = np.full(len(row_of), -1, dtype=np.int64)
    for place in range(len(offsets) - 1):
        block = place // chunks_a_block
        for p in range(offsets[place], offsets[place + 1]):
            term = postings[p, 0]
            bound = (np.int64(postings[p, 1]) + steps - 1) // steps
            if row_of[term] >= 0:
                rows[row_of[term], block] = max(np.int64(rows[row_of[term], block]), bound)
            elif seen_in[term] == block:
                list_maxima[end[term] - 1] = max(np.int64(list_maxima[end[term] - 1]), bound)
            else:
                list_blocks[end[term]], list_maxima[end[term]] = block, bound
                end[term] += 1
                seen_in[term] = block


FOLDER = "block-max"
_ROOM = 256
"""Chunks that may come close to the k-th, beside 4 k."""


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

        Args:
            folder: Folder of the segment; the files go to its sub-folder ``block-max``.
            postings: Posting lists of the segment.
            documents_C: Document number of each chunk.

        Returns:
            The engine, ready to search.
        """
        (folder / FOLDER).mkdir(exist_ok=True)
        layout = arrange(postings)
        for field in fields(layout):
            np.save(folder / FOLDER / f"{field.name}.npy", getattr(layout, field.name))
        del layout
        return cls.open(folder, postings, documents_C)

    @classmethod
    def open(cls, folder: Path, postings: Postings, documents_C: NDArray[np.int32]) -> BlockMaxEngine:
        """Map the engine's files of a segment.

        Args:
            folder: Folder of the segment.
            postings: Posting lists of the segment.
            documents_C: Document number of each chunk.

        Returns:
            The engine, ready to search.

        Raises:
            IntegrityError: If a file is missing or unreadable, or holds another number of chunks or terms.
        """
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
        """Return the best chunk of each of the k best documents, best first.

        Args:
            terms_T: Terms of the query, each once.
            weights_T: Their weights >= 0, idf included.
            k: Most documents to return, >= 1.

        Returns:
            Chunk numbers and scores, both at most k long; documents that share no term with the query are left out. The
            documents are the exact engine's; their scores, and their order where scores are that close, are rounded.
        """
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
