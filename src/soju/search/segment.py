"""One segment of an index: its documents, their posting lists and, when it is large, a fast engine.

Texts lie in one blob that is read through the operating system's cache.

Shape letters: D = documents, C = chunks, V = terms.
"""

from __future__ import annotations

import hashlib
import shutil
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from soju.core.errors import UserError
from soju.core.progress import track
from soju.data.rows import Document
from soju.search.chunking import Chunk, chunk_text
from soju.search.engines import AUTO, FastEngine, SegmentEngine, fast_engine
from soju.search.exact import ExactEngine
from soju.search.folder import (
    SEGMENTS,
    Engine,
    IndexDescription,
    IndexSettings,
    SegmentEntry,
    WeightingSettings,
    bm25_impact,
)
from soju.search.postings import Postings, PostingsWriter, check_vectors, merge_postings

_BLOB = "documents.utf8"
_ENCODING = ("utf-8", "surrogatepass")  # any Python string comes back as it was


@dataclass(frozen=True, slots=True)
class DocumentStore:
    """Ids, texts and chunk windows of D documents; memory-mapped, so opening costs nothing for a million."""

    blob: NDArray[np.uint8]
    boundaries: NDArray[np.int64]
    """``(2 D + 1,)``: id i is ``blob[b[2i]:b[2i+1]]``, its text ``blob[b[2i+1]:b[2i+2]]``."""
    id_hashes: NDArray[np.uint64]
    documents: NDArray[np.int32]
    """Document number of each chunk, rising, ``(C,)``."""
    spans: NDArray[np.int32]
    """Start and end of each chunk in characters of its document, ``(C, 2)``."""

    @classmethod
    def open(cls, folder: Path) -> DocumentStore:
        """Map the files of a segment folder."""
        return cls(
            blob=np.asarray(np.memmap(folder / _BLOB, dtype=np.uint8, mode="r")),
            boundaries=_load(folder / "boundaries.npy"),
            id_hashes=_load(folder / "id_hashes.npy"),
            documents=_load(folder / "chunk_documents.npy"),
            spans=_load(folder / "chunk_spans.npy"),
        )

    def __len__(self) -> int:
        return len(self.id_hashes)

    def document_id(self, document: int) -> str:
        """Return the id of a document by its number."""
        return self._text(2 * document)

    def document_id_of(self, chunk: int) -> str:
        """Return the id of the document a chunk belongs to."""
        return self.document_id(int(self.documents[chunk]))

    def chunk(self, chunk: int) -> tuple[str, Chunk]:
        """Return the document id and the window of a chunk by its number."""
        document = int(self.documents[chunk])
        start, end = (int(value) for value in self.spans[chunk])
        return self.document_id(document), Chunk(start, end, self._text(2 * document + 1)[start:end])

    def _text(self, part: int) -> str:
        start, end = int(self.boundaries[part]), int(self.boundaries[part + 1])
        return self.blob[start:end].tobytes().decode(*_ENCODING)


class DocumentWriter:
    """Writes a document store one document at a time; about 40 bytes of memory a document.

    Args:
        folder: Existing folder of the segment.
        known_hashes: Hashes of ids that are in the index already; ids of this writer are added to it.
    """

    def __init__(self, folder: Path, known_hashes: set[int]) -> None:
        self._folder = folder
        self._known = known_hashes
        self._file = (folder / _BLOB).open("wb")
        self._boundaries = array("q", [0])
        self._hashes = array("Q")
        self._documents = array("i")
        self._spans = array("i")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._file.close()

    def add(self, document: Document, chunks: Sequence[Chunk]) -> None:
        """Append one document and its windows."""
        number = len(self._hashes)
        name, text = document.id.encode(*_ENCODING), document.text.encode(*_ENCODING)
        if not name:
            raise UserError(f"document {number + 1:,}: the id is empty; give every document an id")
        digest = hash_id(document.id)
        if digest in self._known:
            raise UserError(
                f'document {number + 1:,}: id "{document.id}" is in the index already{self._earlier(digest)}; '
                "make ids unique"
            )
        self._known.add(digest)
        self._file.write(name)
        self._file.write(text)
        self._boundaries.append(self._boundaries[-1] + len(name))
        self._boundaries.append(self._boundaries[-1] + len(text))
        self._hashes.append(digest)
        for chunk in chunks:
            self._documents.append(number)
            self._spans.extend((chunk.start, chunk.end))

    def finish(self) -> DocumentStore:
        """Write the arrays and open the store."""
        self._file.close()
        _save(self._folder, self._boundaries, self._hashes, self._documents, self._spans)
        return DocumentStore.open(self._folder)

    def __len__(self) -> int:
        return len(self._hashes)

    def _earlier(self, digest: int) -> str:
        return f" (document {self._hashes.index(digest) + 1:,} has it)" if digest in self._hashes else ""


