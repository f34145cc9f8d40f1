"""What a teacher says of the triplets: vectors of all texts, or one score for each query with its own two texts.

Shape letters: R = rows, B = triplets in a batch, C = candidates (B positives, B negatives), D = dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from soju.core.errors import UserError
from soju.core.language import language_of
from soju.data.records import TripletRow
from soju.sparse.start import teacher_embeddings
from soju.sparse.triplets.config import TripletsTeacherSettings
from soju.sparse.triplets.rows import TeacherScores, TripletRows
from soju.teachers.cross_encoder import cross_encoder_scores
from soju.teachers.teacher_cache import Embeddings

_SAMPLE = 2000
"""Rows that the calibration looks at."""
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
    """Ask a teacher about all rows, once; what it said is kept on disk.

    Args:
        settings: Which teacher.
        rows: The training rows.
        seed: Of the sample that calibrates it.

    Returns:
        Its scores.

    Raises:
        UserError: If the rows hold no scores, or the teacher cannot tell positives from others.
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
    wanted = np.unique(np.concatenate([query_R, candidate_R2.ravel()]))
    wanted = wanted[wanted >= 0]
    vectors = teacher_embeddings(settings, [rows.texts[number] for number in wanted])
    place = np.full(len(rows.texts) + 1, UNKNOWN, np.int64)  # the last stands for UNKNOWN
    place[wanted] = np.arange(len(wanted))
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
