"""What does another engine store? The passages of an index of ours with their final weights, idf included.

Shape letters: V = terms, T = terms of one passage.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soju.search.index import SparseIndex
from soju.search.segment import Segment

_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Passage:
    """A chunk of a document as an engine gets it."""

    id: str
    """The document's id, for further passages of it with ``#`` and a number behind."""
    document_id: str
    number: int
    """Place in the corpus; equal scores rank by it."""
    text: str
    start: int
    """Where the passage starts in its document, in characters."""
    end: int
    terms_T: NDArray[np.int32]
    """Term ids, rising."""
    weights_T: NDArray[np.float32]
    """What each term adds to a score for every unit of query weight."""


@dataclass(frozen=True, slots=True)
class CorpusFacts:
    """What a client must know of the vectors to search them; travels with the index."""

    fingerprint: str
    """Names the model."""
    weighting: str
    """``bm25`` (idf is in the stored weights) or ``as_is``."""
    documents: int
    passages: int
    terms: int
    ceiling: float
    """The largest stored weight."""
    average_length: float | None = None
    """Average passage length of BM25, in term counts."""

    def to_json(self) -> dict[str, Any]:
        """Return the facts as they are written into a mapping or a manifest."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


class WeightedCorpus:
    """The passages of an index with everything of a score that does not depend on the query baked into the weights.

    Our own index keeps idf on the query's side, so that it is never stale. Another engine cannot: a query there is what
    the model says and nothing else. So ``stored = impact * idf`` and ``score = sum(query * stored)``, the same sums.

    Args:
        index: An index of ours; the vectors are read from its posting lists.
    """

    def __init__(self, index: SparseIndex) -> None:
        self._index = index
        self._idf_V = index.idf_V

    @property
    def facts(self) -> CorpusFacts:
        """Counts, weighting and the largest weight."""
        description = self._index.description
        return CorpusFacts(
            fingerprint=description.fingerprint,
            weighting=description.settings.weighting.kind,
            documents=self._index.documents,
            passages=self._index.chunks,
            terms=len(self._index.terms),
            ceiling=max((self._heaviest(segment) for segment in self._index.segments), default=0.0),
            average_length=description.average_length,
        )

    def __len__(self) -> int:
        return self._index.chunks

    def __iter__(self) -> Iterator[Passage]:
        """Yield the passages in corpus order, a thousand vectors in memory at a time."""
        number = 0
        for segment in self._index.segments:
            for start in range(0, segment.entry.chunks, _ROWS):
                stop = min(start + _ROWS, segment.entry.chunks)
                rows = segment.postings.rows(start, stop)
                for row, chunk in enumerate(range(start, stop)):
                    low, high = rows.indptr[row], rows.indptr[row + 1]
                    yield self._passage(segment, chunk, number, rows.indices[low:high], rows.data[low:high])
                    number += 1

    def _passage(
        self, segment: Segment, chunk: int, number: int, terms_T: NDArray[Any], weights_T: NDArray[Any]
    ) -> Passage:
        document_id, window = segment.store.chunk(chunk)
        documents = segment.store.documents
        part = chunk - int(np.searchsorted(documents, documents[chunk]))
        return Passage(
            id=f"{document_id}#{part}" if part else document_id,
            document_id=document_id,
            number=number,
            text=window.text,
            start=window.start,
            end=window.end,
            terms_T=terms_T.astype(np.int32),
            weights_T=weights_T if self._idf_V is None else (weights_T * self._idf_V[terms_T]).astype(np.float32),
        )

    def _heaviest(self, segment: Segment) -> float:
        postings = segment.postings
        filled = np.flatnonzero(postings.document_frequency)
        if not len(filled):
            return 0.0
        heaviest = np.maximum.reduceat(postings.impacts, postings.offsets[filled])
        return float(np.max(heaviest if self._idf_V is None else heaviest * self._idf_V[filled]))
