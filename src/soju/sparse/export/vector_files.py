"""Vectors of a corpus as files other engines load: bulk files of OpenSearch and Elasticsearch, Anserini collections.

References:
    OpenSearch and Elasticsearch, "Bulk API" (newline-delimited JSON). Elasticsearch, "Sparse vector field type".
    Anserini, ``JsonVectorCollection`` (called ``JsonSparseVectorCollection`` since 2026): ``vector`` maps a term to how
    often it is repeated; ``TsvStringTopicReader`` with ``-pretokenized -impact`` reads queries cut at white space.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from soju.core.errors import UserError

PART_BYTES = 50_000_000
"""Size from which a bulk file goes on in the next: engines refuse requests above 100 MB."""


class PartWriter:
    """Writes lines into ``STEM-00000.SUFFIX``, ``STEM-00001.SUFFIX`` ... of a bounded size.

    Args:
        folder: Existing folder.
        stem: Start of the names.
        suffix: End of the names, without a dot.
        part_bytes: Bytes from which the next part begins; a row is never cut.
    """

    def __init__(self, folder: Path, stem: str, suffix: str, *, part_bytes: int = PART_BYTES) -> None:
        self._folder, self._stem, self._suffix, self._limit = folder, stem, suffix, part_bytes
        self._file: IO[bytes] | None = None
        self._size = 0
        self.parts: list[str] = []

    def write(self, *rows: Any) -> None:
        """Append rows that belong together, one JSON object a line."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "replace")
        if self._file is None or self._size + len(text) > self._limit:
            self.close()
            name = f"{self._stem}-{len(self.parts):05d}.{self._suffix}"
            self._file, self._size = (self._folder / name).open("wb"), 0
            self.parts.append(name)
        self._file.write(text)
        self._size += len(text)

    def close(self) -> None:
        """Close the last part."""
        if self._file:
            self._file.close()
        self._file = None


def write_bulk(
    folder: Path, index: str, rows: Iterable[tuple[str, Mapping[str, Any]]], *, part_bytes: int = PART_BYTES
) -> list[str]:
    """Write documents as the bodies of bulk requests.

    Args:
        folder: Existing folder.
        index: Index the actions name.
        rows: Id and body of each document.
        part_bytes: Size of a part.

    Returns:
        Names of the parts.
    """
    writer = PartWriter(folder, "bulk", "ndjson", part_bytes=part_bytes)
    try:
        for name, body in rows:
            writer.write({"index": {"_index": index, "_id": name}}, body)
    finally:
        writer.close()
    return writer.parts


def elasticsearch_index(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body that creates an Elasticsearch index for documents of ours; weights keep 9 significant bits."""
    properties = {
        "document_id": {"type": "keyword"},
        "number": {"type": "long"},
        "text": {"type": "text"},
        "start": {"type": "integer"},
        "end": {"type": "integer"},
        "tokens": {"type": "sparse_vector"},
    }
    return {"mappings": {"_meta": {"soju": dict(meta)}, "properties": properties}}


@dataclass(slots=True)
class Quantised:
    """What rounding to whole numbers did."""

    weights: int = 0
    dropped: int = 0
    """Weights that round to 0 and are left out."""


def quantise(tokens: Mapping[str, float], factor: float, counts: Quantised) -> dict[str, int]:
    """Return ``round(weight * factor)`` of each token, without those that round to 0, which are counted."""
    whole = {token: round(weight * factor) for token, weight in tokens.items()}
    kept = {token: weight for token, weight in whole.items() if weight > 0}
    counts.weights += len(whole)
    counts.dropped += len(whole) - len(kept)
    return kept


def anserini_row(name: str, text: str, vector: Mapping[str, int]) -> dict[str, Any]:
    """Return one document of a ``JsonVectorCollection``."""
    return {"id": name, "contents": text, "vector": dict(vector)}


def anserini_query(name: str, vector: Mapping[str, int]) -> str:
    """Return one line of a query file: the id, a tab, and each token as often as it weighs.

    Args:
        name: Id of the query, without tabs and line breaks.
        vector: Whole weights by token; tokens have no white space.

    Returns:
        The line, with its line feed.

    Raises:
        UserError: If the id would break the line.
    """
    if any(character in name for character in "\t\r\n"):
        raise UserError(f"query id {name!r} holds a tab or a line break, which a TSV file cannot; rename it")
    return f"{name}\t{' '.join(token for token, weight in vector.items() for _ in range(weight))}\n"
