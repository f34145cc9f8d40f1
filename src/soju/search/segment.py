"""What is one segment of an index? Its documents, their posting lists and, when it is large, a fast engine."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from soju.core.errors import UserError
from soju.core.progress import track
from soju.data.records import Document
from soju.search.block_max import BlockMaxEngine
from soju.search.chunking import chunk_text
from soju.search.document_store import DocumentStore, DocumentWriter, merge_documents
from soju.search.exact import ExactEngine
from soju.search.index_folder import SEGMENTS
from soju.search.index_settings import Engine, IndexDescription, IndexSettings, SegmentEntry
from soju.search.postings import Postings, PostingsWriter, check_vectors, merge_postings
from soju.search.seismic_engine import SeismicEngine
from soju.search.weighting import WeightingSettings, bm25_impact

Encode = Callable[[list[str]], Any]
"""Maps texts to a scipy sparse ``(texts, V)`` array of weights >= 0."""

_NAMED_EMPTY = 20
_MOST_FOR_BLOCK_MAX = 100
"""Most documents asked for with which ``auto`` takes block-max; for more, adding up whole posting lists is as fast."""


@dataclass(frozen=True, slots=True)
class Segment:
    """An open segment."""

    entry: SegmentEntry
    folder: Path
    store: DocumentStore
    postings: Postings
    exact: ExactEngine
    fast: BlockMaxEngine | SeismicEngine | None

    @classmethod
    def open(cls, folder: Path, entry: SegmentEntry, settings: IndexSettings, *, terms: int) -> Segment:
        """Map a segment's files; a Seismic index is loaded."""
        store = DocumentStore.open(folder)
        postings = Postings.open(folder / "postings", chunks=entry.chunks)
        fast: BlockMaxEngine | SeismicEngine | None = None
        if entry.fast == "block-max":
            fast = BlockMaxEngine.open(folder, postings, store.documents)
        elif entry.fast == "seismic":
            fast = SeismicEngine.open(folder, store.documents, settings.seismic, terms=terms)
        return cls(entry, folder, store, postings, ExactEngine(postings, store.documents), fast)

    def searcher(self, k: int, engine: Engine) -> ExactEngine | BlockMaxEngine | SeismicEngine:
        """Return the engine to look for k documents with."""
        if self.fast is None or engine == "exact":
            return self.exact
        if engine == "auto" and self.fast.name == "block-max" and k > _MOST_FOR_BLOCK_MAX:
            return self.exact
        return self.fast


def write_segment(
    folder: Path,
    documents: Iterable[Document],
    encode: Encode,
    settings: IndexSettings,
    *,
    terms: int,
    average_length: float | None,
    known_hashes: set[int],
    allow_fast: bool,
) -> SegmentEntry:
    """Chunk, encode and store documents in one pass.

    Memory: one block of postings and about 60 bytes a document, whatever the length of the texts.

    Args:
        folder: Empty folder of the segment.
        documents: Rows to index, read once.
        encode: Maps chunk texts to vectors.
        settings: See `IndexSettings`.
        terms: V.
        average_length: Average chunk length of BM25; ``None`` measures it on these documents.
        known_hashes: Hashes of ids that are taken; this segment's are added.
        allow_fast: Whether a fast engine may be built.

    Returns:
        The entry for ``index.json``, its `name` still empty.

    Raises:
        UserError: If there are no documents, an id is empty or given twice, or the vectors do not fit.
    """
    writer = PostingsWriter(folder / "postings", terms)
    lengths = array("f")
    pending: list[str] = []

    def encode_first(count: int) -> None:
        texts = pending[:count]
        del pending[:count]
        place = f"chunks {len(lengths) + 1:,} to {len(lengths) + len(texts):,}"
        vectors = check_vectors(encode(texts), rows=len(texts), terms=terms, place=place)
        lengths.extend(vectors.sum(axis=1).tolist())
        writer.add(vectors)

    with DocumentWriter(folder, known_hashes) as document_writer:
        for document in track(documents, "Indexing"):
            chunks = chunk_text(document.text, settings.chunking)
            document_writer.add(document, chunks)
            pending.extend(chunk.text for chunk in chunks)
            while len(pending) >= settings.batch_size:
                encode_first(settings.batch_size)
        if pending:
            encode_first(len(pending))
        if not len(document_writer):
            raise UserError("no documents to index; check the corpus file")
        store = document_writer.finish()
    lengths_C = np.asarray(lengths, dtype=np.float32)
    if settings.weighting.kind == "bm25":
        average_length = average_length or settings.weighting.average_length or _mean_length(lengths_C)
    postings = writer.finish(_weigher(settings.weighting, lengths_C, average_length))
    empty = np.flatnonzero(np.bincount(store.documents, weights=lengths_C, minlength=len(store)) == 0)
    names = [store.document_id(int(number)) for number in empty[:_NAMED_EMPTY]]
    return SegmentEntry(
        name="",
        documents=len(store),
        chunks=len(lengths_C),
        postings=postings,
        empty_documents=len(empty),
        first_empty_documents=tuple(_printable(name) for name in names),
        average_length=average_length,
        fast=build_fast(folder, store, len(lengths_C), settings) if allow_fast else None,
    )


