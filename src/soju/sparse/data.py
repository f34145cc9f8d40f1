"""What a run learns from and what it is measured on, as read from its files; refuses what would falsify its scores.

A mode's ``read`` makes a `RunReader`, adds the rows that it alone has, and returns what `RunReader.checked` says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from soju.core.errors import UserError
from soju.data.log import ReadLog
from soju.data.readers import BeirSet, SourceFilter, read_beir, read_rows
from soju.data.rows import PAIRS, PASSAGES, QUERY_PAIRS, TERMS, TRIPLETS, Kind, PairRow, RowT, TermRow, TripletRow
from soju.data.statistics import RowStatistics, counted, held_out, normalise_for_overlap, refuse_overlap
from soju.evaluation.retrieval import RetrievalSet
from soju.sparse.config import DataSettings, NeuralConfig, StaticConfig, TestSet


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

    def texts(self) -> Iterator[str]:
        """Yield every text of pairs and triplets."""
        for pair in self.pairs:
            yield from _pair_texts(pair)
        for row in self.triplets:
            yield from _triplet_texts(row)


@dataclass(frozen=True, slots=True)
class EvaluationTexts:
    """One test set as read."""

    name: str
    directions: dict[str, RetrievalSet]
    """By direction (``ko-en``), or by split for the layout of BEIR, whose languages nobody names."""

    def texts(self) -> list[str]:
        """Return the texts that training must not hold: queries and what answers them."""
        unique: dict[str, None] = {}
        for one in self.directions.values():
            unique.update(dict.fromkeys(one.queries.values()))
            unique.update(dict.fromkeys(one.documents[key] for gains in one.judgements.values() for key in gains))
        return list(unique)


@dataclass(frozen=True, slots=True)
class RunData:
    """Everything a run reads."""

    training: TrainingData
    evaluation: list[EvaluationTexts]


class RunReader:
    """Reads pairs, terms and test sets. What is broken in any file is collected and refused by `checked`, all at once.

    Args:
        config: Settings of the run.
        dev_terms: Share of the head words kept out of training to choose the best checkpoint on.
    """

    def __init__(self, config: StaticConfig | NeuralConfig, *, dev_terms: float = 0.0) -> None:
        self._config = config
        self._settings: DataSettings = config.data
        self._log = ReadLog()
        self.training = self._read_training(dev_terms)
        self._test_rows = [self._read_test_rows(test_set) for test_set in config.evaluation.sets]
        self.training.unseen_terms.extend(self.rows(config.evaluation.terms, TERMS))

    def rows(self, sources: Sequence[str], kind: Kind[RowT], *, select: SourceFilter | None = None) -> Iterator[RowT]:
        """Yield the rows of files of one kind; see `read_rows`."""
        if not sources:
            return iter(())
        settings = self._settings
        return read_rows(
            sources,
            kind,
            log=self._log,
            root=settings.root,
            select=select,
            max_line_bytes=settings.max_line_bytes,
        )

    def checked(self) -> RunData:
        """Return all rows.

        Returns:
            Training and evaluation data that share no text.

        Raises:
            DataError: If rows are broken, all problems of all files listed at once.
            UserError: If evaluation texts stand in the training data, or no pair is left to align.
        """
        config, training = self._config, self.training
        self._log.raise_if_broken(self._settings.on_error)
        training.statistics["reading"] = self._log.to_json()
        pairs = zip(config.evaluation.sets, self._test_rows, strict=True)
        evaluation = [_test_set_of(test_set, rows) for test_set, rows in pairs]
        if self._settings.drop_overlap:
            _drop_overlap(training, evaluation)
        if config.aligns_words:
            place = "check data.pairs, data.passages and data.select"
            refuse_too_few(training.pairs, f"data: no sentence pair is left to train on; {place}")
        for texts in evaluation:
            refuse_overlap(training.texts(), texts.texts(), evaluation=texts.name)
        refuse_overlap(
            (row.ko for row in training.terms), [row.ko for row in training.unseen_terms], evaluation="evaluation.terms"
        )
        return RunData(training, evaluation)

    def _read_training(self, dev_terms: float) -> TrainingData:
        settings, seed = self._settings, self._config.seed
        counts = {name: RowStatistics() for name in ("pairs", "passages", "terms")}
        select = None if settings.select is None else SourceFilter(settings.select.file, settings.select.keep)
        by_source: Counter[str] = Counter()
        pairs: list[PairRow] = []
        for source in settings.pairs:
            rows = list(counted(self.rows([source], PAIRS, select=select), counts["pairs"]))
            by_source.update(self._log.selected if select else {source: len(rows)})
            pairs += rows
        for source in settings.passages:
            for passage in counted(self.rows([source], PASSAGES), counts["passages"]):
                pairs += [PairRow(passage.ko, passage.en), PairRow(passage.query_ko, passage.query_en)]
                by_source[source] += 1
        terms: list[TermRow] = []
        unseen: list[TermRow] = []
        dev: list[TermRow] = []
        for source in settings.terms:
            for row in counted(_of_sources(self.rows([source], TERMS), settings.term_sources), counts["terms"]):
                word = normalise_for_overlap(row.ko)
                if held_out(word, seed=seed, share=settings.held_out_terms):
                    unseen.append(row)
                elif held_out(word, seed=seed + 1, share=dev_terms):
                    dev.append(row)
                else:
                    terms.append(row)
                    by_source.update(row.sources or [source])
        statistics = {name: count.to_json() for name, count in counts.items() if count.rows}
        return TrainingData(pairs, terms, unseen, dev, dict(by_source), self._log, statistics)

    def _read_test_rows(self, test_set: TestSet) -> list[Any] | BeirSet:
        settings = self._settings
        if test_set.beir is not None:
            return read_beir(
                test_set.beir,
                log=self._log,
                split=test_set.split,
                root=settings.root,
                max_line_bytes=settings.max_line_bytes,
            )
        if test_set.pairs:
            return list(self.rows(test_set.pairs, QUERY_PAIRS))
        if test_set.triplets:
            return list(self.rows(test_set.triplets, TRIPLETS))
        return list(self.rows(test_set.passages, PASSAGES))


def refuse_too_few(rows: Sequence[object], message: str, *, least: int = 1) -> None:
    """Refuse (`UserError`) to train on fewer rows than `least`."""
    if len(rows) < least:
        raise UserError(message)


def _of_sources(rows: Iterable[TermRow], sources: Sequence[str] | None) -> Iterator[TermRow]:
    """Leave out rows that name a source which is not among these."""
    return (row for row in rows if sources is None or set(sources).issuperset(row.sources))


def _drop_overlap(training: TrainingData, evaluation: Sequence[EvaluationTexts]) -> None:
    unseen = {normalise_for_overlap(text) for texts in evaluation for text in texts.texts()}

    def drop(name: str, rows: list[Any], texts_of: Callable[[Any], Iterable[str]]) -> None:
        kept = [row for row in rows if not any(normalise_for_overlap(text) in unseen for text in texts_of(row))]
        if len(kept) < len(rows):
            training.statistics[f"{name}_left_out_for_overlap"] = len(rows) - len(kept)
        rows[:] = kept

    drop("pairs", training.pairs, _pair_texts)
    drop("terms", training.terms, lambda row: (row.ko,))
    drop("triplets", training.triplets, _triplet_texts)
    drop("dev_triplets", training.dev_triplets, _triplet_texts)


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


def _pair_texts(pair: PairRow) -> tuple[str, str]:
    return pair.ko, pair.en


def _triplet_texts(row: TripletRow) -> tuple[str, str, str]:
    return row.query, row.positive, row.negative
