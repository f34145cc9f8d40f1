"""Index documents with a model, search them, show why they matched; in soju's own index or in another engine.

`Index` is soju's own. `load_index` and `search_engine` do the same with OpenSearch and Qdrant.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from soju.core.config import Settings, apply_overrides, validate
from soju.core.errors import UserError
from soju.core.progress import track
from soju.core.results import Hit
from soju.core.run import Run
from soju.data.log import OnError, ReadLog
from soju.data.readers import read_rows
from soju.data.rows import DOCUMENTS, Document
from soju.report.contents import Expansion, Search
from soju.search.engines import SearchServer, server
from soju.search.folder import Engine, IndexSettings, WeightingSettings
from soju.search.hits import heaviest, to_hits
from soju.search.index import SparseIndex
from soju.search.opensearch import lint_passage, refuse
from soju.search.remote import (
    BulkLoader,
    CorpusFacts,
    DeadLetters,
    Item,
    LoadReport,
    Passage,
    WeightedCorpus,
    token_names,
)
from soju.sparse.config import SearchSettings
from soju.sparse.model import Model, TermEncoder, fingerprint_of, load, model_folder
from soju.sparse.static.encoder import StaticEncoder

MODEL = "model"
"""Folder inside an index that holds a copy of its model."""

AnyModel = Model | StaticEncoder | Run | str | Path
"""A loaded model, a static encoder just trained, or what `soju.load` takes."""
Documents = Mapping[str, str] | Iterable[str | Document]
"""Texts by id; texts, whose ids are then their numbers; or rows as `read_documents` yields them."""


class Index:
    """A searchable folder of documents with a copy of the model inside; make one with `build` or `open`.

    Args:
        vectors: The documents as weighted terms.
        model: What encodes texts.

    Example:
        >>> import soju
        >>> texts = {"heart": "The heart pumps blood.", "tea": "녹차는 따뜻한 물에 우린다."}
        >>> index = soju.Index.build(texts, "ko-en-static", folder / "index")
        >>> [hit.document_id for hit in index.search("심장과 피")]
        ['heart']
        >>> index.add({"rice": "쌀로 밥을 짓는다."})
        1
        >>> soju.Index.open(folder / "index").search("how to cook rice", k=1)[0].document_id
        'rice'
    """

    def __init__(self, vectors: SparseIndex, model: Model) -> None:
        self.vectors = vectors
        self.model = model

    def __repr__(self) -> str:
        return f"Index({str(self.vectors.folder)!r}, {self.documents:,} documents)"

    @classmethod
    def build(
        cls,
        documents: Documents,
        model: AnyModel,
        folder: str | Path,
        *,
        engine: Engine = "auto",
        overwrite: bool = False,
    ) -> Index:
        """Index documents in one pass with bounded memory; long ones are cut into passages.

        Args:
            documents: A mapping from id to text; texts, whose ids are their numbers; or `soju.Document` rows. They are
                read once, and their order breaks ties.
            model: A loaded model, the name ``ko-en-static``, a model or run folder, or a hub id.
            folder: Where the index goes; it appears whole or not at all.
            engine: ``auto`` adds block-max to the exact engine from 20,000 passages on.
            overwrite: Replace an index that is there.

        Returns:
            The opened index.

        Raises:
            UserError: If the folder is taken, there is no document, an id is empty or given twice, or there is no such
                model; nothing is left behind.

        Example:
            >>> import soju
            >>> soju.Index.build(["A heart.", "물"], "ko-en-static", folder / "built").documents
            2
        """
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            copy = Path(temporary) / MODEL
            if isinstance(model, StaticEncoder):
                model.save(copy)
                source = Model(model, copy)
            else:
                source = model if isinstance(model, Model) else load(model)
                shutil.copytree(source.folder, copy)
            encoder = source.encoder
            index = SparseIndex.build(
                folder,
                _rows(documents),
                encoder.encode_documents,
                encoder.terms,
                index_settings(encoder, source.search, engine=engine),
                fingerprint=source.fingerprint,
                prior_share_V=encoder.document_share_V,
                overwrite=overwrite,
            )
            copy.rename(folder / MODEL)
        return cls(index, Model(encoder, folder / MODEL))

    @classmethod
    def open(cls, folder: str | Path, model: str | Path | Run | None = None) -> Index:
        """Open an index.

        Args:
            folder: The index.
            model: Another place of the model it was made with; the copy inside the index when ``None``.

        Returns:
            The index, its arrays memory-mapped.

        Raises:
            UserError: If there is no index, or it was made with another model.
            IntegrityError: If a file is missing or altered.

        Example:
            >>> import soju
            >>> built = soju.Index.build(["A heart."], "ko-en-static", folder / "opened")
            >>> soju.Index.open(folder / "opened").documents
            1
        """
        folder = Path(folder)
        vectors = SparseIndex.open(folder)
        loaded = load(model if model is not None else folder / MODEL)
        if vectors.description.fingerprint != loaded.fingerprint:
            raise UserError(
                f"{folder}: was made with another model than {loaded.folder}; index the corpus again with this one"
            )
        return cls(vectors, loaded)

    def search(self, text: str, k: int = 10, *, engine: Engine = "auto") -> list[Hit]:
        """Find the documents that share terms with a text, in either language.

        Args:
            text: Korean or English.
            k: Most documents; fewer come back when fewer share a term.
            engine: ``auto`` takes the fastest exact one.

        Returns:
            Best first, equal scores in document order; each hit with its best passage and the terms that matched.

        Raises:
            UserError: If k is below 1, or the engine was not built.

        Example:
            >>> import soju
            >>> index = soju.Index.build(["The heart pumps blood."], "ko-en-static", folder / "searched")
            >>> (hit,) = index.search("심장")
            >>> hit.passage, hit.matched[0].term
            ('The heart pumps blood.', 'heart')
        """
        return self.vectors.search(self.model.encode_queries([text]), k, engine=engine)[0]

    def add(self, documents: Documents) -> int:
        """Append documents; results equal those of an index built at once.

        Args:
            documents: See `Documents`; the numbers of texts without ids go on from those in the index.

        Returns:
            How many were added.

        Raises:
            UserError: If an id is taken, or another process changed the index; it stays as it was.

        Example:
            >>> import soju
            >>> index = soju.Index.build(["A heart."], "ko-en-static", folder / "grown")
            >>> index.add(["Green tea.", soju.Document("rice", "쌀밥")]), index.documents
            (2, 3)
        """
        return self.vectors.add(_rows(documents, start=self.documents), self.model.encode_documents)

    @property
    def documents(self) -> int:
        """Number of documents."""
        return self.vectors.documents

    @property
    def passages(self) -> int:
        """Number of passages the documents were cut into."""
        return self.vectors.chunks


def index_settings(encoder: TermEncoder, search: SearchSettings, *, engine: Engine = "auto") -> IndexSettings:
    """Return the index settings for a model.

    A static one gets BM25 over its term counts, idf with the training text as prior; the weights of a neural one stay
    as they are.
    """
    if not isinstance(encoder, StaticEncoder):
        return IndexSettings(weighting=WeightingSettings(kind="as_is"), engine=engine)
    weighting = WeightingSettings(kind="bm25", k1=search.k1, b=search.b, prior_documents=search.prior_documents)
    return IndexSettings(weighting=weighting, engine=engine)


def search_index(
    index: SparseIndex, encoder: TermEncoder, queries: Sequence[str], *, k: int = 10, engine: Engine = "auto"
) -> list[Search]:
    """Search for several texts at once, in the form reports and the command line show."""
    found = index.search(encoder.encode_queries(queries), k, engine=engine)
    return [Search(query=query, engine="soju", hits=tuple(hits)) for query, hits in zip(queries, found, strict=True)]


def expand(encoder: TermEncoder, texts: Sequence[str], *, k: int = 20) -> list[Expansion]:
    """Return the k heaviest terms of each text, in the form reports and the command line show."""
    vectors = encoder.encode_queries(texts)
    return [
        Expansion(text=text, terms=tuple(heaviest(vectors, row, encoder.terms, k))) for row, text in enumerate(texts)
    ]


def read_documents(corpus: Sequence[str], on_error: OnError = "stop", log: ReadLog | None = None) -> Iterator[Document]:
    """Yield the documents of files; an empty corpus or, with ``stop``, broken rows raise at the end."""
    log = log or ReadLog()
    yield from read_rows(corpus, DOCUMENTS, log=log)
    if not log.kept and not log.reasons:
        raise UserError(f"{', '.join(corpus)}: no document; give a .jsonl, .tsv or .txt file with at least one")
    log.raise_if_broken(on_error)


def _rows(documents: Documents, *, start: int = 0) -> Iterator[Document]:
    if isinstance(documents, Mapping):
        yield from (Document(name, text) for name, text in documents.items())
        return
    for number, document in enumerate(documents, start=start):
        if isinstance(document, str):
            yield Document(str(number), document)
        elif isinstance(document, Document):
            yield document
        else:
            raise UserError(
                f"documents[{number}]: a {type(document).__name__} is no document; give a mapping from id to text, "
                "texts, or rows soju.Document(id, text)"
            )


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

    One code path gives every engine the same passages and weights; memory stays bounded, whatever the corpus. Wrap the
    index in `soju.search.remote.WeightedCorpus`.
    """
    source = load(model)
    encoder = source.encoder
    with tempfile.TemporaryDirectory(prefix="soju-") as temporary:
        index = SparseIndex.build(
            Path(temporary) / "index",
            read_documents(corpus, on_error, log),
            encoder.encode_documents,
            encoder.terms,
            index_settings(encoder, source.search, engine="exact"),
            fingerprint=source.fingerprint,
            prior_share_V=encoder.document_share_V,
        )
        yield encoder, index


