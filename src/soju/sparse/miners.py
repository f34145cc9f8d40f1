"""What finds candidates for negatives, and what scores them: BM25, sparse models, dense models.

Shape letters: D = documents, V = terms, Q = questions, N = vectors' dimensions, K = some documents.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, vstack

from soju.core.errors import UserError
from soju.core.model_folder import STOCK_MODULES, find_model_folder
from soju.core.progress import track
from soju.data.rows import TermRow
from soju.search.exact import ExactEngine
from soju.search.folder import bm25_impact, idf
from soju.search.lexical import K1, Analyzer, B, Bm25Searcher, Dictionary, KoreanEnglishAnalyzer, Ranking
from soju.search.postings import Postings
from soju.sparse.config import SearchSettings
from soju.sparse.model import TermEncoder, fingerprint_of, load_encoder, model_folder, search_settings_of
from soju.sparse.negatives import Question
from soju.sparse.static.encoder import MODEL_TYPE, StaticEncoder
from soju.teachers.dense import Embeddings, SentenceTransformerTeacher, Teacher, cached_embeddings

BM25 = "bm25"
_BATCH = 1024
_BLOCK = 16_384
"""Document vectors in memory at a time."""

Identity = Mapping[str, str | int | float | None]


class Miner(Protocol):
    """Finds, among D documents, those that look like answers."""

    def search(self, questions: Sequence[Question], k: int) -> Ranking:
        """Return, for each question, at most k documents best first, and their scores."""


class Judge(Protocol):
    """Scores any of D documents for a question; higher is closer."""

    def score(self, questions: Sequence[Question], documents: Sequence[NDArray[np.int64]]) -> list[NDArray[np.float32]]:
        """Return the scores of some documents, K by question, ``(K,)`` each."""


@dataclass(frozen=True, slots=True)
class Bm25Model:
    """BM25 over morphemes and stems; a question in another language than its answer is looked up in a dictionary."""

    analyzer: Analyzer
    dictionary: Dictionary | None = None

    @property
    def identity(self) -> Identity:
        """What its rankings depend on, but for the dictionary's rows."""
        return {"model": BM25, "k1": K1, "b": B, "dictionary": int(self.dictionary is not None)}

    def over(self, documents: Sequence[str], questions: Sequence[Question]) -> Bm25Miner:
        """Index documents.

        Args:
            documents: D texts.
            questions: All that will be asked.

        Returns:
            The miner.

        Raises:
            UserError: If a question is in another language than its answer and there is no dictionary.
        """
        crossing = next((question for question in questions if question.crosses_languages), None)
        if crossing is not None and self.dictionary is None:
            raise UserError(
                f'"{crossing.query[:60]}" is in another language than its answer, where BM25 finds names and numbers '
                "only; give a dictionary with --terms FILE, or mine with --miner ko-en-static"
            )
        return Bm25Miner(Bm25Searcher(documents, self.analyzer), self.dictionary)


class Bm25Miner:
    """`Bm25Model` over documents."""

    def __init__(self, searcher: Bm25Searcher, dictionary: Dictionary | None) -> None:
        self._searcher = searcher
        self._dictionary = dictionary

    def search(self, questions: Sequence[Question], k: int) -> Ranking:
        """Return, for each question, at most k documents best first, and their scores."""
        crossing = [question.crosses_languages for question in questions]
        plain = zip(*self._searcher.search([q.query for q in questions if not q.crosses_languages], k), strict=True)
        looked_up = plain
        if self._dictionary is not None:
            weights = self._dictionary.expand([q.query for q in questions if q.crosses_languages])
            looked_up = zip(*self._searcher.search_weighted(weights, k), strict=True)
        found = [next(looked_up if crosses else plain) for crosses in crossing]
        return [documents for documents, _ in found], [scores for _, scores in found]


