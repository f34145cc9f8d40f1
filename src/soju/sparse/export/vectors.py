"""Write the vectors of a corpus for engines soju does not talk to itself. What ``soju vectors`` does."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from soju.core.errors import UserError
from soju.core.files import write_json
from soju.core.progress import track
from soju.data.log import OnError, ReadLog
from soju.data.records import Document
from soju.search.index_folder import new_folder
from soju.search.opensearch import VECTOR, OpenSearchSettings, document_body, index_body
from soju.search.passages import Passage, WeightedCorpus
from soju.search.token_lint import lint_names, lint_passage, refuse
from soju.search.token_names import token_names, unescape_token
from soju.sparse.encoders import TermEncoder
from soju.sparse.engines import weigh_corpus
from soju.sparse.export.query_tokens import query_tokens, search_body
from soju.sparse.export.vector_files import (
    PartWriter,
    Quantised,
    anserini_query,
    anserini_row,
    elasticsearch_index,
    quantise,
    write_bulk,
)
from soju.sparse.indexing import read_documents

VectorFormat = Literal["opensearch", "elasticsearch", "anserini"]
FORMATS: dict[VectorFormat, str] = {
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
        model: See `soju.sparse.indexing.open_model`.
        corpus: Files, globs or hub data sets of documents.
        folder: Where; must be free.
        form: One of `FORMATS`.
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
            raise UserError(f"document {passage.document_id[:60]!r}: {fault}; mend it and write the vectors again")
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
                body = search_body(tokens, field=VECTOR, engine=form)
                file.write(json.dumps({"id": row["id"], "text": row["text"], "body": body}, ensure_ascii=False) + "\n")
    return {"written": written, "without_terms": without_terms, "dropped_weights": counts.dropped}


def _query_rows(queries: Iterator[Document], encoder: TermEncoder, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    terms = [unescape_token(name) for name in names]
    while batch := list(islice(queries, _BATCH)):
        texts = [query.text for query in batch]
        yield from query_tokens([query.id for query in batch], texts, encoder.encode_queries(texts), terms)
