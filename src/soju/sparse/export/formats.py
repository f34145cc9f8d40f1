"""Write a model in the formats of other programs. What ``soju export`` does.

Write the vectors of a corpus for engines soju does not talk to itself. What ``soju vectors`` does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

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
from soju.search.weighting import idf
from soju.sparse.export.tables import (
    PartWriter,
    Quantised,
    anserini_query,
    anserini_row,
    elasticsearch_index,
    quantise,
    query_tokens,
    search_body,
    write_bulk,
    write_term_table,
    write_token_table,
)
from soju.sparse.indexing import read_documents, weigh_corpus
from soju.sparse.model import TermEncoder
from soju.sparse.static.encoder import StaticEncoder

Format = Literal["tsv", "query-tokens", "stock-static", "low-rank", "onnx", "inference-free"]
FORMATS: dict[Format, str] = {
    "tsv": "a file of source, target and weight",
    "query-tokens": "a JSONL file of the weighted terms of every piece, for OpenSearch and its kin",
    "stock-static": "a SparseEncoder folder of the unexpanded side: one weight a piece",
    "low-rank": "a SparseEncoder folder of the expanded side, approximate",
    "onnx": "a folder for onnxruntime: a graph that ends in the heaviest terms",
    "inference-free": "a SparseEncoder folder whose queries are looked up in an idf table",
}


def export(
    encoder: TermEncoder, target: Path, form: Format, *, prior_documents: float = 10_000, hidden_size: int = 512
) -> None:
    """Write one format of a static model.

    Args:
        encoder: The model.
        target: File or folder, must not exist.
        form: One of `FORMATS` but ``onnx``, which is `export_graph`, and ``inference-free``, which is
            `soju.sparse.export.inference_free.make_inference_free`.
        prior_documents: Weight of the training text in the idf that query weights carry outside an index of ours.
        hidden_size: Width of the low-rank form.

    Raises:
        UserError: If the target exists, or the model is a neural one, which is in its stock form already.
    """
    _refuse_taken(target)
    if not isinstance(encoder, StaticEncoder):
        raise UserError(
            "a neural model is saved as sentence-transformers loads it; copy its folder, "
            "or use --to onnx or inference-free"
        )
    if form == "tsv":
        write_term_table(target, encoder.translations_VV, encoder.terms)
    elif form == "query-tokens":
        idf_V = training_idf(encoder, prior_documents)
        write_token_table(target, encoder.query_VV, encoder.pieces, encoder.terms, idf_V=idf_V)
    elif form == "stock-static":
        from soju.sparse.export.stock import own_term_weights, save_stock_static

        weights_V = own_term_weights(encoder.canonical_VV, training_idf(encoder, prior_documents))
        save_stock_static(target, encoder.tokenizer, weights_V)
    else:
        from soju.sparse.export.stock import factorise_codes, save_low_rank

        save_low_rank(target, factorise_codes(encoder.query_VV, hidden_size=hidden_size), encoder.tokenizer)


def export_graph(
    encoder: TermEncoder, target: Path, *, top_terms: int = 128, int8: bool = False, fingerprint: str
) -> dict[str, Any]:
    """Write a neural model as an ONNX graph that ends in the heaviest terms.

    Args:
        encoder: The model; its weights become float32.
        target: Folder, must not exist.
        top_terms: Terms to keep of each text.
        int8: Also write a graph with int8 weights.
        fingerprint: What names the model, see `soju.sparse.indexing.fingerprint_of`.

    Returns:
        What was written and measured, see `soju.sparse.export.onnx.export_onnx`.

    Raises:
        UserError: If the target exists, the model is a static one, or the graph differs from it.
    """
    _refuse_taken(target)
    if isinstance(encoder, StaticEncoder):
        forms = ", ".join(form for form in FORMATS if form not in ("onnx", "inference-free"))
        raise UserError(f"a static model has no network to export as a graph; choose --to {forms}")
    from soju.sparse.export.onnx import OnnxSource, export_onnx
    from soju.sparse.neural_encoders import NeuralEncoder

    assert isinstance(encoder, NeuralEncoder)
    model = encoder.model.float()
    source = OnnxSource(
        model=model[0].model,
        tokenizer=model.tokenizer,
        encode=model.encode_sparse,
        terms=encoder.terms,
        max_length=model[0].max_seq_length,
        activations=2 if model[1].activation_function == "log1p_relu" else 1,
        about={
            "prompt": model.prompts.get(model.default_prompt_name or "", ""),
            "similarity": model.similarity_fn_name,
            "source_sha256": fingerprint,
        },
    )
    return export_onnx(target, source, k=top_terms, int8=int8)


def _refuse_taken(target: Path) -> None:
    if target.exists():
        raise UserError(f"{target}: exists already; give another name or remove it first")


def training_idf(encoder: StaticEncoder, prior_documents: float) -> NDArray[np.float32]:
    """Return the idf of the training text alone, ``(V,)``, of at least one document: there is no index to count yet."""
    none_V = np.zeros(len(encoder.terms), np.int64)
    return idf(none_V, 0, prior_documents=max(prior_documents, 1.0), prior_share_V=encoder.document_share_V)


VectorFormat = Literal["opensearch", "elasticsearch", "anserini"]
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
