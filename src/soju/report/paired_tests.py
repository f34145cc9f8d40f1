"""What do the paired tests of a run say?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from soju.core.score import Score
from soju.report.number_format import format_difference, format_interval, format_p
from soju.report.run_contents import Comparison

Finding = Literal["better", "worse", "undecided"]

SYMBOLS: dict[Finding, str] = {"better": "▲", "worse": "▼", "undecided": "≈"}


@dataclass(frozen=True, slots=True)
class PairedTest:
    """One comparison, ready to be printed."""

    subject: str
    baseline: str
    test_set: str
    metric: str
    difference: str
    interval: str
    p_value: str
    samples: str
    finding: Finding | None
    """None when the run has no score that says which direction of the metric is better."""


def find(comparison: Comparison, *, higher_is_better: bool) -> Finding:
    """Say whether the subject is better or worse than its baseline at the level of the interval (0.95 without one)."""
    level = 0.95 if comparison.interval is None else comparison.interval.level
    if comparison.p_value >= round(1 - level, 12) or comparison.difference == 0:
        return "undecided"
    return "better" if (comparison.difference > 0) == higher_is_better else "worse"


def describe_tests(comparisons: Sequence[Comparison], scores: Sequence[Score]) -> list[PairedTest]:
    """Write each comparison in the unit of its metric; one whose metric has no score has no finding."""
    meanings = {(score.name, score.test_set): (score.unit, score.higher_is_better) for score in scores}
    tests = []
    for comparison in comparisons:
        unit, higher_is_better = meanings.get((comparison.metric, comparison.test_set), ("", None))
        finding = None if higher_is_better is None else find(comparison, higher_is_better=higher_is_better)
        tests.append(
            PairedTest(
                subject=comparison.subject,
                baseline=comparison.baseline,
                test_set=comparison.test_set,
                metric=comparison.metric,
                difference=format_difference(comparison.difference, unit),
                interval="" if comparison.interval is None else format_interval(comparison.interval, unit),
                p_value=format_p(comparison.p_value),
                samples=f"{comparison.samples:,}",
                finding=finding,
            )
        )
    return tests
