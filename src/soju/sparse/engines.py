"""Index and search with somebody else's engine: OpenSearch or Qdrant. What ``--engine opensearch|qdrant`` does."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from soju.core.config import Settings, apply_overrides, validate
from soju.core.errors import UserError
from soju.core.progress import track
from soju.data.log import OnError, ReadLog
from soju.report.run_contents import Search
from soju.search.best_passages import to_hits
from soju.search.bulk_load import BulkLoader, DeadLetters, Item, LoadReport
from soju.search.index import SparseIndex
from soju.search.opensearch_client import OpenSearchEngine
from soju.search.passages import CorpusFacts, Passage, WeightedCorpus
from soju.search.qdrant import QdrantEngine
from soju.search.server import SearchServer
from soju.search.token_lint import lint_passage, refuse
from soju.search.token_names import token_names
from soju.sparse.encoders import TermEncoder
from soju.sparse.indexing import (
    fingerprint_of,
    index_settings,
    model_folder,
    open_model,
    read_documents,
    search_settings_of,
    show_hits,
)

RemoteEngine = Literal["opensearch", "qdrant"]
SettingsT = TypeVar("SettingsT", bound=Settings)


@dataclass(frozen=True, slots=True)
class Loaded:
    """An index in another engine, just made."""

    facts: CorpusFacts
    report: LoadReport
    empty: tuple[int, tuple[str, ...]]
    """Documents without a known term, and the ids of the first."""
    dead_letters: Path
    log: ReadLog


@contextmanager
def weigh_corpus(
    model: str, corpus: Sequence[str], *, on_error: OnError = "stop", log: ReadLog
) -> Iterator[tuple[TermEncoder, SparseIndex]]:
    """Encode a corpus into an index of ours in a temporary folder, from which other forms are written.

    One code path gives every engine the same passages and weights; memory stays bounded, whatever the corpus.

    Args:
        model: See `soju.sparse.indexing.open_model`.
        corpus: Files, globs or hub data sets of documents.
        on_error: Whether broken rows stop or are left out.
        log: Filled with what was read and refused.

    Yields:
        The encoder and the index; wrap it in `soju.search.passages.WeightedCorpus`.
    """
    folder = model_folder(model)
    encoder, fingerprint = open_model(model)
    with tempfile.TemporaryDirectory(prefix="soju-") as temporary:
        index = SparseIndex.build(
            Path(temporary) / "index",
            read_documents(corpus, on_error, log),
            encoder.encode_documents,
            encoder.terms,
            index_settings(encoder, search_settings_of(folder), engine="exact"),
            fingerprint=fingerprint,
            prior_share_V=encoder.document_share_V,
        )
        yield encoder, index


def connect(engine: RemoteEngine, url: str | None) -> SearchServer:
    """Return an engine by its name and address."""
    if url is None:
        raise UserError(f"--engine {engine} needs --url: where the cluster, the server or the local folder is")
    return OpenSearchEngine.connect(url) if engine == "opensearch" else QdrantEngine.connect(url)


def load_index(
    model: str,
    corpus: Sequence[str],
    name: str,
    target: SearchServer,
    *,
    on_error: OnError = "stop",
    overwrite: bool = False,
    settings: Sequence[str] = (),
    dead_letters: Path | None = None,
) -> Loaded:
    """Index the documents of files in another engine.

    Args:
        model: See `soju.sparse.indexing.open_model`.
        corpus: Files, globs or hub data sets of documents.
        name: Of the index or collection.
        target: The engine; its connection stays open.
        on_error: Whether broken rows of the corpus stop or are left out.
        overwrite: Replace an index of that name.
        settings: ``key=value``, see `OpenSearchSettings` and `QdrantSettings` in `soju.search`.
        dead_letters: Where passages go that the engine refuses; ``NAME.dead-letters.jsonl`` when open.

    Returns:
        What was stored and what failed; the caller tells.

    Raises:
        UserError: If the index exists, names or weights do not fit the engine, or it takes nothing.
    """
    log = ReadLog()
    # 1. Refuse what can be refused before anything is encoded.
    chosen: Any = read_settings(settings, target.index_settings)
    if not overwrite and target.exists(name):
        raise UserError(f"{name}: exists already; choose another name or --overwrite it")
    path = dead_letters or Path(f"{name}.dead-letters.jsonl")
    with DeadLetters(path) as dead, weigh_corpus(model, corpus, on_error=on_error, log=log) as (encoder, index):
        # 2. Chunks, BM25 and idf as in an index of ours; look for what the engine would refuse, fold or cut off.
        weighted = WeightedCorpus(index)
        facts = weighted.facts
        names = token_names(tuple(encoder.terms), encoder.pieces)
        refuse(target.faults(chosen, facts, names))
        # 3. Make the index and send the passages.
        target.create(name, chosen, facts, overwrite=overwrite)
        loader = BulkLoader(target.sender(name), dead, chosen.bulk)
        report = loader.load(_items(track(weighted, "Sending"), target, chosen, names))
        # 4. Make them findable.
        target.refresh(name)
        return Loaded(facts, report, index.empty_documents, path, log)


def search_engine(
    target: SearchServer,
    name: str,
    query: str,
    model: str,
    *,
    k: int = 10,
    settings: Sequence[str] = (),
) -> Search:
    """Search an index that `load_index` made, with the terms that matched.

    Args:
        target: The engine.
        name: Of the index or collection.
        query: Text of the query.
        model: The model it was made with.
        k: Most documents.
        settings: ``key=value``, see `soju.search.opensearch.OpenSearchQuery`; Qdrant has none.

    Returns:
        The best documents, best first.

    Raises:
        UserError: If there is no such index, or it was made with another model.
    """
    meta = target.meta(name)
    if meta["fingerprint"] != fingerprint_of(model_folder(model)):
        raise UserError(f"{name}: was made with another model than {model}; give that one, or index the corpus again")
    encoder, _ = open_model(model)
    vectors = encoder.encode_queries([query])
    vectors.sort_indices()
    terms_T, weights_T = vectors.indices.astype(np.int32), vectors.data.astype(np.float32)
    terms_T, weights_T = terms_T[weights_T > 0], weights_T[weights_T > 0]
    names = token_names(tuple(encoder.terms), encoder.pieces)
    how = read_settings(settings, target.query_settings)
    found = target.search(name, terms_T, weights_T, names, k=k, meta=meta, settings=how)
    return show_hits(query, to_hits(found, encoder.terms, terms_T, weights_T), engine=target.name)


def search_url(
    engine: RemoteEngine,
    url: str | None,
    name: str,
    query: str,
    model: str | None,
    *,
    k: int = 10,
    settings: Sequence[str] = (),
) -> Search:
    """Connect, search, close: `search_engine` for the command line."""
    if model is None:
        raise UserError(f"--engine {engine} needs --model: the engine keeps the vectors, not the model")
    with closing(connect(engine, url)) as target:
        return search_engine(target, name, query, model, k=k, settings=settings)


def read_settings(overrides: Sequence[str], kind: type[SettingsT]) -> SettingsT:
    """Return settings from ``key=value`` texts."""
    return validate(apply_overrides({}, list(overrides)), kind, place="--set")


def _items(passages: Iterable[Passage], target: SearchServer, settings: Any, names: Sequence[str]) -> Iterator[Item]:
    """Yield what is sent of each passage, or why it must not be."""
    for passage in passages:
        yield Item(passage.id, target.body(passage, settings, names), lint_passage(passage))