def connect(engine: str, url: str | None) -> SearchServer:
    """Return an engine by its name and address."""
    if url is None:
        raise UserError(f"--engine {engine} needs --url: where the cluster, the server or the local folder is")
    return server(engine).connect(url)


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
        model: See `soju.load`.
        corpus: Files, globs or hub data sets of documents.
        name: Of the index or collection.
        target: The engine; its connection stays open.
        on_error: Whether broken rows of the corpus stop or are left out.
        overwrite: Replace an index of that name.
        settings: ``key=value``, see `OpenSearchSettings` and `QdrantSettings` in `soju.search`.
        dead_letters: Where passages go that the engine refuses; ``NAME.dead-letters.jsonl`` when ``None``.

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

    `settings` are ``key=value``, see `soju.search.opensearch.OpenSearchQuery`; Qdrant has none. Raises `UserError` if
    there is no such index, or it was made with another model.
    """
    meta = target.meta(name)
    if meta["fingerprint"] != fingerprint_of(model_folder(model)):
        raise UserError(f"{name}: was made with another model than {model}; give that one, or index the corpus again")
    encoder = load(model).encoder
    vectors = encoder.encode_queries([query])
    vectors.sort_indices()
    terms_T, weights_T = vectors.indices.astype(np.int32), vectors.data.astype(np.float32)
    terms_T, weights_T = terms_T[weights_T > 0], weights_T[weights_T > 0]
    names = token_names(tuple(encoder.terms), encoder.pieces)
    how = read_settings(settings, target.query_settings)
    found = target.search(name, terms_T, weights_T, names, k=k, meta=meta, settings=how)
    hits = to_hits(found, encoder.terms, terms_T, weights_T)
    return Search(query=query, engine=target.name, hits=tuple(hits))


def search_url(
    engine: str,
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
