"""The layout that block-max pruning searches: similar chunks next to each other, and what each block holds at most.

Chunks are ordered by k-means on vectors projected to few numbers. How similar neighbours are decides how many blocks a
search can skip, never what it finds.

Shape letters: V = terms, P = postings, C = chunks, N = blocks, L = (term, block) pairs in lists, F = terms with a row
for all blocks, K = clusters, R = numbers a vector is projected to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from soju.core.progress import track
from soju.search.folder import idf
from soju.search.postings import Postings

Array = NDArray[Any]

_PROJECTED = 64
_CHUNKS_A_CLUSTER = 64
_MOST_CLUSTERS = 1600
_SAMPLE = 100_000
_GROUPED_AT_ONCE = 20_000
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


@dataclass(frozen=True, slots=True)
class BlockShape:
    """Numbers that the search has compiled in; see the constants of `soju.search.block_max`."""

    chunks: int
    """Chunks of a block."""
    group: int
    """Rows are padded to whole groups of so many blocks."""
    impact_steps: int
    """Steps of an impact, as a share of its term's largest."""
    bound_steps: int
    """Steps of a bound; divides `impact_steps`."""


def arrange(postings: Postings, shape: BlockShape) -> Layout:
    """Lay postings out by blocks of similar chunks, and summarise each block."""
    chunks = similar_order(postings)
    largest = _largest_impacts(postings.offsets, postings.impacts)
    offsets, posting_P2 = _place(postings, chunks, largest, shape.impact_steps)
    terms, blocks = len(largest), -(-len(chunks) // shape.chunks)
    in_blocks_V = _count_blocks(offsets, posting_P2, terms, shape.chunks)
    frequent = np.flatnonzero(in_blocks_V > _DENSE_SHARE * blocks)
    row_of = np.full(terms, -1, dtype=np.int32)
    row_of[frequent] = np.arange(len(frequent), dtype=np.int32)
    rows = np.zeros((len(frequent), -(-blocks // shape.group) * shape.group), dtype=np.uint8)
    in_blocks_V[frequent] = 0
    list_offsets = np.concatenate([[0], np.cumsum(in_blocks_V)])
    list_blocks = np.empty(list_offsets[-1], dtype=np.int32)
    list_maxima = np.empty(list_offsets[-1], dtype=np.uint8)
    steps = shape.impact_steps // shape.bound_steps
    _summarise(offsets, posting_P2, row_of, rows, list_offsets, list_blocks, list_maxima, shape.chunks, steps)
    return Layout(chunks, offsets, posting_P2, largest, row_of, rows, list_offsets, list_blocks, list_maxima)


def _place(postings: Postings, chunks: Array, largest: Array, steps: int) -> tuple[Array, Array]:
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
        _place_rows(rows.indptr, rows.indices, rows.data, place_C[part], offsets, largest, posting_P2, steps)
    return offsets, posting_P2


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
            # Never 0: a chunk with a term must score above one without. So a stored impact is off by less than one
            # step, which is what the search allows for each term of the query.
            postings[to, 1] = max(1, np.rint(row_impacts[p] / largest[term] * steps))
            to += 1


@njit(cache=True, nogil=True)
def _count_blocks(offsets: Array, postings: Array, count: int, chunks_a_block: int) -> Array:
    """Return how many blocks hold each of ``count`` terms."""
    # Places are visited in order, so a term's last block tells whether it was counted: no set of pairs is held.
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
    # Rounded up, so that a bound is never below the stored impact it stands for; with rounding to nearest a block that
    # holds a result could be skipped. Blocks are visited in order, so the lists come out sorted by block.
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
