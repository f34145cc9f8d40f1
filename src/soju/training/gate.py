"""The quality gate: thresholds that decide from scores alone whether a run goes on, and the record of its verdicts.

``verdicts.jsonl`` holds what the gate decided at which step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from soju.core.config import Settings
from soju.core.errors import UserError
from soju.core.files import append_json_line, read_json_lines
from soju.core.results import Score

_TOLERANCE = 1e-12
"""A drop of exactly the allowed size passes, although 0.9 - 0.8 is not 0.1."""


class Threshold(Settings):
    """What one metric must hold."""

    metric: str
    """Name of the score, for example recall@10."""
    test_set: str | None = None
    """Only on this test set; on every one when not given."""
    worst: float | None = None
    """Worst value that passes: a minimum where higher is better, else a maximum."""
    max_drop: float | None = Field(None, ge=0)
    """Largest loss against the baseline, in the unit of the score."""
    max_relative_drop: float | None = Field(None, ge=0)
    """Largest loss against the baseline as a fraction of the baseline's value."""

    @model_validator(mode="after")
    def _holds_something(self) -> Self:
        if self.worst is None and not self.compares:
            raise ValueError("holds nothing; set worst, max_drop or max_relative_drop")
        return self

    @property
    def compares(self) -> bool:
        """Whether a baseline is needed."""
        return self.max_drop is not None or self.max_relative_drop is not None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate decided, and why it did not pass."""

    passed: bool
    reasons: tuple[str, ...] = ()
    """One sentence for each threshold that was missed."""

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary."""
        return {**asdict(self), "reasons": list(self.reasons)}


@dataclass(frozen=True, slots=True)
class QualityGate:
    """Thresholds that scores must hold, all of them."""

    thresholds: Sequence[Threshold]

    def judge(self, scores: Sequence[Score], baseline: Sequence[Score] = ()) -> Verdict:
        """Judge the scores of one system.

        Directions come from the scores. A score that is not finite fails.

        Args:
            scores: Of one system; each metric once a test set.
            baseline: Of the system it must not fall behind, for thresholds that compare.

        Returns:
            The verdict.

        Raises:
            UserError: If a threshold finds no score to judge or to compare with, a metric was measured twice, or
                signatures differ: such scores cannot be compared.
        """
        ours, theirs = _by_place(scores, "scores"), _by_place(baseline, "baseline")
        reasons: list[str] = []
        for threshold in self.thresholds:
            judged = [score for score in ours.values() if _concerns(threshold, score)]
            if not judged:
                raise UserError(
                    f"quality gate: no score {_name(threshold)} to judge, only {_listed(ours)}; correct the gate"
                )
            for score in judged:
                other = _counterpart(score, theirs) if threshold.compares else None
                reasons.extend(_misses(threshold, score, other))
        return Verdict(passed=not reasons, reasons=tuple(reasons))


def _by_place(scores: Iterable[Score], what: str) -> dict[tuple[str, str], Score]:
    places: dict[tuple[str, str], Score] = {}
    for score in scores:
        place = (score.name, score.test_set)
        if place in places:
            raise UserError(f"quality gate: the {what} hold {score.name} on {score.test_set} twice; give one system's")
        places[place] = score
    return places


def _concerns(threshold: Threshold, score: Score) -> bool:
    return threshold.metric == score.name and threshold.test_set in (None, score.test_set)


def _counterpart(score: Score, baseline: dict[tuple[str, str], Score]) -> Score:
    other = baseline.get((score.name, score.test_set))
    if other is None:
        raise UserError(
            f"quality gate: the baseline has no {score.name} on {score.test_set}, only {_listed(baseline)}; measure it "
            "on the same test sets"
        )
    if other.signature != score.signature or other.higher_is_better != score.higher_is_better:
        raise UserError(
            f"quality gate: {score.name} on {score.test_set} was measured as {score.signature}, the baseline as "
            f"{other.signature}; measure both in the same way"
        )
    if not math.isfinite(other.value):
        raise UserError(
            f"quality gate: the baseline's {score.name} on {score.test_set} is {other.value}; measure again"
        )
    return other


def _misses(threshold: Threshold, score: Score, other: Score | None) -> Iterable[str]:
    place = f"{score.name} on {score.test_set}"
    if not math.isfinite(score.value):
        yield f"{place} is {score.value}"
        return
    sign = 1 if score.higher_is_better else -1
    if threshold.worst is not None and sign * (score.value - threshold.worst) < -_TOLERANCE:
        yield f"{place} is {score.value:.4g}, {'below' if sign > 0 else 'above'} {threshold.worst:.4g}"
    if other is None:
        return
    drop = sign * (other.value - score.value)
    compared = f"{place} went from {other.value:.4g} to {score.value:.4g}"
    if threshold.max_drop is not None and drop > threshold.max_drop + _TOLERANCE:
        yield f"{compared}, a loss of {drop:.4g} where {threshold.max_drop:.4g} is allowed"
    relative = _relative(drop, other.value)
    if threshold.max_relative_drop is not None and relative > threshold.max_relative_drop + _TOLERANCE:
        yield f"{compared}, a loss of {relative:.2%} where {threshold.max_relative_drop:.2%} is allowed"


def _relative(drop: float, before: float) -> float:
    if before == 0:
        return math.inf if drop > 0 else 0.0
    return drop / abs(before)


def _name(threshold: Threshold) -> str:
    return threshold.metric if threshold.test_set is None else f"{threshold.metric} on {threshold.test_set}"


def _listed(places: dict[tuple[str, str], Score]) -> str:
    return ", ".join(f"{name} on {test_set}" for name, test_set in places) or "none"


def record_verdict(
    path: Path, verdict: Verdict, *, where: str, step: int | None = None, attempt: int = 0, scores: Sequence[Score] = ()
) -> None:
    """Append a verdict; it is on the disk when this returns.

    Args:
        path: ``verdicts.jsonl`` of the run.
        verdict: What was decided.
        where: ``training``, ``quantization``, ``export`` ...
        step: Optimiser step, during training.
        attempt: Number of the attempt, from 0. See `train_with_rollback`.
        scores: What was judged. A value that is not finite becomes ``null``.
    """
    row = {"where": where, "step": step, "attempt": attempt, **verdict.to_json()}
    append_json_line(path, {**row, "scores": [_plain(score) for score in scores]})


def read_verdicts(path: Path) -> list[dict[str, Any]]:
    """Read ``verdicts.jsonl``; no file is no verdicts."""
    return read_json_lines(path)


def passed_steps(rows: Iterable[Mapping[str, Any]]) -> set[int]:
    """Return the training steps whose last verdict let them pass.

    >>> passed_steps([{"where": "training", "step": 10, "passed": True}])
    {10}
    """
    last = {row["step"]: row["passed"] for row in rows if row["where"] == "training" and row["step"] is not None}
    return {step for step, passed in last.items() if passed}


def _plain(score: Score) -> dict[str, Any]:
    value = score.to_json()
    return {**value, "value": value["value"] if math.isfinite(value["value"]) else None}
