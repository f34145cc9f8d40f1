"""Index a corpus with a model, search it, show what a text expands to. What ``soju index`` and ``soju search`` do."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from scipy.sparse import csr_array

from soju.core.errors import UserError
from soju.core.files import MANIFEST, sha256
from soju.core.language import language_of
from soju.core.records import Document
from soju.data.log import OnError, ReadLog
from soju.data.readers import read_rows
from soju.models.static_encoder import StaticEncoder
from soju.recipes.splade.config import SearchSettings
from soju.report.run_contents import Expansion, ExpansionTerm, Hit, MatchedTerm, Search
from soju.search.index import Engine, SparseIndex
from soju.search.index_settings import IndexSettings
from soju.search.weighting import WeightingSettings

MODEL = "model"
"""Folder inside an index that holds a copy of its model."""
PACKAGED_MODEL = "ko-en-static"
"""Name of the model that ships with soju, accepted wherever a model folder is."""


def open_model(model: str) -> tuple[StaticEncoder, str]:
    """Load a model and its fingerprint.

    Args:
        model: A model folder, a run folder (its ``final``), or `PACKAGED_MODEL`.

    Returns:
        The encoder, and the SHA-256 of its manifest.

    Raises:
        UserError: If there is no model.
    """
    folder = model_folder(model)
    return StaticEncoder.load(folder), sha256(folder / MANIFEST)


def model_folder(model: str) -> Path:
    """Resolve the name of a model to its folder; see `open_model`."""
    path = Path(model)
    if (path / "final" / "config.json").is_file():
        return path / "final"
    if not path.exists() and model == PACKAGED_MODEL:
        return Path(__file__).parents[2] / "packaged" / PACKAGED_MODEL
    return path


def index_settings(search: SearchSettings, *, engine: Engine = "auto") -> IndexSettings:
    """Return the index settings for a static model: BM25 over term counts, idf with the training text as prior."""
    weighting = WeightingSettings(kind="bm25", k1=search.k1, b=search.b, prior_documents=search.prior_documents)
    return IndexSettings(weighting=weighting, engine=engine)


def build_index(
    model: str,
    corpus: Sequence[str],
    folder: Path,
    *,
    settings: IndexSettings | None = None,
    on_error: OnError = "stop",
    overwrite: bool = False,
) -> SparseIndex:
    """Index the documents of files.

    Args:
        model: See `open_model`.
        corpus: Files, globs or hub data sets of documents.
        folder: Where the index goes, with a copy of the model inside.
        settings: Those for a static model when not given.
        on_error: Whether broken rows stop the building or are left out.
        overwrite: Replace an index that is there.

    Returns:
        The opened index.

    Raises:
        DataError: If rows of the corpus are broken; no index is left behind.
        UserError: If the folder is taken.
    """
    encoder, fingerprint = open_model(model)
    index = SparseIndex.build(
        folder,
        _read_documents(corpus, on_error),
        encoder.encode_documents,
        encoder.terms,
        settings or index_settings(SearchSettings()),
        fingerprint=fingerprint,
        prior_share_V=encoder.document_share_V,
        overwrite=overwrite,
    )
    shutil.copytree(model_folder(model), folder / MODEL, ignore=shutil.ignore_patterns("exports"))
    return index


def open_index(folder: Path, model: str | None = None) -> tuple[SparseIndex, StaticEncoder]:
    """Open an index together with the model it was made with, a copy of which lies inside.

    Args:
        folder: The index.
        model: Another place of the same model.

    Returns:
        Index and encoder.

    Raises:
        UserError: If there is no index or no model, or the model is another one.
    """
    index = SparseIndex.open(folder)
    source = Path(model) if model else folder / MODEL
    encoder = StaticEncoder.load(model_folder(str(source)))
    if encoder.terms != tuple(index.terms):
        raise UserError(f"{folder}: was made with another model than {source}; index the corpus again with this one")
    return index, encoder


def add_to_index(folder: Path, corpus: Sequence[str], *, on_error: OnError = "stop") -> tuple[SparseIndex, int]:
    """Add the documents of files to an index with the model inside it; returns the index and how many were added."""
    index, encoder = open_index(folder)
    added = index.add(_read_documents(corpus, on_error), encoder.encode_documents)
    return index, added


def search_index(
    index: SparseIndex, encoder: StaticEncoder, queries: Sequence[str], *, k: int = 10, engine: Engine = "auto"
) -> list[Search]:
    """Search, with the terms that matched."""
    found = index.search(encoder.encode_queries(queries), k, engine=engine)
    return [
        Search(
            query=query,
            engine="soju",
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
        for query, hits in zip(queries, found, strict=True)
    ]


def expand(encoder: StaticEncoder, texts: Sequence[str], *, k: int = 20) -> list[Expansion]:
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


def _read_documents(corpus: Sequence[str], on_error: OnError) -> Iterable[Document]:
    log = ReadLog()
    yield from read_rows(corpus, "documents", log=log)
    if not log.kept and not log.reasons:
        raise UserError(f"{', '.join(corpus)}: no document; give a .jsonl, .tsv or .txt file with at least one")
    log.raise_if_broken(on_error)
