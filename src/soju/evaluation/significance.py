"""Confidence intervals and paired significance tests: the bootstrap over queries.

Shape letters: Q = queries, S = resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from soju.core.errors import UserError
from soju.core.results import Comparison, Interval, Score

_CELLS = 1 << 22
"""Resampled values held at once, which bounds the memory to some 64 MB."""


@dataclass(frozen=True, slots=True, eq=False)
class Measurement:
    """A score together with the per-query values it is the mean of."""

    score: Score
    values: NDArray[np.float64]
    """One value a query, ``(Q,)``, in the order of the test set, in the unit of the score."""


def compare(
    subject: Measurement, baseline: Measurement, *, samples: int = 2_000, seed: int = 0, level: float = 0.95
) -> Comparison:
    """Compare two systems that answered the same queries.

    Queries are drawn with replacement, S times, and the mean paired difference d* of each draw is kept. The interval is
    made of the percentiles of d*. For the p-value d* is shifted to the null hypothesis of no difference:
    ``p = (1 + #{|d* − d| >= |d|}) / (S + 1)``. The + 1 counts the observed sample as one of the draws: without it p
    could be 0, which S resamples cannot show, and the test would reject a true null hypothesis too often.

    Args:
        subject: The system in question.
        baseline: What it is compared with.
        samples: Number S of resamples, >= 1.
        seed: Seed of the resampling; the same seed gives the same result.
        level: Level of the interval, in (0, 1).

    Returns:
        The comparison; a positive difference means that the subject has the larger value, good or bad by the metric's
        direction.

    Raises:
        UserError: If the signatures or the numbers of queries differ, or there are fewer than two queries.

    References:
        Efron and Tibshirani 1993, chapter 16. Sakai 2006, SIGIR. Phipson and Smyth 2010, arXiv:1603.05766 (the + 1).
    """
    require_same_signature(subject.score, baseline.score)
    if subject.values.shape != baseline.values.shape:
        raise UserError(
            f'"{subject.score.subject}" has {len(subject.values):,} queries and "{baseline.score.subject}" '
            f"{len(baseline.values):,}; evaluate both on the same queries"
        )
    differences_Q = _checked(subject.values - baseline.values)
    # Sums in another order differ in the last bits; draws as far out as the observed mean must not be lost to that.
    tolerance = 1e-12 * max(1.0, float(np.abs(differences_Q).max()))
    return judge_draws(
        subject.score,
        baseline.score,
        difference=float(differences_Q.mean()),
        draws_S=resampled_means(differences_Q, samples=samples, seed=seed),
        seed=seed,
        level=level,
        tolerance=tolerance,
    )


def require_same_signature(subject: Score, baseline: Score) -> None:
    """Refuse to compare what was not measured alike (`UserError`)."""
    if subject.signature != baseline.signature:
        raise UserError(
            f'"{subject.subject}" and "{baseline.subject}" were not measured alike '
            f"({subject.signature} / {baseline.signature}); evaluate both on the same test set"
        )


def judge_draws(
    subject: Score,
    baseline: Score,
    *,
    difference: float,
    draws_S: NDArray[np.float64],
    seed: int,
    level: float = 0.95,
    tolerance: float = 1e-12,
) -> Comparison:
    """Turn the differences of all draws into an interval and a p-value; see `compare`.

    Args:
        subject: The system in question.
        baseline: What it is compared with.
        difference: Subject minus baseline on the test set itself.
        draws_S: Subject minus baseline on each draw, ``(S,)``.
        seed: Seed of the draws, for the record.
        level: Level of the interval, in (0, 1).
        tolerance: A draw counts as being as far from the null hypothesis as the difference if it is at most this much
            nearer.

    Returns:
        The comparison.
    """
    extreme = np.count_nonzero(np.abs(draws_S - difference) >= abs(difference) - tolerance)
    return Comparison(
        subject=subject.subject,
        baseline=baseline.subject,
        test_set=subject.test_set,
        metric=subject.name,
        difference=difference,
        interval=percentiles(draws_S, level),
        p_value=(1 + int(extreme)) / (len(draws_S) + 1),
        samples=len(draws_S),
        seed=seed,
    )


def mean_interval(values_Q: ArrayLike, *, samples: int = 2_000, seed: int = 0, level: float = 0.95) -> Interval:
    """Return the percentile-bootstrap confidence interval of the mean of Q >= 2 finite values."""
    return percentiles(resampled_means(values_Q, samples=samples, seed=seed), level)


def resampled_means(values_Q: ArrayLike, *, samples: int, seed: int) -> NDArray[np.float64]:
    """Draw Q values with replacement and take their mean, `samples` times: ``(S,)``, in the unit of the values."""
    values = _checked(values_Q)
    if samples < 1:
        raise UserError(f"samples: got {samples}; take at least 1, 2,000 is usual")
    generator = np.random.default_rng(seed)
    block = max(1, _CELLS // len(values))
    means = [
        values[generator.integers(0, len(values), size=(min(block, samples - start), len(values)))].mean(axis=1)
        for start in range(0, samples, block)
    ]
    return np.concatenate(means)


def _checked(values_Q: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(values_Q, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise UserError(f"values of shape {values.shape}; resampling needs a list of at least two queries")
    if not np.isfinite(values).all():
        raise UserError(f"value {int(np.argmin(np.isfinite(values)))} is not finite; fix the metric that made it")
    return values


def percentiles(draws_S: NDArray[np.float64], level: float) -> Interval:
    """Return the interval between the percentiles of draws that leave out ``1 - level``, half on either side."""
    if not 0.0 < level < 1.0:
        raise UserError(f"level: got {level}; give a share between 0 and 1, 0.95 is usual")
    low, high = np.quantile(draws_S, [(1 - level) / 2, (1 + level) / 2])
    return Interval(low=float(low), high=float(high), level=level)
