"""Index a corpus with a model, search it, show what a text expands to. What ``soju index`` and ``soju search`` do.

Index and search with somebody else's engine: OpenSearch or Qdrant. What ``--engine opensearch|qdrant`` does.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from scipy.sparse import csr_array

from soju.core.config import Settings, apply_overrides, validate
from soju.core.errors import UserError
from soju.core.files import MANIFEST, sha256
from soju.core.language import language_of
from soju.core.progress import track
from soju.data.log import OnError, ReadLog
from soju.data.readers import read_rows
from soju.data.rows import Document
from soju.report.contents import Expansion, ExpansionTerm, Hit, MatchedTerm, Search
from soju.search import hits as search_hits
from soju.search.folder import Engine, IndexSettings
from soju.search.hits import to_hits
from soju.search.index import SparseIndex
from soju.search.opensearch import OpenSearchEngine, lint_passage, refuse
from soju.search.qdrant import QdrantEngine
from soju.search.remote import (
    BulkLoader,
    CorpusFacts,
    DeadLetters,
    Item,
    LoadReport,
    Passage,
    SearchServer,
    WeightedCorpus,
    token_names,
)
from soju.search.weighting import WeightingSettings
from soju.sparse.config import SearchSettings
from soju.sparse.model import ROUTER, TermEncoder, load_encoder
from soju.sparse.static.encoder import StaticEncoder, read_model_config

MODEL = "model"
"""Folder inside an index that holds a copy of its model."""
PACKAGED_MODEL = "ko-en-static"
"""Name of the model that ships with soju, accepted wherever a model folder is."""


def open_model(model: str) -> tuple[TermEncoder, str]:
    """Load a model and its fingerprint.

    Args:
        model: A model folder, a run folder (its ``best`` or else its ``final``), or `PACKAGED_MODEL`.

    Returns:
        The encoder, and the SHA-256 of its manifest.

    Raises:
        UserError: If there is no model.
    """
    folder = model_folder(model)
    return load_encoder(folder), fingerprint_of(folder)


def model_folder(model: str) -> Path:
    """Resolve the name of a model to its folder; see `open_model`."""
    path = Path(model)
    for part in ("best", "final"):
        if (path / part / "config.json").is_file():
            return path / part
    if not path.exists() and model == PACKAGED_MODEL:
        return Path(__file__).parents[1] / "packaged" / PACKAGED_MODEL
    return path


def fingerprint_of(folder: Path) -> str:
    """Return what names a model in its indexes: the SHA-256 of its manifest, or of its weights without one."""
    for name in (MANIFEST, "model.safetensors"):
        if (folder / name).is_file():
            return sha256(folder / name)
    raise UserError(f"{folder}: neither {MANIFEST} nor model.safetensors; give a model folder of safetensors")


def index_settings(encoder: TermEncoder, search: SearchSettings, *, engine: Engine = "auto") -> IndexSettings:
    """Return the index settings for a model.

    A static one gets BM25 over its term counts, idf with the training text as prior; the weights of a neural one stay
    as they are.
    """
    if not isinstance(encoder, StaticEncoder):
        return IndexSettings(weighting=WeightingSettings(kind="as_is"), engine=engine)
    weighting = WeightingSettings(kind="bm25", k1=search.k1, b=search.b, prior_documents=search.prior_documents)
    return IndexSettings(weighting=weighting, engine=engine)


def search_settings_of(folder: Path) -> SearchSettings:
    """Return the document weighting a model was trained and scored with; a neural one has none of its own."""
    if (folder / ROUTER).is_file():  # its config.json files lie in the folders of its modules
        return SearchSettings()
    return SearchSettings(**read_model_config(folder).get("about", {}).get("search", {}))


def index_documents(
    folder: Path,
    documents: Iterable[Document],
    model: Path,
    *,
    engine: Engine = "auto",
    overwrite: bool = False,
) -> SparseIndex:
    """Index documents and put a copy of the model inside, so that the index can be searched alone.

    Args:
        folder: Where the index goes.
        documents: Rows, read once.
        model: The model's folder.
        engine: Which engine to build.
        overwrite: Replace an index that is there.

    Returns:
        The opened index.

    Raises:
        UserError: If the folder is taken or a document is unusable; nothing is left behind then.
    """
    encoder = load_encoder(model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        copy = Path(shutil.copytree(model, Path(temporary) / MODEL))
        index = SparseIndex.build(
            folder,
            documents,
            encoder.encode_documents,
            encoder.terms,
            index_settings(encoder, search_settings_of(model), engine=engine),
            fingerprint=fingerprint_of(model),
            prior_share_V=encoder.document_share_V,
            overwrite=overwrite,
        )
        copy.rename(folder / MODEL)
    return index


def build_index(
    model: str,
    corpus: Sequence[str],
    folder: Path,
    *,
    engine: Engine = "auto",
    on_error: OnError = "stop",
    overwrite: bool = False,
) -> tuple[SparseIndex, ReadLog]:
    """Index the documents of files.

    Args:
        model: See `open_model`.
        corpus: Files, globs or hub data sets of documents.
        folder: Where the index goes, with a copy of the model inside.
        engine: Which engine to build.
        on_error: Whether broken rows stop the building or are left out.
        overwrite: Replace an index that is there.

    Returns:
        The opened index, and what was read and refused.

    Raises:
        DataError: If rows of the corpus are broken; no index is left behind.
        UserError: If the folder is taken.
    """
    log, source = ReadLog(), model_folder(model)
    rows = read_documents(corpus, on_error, log)
    return index_documents(folder, rows, source, engine=engine, overwrite=overwrite), log


def open_index(folder: Path, model: str | None = None) -> tuple[SparseIndex, TermEncoder]:
    """Open an index together with the model it was made with, a copy of which lies inside.

    Args:
        folder: The index.
        model: Another place of the same model.

    Returns:
        Index and encoder.

    Raises:
        UserError: If there is no index or no model, or the model is another one.
    """
    source = model_folder(model) if model else folder / MODEL
    index = SparseIndex.open(folder)
    encoder = load_encoder(source)
    if index.description.fingerprint != fingerprint_of(source):
        raise UserError(f"{folder}: was made with another model than {source}; index the corpus again with this one")
    return index, encoder


def add_to_index(
    model: str, corpus: Sequence[str], folder: Path, *, on_error: OnError = "stop"
) -> tuple[SparseIndex, int, ReadLog]:
    """Add the documents of files to an index of the same model; returns it, how many were added, and the log."""
    log = ReadLog()
    index, encoder = open_index(folder, model)
    added = index.add(read_documents(corpus, on_error, log), encoder.encode_documents)
    return index, added, log


def search_index(
    index: SparseIndex, encoder: TermEncoder, queries: Sequence[str], *, k: int = 10, engine: Engine = "auto"
) -> list[Search]:
    """Search, with the terms that matched."""
    found = index.search(encoder.encode_queries(queries), k, engine=engine)
    return [show_hits(query, hits) for query, hits in zip(queries, found, strict=True)]


def show_hits(query: str, hits: Sequence[search_hits.Hit], *, engine: str = "soju") -> Search:
    """Return what a search found in the form reports and the command line show."""
    return Search(
        query=query,
        engine=engine,
        hits=tuple(
            Hit(
                rank=rank,
                document_id=hit.document_id,
                score=hit.score,
                passage=hit.text,
                matched=tuple(
                    MatchedTerm(
                        term=term.term,
                        language=term.language,
                        query_weight=term.query_weight,
                        document_weight=term.document_weight,
                        contribution=term.contribution,
                    )
                    for term in hit.matched
                ),
            )
            for rank, hit in enumerate(hits, start=1)
        ),
    )


def expand(encoder: TermEncoder, texts: Sequence[str], *, k: int = 20) -> list[Expansion]:
    """Return the k heaviest terms of each text."""
    vectors = encoder.encode_queries(texts)
    return [Expansion(text=text, terms=_heaviest(vectors, row, encoder.terms, k)) for row, text in enumerate(texts)]


def _heaviest(vectors: csr_array, row: int, terms: Sequence[str], k: int) -> tuple[ExpansionTerm, ...]:
    start, stop = vectors.indptr[row : row + 2]
    weighted = zip(vectors.data[start:stop].tolist(), vectors.indices[start:stop].tolist(), strict=True)
    best = sorted(weighted, key=lambda pair: (-pair[0], pair[1]))[:k]
    return tuple(
        ExpansionTerm(term=terms[term], language=language_of(terms[term]), weight=weight) for weight, term in best
    )


def read_documents(corpus: Sequence[str], on_error: OnError, log: ReadLog) -> Iterator[Document]:
    """Yield the documents of files; an empty corpus or, with ``stop``, broken rows raise at the end."""
    yield from read_rows(corpus, "documents", log=log)
    if not log.kept and not log.reasons:
        raise UserError(f"{', '.join(corpus)}: no document; give a .jsonl, .tsv or .txt file with at least one")
    log.raise_if_broken(on_error)


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
        The encoder and the index; wrap it in `soju.search.remote.WeightedCorpus`.
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
