"""Does a sentence find its translation among all others? Tatoeba-style accuracy, in both directions.

Shape letters: N = sentence pairs, D = dimensions, C = sentences of a block.

Measure embedding models side by side, all in the same way; the first is what the others are compared with.

Compare embedding models side by side. What ``soju compare`` and ``soju evaluate`` do under ``recipe: embedding``.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from transformers.utils.logging import disable_progress_bar

from soju.core.config import Settings, validate
from soju.core.errors import UserError
from soju.core.progress import track
from soju.core.score import Comparison, Score, Setting
from soju.data.rows import PairRow
from soju.embedding.config import EvaluationSettings
from soju.embedding.data import EvaluationData, read_evaluation
from soju.embedding.embedder import Embedder, Subject, load_model
from soju.evaluation.mteb_tasks import quiet
from soju.evaluation.retrieval import RetrievalSet, evaluate
from soju.evaluation.significance import Measurement, compare, mean_interval
from soju.evaluation.similarity import (
    SimilarityMeasurement,
    compare_similarity,
    cosines_of,
    evaluate_choices,
    evaluate_similarity,
)

_CELLS = 1 << 22


def mine(queries_ND: ArrayLike, documents_ND: ArrayLike) -> NDArray[np.int64]:
    """Return the document of the highest cosine for each query; of equal ones the first.

    Args:
        queries_ND: Vectors, ``(N, D)``, any length.
        documents_ND: Vectors, ``(M, D)``.

    Returns:
        Positions of documents, ``(N,)``.

    Raises:
        ValueError: If the shapes do not fit.
    """
    queries, documents = _unit(queries_ND), _unit(documents_ND)
    if queries.shape[1] != documents.shape[1] or not len(documents):
        raise ValueError(f"vectors must be (N, D) and (M, D) with M >= 1, got {queries.shape} and {documents.shape}")
    block = max(1, _CELLS // len(documents))
    found = [np.argmax(queries[start : start + block] @ documents.T, axis=1) for start in range(0, len(queries), block)]
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def evaluate_bitext(
    ko_ND: ArrayLike,
    en_ND: ArrayLike,
    pairs: Sequence[PairRow],
    *,
    subject: str,
    test_set: str,
    samples: int = 2_000,
    seed: int = 0,
    **decisive: object,
) -> list[Measurement]:
    """Measure how often the nearest sentence of the other language is the translation.

    A sentence that stands in several pairs is right whichever of its copies is found.

    Args:
        ko_ND: Vectors of the Korean sides, ``(N, D)``.
        en_ND: Vectors of the English sides, ``(N, D)``.
        pairs: The N sentence pairs, N >= 2.
        subject: Name of the system.
        test_set: Name of the pairs; scores add ``/ko-en`` and ``/en-ko``.
        samples: Draws for the interval; 0 for none.
        seed: Seed of the draws.
        **decisive: What else decides the value: prompt, pooling, length.

    Returns:
        Accuracy of both directions, with 1 or 0 for each pair.

    Raises:
        UserError: If there are fewer than two pairs.

    References:
        Artetxe and Schwenk 2019, arXiv:1812.10464 (Tatoeba by cosine).
    """
    if len(pairs) < 2:
        raise UserError(f"{test_set}: fewer than two sentence pairs; give more, or leave the set out")
    texts = {"ko": [pair.ko for pair in pairs], "en": [pair.en for pair in pairs]}
    vectors = {"ko": ko_ND, "en": en_ND}
    found = []
    for asked, wanted in (("ko", "en"), ("en", "ko")):
        answers = mine(vectors[asked], vectors[wanted])
        right_N = np.array([texts[wanted][answer] == own for answer, own in zip(answers, texts[wanted], strict=True)])
        values_N = right_N.astype(np.float64)
        setting = Setting.of_texts(
            [text for both in zip(texts[asked], texts[wanted], strict=True) for text in both],
            subject=subject,
            test_set=f"{test_set}/{asked}-{wanted}",
        )
        score = setting.score(
            "accuracy",
            values_N.mean(),
            unit="fraction",
            higher_is_better=True,
            interval=mean_interval(values_N, samples=samples, seed=seed) if samples else None,
            similarity="cosine",
            candidates=len(pairs),
            ties="equal-texts-count",
            **decisive,
        )
        found.append(Measurement(score, values_N))
    return found


def _unit(vectors_ND: ArrayLike) -> NDArray[np.float32]:
    vectors = np.asarray(vectors_ND, np.float32)
    if vectors.ndim != 2:
        raise ValueError(f"vectors must be (N, D), got {vectors.shape}")
    lengths_N1 = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, lengths_N1, out=np.zeros_like(vectors), where=lengths_N1 > 0)


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


def _key(score: Score) -> tuple[str, str, str]:
    return score.subject, score.test_set, score.name


KEPT = ("best", "final")
"""Folders of a run that hold its model, the better first."""


class _Evaluated(Settings):
    evaluation: EvaluationSettings


def evaluation_of(values: Mapping[str, Any], *, place: str) -> EvaluationSettings:
    """Check the evaluation of a configuration of recipe ``embedding``; what it says of training is passed over.

    Args:
        values: The configuration as read.
        place: What errors call it.

    Returns:
        The settings, ``data.root`` filled in where they name no root.

    Raises:
        ConfigError: If a setting is wrong.
        UserError: If nothing is to be measured.
    """
    found = validate({"evaluation": values.get("evaluation") or {}}, _Evaluated, place=place).evaluation
    if not (found.sts or found.bitext or found.choices or found.retrieval):
        raise UserError(f"{place}: evaluation: names no set; give evaluation.sts, bitext, choices or retrieval")
    data = values.get("data")
    root = data.get("root") if isinstance(data, Mapping) else None
    if found.root is None and isinstance(root, str):
        found = found.model_copy(update={"root": Path(root)})
    return found


def subjects_of(models: Sequence[str]) -> list[Subject]:
    """Name models as briefly as tells them apart.

    A run folder stands for its best model. Names are the last parts of the paths, as many as differ: ``stage1`` of one
    run, ``run-a/stage1`` beside ``run-b/stage1``.

    Args:
        models: Folders, run folders, ``package:NAME`` or hub ids.

    Returns:
        One subject for each.

    Raises:
        UserError: If one is given twice.
    """
    if len(set(models)) < len(models):
        twice = next(model for model in models if models.count(model) > 1)
        raise UserError(f"{twice}: given twice; give each model once")
    parts = [Path(model).parts or (model,) for model in models]  # "." has no parts
    most = max((len(part) for part in parts), default=1)
    for depth in range(1, most + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return [Subject(name, _model_of(model)) for name, model in zip(names, models, strict=True)]


def compare_models(models: Sequence[str], values: Mapping[str, Any], *, place: str) -> Measured:
    """Measure models on the test sets of a configuration; the first is what the others are compared with.

    Args:
        models: See `subjects_of`.
        values: The configuration as read.
        place: What errors call it.

    Returns:
        What `measure_models` gives.
    """
    disable_progress_bar()  # of the libraries: they would draw one for every file of weights
    return measure_models(subjects_of(models), evaluation_of(values, place=place))


def is_embedding_model(model: str) -> bool:
    """Tell whether a folder, or the best model of a run folder, pools token states into one dense vector."""
    file = Path(_model_of(model)) / "modules.json"
    if not file.is_file():
        return False
    modules = json.loads(file.read_text(encoding="utf-8"))
    return any(module["type"].rpartition(".")[2] == "Pooling" for module in modules)


def mteb_model(model: str) -> tuple[Any, str]:
    """Return an embedding model in mteb's own wrapper for sentence-transformers, and its name in tables.

    Args:
        model: See `subjects_of`.

    Returns:
        What ``mteb.evaluate`` takes, and the name.

    Raises:
        UserError: If it cannot be loaded.
    """
    from mteb.models import SentenceTransformerEncoderWrapper

    (subject,) = subjects_of([model])
    loaded = load_model(str(subject.folder_or_model))
    with quiet():
        return SentenceTransformerEncoderWrapper(loaded), subject.name


def _model_of(model: str) -> str:
    folder = Path(model)
    if folder.is_dir() and not (folder / "modules.json").is_file():
        for name in KEPT:
            if (folder / name / "modules.json").is_file():
                return str(folder / name)
    return model
