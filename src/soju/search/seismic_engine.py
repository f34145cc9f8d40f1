"""Which documents score highest, almost always, much faster? Seismic: posting lists cut into summarised blocks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from soju.core.config import Settings
from soju.core.errors import IntegrityError
from soju.core.progress import track
from soju.search.postings import Postings

SEISMIC_FILE = "engine.index.seismic"
_U16_TERMS = 65_535  # the plain index numbers terms in 16 bits and does not check
_ROWS = 50_000


class SeismicSettings(Settings):
    """Parameters of Seismic, building first; the defaults are tuned on ``benchmarks/search.py``.

    On a million documents recall falls fast with fewer `postings`: 0.98 at 2000, 0.82 at 1000, 0.66 at 500.

    References:
        Bruch, Nardini, Rulli & Venturini 2024, Efficient Inverted Indexes for Approximate Retrieval over Learned Sparse
        Representations, arXiv:2404.18812.
    """

    postings: int = Field(default=2000, ge=1)
    """Postings kept for each term on average; the smallest impacts go (λ in the paper). More: recall, disk, build."""
    max_fraction: float = Field(default=1.5, gt=0)
    """A term keeps at most ``max_fraction * postings``."""
    centroid_fraction: float = Field(default=0.05, gt=0, le=1)
    """Blocks of a list as a share of its length (β). More: tighter summaries, slower build."""
    min_cluster_size: int = Field(default=2, ge=1)
    """Chunks in the smallest block."""
    summary_energy: float = Field(default=0.3, gt=0, le=1)
    """Share of a block's mass that its summary keeps (α). More: blocks are skipped better, summaries cost more."""
    document_cut: int = Field(default=10, ge=1)
    """Largest terms of a chunk that decide its block."""
    neighbours: int = Field(default=0, ge=0)
    """Nearest neighbours stored for each chunk to refine results; 0 stores none. Building them takes minutes."""
    batch: int | None = Field(default=None, ge=1)
    """Terms built at once; ``None`` builds all, fewer need less memory."""
    threads: int | None = Field(default=None, ge=1)
    """Threads of the build; ``None`` takes every core. A search always uses one."""
    query_cut: int = Field(default=8, ge=1)
    """Largest query terms whose lists are visited; scores count all terms all the same. More: recall, latency."""
    heap_factor: float = Field(default=0.9, gt=0, le=1)
    """A block is visited when its summary reaches the k-th score divided by this; lower visits more."""


class SeismicEngine:
    """Approximate search of one segment.

    Impacts are held in half precision inside; the scores it ranks by are close, not exact, and the caller scores the
    returned chunks again from the posting lists.

    Args:
        index: A loaded index of the library.
        documents_C: Document number of each chunk, rising, ``(C,)`` int32.
        settings: Search parameters are read from here.
    """

    name = "seismic"

    def __init__(self, index: Any, documents_C: NDArray[np.int32], settings: SeismicSettings) -> None:
        import seismic

        self._index = index
        self._documents_C = documents_C
        self._settings = settings
        self._one_chunk_each = len(documents_C) == 0 or int(documents_C[-1]) + 1 == len(documents_C)
        self._string = seismic.get_seismic_string()

    @classmethod
    def build(
        cls, folder: Path, postings: Postings, documents_C: NDArray[np.int32], settings: SeismicSettings
    ) -> SeismicEngine:
        """Build the engine file of a segment from its posting lists and return the engine.

        Memory: the library holds all vectors and the index, about 20 bytes a posting.

        Args:
            folder: Folder of the segment; ``engine.index.seismic`` is written there.
            postings: Posting lists of the segment.
            documents_C: Document number of each chunk.
            settings: Building and search parameters.

        Returns:
            The engine, ready to search.
        """
        import seismic

        terms = len(postings.offsets) - 1
        large = terms > _U16_TERMS
        dataset = (seismic.SeismicDatasetLV if large else seismic.SeismicDataset)(dim=terms)
        for start in track(range(0, postings.chunks, _ROWS), "Seismic rows"):
            stop = min(start + _ROWS, postings.chunks)
            rows = postings.rows(start, stop)
            dataset.add_documents_by_id(
                [str(chunk) for chunk in range(start, stop)],
                rows.indices.astype(np.int64),
                rows.data.astype(np.float32),
                rows.indptr.astype(np.int64),
            )
        with _library_output_dropped():
            index = (seismic.SeismicIndexLV if large else seismic.SeismicIndex).build_from_dataset(
                dataset,
                n_postings=settings.postings,
                centroid_fraction=settings.centroid_fraction,
                min_cluster_size=settings.min_cluster_size,
                summary_energy=settings.summary_energy,
                max_fraction=settings.max_fraction,
                doc_cut=settings.document_cut,
                nknn=settings.neighbours,
                batched_indexing=settings.batch,
                num_threads=settings.threads or 0,
            )
            index.save(str(folder / SEISMIC_FILE.removesuffix(".index.seismic")))
        return cls(index, documents_C, settings)

    @classmethod
    def open(
        cls, folder: Path, documents_C: NDArray[np.int32], settings: SeismicSettings, *, terms: int
    ) -> SeismicEngine:
        """Load the engine file of a segment.

        Args:
            folder: Folder of the segment.
            documents_C: Document number of each chunk.
            settings: Search parameters.
            terms: V.

        Returns:
            The engine, ready to search.

        Raises:
            IntegrityError: If the library cannot read the file.
        """
        import seismic

        path = folder / SEISMIC_FILE
        try:
            with _library_output_dropped():
                kind = seismic.SeismicIndexLV if terms > _U16_TERMS else seismic.SeismicIndex
                index = kind.load(str(path))
        except OSError as error:
            raise IntegrityError(f"{path}: Seismic cannot read it ({error}); build the index again") from None
        return cls(index, documents_C, settings)

    def search(
        self, terms_T: NDArray[np.int32], weights_T: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return the best found chunk of each of k documents, best first.

        Fetches more chunks until k documents are found or no more come back.

        Args:
            terms_T: Terms of the query, each once.
            weights_T: Their weights, idf included.
            k: Most documents to return, >= 1.

        Returns:
            Chunk numbers and approximate scores, both at most k long.
        """
        if len(terms_T) == 0 or len(self._documents_C) == 0:
            return np.empty(0, dtype=np.int32), np.empty(0, dtype=np.float32)
        tokens = np.array([str(term) for term in terms_T.tolist()], dtype=self._string)
        limit = len(self._documents_C)
        fetch = min(limit, k if self._one_chunk_each else 3 * k)
        while True:
            chunks, scores = self._search_chunks(tokens, weights_T, fetch)
            if self._one_chunk_each:
                return chunks, scores
            _, first = np.unique(self._documents_C[chunks], return_index=True)
            if len(first) >= k or len(chunks) < fetch or fetch == limit:
                kept = np.sort(first)[:k]
                return chunks[kept], scores[kept]
            fetch = min(limit, 2 * fetch)

    def _search_chunks(
        self, tokens: NDArray[Any], weights: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        settings = self._settings
        found = self._index.search(
            "", tokens, weights, k, settings.query_cut, settings.heap_factor, settings.neighbours
        )
        scores = np.array([score for _, score, _ in found], dtype=np.float32)
        return np.array([int(chunk) for _, _, chunk in found], dtype=np.int32), scores


@contextmanager
def _library_output_dropped() -> Iterator[None]:
    """Send what the library prints from native code nowhere: standard output carries results."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        yield
    finally:
        for saved, number in zip(kept, (1, 2), strict=True):
            os.dup2(saved, number)
            os.close(saved)
        os.close(nowhere)