def hash_id(document_id: str) -> int:
    """Return the 64-bit hash that stands for an id; two of a million ids share one with a chance of 3e-8."""
    return int.from_bytes(hashlib.blake2b(document_id.encode(*_ENCODING), digest_size=8).digest(), "little")


def merge_documents(folders: Sequence[Path], folder: Path) -> DocumentStore:
    """Join the document stores of several segments, in order, into an existing folder."""
    stores = [DocumentStore.open(path) for path in folders]
    with (folder / _BLOB).open("wb") as target:
        for path in folders:
            with (path / _BLOB).open("rb") as source:
                shutil.copyfileobj(source, target, 1 << 20)
    boundaries = [np.zeros(1, dtype=np.int64)]
    documents = []
    count = 0
    for store in stores:
        boundaries.append(store.boundaries[1:] + boundaries[-1][-1])
        documents.append(store.documents + np.int32(count))
        count += len(store)
    _save(
        folder,
        np.concatenate(boundaries),
        np.concatenate([store.id_hashes for store in stores]),
        np.concatenate(documents),
        np.concatenate([store.spans for store in stores]),
    )
    return DocumentStore.open(folder)


def _save(folder: Path, boundaries: Any, hashes: Any, documents: Any, spans: Any) -> None:
    np.save(folder / "boundaries.npy", np.asarray(boundaries, dtype=np.int64))
    np.save(folder / "id_hashes.npy", np.asarray(hashes, dtype=np.uint64))
    np.save(folder / "chunk_documents.npy", np.asarray(documents, dtype=np.int32))
    np.save(folder / "chunk_spans.npy", np.asarray(spans, dtype=np.int32).reshape(-1, 2))


def _load(path: Path) -> NDArray[Any]:
    return np.asarray(np.load(path, mmap_mode="r"))


Encode = Callable[[list[str]], Any]
"""Maps texts to a scipy sparse ``(texts, V)`` array of weights >= 0."""

_NAMED_EMPTY = 20


@dataclass(frozen=True, slots=True)
class Segment:
    """An open segment."""

    entry: SegmentEntry
    folder: Path
    store: DocumentStore
    postings: Postings
    exact: ExactEngine
    fast: FastEngine | None

    @classmethod
    def open(cls, folder: Path, entry: SegmentEntry) -> Segment:
        """Map a segment's files."""
        store = DocumentStore.open(folder)
        postings = Postings.open(folder / "postings", chunks=entry.chunks)
        fast = None if entry.fast is None else fast_engine(entry.fast).open(folder, postings, store.documents)
        return cls(entry, folder, store, postings, ExactEngine(postings, store.documents), fast)

    def searcher(self, k: int, engine: Engine) -> SegmentEngine:
        """Return the engine to look for k documents with."""
        if self.fast is None or engine == "exact":
            return self.exact
        if engine == "auto" and k > self.fast.auto_up_to:
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
    """Join segments in order into an empty folder; impacts and document order stay as they are."""
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


def build_fast(folder: Path, store: DocumentStore, chunks: int, settings: IndexSettings) -> str | None:
    """Build the fast engine of a segment that the settings ask for, if they do; return which."""
    wanted = settings.engine
    if wanted == "auto":
        wanted = AUTO if chunks >= settings.block_max_from_chunks else "exact"
    if wanted == "exact":
        return None
    postings = Postings.open(folder / "postings", chunks=chunks)
    fast_engine(wanted).build(folder, postings, store.documents)
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
    return [Segment.open(folder / SEGMENTS / entry.name, entry) for entry in description.segments]
