"""The vectors of a corpus and of queries as files for engines soju does not talk to. What ``soju vectors`` does.

Shape letters: B = texts, V = terms in the vocabulary.

References:
    OpenSearch, "Neural sparse search using raw vectors" (``rank_features``, ``neural_sparse``, ``query_tokens``), and
    "Bulk API" (newline-delimited JSON). Elasticsearch, "Sparse vector query" (``query_vector``) and "Sparse vector
    field type": no dots in names, weights above 0, 9 significant bits kept. Anserini, ``JsonVectorCollection`` (called
    ``JsonSparseVectorCollection`` since 2026): ``vector`` maps a term to how often it is repeated;
    ``TsvStringTopicReader`` with ``-pretokenized -impact`` reads queries cut at white space.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from soju.core.errors import UserError
from soju.core.files import write_json
from soju.core.progress import track
from soju.data.log import OnError, ReadLog
from soju.data.rows import Document
from soju.search.folder import new_folder
from soju.search.opensearch import (
    VECTOR,
    OpenSearchSettings,
    document_body,
    index_body,
    lint_names,
    lint_passage,
    refuse,
)
from soju.search.remote import Passage, WeightedCorpus, token_names, unescape_token
from soju.sparse.export import VectorFormat
from soju.sparse.export.formats import MAX_WEIGHT, query_tokens
from soju.sparse.indexing import read_documents, weigh_corpus
from soju.sparse.model import TermEncoder

VECTOR_FORMATS: dict[VectorFormat, str] = {
    "opensearch": "index.json for PUT /INDEX, bulk-*.ndjson for POST /_bulk",
    "elasticsearch": "index.json for PUT /INDEX, bulk-*.ndjson for POST /_bulk",
    "anserini": "vectors-*.jsonl, a JsonVectorCollection of whole weights",
}
_BATCH = 256


def write_vectors(
    model: str,
    corpus: Sequence[str],
    folder: Path,
    form: VectorFormat,
    *,
    queries: Sequence[str] = (),
    name: str | None = None,
    quantisation: float = 100.0,
    on_error: OnError = "stop",
) -> tuple[dict[str, Any], ReadLog]:
    """Write a corpus, and queries when there are, in one format; the folder appears whole, with a manifest.

    Args:
        model: See `soju.load`.
        corpus: Files, globs or hub data sets of documents.
        folder: Where; must be free.
        form: One of `VECTOR_FORMATS`.
        queries: Files of queries, rows like documents.
        name: Index the bulk actions name; the folder's name when not given.
        quantisation: Factor before weights are rounded to whole numbers (``anserini``).
        on_error: Whether broken rows stop or are left out.

    Returns:
        What ``vectors.json`` says, and what was read and refused.

    Raises:
        UserError: If the folder is taken, rows are broken, or something does not fit the format.
    """
    log = ReadLog()
    with new_folder(folder) as temporary, weigh_corpus(model, corpus, on_error=on_error, log=log) as (encoder, index):
        weighted = WeightedCorpus(index)
        names = token_names(tuple(encoder.terms), encoder.pieces)
        refuse(lint_names(names))
        about: dict[str, Any] = {"format": form, **weighted.facts.to_json()}
        passages = _checked(track(weighted, "Writing"))
        if form == "anserini":
            about |= _write_anserini(temporary, passages, names, quantisation)
        else:
            meta = weighted.facts
            body = (
                index_body(OpenSearchSettings(), meta) if form == "opensearch" else elasticsearch_index(meta.to_json())
            )
            write_json(temporary / "index.json", body)
            rows = ((passage.id, document_body(passage, names)) for passage in passages)
            about["parts"] = write_bulk(temporary, name or folder.name, rows)
        if queries:
            read = read_documents(queries, on_error, log)
            about["queries"] = _write_queries(temporary, read, encoder, names, form, quantisation)
        about["empty_documents"] = index.empty_documents[0]
        write_json(temporary / "vectors.json", about)
    return about, log


def _checked(passages: Iterator[Passage]) -> Iterator[Passage]:
    """Refuse what an engine would refuse: a file cannot have dead letters."""
    for passage in passages:
        if fault := lint_passage(passage):
            raise UserError(f"document {passage.document_id[:60]!r}: {fault}; fix it and write the vectors again")
        yield passage


def _write_anserini(
    folder: Path, passages: Iterator[Passage], names: Sequence[str], quantisation: float
) -> dict[str, Any]:
    counts = Quantised()
    writer = PartWriter(folder, "vectors", "jsonl")
    try:
        for passage in passages:
            tokens = {names[t]: w for t, w in zip(passage.terms_T.tolist(), passage.weights_T.tolist(), strict=True)}
            writer.write(anserini_row(passage.id, passage.text, quantise(tokens, quantisation, counts)))
    finally:
        writer.close()
    return {
        "parts": writer.parts,
        "quantisation": quantisation,
        "weights": counts.weights,
        "dropped_weights": counts.dropped,
    }


def _write_queries(
    folder: Path,
    queries: Iterator[Document],
    encoder: TermEncoder,
    names: Sequence[str],
    form: VectorFormat,
    quantisation: float,
) -> dict[str, Any]:
    """Write ``queries.tsv`` for Anserini, ``queries.jsonl`` with the body of each search for the others."""
    counts = Quantised()
    written, without_terms = 0, list[str]()
    with (folder / ("queries.tsv" if form == "anserini" else "queries.jsonl")).open("w", encoding="utf-8") as file:
        for row in _query_rows(queries, encoder, names):
            tokens = row["query_tokens"]
            if form == "anserini":
                tokens = quantise(tokens, quantisation, counts)
            if not tokens:
                without_terms.append(row["id"])
                continue
            written += 1
            if form == "anserini":
                file.write(anserini_query(row["id"], tokens))
            else:
                body = query_body(tokens, field=VECTOR, engine=form)
                file.write(json.dumps({"id": row["id"], "text": row["text"], "body": body}, ensure_ascii=False) + "\n")
    return {"written": written, "without_terms": without_terms, "dropped_weights": counts.dropped}


def _query_rows(queries: Iterator[Document], encoder: TermEncoder, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    terms = [unescape_token(name) for name in names]
    while batch := list(islice(queries, _BATCH)):
        texts = [query.text for query in batch]
        yield from query_tokens([query.id for query in batch], texts, encoder.encode_queries(texts), terms)


def query_body(
    tokens: Mapping[str, float], *, field: str, size: int = 10, engine: VectorFormat = "opensearch"
) -> dict[str, Any]:
    """Render the body of a ``_search`` request for one query.

    Args:
        tokens: Its ``query_tokens``.
        field: The field that holds the documents' tokens.
        size: Number of hits wanted.
        engine: OpenSearch gets a ``neural_sparse`` query, Elasticsearch a ``sparse_vector`` query without pruning.

    Returns:
        What to send as JSON.

    Raises:
        UserError: If there is no token, a weight is not in (0, 64], or a name is not safe.
    """
    for token, weight in tokens.items():
        if not 0 < weight <= MAX_WEIGHT:
            raise UserError(f"{token!r} has weight {weight!r}; weights must lie in (0, {MAX_WEIGHT:g}]")
        unescape_token(token)
    if not tokens:
        raise UserError("the query has no token, so it matches nothing; send no request")
    if engine == "opensearch":
        return {"size": size, "query": {"neural_sparse": {field: {"query_tokens": dict(tokens)}}}}
    return {"size": size, "query": {"sparse_vector": {"field": field, "query_vector": dict(tokens), "prune": False}}}


PART_BYTES = 50_000_000
"""Size from which a bulk file goes on in the next: engines refuse requests above 100 MB."""


class PartWriter:
    """Writes lines into ``STEM-00000.SUFFIX``, ``STEM-00001.SUFFIX`` ... of a bounded size."""

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
    """Write documents as the bodies of bulk requests."""
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
