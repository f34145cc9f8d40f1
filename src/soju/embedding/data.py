"""Read what a run of recipe `embedding` learns from and is watched by.

Read the test sets of an embedding model; broken rows of all files are told at once.

Texts of a stage, and Korean sides of pairs to pull to the untouched model's vectors of their English sides.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from accelerate import PartialState

from soju.core.errors import UserError
from soju.core.language import language_of
from soju.data.log import ReadLog
from soju.data.readers import SourceFilter, read_beir, read_rows
from soju.data.rows import HIGHEST, KINDS, PASSAGES, ChoiceQuestion, PairRow, PassageRow, SimilarityPair
from soju.data.sources import SAMPLES
from soju.data.splits import held_out, normalise_for_overlap, refuse_overlap, spread
from soju.data.statistics import RowStatistics, counted
from soju.embedding.config import (
    EmbeddingConfig,
    EmbeddingDataSettings,
    EvaluationSettings,
    RetrievalTestSet,
    SimilaritySet,
    SupervisedSettings,
    UnsupervisedSettings,
)
from soju.embedding.rows import TextRows
from soju.evaluation.retrieval import RetrievalSet
from soju.teachers.cache import cached_embeddings
from soju.teachers.dense import SentenceTransformerTeacher

ItemT = TypeVar("ItemT")


@dataclass(slots=True)
class EmbeddingData:
    """Everything a run learns from, and what the guard watches."""

    korean: list[str]
    english: list[str]
    pairs: list[PairRow]
    stage_texts: dict[int, list[str]]
    """Korean texts of each training stage."""
    watched_korean: list[SimilarityPair]
    watched_english: list[SimilarityPair]
    labelled: list[tuple[str, str, float]]
    """Pairs of the supervised phase: a score in [0, 1], or 1 for entailment and 0 for contradiction."""
    log: ReadLog
    source_rows: dict[str, int] = field(default_factory=dict)
    """Rows read for training by source."""
    statistics: dict[str, Any] = field(default_factory=dict)
    """For ``data.json``."""


def read_embedding_data(config: EmbeddingConfig, *, measured: Sequence[str] = ()) -> EmbeddingData:
    """Read training texts, watched pairs and labelled pairs.

    Args:
        config: Settings of the run.
        measured: Texts that the run will be measured on; none of them may be trained on.

    Returns:
        All rows, checked.

    Raises:
        DataError: If rows are broken, all problems of all files listed at once.
        UserError: If measured or watched texts stand in the training data, or nothing is left to train on.
    """
    settings, log = config.data, ReadLog()
    reading = _Reading(settings, log)
    counts = {name: RowStatistics() for name in ("korean", "english", "pairs", "passages")}
    pairs = list(reading.rows(settings.pairs, "pairs", counts["pairs"]))
    kept_out: list[PassageRow] = []
    for passage in reading.rows(settings.passages, "passages", counts["passages"]):
        if held_out(passage.id, seed=config.seed, share=config.retention.held_out):
            kept_out.append(passage)
        else:
            pairs += [PairRow(passage.ko, passage.en), PairRow(passage.query_ko, passage.query_en)]
    english = [row.text for row in reading.rows(settings.english, "documents", counts["english"])]
    korean = [row.text for row in reading.rows(settings.korean, "documents", counts["korean"])]
    own = {
        stage: [row.text for row in reading.rows(of_stage.texts, "documents")]
        for stage, of_stage in stage_settings(config).items()
    }
    watched = {
        side: list(reading.rows(getattr(config.retention, side), "similarity")) for side in ("korean", "english")
    }
    watched["korean"] += _alike_or_not([(row.ko, row.query_ko) for row in kept_out])
    watched["english"] += _alike_or_not([(row.en, row.query_en) for row in kept_out])
    labelled = _labelled(config.supervised, reading)
    log.raise_if_broken(settings.on_error)
    data = EmbeddingData(
        korean=list(dict.fromkeys(korean or (pair.ko for pair in pairs))),
        english=list(dict.fromkeys([*english, *(pair.en for pair in pairs)])),
        pairs=pairs,
        stage_texts=own,
        watched_korean=spread(watched["korean"], config.retention.max_pairs),
        watched_english=spread(watched["english"], config.retention.max_pairs),
        labelled=labelled,
        log=log,
        source_rows=dict(reading.source_rows),
        statistics={name: count.to_json() for name, count in counts.items() if count.rows},
    )
    _keep_apart(data, config, measured)
    for stage, of_stage in stage_settings(config).items():
        texts = list(dict.fromkeys(own[stage])) if of_stage.texts else data.korean
        data.stage_texts[stage] = spread(texts, of_stage.max_texts or len(texts))
        if len(data.stage_texts[stage]) < 2:
            raise UserError(f"stage{stage}: fewer than two Korean texts are left; give more in data.korean")
    data.statistics |= {
        "korean_texts": len(data.korean),
        "english_texts": len(data.english),
        "stage_texts": {f"stage{stage}": len(texts) for stage, texts in data.stage_texts.items()},
        "watched_pairs": {"korean": len(data.watched_korean), "english": len(data.watched_english)},
        "labelled_pairs": len(data.labelled),
        "reading": log.to_json(),
    }
    return data


def stage_settings(config: EmbeddingConfig) -> dict[int, UnsupervisedSettings]:
    """Return the settings of the training stages that are to run, by number."""
    known: dict[int, UnsupervisedSettings] = {1: config.stage1, 2: config.stage2, 3: config.stage3}
    return {stage: known[stage] for stage in config.stages if stage in known}


class _Reading:
    """Rows of sources with the settings of the run, counted by source."""

    def __init__(self, settings: EmbeddingDataSettings, log: ReadLog) -> None:
        self._settings = settings
        self._log = log
        self.source_rows: dict[str, int] = {}

    def rows(self, sources: Iterable[str], kind: Any, counts: RowStatistics | None = None) -> Iterable[Any]:
        """Yield the good rows of the sources."""
        for source in sources:
            rows: Iterable[Any] = read_rows(
                [source],
                KINDS[kind],
                log=self._log,
                root=self._settings.root,
                max_line_bytes=self._settings.max_line_bytes,
            )
            for row in rows if counts is None else counted(rows, counts):
                self.source_rows[source] = self.source_rows.get(source, 0) + 1
                yield row


def _alike_or_not(texts: Sequence[tuple[str, str]]) -> list[SimilarityPair]:
    """Pair each passage with its own query, and with that of the next passage."""
    own = [SimilarityPair(passage, query, HIGHEST) for passage, query in texts]
    others = [SimilarityPair(texts[place - 1][0], query, 0.0) for place, (_, query) in enumerate(texts)]
    return [pair for both in zip(own, others, strict=True) for pair in both] if len(texts) > 1 else []


def _labelled(settings: SupervisedSettings | None, reading: _Reading) -> list[tuple[str, str, float]]:
    if settings is None:
        return []
    if settings.similarity:
        return [(row.first, row.second, row.score / HIGHEST) for row in reading.rows(settings.similarity, "similarity")]
    kept = {"entailment": 1.0, "contradiction": 0.0}
    rows = reading.rows(settings.inference, "inference")
    return [(row.premise, row.hypothesis, kept[row.label]) for row in rows if row.label in kept]


def _keep_apart(data: EmbeddingData, config: EmbeddingConfig, measured: Sequence[str]) -> None:
    """Leave out, or refuse, training texts that are measured or watched."""
    watched = [text for pair in (*data.watched_korean, *data.watched_english) for text in (pair.first, pair.second)]
    unseen = {normalise_for_overlap(text) for text in (*measured, *watched)} - {""}

    def seen(*texts: str) -> bool:
        return any(normalise_for_overlap(text) in unseen for text in texts)

    if config.data.drop_overlap:
        before = _sizes(data)
        data.korean = [text for text in data.korean if not seen(text)]
        data.english = [text for text in data.english if not seen(text)]
        data.pairs = [pair for pair in data.pairs if not seen(pair.ko, pair.en)]
        data.labelled = [row for row in data.labelled if not seen(row[0], row[1])]
        for texts in data.stage_texts.values():
            texts[:] = [text for text in texts if not seen(text)]
        data.statistics["left_out_for_overlap"] = {
            name: count - _sizes(data)[name] for name, count in before.items() if count > _sizes(data)[name]
        }
    for name, texts in (("evaluation", list(measured)), ("retention", watched)):
        refuse_overlap(_training_texts(data), texts, evaluation=name)


def _sizes(data: EmbeddingData) -> dict[str, int]:
    sizes = {name: len(getattr(data, name)) for name in ("korean", "english", "pairs", "labelled")}
    return sizes | {f"stage{stage}": len(texts) for stage, texts in data.stage_texts.items()}


def _training_texts(data: EmbeddingData) -> Iterable[str]:
    yield from data.korean
    yield from data.english
    for pair in data.pairs:
        yield from (pair.ko, pair.en)
    for texts in data.stage_texts.values():
        yield from texts
    for first, second, _ in data.labelled:
        yield from (first, second)


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

    Args:
        settings: Which sets.
        root: Folder of relative files when the settings name none.
        log: Gets counts and problems, for a caller that reports the problems of more files together; without one
            problems are raised here.

    Returns:
        The sets; without those that could not be read when a log is given.

    Raises:
        DataError: If rows are broken and no log is given.
        UserError: If a set has fewer than two rows.
    """
    own = log or ReadLog()
    folder = settings.root or root

    def rows(file: str, kind: Any, select: SourceFilter | None = None) -> Iterator[Any]:
        return read_rows([file], KINDS[kind], log=own, root=folder, select=select)

    sts = {one.name: _some(_of_language(rows(one.file, "similarity"), one), settings) for one in settings.sts}
    bitext = {
        one.name: _some(
            rows(one.file, "query_pairs", SourceFilter(one.select.file, one.select.keep) if one.select else None),
            settings,
        )
        for one in settings.bitext
    }
    choices = {one.name: _some(rows(one.file, "choices"), settings) for one in settings.choices}
    retrieval: dict[str, RetrievalSet] = {}
    for wanted in settings.retrieval:
        retrieval |= _retrieval(wanted, settings, folder, own)
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


def _retrieval(
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


CACHE = "anchor-vectors"
"""Folder below ``training`` that keeps the vectors."""


def anchored_rows(
    texts: Sequence[str], pairs: Sequence[PairRow], base: Path, *, weight: float, cache: Path
) -> TextRows:
    """Put texts and anchored Korean sides together.

    Args:
        texts: Of the stage.
        pairs: Sentence pairs.
        base: The untouched model.
        weight: Of the anchoring; 0 reads no pairs.
        cache: Folder that keeps vectors by content.

    Returns:
        Rows, some of which have a vector to be pulled to.
    """
    if not weight or not pairs:
        return TextRows(list(texts))
    english = list(dict.fromkeys(pair.en for pair in pairs))
    with PartialState().main_process_first():
        vectors_ND = np.asarray(cached_embeddings(SentenceTransformerTeacher(str(base)), english, cache), np.float32)
    place = {text: number for number, text in enumerate(english)}
    target_of = [-1] * len(texts) + [place[pair.en] for pair in pairs]
    return TextRows([*texts, *(pair.ko for pair in pairs)], vectors_ND, np.array(target_of, np.int64))
