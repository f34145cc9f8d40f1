"""Measure embedding models on the same test sets, all asked in the same way and compared with the first."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils.logging import disable_progress_bar

from soju.core.config import Settings, validate
from soju.core.errors import UserError
from soju.core.language import language_of
from soju.core.progress import track
from soju.core.results import Comparison, Score, Setting
from soju.data.log import ReadLog
from soju.data.readers import SourceFilter, read_beir, read_rows
from soju.data.rows import (
    CHOICES,
    PASSAGES,
    QUERY_PAIRS,
    SIMILARITY,
    ChoiceQuestion,
    Kind,
    PairRow,
    PassageRow,
    RowT,
    SimilarityPair,
)
from soju.data.sources import SAMPLES
from soju.embedding.config import EvaluationSettings, RetrievalTestSet, SimilaritySet
from soju.embedding.embedder import Embedder, Subject, load_model
from soju.evaluation.mteb_tasks import quiet
from soju.evaluation.retrieval import RetrievalSet, evaluate
from soju.evaluation.significance import Measurement, compare
from soju.evaluation.similarity import (
    SimilarityMeasurement,
    compare_similarity,
    cosines_of,
    evaluate_bitext,
    evaluate_choices,
    evaluate_similarity,
    unit_rows,
)


@dataclass(frozen=True, slots=True)
class EvaluationData:
    """All test sets as read, by name."""

    sts: dict[str, list[SimilarityPair]]
    languages: dict[str, str]
    """Language of each set of `sts`."""
    bitext: dict[str, list[PairRow]]
    choices: dict[str, list[ChoiceQuestion]]
    retrieval: dict[str, RetrievalSet]
    """By name and direction: ``samples/ko-en``."""

    def texts(self) -> Iterator[tuple[str, list[str]]]:
        """Yield what tokens are counted on: the texts of each set of pairs, by set and language."""
        for name, pairs in self.sts.items():
            yield f"{name}/{self.languages[name]}", [text for pair in pairs for text in (pair.first, pair.second)]
        for name, rows in self.bitext.items():
            yield f"{name}/ko", [row.ko for row in rows]
            yield f"{name}/en", [row.en for row in rows]

    def all_texts(self) -> list[str]:
        """Return every text once, for a check that none is trained on."""
        unique: dict[str, None] = {}
        for _, texts in self.texts():
            unique.update(dict.fromkeys(texts))
        for questions in self.choices.values():
            unique.update(dict.fromkeys(text for one in questions for text in (one.context, *one.choices)))
        for one in self.retrieval.values():
            unique.update(dict.fromkeys(one.queries.values()))
            unique.update(dict.fromkeys(one.documents[key] for gains in one.judgements.values() for key in gains))
        return list(unique)


def read_evaluation(
    settings: EvaluationSettings, *, root: Path | None = None, log: ReadLog | None = None
) -> EvaluationData:
    """Read every test set.

    Raises `DataError` if rows are broken and no log is given. Raises `UserError` if a set has fewer than two rows.
    """
    own = log or ReadLog()
    folder = settings.root or root

    def rows(file: str, kind: Kind[RowT], select: SourceFilter | None = None) -> Iterator[RowT]:
        return read_rows([file], kind, log=own, root=folder, select=select)

    sts = {one.name: _some(_of_language(rows(one.file, SIMILARITY), one), settings) for one in settings.sts}
    bitext = {
        one.name: _some(
            rows(one.file, QUERY_PAIRS, SourceFilter(one.select.file, one.select.keep) if one.select else None),
            settings,
        )
        for one in settings.bitext
    }
    choices = {one.name: _some(rows(one.file, CHOICES), settings) for one in settings.choices}
    retrieval: dict[str, RetrievalSet] = {}
    for wanted in settings.retrieval:
        retrieval |= _retrieval_sets(wanted, settings, folder, own)
    if log is None:
        own.raise_if_broken()
    if not own.problems:
        _refuse_small({**sts, **bitext, **choices})
    return EvaluationData(sts, {one.name: one.language for one in settings.sts}, bitext, choices, retrieval)


def _of_language(rows: Iterable[SimilarityPair], one: SimilaritySet) -> Iterator[SimilarityPair]:
    """Take the rows of one language of a sample, which holds both; a file holds what its owner says."""
    for row in rows:
        if not one.file.startswith(SAMPLES) or language_of(row.first + row.second) == one.language:
            yield row


def _some(rows: Iterator[Any], settings: EvaluationSettings) -> list[Any]:
    """Return the first rows; the rest is read too, so that its problems are told."""
    found = list(islice(rows, settings.limit))
    for _ in rows:
        pass
    return found


def _retrieval_sets(
    one: RetrievalTestSet, settings: EvaluationSettings, root: Path | None, log: ReadLog
) -> dict[str, RetrievalSet]:
    if one.beir is not None:
        found = read_beir(one.beir, log=log, split=one.split, root=root)
        if log.problems:
            return {}
        name = f"{one.name}/{one.split}"
        return {name: RetrievalSet.create(name, found.queries, found.documents, found.judgements)}
    passages: list[PassageRow] = _some(read_rows(one.passages, PASSAGES, log=log, root=root), settings)
    if log.problems:
        return {}
    if len(passages) < 2:
        raise UserError(f"evaluation set {one.name}: fewer than two passages; give more, or leave the set out")
    documents = {"ko": [row.ko for row in passages], "en": [row.en for row in passages]}
    queries = {"ko": [row.query_ko for row in passages], "en": [row.query_en for row in passages]}
    return {
        f"{one.name}/{asked}-{answer}": RetrievalSet.from_pairs(
            f"{one.name}/{asked}-{answer}", queries[asked], documents[answer]
        )
        for asked, answer in (("ko", "ko"), ("ko", "en"), ("en", "ko"), ("en", "en"))
    }


def _refuse_small(sets: dict[str, list[Any]]) -> None:
    for name, rows in sets.items():
        if len(rows) < 2:
            raise UserError(f"evaluation set {name}: fewer than two rows; give more, or leave the set out")


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

    Returns the comparisons, and a sentence for each set that was not measured alike.
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
    queries_QD = unit_rows(embedder.embed(list(one.queries.values()), "query"))
    documents_DD = unit_rows(embedder.embed(list(one.documents.values()), "document"))
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

    Raises `ConfigError` if a setting is wrong. Raises `UserError` if nothing is to be measured.
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
    run, ``run-a/stage1`` and ``run-b/stage1`` of two.

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
    """Measure models on the test sets of a configuration; the first is what the others are compared with."""
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

    Raises `UserError` if it cannot be loaded.
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
