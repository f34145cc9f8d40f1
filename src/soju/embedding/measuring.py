"""Measure embedding models side by side, all in the same way; the first is what the others are compared with."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soju.core.errors import UserError
from soju.core.progress import track
from soju.core.score import Score
from soju.core.setting import Setting
from soju.embedding.bitext import evaluate_bitext
from soju.embedding.embedder import Embedder, Subject
from soju.embedding.evaluation_config import EvaluationSettings
from soju.embedding.evaluation_data import EvaluationData, read_evaluation
from soju.evaluation.choices import evaluate_choices
from soju.evaluation.retrieval import RetrievalSet, evaluate
from soju.evaluation.significance import Comparison, Measurement, compare
from soju.evaluation.similarity import SimilarityMeasurement, compare_similarity, cosines_of, evaluate_similarity

__all__ = ["Measured", "Subject", "compare_measured", "measure_models"]

Item = Measurement | SimilarityMeasurement
RETRIEVAL_METRICS = ("ndcg@10", "recall@1", "recall@10", "mrr@10")
RANKED = 1000
"""Documents that are ranked for each query."""
SIZE = "model"
"""What tables call the set of figures that belong to no test set."""


@dataclass(slots=True)
class Measured:
    """Everything that was measured."""

    subjects: tuple[str, ...]
    """Names of the models, the baseline first."""
    scores: list[Score] = field(default_factory=list)
    """All scores; multiple choice also has one of the system ``chance``."""
    items: list[Item] = field(default_factory=list)
    """Scores with their values, for paired tests."""
    comparisons: list[Comparison] = field(default_factory=list)
    """Every model minus the first, where both were measured alike."""
    not_compared: list[str] = field(default_factory=list)
    """Why others were not."""

    def score(self, subject: str, test_set: str, metric: str) -> Score:
        """Return one score; `UserError` when it was not measured."""
        for score in self.scores:
            if (score.subject, score.test_set, score.name) == (subject, test_set, metric):
                return score
        raise UserError(f"{metric} of {subject} on {test_set} was not measured; add the set to evaluation")

    def similarity(self, subject: str, test_sets: Sequence[str], metric: str = "spearman") -> float:
        """Return the mean correlation of a model over some sets of pairs, in the unit of the correlation."""
        return statistics.fmean(self.score(subject, name, metric).value for name in test_sets)

    def to_json(self) -> dict[str, Any]:
        """Return scores and comparisons as plain data."""
        return {
            "subjects": list(self.subjects),
            "scores": [score.to_json() for score in self.scores],
            "comparisons": [comparison.to_json() for comparison in self.comparisons],
            "not_compared": list(self.not_compared),
        }


def measure_models(
    subjects: Sequence[Subject],
    evaluation: EvaluationSettings,
    *,
    data: EvaluationData | None = None,
    root: Path | None = None,
    load: Callable[[str], Any] | None = None,
) -> Measured:
    """Measure models on the same sets.

    One model is in memory at a time when folders are given. Each text is embedded once for each prompt.

    Args:
        subjects: The models; the first is what the others are compared with.
        evaluation: Sets, prompt, length.
        data: The sets, when they were read before, see `read_evaluation`.
        root: Folder of relative files when the settings name none.
        load: Loads folders in place of `soju.embedding.embedder.load_model`.

    Returns:
        Scores, values of items, comparisons with the first model.

    Raises:
        DataError: If rows of a set are broken.
        UserError: If two models have one name, a model cannot be loaded, or a set is too small.
    """
    names = [subject.name for subject in subjects]
    if len(set(names)) < len(names) or not names:
        raise UserError(f"models {', '.join(names) or '(none)'}: give one or more, each under a name of its own")
    data = data or read_evaluation(evaluation, root=root)
    measured = Measured(tuple(names))
    for subject in track(subjects, "Measuring"):
        embedder = Embedder(subject, evaluation, load=load)
        for item in _items(embedder, data, evaluation):
            if isinstance(item, Score):
                if all((item.subject, item.test_set, item.name) != _key(score) for score in measured.scores):
                    measured.scores.append(item)
            else:
                measured.items.append(item)
                measured.scores.append(item.score)
        del embedder  # before the next model is loaded
    if evaluation.resamples is not None:
        for name in names[1:]:
            found, why = compare_measured(
                [item for item in measured.items if item.score.subject == name],
                [item for item in measured.items if item.score.subject == names[0]],
                samples=evaluation.resamples,
                seed=evaluation.seed,
            )
            measured.comparisons += found
            measured.not_compared += why
    return measured


def compare_measured(
    ours: Sequence[Item], baseline: Sequence[Item], *, samples: int = 2_000, seed: int = 0
) -> tuple[list[Comparison], list[str]]:
    """Compare a model with a baseline on everything that both were measured on, pair by pair.

    Args:
        ours: Items of the model in question.
        baseline: Items of what it is compared with.
        samples: Draws of the paired bootstrap.
        seed: Seed of the draws.

    Returns:
        The comparisons, and a sentence for each set that was not measured alike.
    """
    theirs = {(item.score.test_set, item.score.name): item for item in baseline}
    found, why = [], []
    for item in ours:
        other = theirs.get((item.score.test_set, item.score.name))
        if other is None:
            continue
        try:
            if isinstance(item, SimilarityMeasurement) and isinstance(other, SimilarityMeasurement):
                found.append(compare_similarity(item, other, samples=samples, seed=seed))
            elif isinstance(item, Measurement) and isinstance(other, Measurement):
                found.append(compare(item, other, samples=samples, seed=seed))
        except UserError as error:
            why.append(f"{item.score.test_set}: {item.score.name}: {error}")
    return found, why


def _items(embedder: Embedder, data: EvaluationData, settings: EvaluationSettings) -> Iterator[Item | Score]:
    yield from _similarity(embedder, data, settings)
    yield from _bitext(embedder, data, settings)
    yield from _choices(embedder, data, settings)
    for one in data.retrieval.values():
        yield from _retrieval(embedder, one, settings)
    yield from _token_counts(embedder, data)
    yield from _figures(embedder, data, settings)


def _similarity(embedder: Embedder, data: EvaluationData, settings: EvaluationSettings) -> Iterator[Item]:
    for name, pairs in data.sts.items():
        texts = [pair.first for pair in pairs] + [pair.second for pair in pairs]
        first_ND, second_ND = np.split(embedder.embed(texts), 2)
        yield from evaluate_similarity(
            cosines_of(first_ND, second_ND), pairs, test_set=name, **_drawn(embedder, settings), **embedder.decisive()
        )


def _bitext(embedder: Embedder, data: EvaluationData, settings: EvaluationSettings) -> Iterator[Item]:
    for name, rows in data.bitext.items():
        ko_ND, en_ND = embedder.embed([row.ko for row in rows]), embedder.embed([row.en for row in rows])
        drawn = _drawn(embedder, settings)
        yield from evaluate_bitext(ko_ND, en_ND, rows, test_set=name, **drawn, **embedder.decisive())


def _choices(embedder: Embedder, data: EvaluationData, settings: EvaluationSettings) -> Iterator[Item | Score]:
    for name, questions in data.choices.items():
        contexts_QD = embedder.embed([question.context for question in questions])
        choices_CD = embedder.embed([choice for question in questions for choice in question.choices])
        drawn = _drawn(embedder, settings)
        yield from evaluate_choices(contexts_QD, choices_CD, questions, test_set=name, **drawn, **embedder.decisive())


def _retrieval(embedder: Embedder, one: RetrievalSet, settings: EvaluationSettings) -> Iterator[Item]:
    queries_QD = _unit(embedder.embed(list(one.queries.values()), "query"))
    documents_DD = _unit(embedder.embed(list(one.documents.values()), "document"))
    rankings = []
    for start in range(0, len(queries_QD), 256):
        cosines = queries_QD[start : start + 256] @ documents_DD.T
        rankings += list(np.argsort(-cosines, axis=1, kind="stable")[:, :RANKED])
    found = evaluate(
        one.run_of(rankings),
        one,
        subject=embedder.name,
        metrics=RETRIEVAL_METRICS,
        samples=settings.resamples or 0,
        seed=settings.seed,
        decisive={**embedder.decisive("query", "document"), "similarity": "cosine"},
    )
    yield from found.measurements


def _token_counts(embedder: Embedder, data: EvaluationData) -> Iterator[Item]:
    for name, texts in data.texts():
        counts_N = embedder.token_counts(texts)
        setting = Setting.of_texts(texts, subject=embedder.name, test_set=name)
        score = setting.score(
            "tokens", counts_N.mean(), unit="tokens", higher_is_better=False, texts=len(texts), special="without"
        )
        yield Measurement(score, counts_N)


def _figures(embedder: Embedder, data: EvaluationData, settings: EvaluationSettings) -> Iterator[Score]:
    setting = Setting.of_texts([], subject=embedder.name, test_set=SIZE)
    yield setting.score("parameters", embedder.parameters(), unit="parameters", higher_is_better=False)
    yield setting.score("size", embedder.bytes(), unit="bytes", higher_is_better=False, dtype=settings.dtype)
    texts = next((texts for _, texts in data.texts()), [])[: settings.timed_texts or 0]
    if not texts:
        return
    rates, prompt = [], embedder.prompt("text")
    embedder.encode(texts[: settings.batch_size], prompt)  # the first batch pays for what is set up once
    for _ in range(settings.timings):
        start = time.perf_counter()
        embedder.encode(texts, prompt)
        rates.append(len(texts) / max(time.perf_counter() - start, 1e-9))
    timed = Setting.of_texts(texts, subject=embedder.name, test_set=SIZE)
    yield timed.score(
        "speed",
        statistics.median(rates),
        unit="texts/second",
        higher_is_better=True,
        timings=settings.timings,
        batch_size=settings.batch_size,
        # Speeds depend on the machine and its neighbours; those of different machines are never compared.
        machine=f"{platform.system()}-{platform.machine()}-{os.cpu_count()}cpu-{embedder.model.device}",
    )


def _drawn(embedder: Embedder, settings: EvaluationSettings) -> dict[str, Any]:
    return {"subject": embedder.name, "samples": settings.resamples or 0, "seed": settings.seed}


def _unit(vectors_ND: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return np.divide(vectors_ND, lengths_N1, out=np.zeros_like(vectors_ND), where=lengths_N1 > 0)


def _key(score: Score) -> tuple[str, str, str]:
    return score.subject, score.test_set, score.name
