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
from soju.search.weighting import idf

SEISMIC_FILE = "engine.index.seismic"
SCALE_FILE = "engine.scale.npy"
_U16_TERMS = 65_535  # the plain index numbers terms in 16 bits and does not check
_ROWS = 50_000
_MANY_CHUNKS = 300_000
_SMALL = {"centroid_fraction": 0.35, "summary_energy": 0.4, "rarity": 0.5, "query_cut": 7}
_LARGE = {"centroid_fraction": 0.05, "summary_energy": 0.3, "rarity": 0.0, "query_cut": 8}


class SeismicSettings(Settings):
    """Parameters of Seismic, building first; the defaults are tuned on ``benchmarks/search.py``.

    On a million documents recall falls fast with fewer `postings`: 0.98 at 2000, 0.82 at 1000, 0.66 at 500. Where a
    default is ``None``, `for_chunks` chooses.

    References:
        Bruch, Nardini, Rulli & Venturini 2024, Efficient Inverted Indexes for Approximate Retrieval over Learned Sparse
        Representations, arXiv:2404.18812.
    """

    postings: int = Field(default=2000, ge=1)
    """Postings kept for each term on average; the smallest impacts go (λ in the paper). More: recall, disk, build."""
    max_fraction: float = Field(default=1.5, gt=0)
    """A term keeps at most ``max_fraction * postings``."""
    centroid_fraction: float | None = Field(default=None, gt=0, le=1)
    """Blocks of a list as a share of its length (β). More: tighter summaries, slower build, disk."""
    min_cluster_size: int = Field(default=2, ge=1)
    """Chunks in the smallest block."""
    summary_energy: float | None = Field(default=None, gt=0, le=1)
    """Share of a block's mass that its summary keeps (α). More: blocks are skipped better, summaries cost more."""
    document_cut: int = Field(default=10, ge=1)
    """Largest terms of a chunk that decide its block."""
    rarity: float | None = Field(default=None, ge=0, le=1)
    """Impacts are multiplied by idf to this power when the file is built, query weights divided by it when searching.
    Products stay the same, but summaries keep rare terms, which decide BM25 scores, rather than frequent ones."""
    neighbours: int = Field(default=0, ge=0)
    """Nearest neighbours stored for each chunk to refine results; 0 stores none. Building them takes minutes."""
    batch: int | None = Field(default=None, ge=1)
    """Terms built at once; ``None`` builds all, fewer need less memory."""
    threads: int | None = Field(default=None, ge=1)
    """Threads of the build; ``None`` takes every core. A search always uses one."""
    query_cut: int | None = Field(default=None, ge=1)
    """Largest query terms whose lists are visited; scores count all terms all the same. More: recall, latency."""
    heap_factor: float = Field(default=0.9, gt=0, le=1)
    """A block is visited when its summary reaches the k-th score times this; lower visits more."""

    def for_chunks(self, chunks: int) -> SeismicSettings:
        """Return these settings with the parameters that were left open chosen for a number of chunks.

        Below 300,000 chunks lists are short (200 postings on average at 100,000), and comparing whole chunks with the
        query takes most of a search; blocks of about three chunks skip most of them and still build in a minute or two.
        From there on larger blocks keep building time and disk in bounds.

        Args:
            chunks: Chunks to be indexed.

        Returns:
            Settings without ``None`` in `centroid_fraction`, `summary_energy`, `rarity` and `query_cut`.
        """
        chosen = _SMALL if chunks < _MANY_CHUNKS else _LARGE
        return self.model_copy(update={name: value for name, value in chosen.items() if getattr(self, name) is None})


