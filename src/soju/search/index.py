"""An inverted index: a folder of segments that is built, extended and searched as one object.

Shape letters: V = terms, Q = queries, T = terms of one query.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from soju.core.errors import UserError
from soju.core.files import write_json
from soju.core.results import Hit
from soju.data.rows import Document
from soju.search.engines import OWN
from soju.search.folder import (
    FORMAT,
    INDEX,
    SEGMENTS,
    Engine,
    IndexDescription,
    IndexSettings,
    SegmentEntry,
    check,
    idf,
    new_folder,
    new_segment,
    newest_segment,
    publish,
    read_description,
    read_json,
    recover,
)
from soju.search.hits import explain
from soju.search.postings import check_vectors
from soju.search.segment import Encode, Segment, merge_segments, open_segments, plan_merge, write_segment

_Query = tuple[NDArray[np.int32], NDArray[np.float32]]
"""Terms and weights, ``(T,)`` each."""
_Found = tuple[float, int, int, NDArray[np.float32]]
"""Negative score, segment, chunk, impacts of the query's terms in it."""


class SparseIndex:
    """An inverted index over sparse vectors of V terms, in a folder. Make one with `build` or `open`."""

    def __init__(
        self,
        folder: Path,
        description: IndexDescription,
        terms: Sequence[str],
        prior_share_V: NDArray[np.float32] | None,
        segments: Sequence[Segment],
    ) -> None:
        self.folder = folder
        self.description = description
        self.terms = terms
        self._prior_share_V = prior_share_V
        self.segments = segments
        self._idf_V = self._live_idf()

    @classmethod
    def build(
        cls,
        folder: Path,
        documents: Iterable[Document],
        encode: Encode,
        terms: Sequence[str],
        settings: IndexSettings | None = None,
        *,
        fingerprint: str = "",
        prior_share_V: NDArray[np.float32] | None = None,
        overwrite: bool = False,
    ) -> SparseIndex:
        """Index a corpus in one pass with bounded memory; the folder appears whole or not at all.

        Args:
            folder: Where the index goes.
            documents: Rows, read once; their order breaks ties.
            encode: Maps up to `batch_size` chunk texts to a sparse ``(texts, V)`` array of finite weights >= 0: term
                counts for ``bm25``, final weights for ``as_is``.
            terms: The V strings that name the columns.
            settings: The defaults when ``None``.
            fingerprint: Names the model, for example its hash.
            prior_share_V: Share of the model's training documents that hold each term, for
                `weighting.prior_documents`.
            overwrite: Replace an index that is there.

        Returns:
            The opened index.

        Raises:
            UserError: If the folder is taken, there are no documents, an id is empty or given twice, or vectors do not
                fit the terms.
        """
        settings = settings or IndexSettings()
        weighting = settings.weighting
        if weighting.kind == "bm25":  # refuses a prior without shares before anything is encoded
            idf(
                np.zeros(len(terms), dtype=np.int64), 0,
                prior_documents=weighting.prior_documents, prior_share_V=prior_share_V,
            )  # fmt: skip
        with new_folder(folder, overwrite=overwrite) as temporary:
            part = temporary / SEGMENTS / "0000"
            part.mkdir(parents=True)
            entry = write_segment(
                part, documents, encode, settings,
                terms=len(terms), average_length=None, known_hashes=set(), allow_fast=True,
            )  # fmt: skip
            write_json(temporary / "terms.json", list(terms))
            if prior_share_V is not None:
                np.save(temporary / "prior_share.npy", np.asarray(prior_share_V, dtype=np.float32))
            description = IndexDescription(
                format=FORMAT,
                fingerprint=fingerprint,
                terms=len(terms),
                average_length=entry.average_length,
                settings=settings,
                segments=(entry.model_copy(update={"name": "0000"}),),
            )
            write_json(temporary / INDEX, description.model_dump(mode="json"))
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path, *, fingerprint: str | None = None, full_check: bool = False) -> SparseIndex:
        """Open an index; arrays are memory-mapped.

        Args:
            folder: The index.
            fingerprint: Refuse an index of another model; ``None`` takes any.
            full_check: Compare every byte with the manifest instead of sizes alone.

        Returns:
            The index.

        Raises:
            IntegrityError: If a file is missing, has another size or cannot be read.
            UserError: If the folder is no index, was written by another version of soju, or belongs to another model.
        """
        if folder.is_dir():
            recover(folder)
        check(folder, full=full_check)
        description = read_description(folder)
        if fingerprint is not None and fingerprint != description.fingerprint:
            raise UserError(
                f'{folder}: built with model "{description.fingerprint}", not "{fingerprint}"; search with that model, '
                "or build the index again"
            )
        prior = folder / "prior_share.npy"
        return cls(
            folder,
            description,
            read_json(folder / "terms.json"),
            np.load(prior) if prior.is_file() else None,
            open_segments(folder, description),
        )

    def add(self, documents: Iterable[Document], encode: Encode) -> int:
        """Append documents; results equal those of an index built at once with the same `average_length`.

        New documents form a segment that is searched exactly, whatever the engine. Segments are merged when the added
        ones grow (`compact_share`, `max_added_segments`).

        Args:
            documents: Rows, read once.
            encode: As in `build`, of the same model.

        Returns:
            How many documents were added.

        Raises:
            UserError: If an id is taken, vectors do not fit, or the index changed meanwhile; it stays as it was.
        """
        known = {int(digest) for segment in self.segments for digest in segment.store.id_hashes}
        settings = self.description.settings
        with new_segment(self.folder) as part:
            entry = write_segment(
                part, documents, encode, settings,
                terms=len(self.terms), average_length=self.description.average_length,
                known_hashes=known, allow_fast=False,
            )  # fmt: skip
        added = newest_segment(self.folder)
        entry = entry.model_copy(update={"name": added})
        fresh = Segment.open(self.folder / SEGMENTS / added, entry)
        kept, merged = plan_merge([*self.segments, fresh], settings)
        entries = [segment.entry for segment in kept]
        if len(merged) > 1:
            with new_segment(self.folder) as part:
                whole = merge_segments(merged, part, settings, allow_fast=not kept)
            entries.append(whole.model_copy(update={"name": newest_segment(self.folder)}))
        else:
            entries.append(entry)
        self._publish(entries)
        return entry.documents

    def search(
        self, query_vectors: Any, k: int = 10, *, engine: Engine = "auto", explain_hits: bool = True
    ) -> list[list[Hit]]:
        """Return the best documents of each query, best first, equal scores in document order.

        A document scores as its best chunk. Every engine finds the same documents with the same scores.

        Args:
            query_vectors: Sparse ``(Q, V)`` query weights >= 0, without idf.
            k: Most documents a query, >= 1; fewer come back when fewer share a term with the query.
            engine: ``auto`` takes the fast engine where a segment has one, and the exact engine elsewhere and where it
                is as fast.
            explain_hits: Whether hits list the terms that matched.

        Returns:
            Q lists of hits.

        Raises:
            UserError: If the vectors do not fit the index, or the engine was not built.
        """
        rows = query_vectors.shape[0]
        queries = self._checked(query_vectors, k, engine)
        return [
            [
                self._hit(rank, item, query, explain_hits)
                for rank, item in enumerate(self._find(query, k, engine), start=1)
            ]
            for query in self._weighted(queries, rows)
        ]

    def rank(self, query_vectors: Any, k: int = 10, *, engine: Engine = "auto") -> list[list[str]]:
        """Return the ids `search` would find, without reading a document: for evaluation."""
        rows = query_vectors.shape[0]
        queries = self._checked(query_vectors, k, engine)
        found = (self._find(query, k, engine) for query in self._weighted(queries, rows))
        return [[self.segments[number].store.document_id_of(chunk) for _, number, chunk, _ in items] for items in found]

    @property
    def documents(self) -> int:
        """Number of documents, those without terms included."""
        return sum(segment.entry.documents for segment in self.segments)

    @property
    def chunks(self) -> int:
        """Number of chunks, N of the idf."""
        return sum(segment.entry.chunks for segment in self.segments)

    @property
    def idf_V(self) -> NDArray[np.float32] | None:
        """What a query's weights are multiplied with, ``(V,)`` in nats; none for ``as_is``."""
        return self._idf_V

    @property
    def empty_documents(self) -> tuple[int, tuple[str, ...]]:
        """How many documents have no term, and the ids of the first."""
        entries = [segment.entry for segment in self.segments]
        names = [name for entry in entries for name in entry.first_empty_documents]
        return sum(entry.empty_documents for entry in entries), tuple(names)

    def _checked(self, query_vectors: Any, k: int, engine: Engine) -> csr_array:
        if k < 1:
            raise UserError(f"k: got {k}; ask for at least one document")
        if engine not in OWN:
            raise UserError(f'engine "{engine}" is not known; choose one of {", ".join(OWN)}')
        built = {segment.entry.fast for segment in self.segments}
        if engine not in ("auto", "exact") and engine not in built:
            raise UserError(
                f'{self.folder}: has no {engine} engine; build the index with engine "{engine}", or search with "exact"'
            )
        return check_vectors(query_vectors, rows=query_vectors.shape[0], terms=len(self.terms), place="query")

    def _weighted(self, queries: csr_array, rows: int) -> Iterator[_Query]:
        """Yield terms and weights of each query, the idf multiplied in."""
        for row in range(rows):
            low, high = queries.indptr[row], queries.indptr[row + 1]
            terms_T = queries.indices[low:high].astype(np.int32)
            weights_T = queries.data[low:high]
            yield terms_T, weights_T if self._idf_V is None else weights_T * self._idf_V[terms_T]

    def _find(self, query: _Query, k: int, engine: Engine) -> list[_Found]:
        terms_T, weights_T = query
        found: list[_Found] = []
        for number, segment in enumerate(self.segments):
            chunks, _ = segment.searcher(k, engine).search(terms_T, weights_T, k)
            for chunk, impacts_T in zip(chunks, segment.postings.weights(chunks, terms_T), strict=True):
                # Summed in the order and precision of the exact engine, so that engines agree to the last bit.
                score = float(np.cumsum(weights_T * impacts_T, dtype=np.float32)[-1])
                found.append((-score, number, int(chunk), impacts_T))
        return sorted(found, key=lambda item: item[:3])[:k]

    def _hit(self, rank: int, item: _Found, query: _Query, explained: bool) -> Hit:
        negative, number, chunk, impacts_T = item
        document_id, window = self.segments[number].store.chunk(chunk)
        matched = explain(self.terms, *query, impacts_T) if explained else ()
        return Hit(rank, document_id, -negative, window.text, matched, window.start, window.end)

    def _live_idf(self) -> NDArray[np.float32] | None:
        weighting = self.description.settings.weighting
        if weighting.kind == "as_is":
            return None
        frequency_V = np.sum([segment.postings.document_frequency for segment in self.segments], axis=0)
        return idf(
            frequency_V, self.chunks, prior_documents=weighting.prior_documents, prior_share_V=self._prior_share_V
        )

    def _publish(self, entries: Sequence[SegmentEntry]) -> None:
        if read_description(self.folder) != self.description:
            raise UserError(f"{self.folder}: another process changed the index meanwhile; open it and add again")
        description = self.description.model_copy(update={"segments": tuple(entries)})
        names = [entry.name for entry in entries]
        publish(self.folder, description.model_dump(mode="json"), segments=names)
        self.description = description
        self.segments = open_segments(self.folder, description)
        self._idf_V = self._live_idf()
