"""Measure sparse models on the index a user would have: against BM25 and look-up, against another run, by mteb.

`score` measures a run, `compare_runs` compares two query by query, and `MtebSearcher` is a model as mteb asks it.

Shape letters: B = texts, V = terms, Q = queries, D = documents, E = dimensions of a dense vector.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from soju.alignment.bitext import prune_by_mass
from soju.core.errors import UserError
from soju.core.files import write_json
from soju.core.language import language_of
from soju.core.progress import track
from soju.core.results import Comparison, Score, Setting
from soju.data.rows import Document, TermRow
from soju.evaluation.retrieval import RetrievalResult, RetrievalSet, cut_off, evaluate
from soju.evaluation.significance import Measurement, compare
from soju.search.hits import reciprocal_rank_fusion
from soju.search.index import SparseIndex
from soju.search.lexical import Bm25Searcher, Dictionary, DictionarySearcher, KoreanEnglishAnalyzer
from soju.sparse.config import EvaluationSettings, NeuralConfig, SearchSettings, StaticConfig
from soju.sparse.data import EvaluationTexts, RunData
from soju.sparse.indexing import index_settings
from soju.sparse.model import TermEncoder, load
from soju.sparse.static.encoder import StaticEncoder
from soju.sparse.term_activation import (
    FUNCTION_WORDS,
    active_terms,
    bytes_on_disk,
    evaluate_terms,
    expected_terms,
    flops,
    latency,
    posting_skew,
    terms_of,
    throughput,
)

if TYPE_CHECKING:
    from soju.sparse.initial import Vocabulary


SUBJECT = "soju static"
STUDENT = "soju student"
METRICS = ("recall@10", "ndcg@10", "mrr@10", "recall@1", "recall@100")
"""What every run measures; `EvaluationSettings.more_metrics` adds to them."""
NOT_PRUNED = ("ko-ko", "en-en")
"""Directions without a pruning curve: words that stand on both sides find their text whatever is pruned."""
MASSES = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0)
"""Shares of the expansion weight on the pruning curve."""

Embed = Callable[[Sequence[str]], NDArray[np.float32]]
Rankings = Sequence[Sequence[int] | NDArray[np.int64]]


def metrics_of(settings: EvaluationSettings) -> tuple[str, ...]:
    """Return what a run measures, without repetitions."""
    return tuple(dict.fromkeys((*METRICS, *settings.more_metrics)))


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


@dataclass(frozen=True, slots=True)
class Subject:
    """One of our encoders under the name it has in tables."""

    name: str
    encoder: TermEncoder
    search: SearchSettings = field(default_factory=SearchSettings)
    """How its documents are weighted; for static encoders."""


def score(
    subjects: Sequence[Subject],
    data: RunData,
    config: StaticConfig | NeuralConfig,
    folder: Path,
    *,
    teacher: Embed | None = None,
    vocabulary: Vocabulary | None = None,
    workers: int = 2,
) -> Measured:
    """Measure retrieval on every test set, cost on the first, and unseen terms where some were kept out."""
    settings, training = config.evaluation, data.training
    measured = score_retrieval(
        subjects, training.terms, data.evaluation, settings, seed=config.seed, teacher=teacher, workers=workers
    )
    if data.evaluation:
        measured.scores += score_cost(subjects[0], folder, data.evaluation[0], settings)
    for subject in subjects if training.unseen_terms else ():
        measured.scores += score_unseen_terms(subject, training.unseen_terms, vocabulary=vocabulary)
    return measured


def score_retrieval(
    subjects: Sequence[Subject],
    terms: Sequence[TermRow],
    test_sets: Sequence[EvaluationTexts],
    settings: EvaluationSettings,
    *,
    seed: int,
    teacher: Embed | None = None,
    workers: int = 2,
) -> Measured:
    """Score every direction of every test set.

    Args:
        subjects: Our encoders as they were saved; the first is the one that others are compared with.
        terms: Training terms, the dictionary of the look-up baseline.
        test_sets: What to search and what to ask.
        settings: What to measure.
        seed: Of the bootstrap.
        teacher: Embeds texts densely, ``(N, D)`` of length 1; a row of its own.
        workers: Threads of the morphological analyser of the baselines.

    Returns:
        Scores of all systems, comparisons of the first with each other, the pruning curve.
    """
    measured = Measured()
    analyzer = CachedAnalyzer(workers)
    dictionary = Dictionary(terms, analyzer) if terms else None
    rounds = [(texts, direction) for texts in test_sets for direction in texts.directions]
    curves: dict[str, list[float]] = {}
    known: dict[tuple[int, tuple[str, ...]], csr_array] = {}
    subjects = [_remembering(subject, known) for subject in subjects]
    ours = subjects[0]
    depth = max(map(cut_off, metrics_of(settings)))
    for texts, direction in track(rounds, "evaluate"):
        test_set = texts.directions[direction]
        queries, documents = list(test_set.queries.values()), list(test_set.documents.values())
        rankings: dict[str, Rankings] = {}
        for subject in subjects:
            with _index_of(subject, documents) as index:
                vectors = subject.encoder.encode_queries(queries)
                rankings[subject.name] = _search(index, vectors, depth)
                if subject is ours and texts is test_sets[0] and direction not in NOT_PRUNED:
                    lighter = (_pruned_queries(subject.encoder, queries, vectors, mass) for mass in MASSES)
                    curves[test_set.name] = [_recall_at_10(_search(index, some, 10), test_set) for some in lighter]
        rankings["BM25"] = Bm25Searcher(documents, analyzer).search(queries, depth)[0]
        if dictionary is not None:
            rankings["dictionary"] = DictionarySearcher(documents, dictionary).search(queries, depth)[0]
        if teacher is not None:
            rankings["dense teacher"] = _search_dense(teacher, queries, documents, depth)
        rankings["soju + BM25"] = [
            [document for document, _ in reciprocal_rank_fusion([list(sparse), list(lexical)], limit=depth)]
            for sparse, lexical in zip(rankings[ours.name], rankings["BM25"], strict=True)
        ]
        _evaluate(measured, rankings, test_set, settings, seed=seed)
    if curves:
        measured.figures.append(_pruning_figure(curves))
    return measured


def _evaluate(
    measured: Measured,
    rankings: dict[str, Rankings],
    test_set: RetrievalSet,
    settings: EvaluationSettings,
    *,
    seed: int,
) -> None:
    results: dict[str, RetrievalResult] = {}
    for subject, ranking in rankings.items():
        results[subject] = evaluate(
            test_set.run_of(ranking),
            test_set,
            subject=subject,
            metrics=metrics_of(settings),
            samples=settings.bootstrap_samples,
            seed=seed,
        )
        measured.scores += results[subject].scores
    ours, *others = results.values()
    measured.per_query += ours.measurements
    for other in others:
        for metric in ("recall@10", "ndcg@10"):
            pair = ours.measurement(metric), other.measurement(metric)
            measured.comparisons.append(compare(*pair, samples=settings.bootstrap_samples, seed=seed))


def search_all(subject: Subject, test_set: RetrievalSet, *, depth: int = 100) -> list[list[int]]:
    """Index the documents and return, for each query, document positions best first."""
    with _index_of(subject, list(test_set.documents.values())) as index:
        return _search(index, subject.encoder.encode_queries(list(test_set.queries.values())), depth)


def pruned(encoder: StaticEncoder, mass: float) -> StaticEncoder:
    """Return the encoder with each term's translations cut to a share of their weight."""
    translations = prune_by_mass(encoder.translations_VV, mass=mass)
    return StaticEncoder(encoder.tokenizer, encoder.canonical_VV, translations, encoder.document_share_V)