class SparseModel:
    """A static or neural sparse encoder, weighted as its index would be."""

    def __init__(self, folder: Path) -> None:
        self._encoder = load_encoder(folder)
        static = isinstance(self._encoder, StaticEncoder)
        self._settings = search_settings_of(folder) if static else SearchSettings()
        self.identity: Identity = {"model": fingerprint_of(folder)}

    def over(self, documents: Sequence[str], questions: Sequence[Question]) -> SparseRanker:
        """Encode documents; questions are not needed."""
        del questions
        starts = range(0, len(documents), _BATCH)
        batches = [
            self._encoder.encode_documents(documents[start : start + _BATCH]) for start in track(starts, "documents")
        ]
        return SparseRanker(self._encoder, csr_array(vstack(batches, format="csr")), self._settings)


class SparseRanker:
    """Scores by the dot product of query weights and impacts, unitless.

    Those of a neural encoder are what it says. Of a static one, documents have BM25 impacts and query weights carry idf
    over these documents, as in `soju.search.index.SparseIndex`.

    Args:
        encoder: Encodes queries.
        documents_DV: What it gave for the documents.
        settings: Weighting of the documents of a static encoder.
    """

    def __init__(self, encoder: TermEncoder, documents_DV: csr_array, settings: SearchSettings) -> None:
        self._encoder = encoder
        self._idf_V: NDArray[np.float32] | None = None
        documents_DV.sum_duplicates()
        if isinstance(encoder, StaticEncoder):
            documents_DV = _bm25_impacts(documents_DV, settings)
            frequency_V = np.bincount(documents_DV.indices, minlength=documents_DV.shape[1])
            prior = settings.prior_documents
            share_V = encoder.document_share_V
            self._idf_V = idf(frequency_V, documents_DV.shape[0], prior_documents=prior, prior_share_V=share_V)
        columns = documents_DV.tocsc()
        columns.sort_indices()
        offsets, numbers = columns.indptr.astype(np.int64), columns.indices.astype(np.int32)
        size = documents_DV.shape[0]
        self._postings = Postings(offsets, numbers, columns.data.astype(np.float32), size)
        self._engine = ExactEngine(self._postings, np.arange(size, dtype=np.int32))

    def search(self, questions: Sequence[Question], k: int) -> Ranking:
        """Return, for each question, at most k documents that share a term with it, best first, and their scores."""
        found = [self._engine.search(terms_T, weights_T, k) for terms_T, weights_T in self._weighted(questions)]
        return [documents.astype(np.int64) for documents, _ in found], [scores for _, scores in found]

    def score(self, questions: Sequence[Question], documents: Sequence[NDArray[np.int64]]) -> list[NDArray[np.float32]]:
        """Return the scores of some documents, K by question, ``(K,)`` each."""
        weighted = zip(self._weighted(questions), documents, strict=True)
        return [
            self._postings.weights(some_K.astype(np.int32), terms_T) @ weights_T
            for (terms_T, weights_T), some_K in weighted
        ]

    def _weighted(self, questions: Sequence[Question]) -> list[tuple[NDArray[np.int32], NDArray[np.float32]]]:
        vectors_QV = self._encoder.encode_queries([question.query for question in questions])
        weighted = []
        for start, stop in zip(vectors_QV.indptr[:-1], vectors_QV.indptr[1:], strict=True):
            terms_T, weights_T = vectors_QV.indices[start:stop], vectors_QV.data[start:stop].astype(np.float32)
            if self._idf_V is not None:
                weights_T = weights_T * self._idf_V[terms_T]
            weighted.append((terms_T.astype(np.int32), weights_T))
        return weighted


def _bm25_impacts(counts_DV: csr_array, settings: SearchSettings) -> csr_array:
    lengths_D = np.asarray(counts_DV.sum(axis=1), np.float32).ravel()
    filled = lengths_D[lengths_D > 0]
    average = float(filled.mean()) if len(filled) else 1.0
    lengths_P = np.repeat(lengths_D, np.diff(counts_DV.indptr))
    impacts_P = bm25_impact(counts_DV.data, lengths_P, k1=settings.k1, b=settings.b, average_length=average)
    return csr_array((impacts_P, counts_DV.indices, counts_DV.indptr), shape=counts_DV.shape)


