"""Index a corpus with a model, search it, show what a text expands to. What ``soju index`` and ``soju search`` do."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from scipy.sparse import csr_array

from soju.core.errors import UserError
from soju.core.files import MANIFEST, sha256
from soju.core.language import language_of
from soju.data.log import OnError, ReadLog
from soju.data.readers import read_rows
from soju.data.records import Document
from soju.report.run_contents import Expansion, ExpansionTerm, Hit, MatchedTerm, Search
from soju.search import hits as search_hits
from soju.search.index import SparseIndex
from soju.search.index_settings import Engine, IndexSettings
from soju.search.weighting import WeightingSettings
from soju.sparse.config import SearchSettings
from soju.sparse.encoders import ROUTER, TermEncoder, load_encoder
from soju.sparse.static.static_encoder import StaticEncoder, read_model_config

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
