"""Measure a static encoder against BM25, dictionary look-up and their fusion, on the index a user would have."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from soju.alignment.expansion import prune_by_mass
from soju.core.language import language_of
from soju.core.progress import track
from soju.core.records import Document, TermRow
from soju.core.score import Score
from soju.evaluation.efficiency import active_terms, bytes_on_disk, flops, latency, posting_skew, throughput
from soju.evaluation.retrieval import RetrievalResult, RetrievalSet, evaluate
from soju.evaluation.setting import Setting
from soju.evaluation.significance import Comparison, Measurement, compare
from soju.evaluation.terms import KOREAN_FUNCTION_WORDS, evaluate_terms
from soju.models.lexicon_tokenizer import BOUNDARY
from soju.models.static_encoder import StaticEncoder
from soju.recipes.splade.config import StaticConfig
from soju.recipes.splade.indexing import index_settings
from soju.recipes.splade.reading import EvaluationTexts
from soju.search.dictionary import Dictionary, DictionarySearcher
from soju.search.fusion import reciprocal_rank_fusion
from soju.search.index import SparseIndex
from soju.search.lexical import ENGLISH_STOP_WORDS, Bm25Searcher, KoreanEnglishAnalyzer

SUBJECT = "soju static"
METRICS = ("recall@10", "ndcg@10", "mrr@10", "recall@1", "recall@100")
DEPTH = 100
"""Documents taken from each system; nothing is measured deeper."""
MASSES = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0)
"""Shares of the expansion weight on the pruning curve."""

Rankings = Sequence[Sequence[int] | NDArray[np.int64]]


@dataclass(slots=True)
class Measured:
    """What scoring gives to the report."""

    scores: list[Score] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)
    per_query: list[Measurement] = field(default_factory=list)
    """Our own scores with the value of every query."""


class CachedAnalyzer:
    """Remembers the words of a text: BM25 and dictionary look-up read the same texts."""

    def __init__(self, workers: int) -> None:
        self._analyzer = KoreanEnglishAnalyzer(workers=workers)
        self._words: dict[str, list[str]] = {}

    def analyze(self, texts: Sequence[str]) -> list[list[str]]:
        """Return the words of each text."""
        new = [text for text in dict.fromkeys(texts) if text not in self._words]
        self._words.update(zip(new, self._analyzer.analyze(new), strict=True))
        return [self._words[text] for text in texts]


def score_retrieval(
    encoder: StaticEncoder,
    terms: Sequence[TermRow],
    test_sets: Sequence[EvaluationTexts],
    config: StaticConfig,
    *,
    workers: int = 2,
) -> Measured:
    """Score every direction of every test set.

    Args:
        encoder: The model as it was saved.
        terms: Training terms, the dictionary of the look-up baseline.
        test_sets: What to search and what to ask.
        config: Settings of the run.
        workers: Threads of the morphological analyser of the baselines.

    Returns:
        Scores of all systems, comparisons of ours with each baseline, the pruning curve.
    """
    measured = Measured()
    analyzer = CachedAnalyzer(workers)
    dictionary = Dictionary(terms, analyzer) if terms else None
    settings = config.evaluation
    rounds = [(texts, direction) for texts in test_sets for direction in texts.directions]
    curves: dict[str, list[float]] = {}
    for texts, direction in track(rounds, "evaluate"):
        queries, documents = texts.directions[direction]
        test_set = RetrievalSet.from_pairs(f"{texts.name}/{direction}", queries, documents)
        with _index_of(encoder, documents, config) as index:
            rankings: dict[str, Rankings] = {SUBJECT: _search(index, encoder, queries)}
            if texts is test_sets[0] and direction in ("ko-en", "en-ko"):
                curves[test_set.name] = [
                    _recall_at_10(_search(index, pruned(encoder, mass), queries)) for mass in MASSES
                ]
        rankings["BM25"] = Bm25Searcher(documents, analyzer).search(queries, DEPTH)[0]
        if dictionary is not None:
            rankings["dictionary"] = DictionarySearcher(documents, dictionary).search(queries, DEPTH)[0]
        rankings["soju + BM25"] = [
            [document for document, _ in reciprocal_rank_fusion([list(ours), list(theirs)], limit=DEPTH)]
            for ours, theirs in zip(rankings[SUBJECT], rankings["BM25"], strict=True)
        ]
        results: dict[str, RetrievalResult] = {}
        for subject, ranking in rankings.items():
            results[subject] = evaluate(
                test_set.run_of(ranking),
                test_set,
                subject=subject,
                metrics=METRICS,
                samples=settings.bootstrap_samples,
                seed=config.seed,
            )
            measured.scores += results[subject].scores
        measured.per_query += results[SUBJECT].measurements
        for subject in list(results)[1:]:
            for metric in ("recall@10", "ndcg@10"):
                ours, theirs = results[SUBJECT].measurement(metric), results[subject].measurement(metric)
                measured.comparisons.append(compare(ours, theirs, samples=settings.bootstrap_samples, seed=config.seed))
    if curves:
        measured.figures.append(_pruning_figure(curves))
    return measured


def search_all(
    encoder: StaticEncoder, queries: Sequence[str], documents: Sequence[str], config: StaticConfig
) -> list[list[int]]:
    """Index the documents and return, for each query, document positions best first."""
    with _index_of(encoder, documents, config) as index:
        return _search(index, encoder, queries)


def pruned(encoder: StaticEncoder, mass: float) -> StaticEncoder:
    """Return the encoder with each term's translations cut to a share of their weight."""
    translations = prune_by_mass(encoder.translations_VV, mass=mass)
    return StaticEncoder(encoder.tokenizer, encoder.canonical_VV, translations, encoder.document_share_V)


