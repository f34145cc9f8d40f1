"""What vectors say of texts, compared with what people say: similarity, multiple choice, translations found.

A correlation is no mean of values of pairs, so its resampling draws pairs and correlates each draw anew. The ranks of a
draw are found without sorting it: the pairs are sorted once, and a draw says how often each occurs.

Shape letters: N = pairs, S = draws, G = distinct values; Q = questions, C = choices of all questions, one after the
other; D = dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from soju.core.errors import UserError
from soju.core.results import Comparison, Score, Setting
from soju.data.rows import ChoiceQuestion, PairRow, SimilarityPair
from soju.evaluation.significance import Measurement, judge_draws, mean_interval, percentiles, require_same_signature

Metric = Literal["spearman", "pearson"]
METRICS: tuple[Metric, ...] = ("spearman", "pearson")

_CELLS = 1 << 21
"""Counts held at once, which bounds the memory to some 64 MB."""
_PRODUCTS = 1 << 22
"""Cosines held at once."""


@dataclass(frozen=True, slots=True, eq=False)
class SimilarityMeasurement:
    """A correlation together with what was correlated, to compare it with that of another system."""

    score: Score
    metric: Metric
    cosines_N: NDArray[np.float64]
    """What the system says of each pair, ``(N,)``, in the order of the test set."""
    grades_N: NDArray[np.float64]
    """What people say of it, ``(N,)``."""


def cosines_of(first_ND: ArrayLike, second_ND: ArrayLike) -> NDArray[np.float64]:
    """Return the cosine of each row of the one with the same row of the other, ``(N,)``; 0 for a zero vector."""
    first, second = np.asarray(first_ND, np.float64), np.asarray(second_ND, np.float64)
    if first.shape != second.shape or first.ndim != 2:
        raise ValueError(f"vectors must be two (N, D) of one shape, got {first.shape} and {second.shape}")
    lengths_N = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    products_N = np.einsum("nd,nd->n", first, second)
    return np.divide(products_N, lengths_N, out=np.zeros_like(products_N), where=lengths_N > 0)


def correlation(values_N: ArrayLike, grades_N: ArrayLike, metric: Metric = "spearman") -> float:
    """Return Spearman's rank correlation (equal values share the mean of their ranks) or Pearson's of values.

    Args:
        values_N: One value a pair, ``(N,)``, N >= 2.
        grades_N: The grades of people, ``(N,)``.
        metric: Which of the two.

    Returns:
        A number in [-1, 1].

    Raises:
        UserError: If a value is not finite, or all values or all grades are equal, so that nothing correlates.

    References:
        Spearman 1904. Reimers et al. 2016, COLING (why Spearman and not Pearson for STS).
    """
    values, grades = _checked(values_N, grades_N)
    once_1N = np.ones((1, len(values)), np.int64)
    return float(_Correlator(values, grades, metric)(once_1N)[0])


def evaluate_similarity(
    cosines_N: ArrayLike,
    pairs: list[SimilarityPair],
    *,
    subject: str,
    test_set: str,
    samples: int = 2_000,
    seed: int = 0,
    level: float = 0.95,
    **decisive: object,
) -> list[SimilarityMeasurement]:
    """Correlate the cosines of a system with the scores of people.

    Args:
        cosines_N: What the system says of each pair, ``(N,)``.
        pairs: The pairs with their scores, N >= 2.
        subject: Name of the system.
        test_set: Name of the pairs.
        samples: Draws for the percentile-bootstrap interval; 0 for none.
        seed: Seed of the draws.
        level: Level of the interval.
        **decisive: What else decides the value: prompt, pooling, length.

    Returns:
        One measurement for each of `METRICS`.

    Raises:
        UserError: If there are fewer than two pairs, a cosine is not finite, or all are equal.
    """
    try:
        values, grades = _checked(cosines_N, [pair.score for pair in pairs])
    except UserError as error:
        raise UserError(f"{test_set}: {subject}: {error}") from None
    texts = [text for pair in pairs for text in (pair.first, pair.second, repr(pair.score))]
    setting = Setting.of_texts(texts, subject=subject, test_set=test_set)
    found = []
    for metric in METRICS:
        interval = None
        if samples:
            draws_S = resampled_correlations([values], grades, metric, samples=samples, seed=seed)[0]
            interval = percentiles(draws_S, level)
        score = setting.score(
            metric,
            correlation(values, grades, metric),
            unit="correlation",
            higher_is_better=True,
            interval=interval,
            similarity="cosine",
            pairs=len(pairs),
            **({"ties": "mean-rank"} if metric == "spearman" else {}),
            **decisive,
        )
        found.append(SimilarityMeasurement(score, metric, values, grades))
    return found


def compare_similarity(
    subject: SimilarityMeasurement,
    baseline: SimilarityMeasurement,
    *,
    samples: int = 2_000,
    seed: int = 0,
    level: float = 0.95,
) -> Comparison:
    """Compare the correlations of two systems on the same pairs: both are correlated anew on every draw of pairs.

    Args:
        subject: The system in question.
        baseline: What it is compared with.
        samples: Number S of draws, >= 1.
        seed: Seed of the draws.
        level: Level of the interval.

    Returns:
        The comparison, subject minus baseline, its p-value as in `soju.evaluation.significance.compare`.

    Raises:
        UserError: If the two were not measured alike.

    References:
        Efron and Tibshirani 1993, chapter 16. Koehn 2004 (paired resampling). Phipson and Smyth 2010 (the + 1).
    """
    require_same_signature(subject.score, baseline.score)
    both = [subject.cosines_N, baseline.cosines_N]
    ours_S, theirs_S = resampled_correlations(both, subject.grades_N, subject.metric, samples=samples, seed=seed)
    return judge_draws(
        subject.score,
        baseline.score,
        difference=subject.score.value - baseline.score.value,
        draws_S=ours_S - theirs_S,
        seed=seed,
        level=level,
    )


def resampled_correlations(
    systems: list[NDArray[np.float64]], grades_N: NDArray[np.float64], metric: Metric, *, samples: int, seed: int
) -> list[NDArray[np.float64]]:
    """Draw N pairs with replacement and correlate them, `samples` times; the draws are the same for every system.

    Args:
        systems: Values of each system, ``(N,)`` each.
        grades_N: Grades of people, ``(N,)``.
        metric: Which correlation.
        samples: Number S of draws, >= 1.
        seed: Seed of the draws.

    Returns:
        Correlations of each system, ``(S,)``. A draw in which all values are equal has none and counts as 0.

    Raises:
        UserError: If samples < 1.
    """
    if samples < 1:
        raise UserError(f"samples: got {samples}; take at least 1, 2,000 is usual")
    correlators = [_Correlator(values, grades_N, metric) for values in systems]
    generator = np.random.default_rng(seed)
    count, block = len(grades_N), max(1, _CELLS // len(grades_N))
    found: list[list[NDArray[np.float64]]] = [[] for _ in systems]
    for start in range(0, samples, block):
        rows = min(block, samples - start)
        drawn_SN = generator.integers(0, count, size=(rows, count)) + count * np.arange(rows)[:, None]
        counts_SN = np.bincount(drawn_SN.ravel(), minlength=rows * count).reshape(rows, count)
        for own, correlate in zip(found, correlators, strict=True):
            own.append(correlate(counts_SN))
    return [np.concatenate(own) for own in found]


class _Correlator:
    """Correlation of the pairs of a draw, given by how often each pair is in it."""

    def __init__(self, values_N: NDArray[np.float64], grades_N: NDArray[np.float64], metric: Metric) -> None:
        self._sides = (values_N, grades_N)
        self._ranked = metric == "spearman"
        self._groups = [_Groups(side) for side in self._sides] if self._ranked else []

    def __call__(self, counts_SN: NDArray[np.int64]) -> NDArray[np.float64]:
        weights_SN = counts_SN / counts_SN.sum(axis=1, keepdims=True)
        if self._ranked:
            first, second = (groups.ranks(counts_SN) for groups in self._groups)
        else:
            first, second = (np.broadcast_to(side, counts_SN.shape) for side in self._sides)
        first_SN, first_S = _centred(first, weights_SN)
        second_SN, second_S = _centred(second, weights_SN)
        covariance_S = np.einsum("sn,sn,sn->s", weights_SN, first_SN, second_SN)
        spread_S, none_S = np.sqrt(first_S * second_S), np.zeros_like(covariance_S)
        return np.clip(np.divide(covariance_S, spread_S, out=none_S, where=spread_S > 0), -1.0, 1.0)


def _centred(
    side_SN: NDArray[np.float64], weights_SN: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return a side without its mean, and its variance; what is left of equal values by rounding counts as 0."""
    centred_SN = side_SN - np.einsum("sn,sn->s", weights_SN, side_SN)[:, None]
    variance_S = np.einsum("sn,sn,sn->s", weights_SN, centred_SN, centred_SN)
    return centred_SN, np.where(variance_S > 1e-26 * float(np.abs(side_SN).max()) ** 2, variance_S, 0.0)