def score_cost(subject: Subject, folder: Path, texts: EvaluationTexts, settings: EvaluationSettings) -> list[Score]:
    """Measure size, active terms and speed on the first direction of a test set."""
    direction, test_set = next(iter(texts.directions.items()))
    queries, documents = list(test_set.queries.values()), list(test_set.documents.values())
    encoder = subject.encoder
    setting = Setting(subject.name, f"cost on {texts.name} {direction}", test_set.hash)
    query_vectors, document_vectors = encoder.encode_queries(queries), encoder.encode_documents(documents)
    scores = active_terms(query_vectors, setting, side="query")[:1]
    scores += active_terms(document_vectors, setting, side="document")[:1]
    scores.append(flops(query_vectors, document_vectors, setting))
    scores += posting_skew(document_vectors, setting)
    scores.append(_renamed(bytes_on_disk(folder, setting), "model bytes"))
    with _index_of(subject, documents) as index:
        scores.append(_renamed(bytes_on_disk(index.folder, setting), "index bytes"))
        search: Callable[[str], object] = lambda query: index.search(encoder.encode_queries([query]), 10)  # noqa: E731
        scores += latency(search, queries[: settings.latency_queries], setting)
    scores.append(throughput(encoder.encode_documents, documents[:2000], setting))
    return scores