def merge_segments(
    parts: Sequence[Segment], folder: Path, settings: IndexSettings, *, allow_fast: bool
) -> SegmentEntry:
    """Join segments in order into an empty folder; impacts and document order stay as they are.

    Args:
        parts: Open segments.
        folder: Empty folder of the merged segment.
        settings: See `IndexSettings`.
        allow_fast: Whether a fast engine may be built.

    Returns:
        The entry for ``index.json``, its `name` still empty.
    """
    store = merge_documents([part.folder for part in parts], folder)
    bases = np.concatenate([[0], np.cumsum([part.entry.chunks for part in parts])])
    (folder / "postings").mkdir()
    terms = len(parts[0].postings.offsets) - 1
    postings = merge_postings(
        [(part.postings, int(base)) for part, base in zip(parts, bases, strict=False)], folder / "postings", terms
    )
    names = [name for part in parts for name in part.entry.first_empty_documents]
    chunks = int(bases[-1])
    return SegmentEntry(
        name="",
        documents=len(store),
        chunks=chunks,
        postings=postings,
        empty_documents=sum(part.entry.empty_documents for part in parts),
        first_empty_documents=tuple(names[:_NAMED_EMPTY]),
        average_length=parts[0].entry.average_length,
        fast=build_fast(folder, store, chunks, settings) if allow_fast else None,
    )


def build_fast(
    folder: Path, store: DocumentStore, chunks: int, settings: IndexSettings
) -> Literal["block-max", "seismic"] | None:
    """Build the fast engine of a segment that the settings ask for, if they do; return which."""
    wanted = settings.engine
    if wanted == "auto":
        wanted = "block-max" if chunks >= settings.block_max_from_chunks else "exact"
    if wanted == "exact":
        return None
    postings = Postings.open(folder / "postings", chunks=chunks)
    if wanted == "block-max":
        BlockMaxEngine.build(folder, postings, store.documents)
    else:
        SeismicEngine.build(folder, postings, store.documents, settings.seismic)
    return wanted


def _weigher(
    weighting: WeightingSettings, lengths_C: NDArray[np.float32], average_length: float | None
) -> Callable[[NDArray[np.int32], NDArray[np.float32]], NDArray[np.float32]] | None:
    if weighting.kind == "as_is" or average_length is None:
        return None
    average = average_length

    def weigh(chunks_P: NDArray[np.int32], counts_P: NDArray[np.float32]) -> NDArray[np.float32]:
        return bm25_impact(counts_P, lengths_C[chunks_P], k1=weighting.k1, b=weighting.b, average_length=average)

    return weigh


def _mean_length(lengths_C: NDArray[np.float32]) -> float:
    """Average over the chunks that have terms; 1 when none has, so that later documents can still be weighed."""
    filled = lengths_C[lengths_C > 0]
    return float(filled.mean(dtype=np.float64)) if len(filled) else 1.0


def _printable(name: str) -> str:
    return name.encode("utf-8", "replace").decode("utf-8")


def plan_merge(segments: Sequence[Segment], settings: IndexSettings) -> tuple[list[Segment], list[Segment]]:
    """Return the segments to keep and those to merge into one (a single one stays as it is)."""
    first, *added = segments
    if sum(segment.entry.chunks for segment in added) > settings.compact_share * first.entry.chunks:
        return [], list(segments)
    if len(added) > settings.max_added_segments:
        return [first], added
    return list(segments[:-1]), [segments[-1]]


def open_segments(folder: Path, description: IndexDescription) -> list[Segment]:
    """Open the segments that ``index.json`` names."""
    return [
        Segment.open(folder / SEGMENTS / entry.name, entry, description.settings, terms=description.terms)
        for entry in description.segments
    ]
