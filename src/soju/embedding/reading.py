"""Read what a run of recipe `embedding` learns from and is watched by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from soju.core.errors import UserError
from soju.data.checks import normalise_for_overlap, refuse_overlap
from soju.data.log import ReadLog
from soju.data.readers import read_rows
from soju.data.records import PairRow, PassageRow, SimilarityPair
from soju.data.similarity_pairs import HIGHEST
from soju.data.split import held_out
from soju.data.spreading import spread
from soju.data.statistics import RowStatistics, counted
from soju.embedding.config import EmbeddingConfig, EmbeddingDataSettings, SupervisedSettings, UnsupervisedSettings

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
                [source], kind, log=self._log, root=self._settings.root, max_line_bytes=self._settings.max_line_bytes
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