def score_cost(encoder: StaticEncoder, folder: Path, texts: EvaluationTexts, config: StaticConfig) -> list[Score]:
    """Measure size, active terms and speed on the first direction of a test set.

    Args:
        encoder: The model.
        folder: Where it was saved.
        texts: The test set.
        config: Settings of the run.

    Returns:
        Costs of the model and of an index of the documents; latency includes encoding the query.
    """
    direction, (queries, documents) = next(iter(texts.directions.items()))
    setting = _setting(RetrievalSet.from_pairs(f"cost on {texts.name} {direction}", queries, documents))
    query_vectors, document_vectors = encoder.encode_queries(queries), encoder.encode_documents(documents)
    scores = active_terms(query_vectors, setting, side="query")[:1]
    scores += active_terms(document_vectors, setting, side="document")[:1]
    scores.append(flops(query_vectors, document_vectors, setting))
    scores += posting_skew(document_vectors, setting)
    scores.append(_renamed(bytes_on_disk(folder, setting), "model bytes"))
    with _index_of(encoder, documents, config) as index:
        scores.append(_renamed(bytes_on_disk(index.folder, setting), "index bytes"))
        search: Callable[[str], object] = lambda query: index.search(encoder.encode_queries([query]), 10)  # noqa: E731
        scores += latency(search, list(queries[: config.evaluation.latency_queries]), setting)
    scores.append(throughput(encoder.encode_documents, documents[:2000], setting))
    return scores


def score_unseen_terms(encoder: StaticEncoder, rows: Sequence[TermRow]) -> list[Score]:
    """Measure which expected terms head words light up that the term list did not have."""
    rows = [row for row in rows if any(language_of(term.text) == "en" for term in row.terms)]
    if not rows:
        return []
    expected: dict[str, list[set[int]]] = {"en": [], "ko": []}
    for row in rows:
        known = {"en": set[int](), "ko": _ids(encoder.encode_documents([row.ko]))}
        for term in row.terms:
            language = "ko" if language_of(term.text) == "ko" else "en"
            known[language] |= _ids(encoder.encode_documents([term.text]))
        expected["en"].append(known["en"])
        expected["ko"].append(known["ko"])
    texts = [f"{row.ko}\t{[term.text for term in row.terms]}" for row in rows]
    setting = _setting(RetrievalSet.from_pairs("unseen terms", texts, texts))
    return evaluate_terms(
        encoder.encode_queries([row.ko for row in rows]),
        english=expected["en"],
        korean=expected["ko"],
        vocabulary=[piece.strip(BOUNDARY) or piece for piece in encoder.pieces],
        function_words=ENGLISH_STOP_WORDS | KOREAN_FUNCTION_WORDS,
        setting=setting,
    )


def _setting(test_set: RetrievalSet) -> Setting:
    return Setting(subject=SUBJECT, test_set=test_set.name, data_hash=test_set.hash)


@contextmanager
def _index_of(encoder: StaticEncoder, documents: Sequence[str], config: StaticConfig) -> Iterator[SparseIndex]:
    """Index documents under their positions for as long as the block runs."""
    with tempfile.TemporaryDirectory() as folder:
        yield SparseIndex.build(
            Path(folder) / "index",
            (Document(str(number), text) for number, text in enumerate(documents)),
            encoder.encode_documents,
            encoder.terms,
            index_settings(config.search),
            prior_share_V=encoder.document_share_V,
        )


def _search(index: SparseIndex, encoder: StaticEncoder, queries: Sequence[str]) -> list[list[int]]:
    ranked = index.rank(encoder.encode_queries(queries), DEPTH, engine="exact")
    return [[int(document) for document in row] for row in ranked]


def _ids(vectors: csr_array) -> set[int]:
    return set(vectors.indices.tolist())


def _recall_at_10(rankings: Rankings) -> float:
    return sum(query in ranking[:10] for query, ranking in enumerate(rankings)) / len(rankings)


def _renamed(score: Score, name: str) -> Score:
    return Score.from_json({**score.to_json(), "name": name})


def _pruning_figure(curves: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "id": "pruning",
        "title": "Recall@10 against the expansion weight that is kept",
        "caption": "Each term keeps its heaviest translations up to this share of their total weight.",
        "kind": "line",
        "x_label": "share of expansion weight kept",
        "y_label": "recall@10",
        "series": [{"name": name, "x": list(MASSES), "y": values} for name, values in curves.items()],
    }
