"""Triplets become training rows: each text once, its tokens and terms, and what a teacher says of it.

Shape letters: B = triplets in the batch, C = candidates (the B positives, then the B negatives), N = the 3 B texts of a
batch (queries, positives, negatives), S = tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor

from soju.core.progress import track
from soju.data.checks import normalise_for_overlap
from soju.data.records import TripletRow
from soju.sparse.curriculum_sampling import Grouping
from soju.sparse.initial_models import Vocabulary
from soju.sparse.term_losses import RowTargets, TermTargets

_CHUNK = 4096


class TeacherScores(Protocol):
    """Hands a batch what the teacher says of it."""

    def of_batch(self, rows_B: NDArray[np.int64]) -> dict[str, Any]:
        """Return ``teacher`` scores ``(B, C)`` and where they are ``known``, bool; the unknown ones are 0."""


@dataclass(slots=True)
class TripletCounts:
    """What became of the rows, for ``data.json``."""

    kept: int = 0
    without_terms: int = 0
    """Rows whose query or positive has only special or unknown tokens; rejected."""
    banned: int = 0
    """Rows that ask for a probe word; these are for display and must not be trained on."""
    texts: int = 0
    """Different texts."""


@dataclass(frozen=True, slots=True)
class TripletRows:
    """All rows in memory."""

    texts: list[str]
    """Every text once."""
    input_ids: list[list[int]]
    """What the student reads of each text."""
    terms: list[list[int]]
    """The terms each text holds."""
    numbers_R3: NDArray[np.int64]
    """Texts of each row: query, positive, negative."""
    triplets: list[TripletRow]
    positives: dict[int, frozenset[int]]
    """All positives of a query in the data; none of them is a negative for it."""
    counts: TripletCounts = field(default_factory=TripletCounts)

    def __len__(self) -> int:
        return len(self.triplets)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row's texts together."""
        sizes = np.array([len(ids) for ids in self.input_ids], np.int64)
        lengths: list[int] = sizes[self.numbers_R3].sum(axis=1).tolist()
        return lengths

    def texts_with_term(self, size: int) -> NDArray[np.int64]:
        """Count the texts that hold each term, ``(V,)``."""
        counts_V = np.zeros(size, np.int64)
        for terms in self.terms:
            counts_V[terms] += 1
        return counts_V

    def groupings(self) -> tuple[Grouping, Grouping]:
        """Return the rows by pair type and by difficulty."""
        return (
            _grouping([row.pair_type for row in self.triplets]),
            _grouping([row.difficulty for row in self.triplets]),
        )

    def dataset(self) -> Dataset:
        """Return what the trainer shuffles: numbers of rows."""
        return Dataset.from_dict({"row": list(range(len(self)))})


def triplet_rows(
    triplets: Sequence[TripletRow], vocabulary: Vocabulary, *, max_length: int, banned: Iterable[str] = ()
) -> TripletRows:
    """Make the rows.

    Args:
        triplets: As read.
        vocabulary: The student's.
        max_length: Tokens after which a text is cut.
        banned: Queries that must not be trained on.

    Returns:
        The rows, with what was kept and rejected.
    """
    stop = {normalise_for_overlap(word) for word in banned}
    number: dict[str, int] = {}
    for row in triplets:
        for text in (row.query, row.positive, row.negative):
            number.setdefault(text, len(number))
    texts = list(number)
    terms: list[list[int]] = []
    input_ids: list[list[int]] = []
    for start in track(range(0, len(texts), _CHUNK), "triplets"):
        chunk = texts[start : start + _CHUNK]
        terms += vocabulary.terms(chunk)
        input_ids += vocabulary.input_ids(chunk, max_length=max_length)
    counts = TripletCounts(texts=len(texts))
    kept: list[TripletRow] = []
    for row in triplets:
        if normalise_for_overlap(row.query) in stop:
            counts.banned += 1
        elif not terms[number[row.query]] or not terms[number[row.positive]]:
            counts.without_terms += 1
        else:
            kept.append(row)
    counts.kept = len(kept)
    numbers = [(number[row.query], number[row.positive], number[row.negative]) for row in kept]
    positives: dict[int, set[int]] = {}
    for query, positive, _ in numbers:
        positives.setdefault(query, set()).add(positive)
    return TripletRows(
        texts,
        input_ids,
        terms,
        np.array(numbers, np.int64).reshape(-1, 3),
        kept,
        {query: frozenset(found) for query, found in positives.items()},
        counts,
    )


class TripletsCollator:
    """Makes a batch of rows: padded tokens, the terms a query should light, which candidates are no negatives."""

    valid_label_columns = ("label",)

    def __init__(self, rows: TripletRows, teacher: TeacherScores | None, *, pad_id: int) -> None:
        self._rows = rows
        self._teacher = teacher
        self._pad_id = pad_id

    def __call__(self, batch: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return ``text_input_ids`` and ``text_attention_mask`` ``(N, S)``, and the labels of `TripletsLoss`."""
        places = np.array([item["row"] for item in batch], np.int64)
        queries, positives, negatives = self._rows.numbers_R3[places].T.tolist()
        label: dict[str, Any] = {
            "terms": TermTargets.from_rows([self._terms(q, p) for q, p in zip(queries, positives, strict=True)]),
            "same": self._same(queries, positives, [*positives, *negatives]),
        }
        if self._teacher is not None:
            label |= self._teacher.of_batch(places)
        return {**self._padded([*queries, *positives, *negatives]), "label": label}

    def _terms(self, query: int, positive: int) -> RowTargets:
        """Own terms of the query as ``source``, those of its positive as ``english``, whatever its language."""
        return RowTargets(self._rows.terms[query], [], [(term, 1.0) for term in self._rows.terms[positive]])

    def _same(self, queries: list[int], positives: list[int], candidates: list[int]) -> Tensor:
        same_BC = torch.zeros(len(queries), len(candidates), dtype=torch.bool)
        for row, query in enumerate(queries):
            answers = self._rows.positives.get(query, frozenset()) | {query, positives[row]}
            same_BC[row] = torch.tensor([candidate in answers for candidate in candidates])
        return same_BC

    def _padded(self, numbers: list[int]) -> dict[str, Tensor]:
        ids = [self._rows.input_ids[number] for number in numbers]
        input_ids = torch.full((len(ids), max(map(len, ids))), self._pad_id, dtype=torch.long)
        mask = torch.zeros_like(input_ids)
        for place, text in enumerate(ids):
            input_ids[place, : len(text)] = torch.tensor(text)
            mask[place, : len(text)] = 1
        return {"text_input_ids": input_ids, "text_attention_mask": mask}


def _grouping(values: Sequence[str]) -> Grouping:
    names = tuple(sorted(set(values)))
    index = {name: place for place, name in enumerate(names)}
    return Grouping(names, np.array([index[value] for value in values], np.int64))
