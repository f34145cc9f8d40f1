"""Which documents score highest, exactly, without adding up every posting? Block-max pruning.

Similar chunks lie side by side in blocks of eight. The largest impact of each term in each block bounds the score of
the block's chunks; blocks are scored by falling bound until no bound reaches the worst kept score.

Shape letters: V = terms, P = postings, C = chunks, N = blocks, L = (term, block) pairs in lists, F = terms with a row
for all blocks, T = terms of a query.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soju.core.errors import IntegrityError
from soju.core.progress import track
from soju.search import block_max_loops as loops
from soju.search.exact import ExactEngine
from soju.search.postings import Postings
from soju.search.similar_order import similar_order

FOLDER = "block-max"
_ROWS = 50_000
_ROOM = 256
"""Chunks that may come close to the k-th, beside 4 k."""
_DENSE_SHARE = 1 / 16
"""Terms in more than this share of the blocks get a row with a number for every block: adding a whole row up takes less
time than looking so many blocks up."""

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class _Arrays:
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


class BlockMaxEngine:
    """Finds the documents that the exact engine finds, and scores few chunks for it.

    Impacts are rounded to 16 bits, so every chunk whose score comes within the rounding of the k-th is remembered.
    Where there are more of these than k, they are scored again from the posting lists; where there are very many (equal
    scores, or an impact that dwarfs all others of its term), the exact engine takes over.

    Arrays are memory-mapped. Each thread holds a float32 for each term and for each block.

    Args:
        arrays: As `build` writes them.
        postings: Posting lists of the segment.
        documents_C: Document number of each chunk, rising, ``(C,)`` int32.

    References:
        Mallia, Suel & Tonellotto 2024, Faster Learned Sparse Retrieval with Block-Max Pruning, arXiv:2405.01117. Here
        with blocks by k-means, rows and lists for frequent and rare terms, and the next block found by a tournament.
    """

    name = "block-max"

    def __init__(self, arrays: _Arrays, postings: Postings, documents_C: NDArray[np.int32]) -> None:
        self._arrays = arrays
        self._postings = postings
        self._exact = ExactEngine(postings, documents_C)
        self._documents_C = documents_C
        self._one_chunk_each = len(documents_C) == 0 or int(documents_C[-1]) + 1 == len(documents_C)
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
        arrays = _arrange(postings)
        for field in fields(arrays):
            np.save(folder / FOLDER / f"{field.name}.npy", getattr(arrays, field.name))
        del arrays
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
            arrays = _Arrays(
                **{
                    field.name: np.asarray(np.load(path / f"{field.name}.npy", mmap_mode="r"))
                    for field in fields(_Arrays)
                }
            )
        except (OSError, ValueError, EOFError) as error:
            raise IntegrityError(f"{path}: cannot be read ({error}); build the index again") from None
        found = len(arrays.chunks), len(arrays.largest)
        wanted = len(documents_C), len(postings.offsets) - 1
        if found != wanted:
            raise IntegrityError(
                f"{path}: holds {found[0]} chunks and {found[1]} terms, not {wanted[0]} and {wanted[1]}; build the "
                "index again"
            )
        return cls(arrays, postings, documents_C)

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
        scores, chunks = np.empty(size, dtype=np.float32), np.empty(size, dtype=np.int32)
        if len(terms_T) == 0 or size == 0:
            return chunks[:0], scores[:0]
        held = self._arrays
        query_V, bounds_N, groups = self._scratch()
        room = _ROOM + 4 * size
        near_chunks = np.empty(room, dtype=np.int32)
        found, near = loops.best_documents(
            terms_T, weights_T, held.largest, held.row_of, held.rows, held.list_offsets, held.list_blocks,
            held.list_maxima, held.chunks, held.offsets, held.postings, self._documents_C, self._one_chunk_each,
            query_V, bounds_N, groups, scores, chunks, np.empty(room, dtype=np.float32), near_chunks,
        )  # fmt: skip
        if near < 0:
            return self._exact.search(terms_T, weights_T, k)
        if near > found:
            return self._score_exactly(near_chunks[:near], terms_T, weights_T, k)
        return chunks[:found], scores[:found]

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

    def _scratch(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int32]]:
        """Return this thread's query weights, bounds of blocks, and the largest ones of groups, as bits."""
        scratch = getattr(self._local, "scratch", None)
        if scratch is None:
            blocks = self._arrays.rows.shape[1]
            query_V = np.zeros(len(self._arrays.largest), dtype=np.float32)
            bounds_N = np.zeros(blocks, dtype=np.float32)
            scratch = self._local.scratch = query_V, bounds_N, np.zeros(blocks // loops.GROUP, dtype=np.int32)
        return scratch


def _arrange(postings: Postings) -> _Arrays:
    """Lay the postings out by blocks of similar chunks, and summarise each block."""
    chunks = similar_order(postings)
    largest = loops.largest_impacts(postings.offsets, postings.impacts)
    offsets, posting_P2 = _place(postings, chunks, largest)
    terms, blocks = len(largest), -(-len(chunks) // loops.BLOCK)
    in_blocks_V = loops.count_blocks(offsets, posting_P2, terms)
    frequent = np.flatnonzero(in_blocks_V > _DENSE_SHARE * blocks)
    row_of = np.full(terms, -1, dtype=np.int32)
    row_of[frequent] = np.arange(len(frequent), dtype=np.int32)
    rows = np.zeros((len(frequent), -(-blocks // loops.GROUP) * loops.GROUP), dtype=np.uint8)
    in_blocks_V[frequent] = 0
    list_offsets = np.concatenate([[0], np.cumsum(in_blocks_V)])
    list_blocks = np.empty(list_offsets[-1], dtype=np.int32)
    list_maxima = np.empty(list_offsets[-1], dtype=np.uint8)
    loops.summarise(offsets, posting_P2, row_of, rows, list_offsets, list_blocks, list_maxima)
    return _Arrays(chunks, offsets, posting_P2, largest, row_of, rows, list_offsets, list_blocks, list_maxima)


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
        loops.place_rows(rows.indptr, rows.indices, rows.data, place_C[part], offsets, largest, posting_P2)
    return offsets, posting_P2
