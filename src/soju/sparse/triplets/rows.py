"""Triplets become training rows: each text once, its tokens and terms; and what a teacher says of them.

A teacher gives vectors of all texts, or one score for each query with its own two texts.

Shape letters: R = rows, B = triplets in the batch, C = candidates (the B positives, then the B negatives), N = the 3 B
texts of a batch (queries, positives, negatives), S = tokens of the longest, D = dimensions of the teacher.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soju.core.errors import UserError
from soju.core.language import language_of
from soju.core.progress import track
from soju.data.rows import TripletRow
from soju.data.statistics import normalise_for_overlap
from soju.sparse.curriculum import Grouping
from soju.sparse.initial import Vocabulary, padded, teacher_embeddings
from soju.sparse.losses import RowTargets, TermTargets
from soju.sparse.triplets.config import TripletsTeacherSettings
from soju.teachers.dense import Embeddings, cross_encoder_scores

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


def triplet_rows(
    triplets: Sequence[TripletRow], vocabulary: Vocabulary, *, max_length: int, banned: Iterable[str] = ()
) -> TripletRows:
    """Make the rows; `banned` queries are left out, texts cut after `max_length` tokens, rejected rows counted."""
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
    """Makes a batch of rows: padded tokens, the terms a query should activate, which candidates are no negatives."""

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
        ids = [self._rows.input_ids[number] for number in (*queries, *positives, *negatives)]
        return {**padded(ids, pad_id=self._pad_id), "label": label}

    def _terms(self, query: int, positive: int) -> RowTargets:
        """Own terms of the query as ``source``, those of its positive as ``english``, whatever its language."""
        return RowTargets(self._rows.terms[query], [], [(term, 1.0) for term in self._rows.terms[positive]])

    def _same(self, queries: list[int], positives: list[int], candidates: list[int]) -> Tensor:
        same_BC = torch.zeros(len(queries), len(candidates), dtype=torch.bool)
        for row, query in enumerate(queries):
            answers = self._rows.positives.get(query, frozenset()) | {query, positives[row]}
            same_BC[row] = torch.tensor([candidate in answers for candidate in candidates])
        return same_BC


def _grouping(values: Sequence[str]) -> Grouping:
    names = tuple(sorted(set(values)))
    index = {name: place for place, name in enumerate(names)}
    return Grouping(names, np.array([index[value] for value in values], np.int64))


_SAMPLE = 2000
"""Rows that the calibration reads."""
UNKNOWN = -1


class VectorScores:
    """Cosines of a bi-encoder between every query and every candidate of the batch, calibrated.

    Args:
        vectors: The teacher's vectors.
        query_R: Number of the vector that stands for each row's query; `UNKNOWN` leaves the row out.
        candidate_R2: The same for positives and negatives.
        calibrate: See `TripletsTeacherSettings`.
        seed: Of the sample that calibrates.

    Raises:
        UserError: If calibration finds positives no more similar than the texts of other rows.
    """

    def __init__(
        self,
        vectors: Embeddings,
        query_R: NDArray[np.int64],
        candidate_R2: NDArray[np.int64],
        *,
        calibrate: bool,
        seed: int = 0,
    ) -> None:
        self._vectors = vectors
        self._query_R = query_R
        self._candidate_R2 = candidate_R2
        self.offset, self.scale = self._line(seed) if calibrate else (0.0, 1.0)

    def _line(self, seed: int) -> tuple[float, float]:
        known = np.flatnonzero((self._query_R >= 0) & (self._candidate_R2[:, 0] >= 0))
        if len(known) < 2:
            return 0.0, 1.0
        rows = np.random.default_rng(seed).permutation(known)[:_SAMPLE]
        queries = self._vectors[self._query_R[rows]]
        positives = self._vectors[self._candidate_R2[rows, 0]]
        return calibration(
            np.einsum("nd,nd->n", queries, positives), np.einsum("nd,nd->n", queries, np.roll(positives, 1, axis=0))
        )

    def of_batch(self, rows_B: NDArray[np.int64]) -> dict[str, Any]:
        """Return calibrated cosines ``(B, C)`` and where they are known."""
        query_B, candidate_C = self._query_R[rows_B], self._candidate_R2[rows_B].T.ravel()
        known_BC = (query_B >= 0)[:, None] & (candidate_C >= 0)[None, :]
        cosine_BC = self._vectors[np.maximum(query_B, 0)] @ self._vectors[np.maximum(candidate_C, 0)].T
        scores_BC = np.where(known_BC, (cosine_BC - self.offset) / self.scale, 0.0)
        return {"teacher": torch.from_numpy(scores_BC.astype(np.float32)), "known": torch.from_numpy(known_BC)}


class PairScores:
    """A score for each query with its own positive and negative alone; NaN where there is none."""

    def __init__(self, scores_R2: NDArray[np.float64], *, calibrate: bool) -> None:
        self._scores_R2 = scores_R2
        known = np.isfinite(scores_R2).all(axis=1)
        self.offset, self.scale = calibration(*scores_R2[known].T) if calibrate and known.any() else (0.0, 1.0)

    def of_batch(self, rows_B: NDArray[np.int64]) -> dict[str, Any]:
        """Return calibrated scores on the two diagonals of ``(B, C)``, and that only those are known."""
        rows = len(rows_B)
        scores_BC = np.zeros((rows, 2 * rows), np.float32)
        known_BC = np.zeros((rows, 2 * rows), bool)
        own_B = np.arange(rows)
        for side in (0, 1):
            values_B = self._scores_R2[rows_B, side]
            known_BC[own_B, own_B + side * rows] = np.isfinite(values_B)
            scores_BC[own_B, own_B + side * rows] = (np.nan_to_num(values_B) - self.offset) / self.scale
        return {"teacher": torch.from_numpy(scores_BC * known_BC), "known": torch.from_numpy(known_BC)}


def calibration(positives: NDArray[Any], others: NDArray[Any]) -> tuple[float, float]:
    """Return offset and scale of the line that maps the median of the others to 0 and of the positives to 1.

    Args:
        positives: Teacher's scores of right pairs.
        others: Of wrong pairs.

    Returns:
        ``(offset, scale)``: a score s becomes ``(s - offset) / scale``.

    Raises:
        UserError: If the positives' median is not above the others'.
    """
    high, low = float(np.median(positives)), float(np.median(others))
    if not high > low:
        raise UserError(
            f"teacher: positives score {high:.3f} and other texts {low:.3f} (medians), so it cannot tell them apart; "
            "choose a teacher that reads both languages, or teacher.text: translation for an English one"
        )
    return low, high - low


def teacher_scores(settings: TripletsTeacherSettings, rows: TripletRows, *, seed: int) -> TeacherScores:
    """Ask a teacher about all rows, once; what it said is kept on disk. `seed` is of the sample that calibrates it.

    It is a `UserError` if the rows hold no scores, or the teacher cannot tell positives from others.
    """
    if settings.kind == "scores":
        scores = [(_number(row.positive_score), _number(row.negative_score)) for row in rows.triplets]
        scores_R2 = np.array(scores, np.float64).reshape(-1, 2)
        if not np.isfinite(scores_R2).all(axis=1).any():
            raise UserError(
                "data.triplets: no row has positive_score and negative_score; write them, for example with "
                "soju mine, or choose another teacher.kind"
            )
        return PairScores(scores_R2, calibrate=settings.calibrate)
    if settings.kind == "cross_encoder":
        assert settings.model is not None
        pairs = [(row.query, text) for row in rows.triplets for text in (row.positive, row.negative)]
        found = cross_encoder_scores(
            settings.model,
            pairs,
            settings.cache,
            revision=settings.revision,
            max_length=settings.max_length,
            batch_size=settings.batch_size,
        )
        return PairScores(found.reshape(-1, 2).astype(np.float64), calibrate=settings.calibrate)
    query_R, candidate_R2 = heard_texts(rows.triplets, rows.numbers_R3, translation=settings.text == "translation")
    heard = np.unique(np.concatenate([query_R, candidate_R2.ravel()]))
    heard = heard[heard >= 0]
    vectors = teacher_embeddings(settings, [rows.texts[number] for number in heard])
    place = np.full(len(rows.texts) + 1, UNKNOWN, np.int64)  # the last stands for UNKNOWN
    place[heard] = np.arange(len(heard))
    return VectorScores(vectors, place[query_R], place[candidate_R2], calibrate=settings.calibrate, seed=seed)


def heard_texts(
    triplets: Sequence[TripletRow], numbers_R3: NDArray[np.int64], *, translation: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the text the teacher hears for each query ``(R,)`` and for positives and negatives ``(R, 2)``.

    An English-only teacher (`translation`) hears the positive in the place of a Korean query whose positive is English,
    which translates it, and no other Korean text; the places of texts it does not hear are `UNKNOWN`.
    """
    query_R, candidate_R2 = numbers_R3[:, 0].copy(), numbers_R3[:, 1:].copy()
    if not translation:
        return query_R, candidate_R2
    for place, row in enumerate(triplets):
        korean = [language_of(text) == "ko" for text in (row.query, row.positive, row.negative)]
        if korean[0]:
            query_R[place] = UNKNOWN if korean[1] else numbers_R3[place, 1]
        candidate_R2[place][korean[1:]] = UNKNOWN
    return query_R, candidate_R2


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