def score_unseen_terms(
    subject: Subject, rows: Sequence[TermRow], *, vocabulary: Vocabulary | None = None
) -> list[Score]:
    """Measure which expected terms a model activates for head words that the term list did not have.

    Args:
        subject: The model.
        rows: The head words.
        vocabulary: Says which terms a text holds. When not given, a static encoder asks itself, and a neural one
            counts its pieces.

    Returns:
        The scores; none when no row has an English term.
    """
    rows = [row for row in rows if any(language_of(term.text) == "en" for term in row.terms)]
    if not rows:
        return []
    encoder = subject.encoder
    english, korean = expected_terms(rows, vocabulary.terms if vocabulary else terms_of(encoder))
    texts = [f"{row.ko}\t{[term.text for term in row.terms]}" for row in rows]
    setting = Setting(subject.name, "unseen terms", RetrievalSet.from_pairs("unseen terms", texts, texts).hash)
    return evaluate_terms(
        encoder.encode_queries([row.ko for row in rows]),
        english=english,
        korean=korean,
        vocabulary=encoder.terms,
        function_words=FUNCTION_WORDS,
        setting=setting,
    )


def _remembering(subject: Subject, known: dict[tuple[int, tuple[str, ...]], csr_array]) -> Subject:
    encoder = subject.encoder
    if isinstance(encoder, StaticEncoder):  # encodes faster than it is looked up, and needs no torch
        return subject
    from soju.sparse.neural_encoders import NeuralEncoder, RememberingEncoder

    return replace(subject, encoder=RememberingEncoder(encoder, known)) if type(encoder) is NeuralEncoder else subject


@contextmanager
def _index_of(subject: Subject, documents: Sequence[str]) -> Iterator[SparseIndex]:
    """Index documents under their positions for as long as the block runs."""
    encoder = subject.encoder
    with tempfile.TemporaryDirectory() as folder:
        yield SparseIndex.build(
            Path(folder) / "index",
            (Document(str(number), text) for number, text in enumerate(documents)),
            encoder.encode_documents,
            encoder.terms,
            index_settings(encoder, subject.search),
            prior_share_V=encoder.document_share_V,
        )


def _search(index: SparseIndex, query_vectors: csr_array, depth: int) -> list[list[int]]:
    ranked = index.rank(query_vectors, depth, engine="exact")
    return [[int(document) for document in row] for row in ranked]


def _search_dense(teacher: Embed, queries: Sequence[str], documents: Sequence[str], depth: int) -> list[list[int]]:
    queries_QE, documents_DE = teacher(queries), teacher(documents)
    rankings: list[list[int]] = []
    for start in range(0, len(queries), 256):  # bounds the memory of the product
        similarities = queries_QE[start : start + 256] @ documents_DE.T
        order = np.argsort(-similarities, axis=1, kind="stable")[:, :depth]
        rankings += [[int(document) for document in row] for row in order]
    return rankings


def _pruned_queries(encoder: TermEncoder, queries: Sequence[str], vectors: csr_array, mass: float) -> csr_array:
    """Return query vectors with the lightest weights gone: of each term's translations, or of a neural vector."""
    if isinstance(encoder, StaticEncoder):
        return pruned(encoder, mass).encode_queries(queries)
    return prune_by_mass(vectors, mass=mass)


def _recall_at_10(rankings: Rankings, test_set: RetrievalSet) -> float:
    run = test_set.run_of([ranking[:10] for ranking in rankings])
    shares = [sum(key in gains for key in run[query]) / len(gains) for query, gains in test_set.judgements.items()]
    return sum(shares) / len(shares)


def _renamed(score: Score, name: str) -> Score:
    return Score.from_json({**score.to_json(), "name": name})


def _pruning_figure(curves: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "id": "pruning",
        "title": "Recall@10 against the query weight that is kept",
        "caption": "The lightest weights of a query go first: of each term's translations, or of a neural vector.",
        "kind": "line",
        "x_label": "share of the weight kept",
        "y_label": "recall@10",
        "series": [{"name": name, "x": list(MASSES), "y": values} for name, values in curves.items()],
    }


FILE = "query_scores.json"
"""Per-query values of a run's own system."""


