"""Read what a run learns from and what it is measured on; refuse what would make its scores lie."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from soju.core.errors import UserError
from soju.data.log import ReadLog
from soju.data.readers import BeirSet, SourceFilter, read_beir, read_rows
from soju.data.rows import KINDS, PairRow, TermRow, TripletRow
from soju.data.splits import held_out, normalise_for_overlap, refuse_overlap
from soju.data.statistics import RowStatistics, counted
from soju.evaluation.retrieval import RetrievalSet
from soju.sparse.config import DataSettings, ScratchStudent, StaticConfig, TestSet
from soju.sparse.terms.config import TermsConfig
from soju.sparse.triplets.config import TripletsConfig

SpladeConfig = StaticConfig | TermsConfig | TripletsConfig


@dataclass(frozen=True, slots=True)
class TrainingData:
    """Rows to learn from."""

    pairs: list[PairRow]
    terms: list[TermRow]
    unseen_terms: list[TermRow]
    """Head words kept out of `terms` to measure on."""
    dev_terms: list[TermRow]
    """Head words kept out of `terms` to choose the best checkpoint on (mode ``terms``)."""
    source_rows: dict[str, int]
    """Rows read for training by source, or by file where rows name none; a head word counts for each of its sources."""
    log: ReadLog
    """What was read and refused, evaluation data included."""
    statistics: dict[str, Any]
    """For ``data.json``."""
    triplets: list[TripletRow] = field(default_factory=list)
    """Rows of mode ``triplets``."""
    dev_triplets: list[TripletRow] = field(default_factory=list)
    """Rows whose queries were kept out of `triplets` to choose the best checkpoint on."""


@dataclass(frozen=True, slots=True)
class EvaluationTexts:
    """One test set as read."""

    name: str
    directions: dict[str, RetrievalSet]
    """By direction (``ko-en``), or by split for the layout of BEIR, whose languages nobody names."""


@dataclass(frozen=True, slots=True)
class RunData:
    """Everything a run reads."""

    training: TrainingData
    evaluation: list[EvaluationTexts]


def read_run_data(config: SpladeConfig) -> RunData:
    """Read training and evaluation data.

    Args:
        config: Settings of the run.

    Returns:
        All rows, checked.

    Raises:
        DataError: If rows are broken, all problems of all files listed at once.
        UserError: If evaluation texts stand in the training data, or nothing is left to train on.
    """
    log = ReadLog()
    dev_share = config.data.dev_terms if isinstance(config, TermsConfig) else 0.0
    training = _read_training(config.data, seed=config.seed, dev_share=dev_share, log=log)
    test_rows = [_read_test_rows(test_set, config.data, log=log) for test_set in config.evaluation.sets]
    training.unseen_terms.extend(_read(config.evaluation.terms, "terms", config.data, log))
    if isinstance(config, TripletsConfig):
        _read_triplets(config, training, log=log)
    log.raise_if_broken(config.data.on_error)
    training.statistics["reading"] = log.to_json()
    evaluation = [_test_set_of(*pair) for pair in zip(config.evaluation.sets, test_rows, strict=True)]
    if config.data.drop_overlap:
        _drop_overlap(training, evaluation)
    _refuse_too_little(config, training)
    for texts in evaluation:
        refuse_overlap(_training_texts(training), _texts(texts), evaluation=texts.name)
    refuse_overlap(
        (row.ko for row in training.terms), [row.ko for row in training.unseen_terms], evaluation="evaluation.terms"
    )
    return RunData(training, evaluation)


def _read_triplets(config: TripletsConfig, training: TrainingData, *, log: ReadLog) -> None:
    """Add the triplets; words that are kept out of the terms to measure on are kept out of the triplets too."""
    data, seed = config.data, config.seed
    counts = RowStatistics()
    unseen = {normalise_for_overlap(row.ko) for row in training.unseen_terms}
    for source in data.triplets:
        for row in counted(_read([source], "triplets", data, log), counts):
            query = normalise_for_overlap(row.query)
            if row.pair_type == "single_term" and query in unseen:
                continue
            if not data.dev_triplets and held_out(query, seed=seed + 1, share=data.dev_share):
                training.dev_triplets.append(row)
            else:
                training.triplets.append(row)
                training.source_rows[source] = training.source_rows.get(source, 0) + 1
    training.dev_triplets.extend(_read(data.dev_triplets, "triplets", data, log))
    training.statistics["triplets"] = counts.to_json()


def _drop_overlap(training: TrainingData, evaluation: Sequence[EvaluationTexts]) -> None:
    unseen = {normalise_for_overlap(text) for texts in evaluation for text in _texts(texts)}

    def drop(name: str, rows: list[Any], texts_of: Callable[[Any], Iterable[str]]) -> None:
        kept = [row for row in rows if not any(normalise_for_overlap(text) in unseen for text in texts_of(row))]
        if len(kept) < len(rows):
            training.statistics[f"{name}_left_out_for_overlap"] = len(rows) - len(kept)
        rows[:] = kept

    drop("pairs", training.pairs, _pair_texts)
    drop("terms", training.terms, lambda row: (row.ko,))
    drop("triplets", training.triplets, _triplet_texts)
    drop("dev_triplets", training.dev_triplets, _triplet_texts)


def _refuse_too_little(config: SpladeConfig, training: TrainingData) -> None:
    aligns = isinstance(config, StaticConfig) or (
        isinstance(config.student, ScratchStudent) and config.student.static_model is None
    )
    if aligns and not training.pairs:
        raise UserError("data: no sentence pair is left to train on; check data.pairs, data.passages and data.select")
    if isinstance(config, TermsConfig):
        for rows, setting in ((training.terms, "data.terms"), (training.dev_terms, "data.dev_terms")):
            if not rows:
                raise UserError(f"{setting}: no head word is left; give more terms, or another share")
    if isinstance(config, TripletsConfig):
        for triplets, setting in ((training.triplets, "data.triplets"), (training.dev_triplets, "data.dev_share")):
            if len(triplets) < 2:
                raise UserError(f"{setting}: fewer than two triplets are left; give more, or another share")


def _read_training(settings: DataSettings, *, seed: int, dev_share: float, log: ReadLog) -> TrainingData:
    counts = {name: RowStatistics() for name in ("pairs", "passages", "terms")}
    select = None if settings.select is None else SourceFilter(settings.select.file, settings.select.keep)
    by_source: Counter[str] = Counter()
    pairs: list[PairRow] = []
    for source in settings.pairs:
        rows = list(counted(_read([source], "pairs", settings, log, select=select), counts["pairs"]))
        by_source.update(log.selected if select else {source: len(rows)})
        pairs += rows
    for source in settings.passages:
        for passage in counted(_read([source], "passages", settings, log), counts["passages"]):
            pairs += [PairRow(passage.ko, passage.en), PairRow(passage.query_ko, passage.query_en)]
            by_source[source] += 1
    terms: list[TermRow] = []
    unseen: list[TermRow] = []
    dev: list[TermRow] = []
    for source in settings.terms:
        for row in counted(_wanted(_read([source], "terms", settings, log), settings), counts["terms"]):
            word = normalise_for_overlap(row.ko)
            if held_out(word, seed=seed, share=settings.held_out_terms):
                unseen.append(row)
            elif held_out(word, seed=seed + 1, share=dev_share):
                dev.append(row)
            else:
                terms.append(row)
                by_source.update(row.sources or [source])
    statistics = {name: count.to_json() for name, count in counts.items() if count.rows}
    return TrainingData(pairs, terms, unseen, dev, dict(by_source), log, statistics)


def _wanted(rows: Iterable[TermRow], settings: DataSettings) -> Iterator[TermRow]:
    if settings.term_sources is None:
        yield from rows
        return
    wanted = set(settings.term_sources)
    yield from (row for row in rows if wanted.issuperset(row.sources))


def _read_test_rows(test_set: TestSet, settings: DataSettings, *, log: ReadLog) -> list[Any] | BeirSet:
    if test_set.beir is not None:
        return read_beir(
            test_set.beir, log=log, split=test_set.split, root=settings.root, max_line_bytes=settings.max_line_bytes
        )
    if test_set.pairs:
        return list(_read(test_set.pairs, "query_pairs", settings, log))
    if test_set.triplets:
        return list(_read(test_set.triplets, "triplets", settings, log))
    return list(_read(test_set.passages, "passages", settings, log))


def _test_set_of(test_set: TestSet, rows: list[Any] | BeirSet) -> EvaluationTexts:
    """Arrange the rows of a test set as queries, documents and what answers what."""
    name = test_set.name
    if len(rows.queries if isinstance(rows, BeirSet) else rows) < 2:
        raise UserError(f"evaluation set {name}: fewer than two rows with an answer; give more, or leave the set out")
    if isinstance(rows, BeirSet):
        one = RetrievalSet.create(f"{name}/{test_set.split}", rows.queries, rows.documents, rows.judgements)
        return EvaluationTexts(name, {test_set.split: one})
    if test_set.triplets:
        made = {kind: _triplet_set(f"{name}/{kind}", rows, kind) for kind in sorted({row.pair_type for row in rows})}
        if any(len(one.queries) < 2 for one in made.values()):
            raise UserError(f"evaluation set {name}: a pair type has fewer than two queries; give more, or none of it")
        return EvaluationTexts(name, made)
    documents = {"ko": [row.ko for row in rows], "en": [row.en for row in rows]}
    queries = documents
    directions: tuple[str, ...] = ("ko-en", "en-ko")
    if test_set.passages:
        queries = {"ko": [row.query_ko for row in rows], "en": [row.query_en for row in rows]}
        directions += ("ko-ko", "en-en")
    return EvaluationTexts(
        name, {d: RetrievalSet.from_pairs(f"{name}/{d}", queries[d[:2]], documents[d[3:]]) for d in directions}
    )


def _triplet_set(name: str, rows: Sequence[TripletRow], kind: str) -> RetrievalSet:
    """Let each query of a pair type find its positives among the positives and negatives of that type."""
    wanted = [row for row in rows if row.pair_type == kind]
    documents = dict.fromkeys(text for row in wanted for text in (row.positive, row.negative))
    answers: dict[str, set[str]] = {}
    for row in wanted:
        answers.setdefault(row.query, set()).add(row.positive)
    return RetrievalSet.create(name, {query: query for query in answers}, {text: text for text in documents}, answers)


def _read(
    sources: Sequence[str], kind: Any, settings: DataSettings, log: ReadLog, *, select: SourceFilter | None = None
) -> Iterator[Any]:
    if not sources:
        return iter(())
    return read_rows(
        sources, KINDS[kind], log=log, root=settings.root, select=select, max_line_bytes=settings.max_line_bytes
    )


def _training_texts(training: TrainingData) -> Iterator[str]:
    for pair in training.pairs:
        yield from _pair_texts(pair)
    for row in training.triplets:
        yield from _triplet_texts(row)


def _pair_texts(pair: PairRow) -> tuple[str, str]:
    return pair.ko, pair.en


def _triplet_texts(row: TripletRow) -> tuple[str, str, str]:
    return row.query, row.positive, row.negative


def _texts(texts: EvaluationTexts) -> list[str]:
    """Return the texts that training must not hold: queries and what answers them."""
    unique: dict[str, None] = {}
    for one in texts.directions.values():
        unique.update(dict.fromkeys(one.queries.values()))
        unique.update(dict.fromkeys(one.documents[key] for gains in one.judgements.values() for key in gains))
    return list(unique)
