"""What did a document say, and where are its chunks? Texts in one blob, read through the operating system's cache.

Shape letters: D = documents, C = chunks.
"""

from __future__ import annotations

import hashlib
import shutil
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from soju.core.errors import UserError
from soju.data.records import Document
from soju.search.chunking import Chunk

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
        """Append one document and its windows.

        Args:
            document: The row.
            chunks: Its windows.

        Raises:
            UserError: If its id is empty or was given before.
        """
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