def write_query_scores(folder: Path, measurements: Sequence[Measurement]) -> None:
    """Keep what every query scored, so that runs can be compared later."""
    rows = [{"score": item.score.to_json(), "values": [float(value) for value in item.values]} for item in measurements]
    write_json(folder / FILE, rows)


def compare_runs(subject: Path, baseline: Path, *, samples: int = 2000, seed: int = 0) -> list[Comparison]:
    """Compare what both runs measured on the same queries: subject minus baseline, by a paired bootstrap."""
    ours, theirs = _read(subject), _read(baseline)
    alike = [key for key in ours if key in theirs]
    if not alike:
        raise UserError(
            f"{subject} and {baseline} measured nothing on the same queries; evaluate both on the same sets"
        )
    return [compare(ours[key], theirs[key], samples=samples, seed=seed) for key in alike]


def _read(folder: Path) -> dict[tuple[str, str], Measurement]:
    path = folder / FILE
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no {FILE}; give the folder of a finished run") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error}); run the training again") from None
    found = {}
    for row in rows:
        score = Score.from_json({**row["score"], "subject": folder.resolve().name})
        found[score.test_set, score.signature] = Measurement(score, np.array(row["values"], np.float64))
    return found


class MtebSearcher:
    """A model behind mteb's ``SearchProtocol``: it builds the index that ``soju index`` would, and searches it exactly.

    mteb's wrapper for ``SparseEncoder`` multiplies vectors alone; a static model needs the weighting of its index.

    Args:
        encoder: The model.
        name: What mteb calls it.
        fingerprint: What names its weights.
        search: How documents are weighted; for static encoders.
    """

    def __init__(self, encoder: TermEncoder, *, name: str, fingerprint: str, search: SearchSettings) -> None:
        self._encoder = encoder
        self.name = name
        self._fingerprint = fingerprint
        self._search_settings = search
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._index: SparseIndex | None = None

    @property
    def mteb_model_meta(self) -> Any:
        """What mteb writes about the model."""
        from mteb.models.model_meta import ModelMeta

        about = {"name": f"soju/{self.name}", "revision": self._fingerprint[:16], "model_type": ["sparse"]}
        return ModelMeta.create_empty(overwrites=about)

    @classmethod
    def of(cls, model: str) -> MtebSearcher:
        """Load a model, see `soju.load`."""
        found = load(model)
        folder = found.folder
        name = folder.resolve().parent.name if folder.name in ("best", "final") else folder.name
        return cls(found.encoder, name=name, fingerprint=found.fingerprint, search=found.search)

    def index(self, corpus: Iterable[Mapping[str, Any]], **_: Any) -> None:
        """Index the rows of a corpus: ``id``, ``text`` and perhaps ``title``, which is put before the text."""
        self.close()
        self._folder = tempfile.TemporaryDirectory(prefix="soju-mteb-")
        self._index = SparseIndex.build(
            Path(self._folder.name) / "index",
            (Document(str(row["id"]), _text_of(row)) for row in corpus),
            self._encoder.encode_documents,
            self._encoder.terms,
            index_settings(self._encoder, self._search_settings, engine="exact"),
            prior_share_V=self._encoder.document_share_V,
        )

    def search(
        self, queries: Iterable[Mapping[str, Any]], *, top_k: int, top_ranked: object = None, **_: Any
    ) -> dict[str, dict[str, float]]:
        """Search what was indexed: query id -> document id -> score. Candidates of a reranking task are refused."""
        assert self._index is not None, "mteb indexes before it searches"
        if top_ranked is not None:
            raise UserError("a reranking task gives its own candidates; choose a retrieval task")
        rows = [(str(row["id"]), str(row["text"])) for row in queries]
        found: dict[str, dict[str, float]] = {}
        for start in range(0, len(rows), 256):
            part = rows[start : start + 256]
            vectors = self._encoder.encode_queries([text for _, text in part])
            hits = self._index.search(vectors, top_k, engine="exact", explain_hits=False)
            found |= {
                name: {hit.document_id: hit.score for hit in of} for (name, _), of in zip(part, hits, strict=True)
            }
        return found

    def close(self) -> None:
        """Remove the index."""
        self._index = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def _text_of(row: Mapping[str, Any]) -> str:
    """Return title and text as mteb's own encoders read them."""
    return f"{row.get('title') or ''} {row['text']}".strip()