class DenseModel:
    """A dense model, whose vectors are kept on disk."""

    def __init__(self, teacher: Teacher, cache: Path) -> None:
        self._teacher = teacher
        self._cache = cache
        self.identity: Identity = teacher.identity

    def over(self, documents: Sequence[str], questions: Sequence[Question]) -> DenseRanker:
        """Embed documents and questions, each text once."""
        texts = list(dict.fromkeys([*documents, *(question.query for question in questions)]))
        rows = {text: row for row, text in enumerate(texts)}
        return DenseRanker(cached_embeddings(self._teacher, texts, self._cache), rows, len(documents))


class DenseRanker:
    """Scores by cosine, in [-1, 1].

    Args:
        vectors: Unit vectors of the D documents, then of the questions that are no documents.
        rows: Where the vector of a text stands.
        documents: D.
    """

    def __init__(self, vectors: Embeddings, rows: Mapping[str, int], documents: int) -> None:
        self._vectors = vectors
        self._rows = rows
        self._documents = documents

    def search(self, questions: Sequence[Question], k: int) -> Ranking:
        """Return, for each question, the k documents with the largest cosine, best first, and the cosines."""
        queries_QN = self._queries(questions)
        best: list[tuple[NDArray[np.int64], NDArray[np.float32]]] = [(np.empty(0, np.int64), np.empty(0, np.float32))]
        best *= len(questions)
        for start in range(0, self._documents, _BLOCK):
            scores_QD = queries_QN @ self._vectors[start : min(start + _BLOCK, self._documents)].T
            numbers_D = np.arange(start, start + scores_QD.shape[1])
            best = [
                _best(np.concatenate([numbers, numbers_D]), np.concatenate([scores, scores_D]), k)
                for (numbers, scores), scores_D in zip(best, scores_QD, strict=True)
            ]
        return [numbers for numbers, _ in best], [scores for _, scores in best]

    def score(self, questions: Sequence[Question], documents: Sequence[NDArray[np.int64]]) -> list[NDArray[np.float32]]:
        """Return the cosines of some documents, K by question, ``(K,)`` each."""
        queries_QN = self._queries(questions)
        return [self._vectors[some_K] @ query_N for query_N, some_K in zip(queries_QN, documents, strict=True)]

    def _queries(self, questions: Sequence[Question]) -> NDArray[np.float32]:
        return self._vectors[[self._rows[question.query] for question in questions]]


def _best(
    documents: NDArray[np.int64], scores: NDArray[np.float32], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the k best, best first, equal scores by document; scores may be negative."""
    if len(scores) > k:  # all that tie with the k-th stay until the sort has decided
        keep = scores >= np.partition(scores, len(scores) - k)[len(scores) - k]
        documents, scores = documents[keep], scores[keep]
    order = np.lexsort((documents, -scores))[:k]
    return documents[order], scores[order]


def open_model(name: str, *, cache: Path, prompt: str | None = None) -> SparseModel | DenseModel:
    """Open a sparse or a dense model, told apart by what its folder says it is.

    Args:
        name: ``ko-en-static``, a folder of a model or a run, ``package:NAME``, or a hub id.
        cache: Folder that keeps the vectors of a dense model.
        prompt: Put before every text of a dense model.

    Returns:
        The model.

    Raises:
        UserError: If there is no such model.
    """
    folder = model_folder(name)
    if not folder.is_dir():
        folder = find_model_folder(name).path
    if is_sparse(folder):
        return SparseModel(folder)
    source = str(folder) if Path(name).exists() else name
    return DenseModel(SentenceTransformerTeacher(source, prompt=prompt), cache)


def is_sparse(folder: Path) -> bool:
    """Tell whether a folder holds a static or neural sparse encoder."""
    try:
        if (folder / STOCK_MODULES).is_file():
            modules = json.loads((folder / STOCK_MODULES).read_text(encoding="utf-8"))
            return any("sparse_encoder" in str(module.get("type")) for module in modules)
        return bool(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type") == MODEL_TYPE)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder}: not a model folder ({error}); give the folder of a sparse or dense model") from None


def bm25_model(terms: Sequence[TermRow] = ()) -> Bm25Model:
    """Return BM25 over Kiwi morphemes and English stems, with a dictionary when there are terms for it."""
    analyzer = KoreanEnglishAnalyzer()
    return Bm25Model(analyzer, Dictionary(terms, analyzer) if terms else None)