class _Groups:
    """Equal values of one side, in ascending order."""

    def __init__(self, values_N: NDArray[np.float64]) -> None:
        self._order_N = np.argsort(values_N, kind="stable")
        distinct_G, self._group_N = np.unique(values_N, return_inverse=True)
        self._start_G = np.searchsorted(values_N[self._order_N], distinct_G)

    def ranks(self, counts_SN: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the rank of each pair in each draw, ``(S, N)``, from 1: its group's mean rank."""
        size_SG = np.add.reduceat(counts_SN[:, self._order_N], self._start_G, axis=1)
        rank_SG = np.cumsum(size_SG, axis=1) - (size_SG - 1) / 2
        return rank_SG[:, self._group_N]


def _checked(values_N: ArrayLike, grades_N: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    values, grades = np.asarray(values_N, np.float64), np.asarray(grades_N, np.float64)
    if values.ndim != 1 or values.shape != grades.shape or len(values) < 2:
        raise UserError(f"{len(values)} values and {len(grades)} grades; a correlation needs two or more of each alike")
    for name, side in (("value", values), ("grade", grades)):
        if not np.isfinite(side).all():
            raise UserError(f"{name} {int(np.argmin(np.isfinite(side)))} is not finite; fix the model that made it")
        if np.all(side == side[0]):
            raise UserError(f"every {name} is {side[0]:g}, so nothing correlates; give a model and pairs that differ")
    return values, grades


def chance_level(questions: Sequence[ChoiceQuestion]) -> float:
    """Return the accuracy of guessing: the mean of 1 / number of choices."""
    return float(np.mean([1 / len(question.choices) for question in questions]))


def credits_of(cosines_C: ArrayLike, questions: Sequence[ChoiceQuestion]) -> NDArray[np.float64]:
    """Return what each question earns: 1 when its right choice has the highest cosine, a share when it ties for it.

    Args:
        cosines_C: Cosine of each choice with the context of its question, ``(C,)``.
        questions: Q questions, whose choices follow one another in `cosines_C`.

    Returns:
        Credits in [0, 1], ``(Q,)``. Equal cosines share one point, so that a model that finds all alike is at chance.

    Raises:
        ValueError: If there is not one cosine for each choice.
    """
    cosines = np.asarray(cosines_C, np.float64)
    counts = [len(question.choices) for question in questions]
    if cosines.shape != (sum(counts),):
        raise ValueError(f"cosines must be ({sum(counts)},), one a choice, got {cosines.shape}")
    credits = []
    for question, own in zip(questions, np.split(cosines, np.cumsum(counts)[:-1]), strict=True):
        best = own == own.max()
        credits.append(float(best[question.answer]) / float(best.sum()))
    return np.array(credits)


def evaluate_choices(
    context_QD: NDArray[np.float32],
    choices_CD: NDArray[np.float32],
    questions: Sequence[ChoiceQuestion],
    *,
    subject: str,
    test_set: str,
    samples: int = 2_000,
    seed: int = 0,
    **decisive: object,
) -> tuple[Measurement, Score]:
    """Measure how often the right choice is nearest to the context.

    Args:
        context_QD: Vectors of the contexts, ``(Q, D)``.
        choices_CD: Vectors of the choices, question by question, ``(C, D)``.
        questions: The questions, Q >= 2.
        subject: Name of the system.
        test_set: Name of the questions.
        samples: Draws for the interval; 0 for none.
        seed: Seed of the draws.
        **decisive: What else decides the value: prompt, pooling, length.

    Returns:
        The accuracy with the credit of each question, and the chance level as a score of the system ``chance``.

    Raises:
        UserError: If there are fewer than two questions.
    """
    if len(questions) < 2:
        raise UserError(f"{test_set}: fewer than two questions; give more, or leave the set out")
    repeated_CD = np.repeat(context_QD, [len(question.choices) for question in questions], axis=0)
    credits_Q = credits_of(cosines_of(repeated_CD, choices_CD), questions)
    texts = [text for question in questions for text in (question.context, *question.choices, str(question.answer))]
    same = {"questions": len(questions), "ties": "shared", **decisive}

    def score(name: str, value: float, values_Q: NDArray[np.float64] | None = None) -> Score:
        interval = mean_interval(values_Q, samples=samples, seed=seed) if samples and values_Q is not None else None
        setting = Setting.of_texts(texts, subject=name, test_set=test_set)
        return setting.score("accuracy", value, unit="fraction", higher_is_better=True, interval=interval, **same)

    measured = Measurement(score(subject, float(credits_Q.mean()), credits_Q), credits_Q)
    return measured, score("chance", chance_level(questions))


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
    queries, documents = unit_rows(queries_ND), unit_rows(documents_ND)
    if queries.shape[1] != documents.shape[1] or not len(documents):
        raise ValueError(f"vectors must be (N, D) and (M, D) with M >= 1, got {queries.shape} and {documents.shape}")
    block = max(1, _PRODUCTS // len(documents))
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


def unit_rows(vectors_ND: ArrayLike) -> NDArray[np.float32]:
    """Return rows of length 1, ``(N, D)`` float32; a row of zeros stays."""
    vectors = np.asarray(vectors_ND, np.float32)
    if vectors.ndim != 2:
        raise ValueError(f"vectors must be (N, D), got {vectors.shape}")
    lengths_N1 = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, lengths_N1, out=np.zeros_like(vectors), where=lengths_N1 > 0)
