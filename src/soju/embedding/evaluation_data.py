"""Read the test sets of an embedding model; broken rows of all files are told at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from soju.core.errors import UserError
from soju.core.language import language_of
from soju.data.beir import read_beir
from soju.data.log import ReadLog
from soju.data.readers import read_rows
from soju.data.records import ChoiceQuestion, PairRow, PassageRow, SimilarityPair
from soju.data.source_filter import SourceFilter
from soju.data.sources import SAMPLES
from soju.embedding.evaluation_config import EvaluationSettings, RetrievalTestSet, SimilaritySet
from soju.evaluation.retrieval import RetrievalSet


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
        return read_rows([file], kind, log=own, root=folder, select=select)

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
    passages: list[PassageRow] = _some(read_rows(one.passages, "passages", log=log, root=root), settings)
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
