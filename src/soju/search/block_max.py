"""Which documents score highest, exactly, without adding up every posting? Block-max pruning.

Similar chunks lie side by side in blocks of eight. The largest impact of each term in each block bounds the score of
the block's chunks; blocks are scored by falling bound until no bound reaches the worst kept score.

Shape letters: V = terms, C = chunks, N = blocks, T = terms of a query.
"""

from __future__ import annotations

import threading
from dataclasses import fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from soju.core.errors import IntegrityError
from soju.search import block_max_loops as loops
from soju.search.block_max_layout import Layout, arrange
from soju.search.exact import ExactEngine
from soju.search.postings import Postings

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

    name = "block-max"

    def __init__(self, layout: Layout, postings: Postings, documents_C: NDArray[np.int32]) -> None:
        self._largest_V = layout.largest
        self._maxima = loops.Maxima(*(getattr(layout, name) for name in loops.Maxima._fields))
        one_chunk_each = len(documents_C) == 0 or int(documents_C[-1]) + 1 == len(documents_C)
        self._blocks = loops.Blocks(layout.chunks, layout.offsets, layout.postings, documents_C, one_chunk_each)
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
        results = loops.Results(
            scores=np.empty(size, dtype=np.float32),
            chunks=np.empty(size, dtype=np.int32),
            near_scores=np.empty(room, dtype=np.float32),
            near_chunks=np.empty(room, dtype=np.int32),
        )
        if len(terms_T) == 0 or size == 0:
            return results.chunks[:0], results.scores[:0]
        found, near = loops.best_documents(  # plain tuples reach compiled code 5 µs sooner than named ones
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

    def _scratch(self) -> loops.Scratch:
        """Return this thread's room to work in."""
        scratch: loops.Scratch | None = getattr(self._local, "scratch", None)
        if scratch is None:
            blocks = self._maxima.rows.shape[1]
            scratch = self._local.scratch = loops.Scratch(
                query=np.zeros(len(self._largest_V), dtype=np.float32),
                bounds=np.zeros(blocks, dtype=np.float32),
                groups=np.zeros(blocks // loops.GROUP, dtype=np.int32),
            )
        return scratch