class SeismicEngine:
    """Approximate search of one segment.

    Impacts are held in half precision inside; the scores it ranks by are close, not exact, and the caller scores the
    returned chunks again from the posting lists.

    Args:
        index: A loaded index of the library, whose terms and chunks are numbers.
        scale_V: What the impacts of each term were multiplied by, ``(V,)`` float32.
        documents_C: Document number of each chunk, rising, ``(C,)`` int32.
        settings: Search parameters are read from here.
    """

    name = "seismic"

    def __init__(
        self, index: Any, scale_V: NDArray[np.float32], documents_C: NDArray[np.int32], settings: SeismicSettings
    ) -> None:
        self._index = index
        self._scale_V = scale_V
        self._documents_C = documents_C
        self._settings = settings.for_chunks(len(documents_C))
        self._one_chunk_each = len(documents_C) == 0 or int(documents_C[-1]) + 1 == len(documents_C)

    @classmethod
    def build(
        cls, folder: Path, postings: Postings, documents_C: NDArray[np.int32], settings: SeismicSettings
    ) -> SeismicEngine:
        """Build the engine file of a segment from its posting lists and return the engine.

        Memory: the library holds all vectors and the index, about 20 bytes a posting.

        Args:
            folder: Folder of the segment; ``engine.index.seismic`` and ``engine.scale.npy`` are written there.
            postings: Posting lists of the segment.
            documents_C: Document number of each chunk.
            settings: Building and search parameters.

        Returns:
            The engine, ready to search.
        """
        import seismic

        settings = settings.for_chunks(postings.chunks)
        terms = len(postings.offsets) - 1
        scale_V = _scale(postings, settings)
        large = terms > _U16_TERMS
        dataset = (seismic.SeismicDatasetLV if large else seismic.SeismicDataset)(dim=terms)
        for start in track(range(0, postings.chunks, _ROWS), "Seismic rows"):
            stop = min(start + _ROWS, postings.chunks)
            rows = postings.rows(start, stop)
            # The library drops rows without terms, which would shift the numbers of later ones: they get a zero.
            empty = np.diff(rows.indptr) == 0
            places = rows.indptr[:-1][empty]
            dataset.add_documents_by_id(
                [str(chunk) for chunk in range(start, stop)],
                np.insert(rows.indices, places, 0).astype(np.int64),
                np.insert(rows.data * scale_V[rows.indices], places, 0).astype(np.float32),
                (rows.indptr + np.concatenate([[0], np.cumsum(empty)])).astype(np.int64),
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
        del dataset, index  # `open` reads the file into memory again
        np.save(folder / SCALE_FILE, scale_V)
        return cls.open(folder, documents_C, settings, terms=terms)

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
            IntegrityError: If a file is missing or unreadable, or holds another number of chunks.
        """
        import seismic

        path = folder / SEISMIC_FILE
        try:
            with _library_output_dropped():
                # The file starts with what the raw index reads; the names of terms and chunks that follow are left
                # out. Searching with numbers saves 0.1 ms of strings.
                kind = seismic.SeismicIndexRawLV if terms > _U16_TERMS else seismic.SeismicIndexRaw
                index = kind.load(str(path))
        except OSError as error:
            raise IntegrityError(f"{path}: Seismic cannot read it ({error}); build the index again") from None
        if not (folder / SCALE_FILE).is_file():
            raise IntegrityError(f"{folder / SCALE_FILE}: missing; build the index again")
        if index.len != len(documents_C):
            raise IntegrityError(f"{path}: holds {index.len} chunks, not {len(documents_C)}; build the index again")
        return cls(index, np.load(folder / SCALE_FILE), documents_C, settings)

    def search(
        self, terms_T: NDArray[np.int32], weights_T: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return the best found chunk of each of k documents, best first.

        Fetches more chunks until k documents are found or no more come back.

        Args:
            terms_T: Terms of the query, rising, each once.
            weights_T: Their weights, idf included.
            k: Most documents to return, >= 1.

        Returns:
            Chunk numbers and approximate scores, both at most k long.
        """
        if len(terms_T) == 0 or len(self._documents_C) == 0:
            return np.empty(0, dtype=np.int32), np.empty(0, dtype=np.float32)
        weights_T = weights_T / self._scale_V[terms_T]
        limit = len(self._documents_C)
        fetch = min(limit, k if self._one_chunk_each else 3 * k)
        while True:
            chunks, scores = self._search_chunks(terms_T, weights_T, fetch)
            if self._one_chunk_each:
                return chunks, scores
            _, first = np.unique(self._documents_C[chunks], return_index=True)
            if len(first) >= k or len(chunks) < fetch or fetch == limit:
                kept = np.sort(first)[:k]
                return chunks[kept], scores[kept]
            fetch = min(limit, 2 * fetch)

    def _search_chunks(
        self, terms: NDArray[np.int32], weights: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        settings = self._settings
        found = self._index.search(
            terms, weights, k, settings.query_cut, settings.heap_factor, settings.neighbours, True
        )
        found = [pair for pair in found if pair[0] > 0]
        scores, chunks = zip(*found, strict=True) if found else ((), ())
        return np.array(chunks, dtype=np.int32), np.array(scores, dtype=np.float32)


def _scale(postings: Postings, settings: SeismicSettings) -> NDArray[np.float32]:
    """Return idf to the power of `rarity` of each term."""
    idf_V = np.maximum(idf(postings.document_frequency, postings.chunks), 0.01)  # common terms stay in half precision
    return np.asarray(idf_V ** (settings.rarity or 0.0), dtype=np.float32)


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
