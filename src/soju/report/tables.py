"""Scores and paired tests as tables for any page, and numbers as a reader sees them.

`build_tables` makes one table a test set: systems down, metrics across, directions grouped. `model_rows` compares
models: a row for each metric, a column for each model, differences to the first. `describe_tests` lists the paired
tests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from soju.core.results import Comparison, Interval, Score

_SECONDS = {"seconds": 1.0, "milliseconds": 1e-3, "microseconds": 1e-6}
_COST_WORDS = ("bytes", "terms", "tokens", "parameters", "documents", "postings", "flops", "products", "bits")
_HEADINGS = {"fraction": "0–1", "correlation": "−1–1", "percent": "%"}
_SCALED = {"bytes", "parameters", *_SECONDS}


def is_cost(unit: str) -> bool:
    """Tell whether a unit measures what a system costs (time, size, terms) rather than how good it is."""
    return unit in _SECONDS or unit.startswith(_COST_WORDS) or unit.endswith(("per second", "/s", "/second"))


def unit_heading(unit: str) -> str:
    """Return what a column's head says about its unit; nothing when every value carries its own."""
    return "" if unit in _SCALED else _HEADINGS.get(unit, unit)


def format_value(value: float, unit: str) -> str:
    """Write a value in its unit: three decimals for a fraction, otherwise about three digits.

    >>> format_value(1_900_000, "bytes"), format_value(0.42, "milliseconds"), format_value(0.8421, "fraction")
    ('1.9 MB', '0.42 ms', '0.842')
    """
    if value < 0:
        text = format_value(-value, unit)
        return f"−{text}" if any(digit in text for digit in "123456789") else text
    if unit == "bytes":
        return _scaled(value, 1000, ("B", "kB", "MB", "GB", "TB"))
    if unit == "parameters":
        return _scaled(value, 1000, ("", "k", "M", "B", "T"))
    if unit in _SECONDS:
        return _time(value * _SECONDS[unit], unit)
    if unit in ("fraction", "correlation"):
        return f"{value:.3f}"
    if unit in ("points", "percent"):
        return f"{value:.1f}"
    return _digits(value)


def format_difference(value: float, unit: str) -> str:
    """Write a difference with its sign."""
    text = format_value(value, unit)
    return f"+{text}" if value > 0 and any(digit in text for digit in "123456789") else text


def format_interval(interval: Interval, unit: str) -> str:
    """Write both ends of an interval."""
    dash = " to " if interval.low < 0 else "–"
    return f"{format_value(interval.low, unit)}{dash}{format_value(interval.high, unit)}"


def format_level(interval: Interval) -> str:
    """Write the level of an interval, ``95 %``, on one line."""
    return f"{interval.level * 100:g}\u00a0%"


def format_p(p_value: float) -> str:
    """Write a p-value to three decimals, and a smaller one as a bound."""
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def format_weight(weight: float) -> str:
    """Write a term's weight to two decimals."""
    return f"{weight:.2f}".replace("-", "−")


def format_duration(seconds: float) -> str:
    """Write how long something took.

    >>> format_duration(0.84), format_duration(133), format_duration(7260)
    ('0.8 s', '2 min 13 s', '2 h 1 min')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def _digits(value: float) -> str:
    if value == int(value):
        return f"{int(value):,}"
    if value >= 100:
        return f"{value:,.0f}"
    if value < 0.01:
        return f"{value:.2g}"
    return f"{value:.{2 - max(math.floor(math.log10(value)), 0)}f}"


def _scaled(value: float, step: int, suffixes: tuple[str, ...]) -> str:
    index = 0
    while index < len(suffixes) - 1 and round(value, 0 if index == 0 else 1) >= step:
        value /= step
        index += 1
    text = f"{value:,.0f}" if index == 0 or value >= 100 else f"{value:.1f}"
    return f"{text} {suffixes[index]}".rstrip()


def _time(seconds: float, unit: str) -> str:
    if seconds == 0:
        return f"0 {'s' if unit == 'seconds' else 'ms' if unit == 'milliseconds' else 'µs'}"
    if seconds >= 120:
        return format_duration(seconds)
    if seconds >= 1:
        return f"{_digits(seconds)} s"
    if seconds >= 1e-5:
        return f"{_digits(float(f'{seconds * 1e3:.6g}'))} ms"
    return f"{_digits(float(f'{seconds * 1e6:.6g}'))} µs"


Finding = Literal["better", "worse", "undecided"]

SYMBOLS: dict[Finding, str] = {"better": "▲", "worse": "▼", "undecided": "≈"}

_LANGUAGES = {"ko": "Korean", "en": "English"}
_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_MetricKey = tuple[str, str, bool]


# Paired tests.


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


def finding_of(comparison: Comparison, *, higher_is_better: bool) -> Finding:
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
        finding = None if higher_is_better is None else finding_of(comparison, higher_is_better=higher_is_better)
        tests.append(
            PairedTest(
                subject=comparison.subject,
                baseline=comparison.baseline,
                test_set=comparison.test_set,
                metric=comparison.metric,
                difference=format_difference(comparison.difference, unit),
                interval=format_interval(comparison.interval, unit),
                p_value=format_p(comparison.p_value),
                samples=f"{comparison.samples:,}",
                finding=finding,
            )
        )
    return tests


# One table a test set.


@dataclass(frozen=True, slots=True)
class Mark:
    """What a paired test says about one value."""

    finding: Finding
    baseline: str
    number: int | None
    """Which baseline of the table, from 1, when there are several."""
    p_value: float

    @property
    def symbol(self) -> str:
        """The sign that is printed after the value."""
        return SYMBOLS[self.finding] + ("" if self.number is None else str(self.number).translate(_SUPERSCRIPTS))


@dataclass(frozen=True, slots=True)
class Cell:
    """One value of a table."""

    text: str
    interval: str
    best: bool
    marks: tuple[Mark, ...]
    score: Score


@dataclass(frozen=True, slots=True)
class Column:
    """One metric under one signature in each direction."""

    metric: str
    unit: str
    higher_is_better: bool
    variant: str
    """A letter when systems were measured under different settings, so that they stand in different columns."""
    signatures: tuple[tuple[str, str], ...]
    """(direction, signature); the direction is empty when all share one."""

    @property
    def heading(self) -> str:
        """The metric with its variant."""
        return f"{self.metric} ({self.variant})" if self.variant else self.metric

    @property
    def note(self) -> str:
        """Which way is better, and the unit."""
        unit = unit_heading(self.unit)
        return f"{'↑' if self.higher_is_better else '↓'} {unit}".rstrip()


@dataclass(frozen=True, slots=True)
class Group:
    """The systems in one direction; a cell is None where a system has no such score."""

    direction: str
    label: str
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]


@dataclass(frozen=True, slots=True)
class ScoreTable:
    """All scores on one test set."""

    test_set: str
    columns: tuple[Column, ...]
    groups: tuple[Group, ...]
    baselines: tuple[str, ...]
    mixed: tuple[str, ...]
    """Metrics whose signatures differ between systems of one direction."""
    level: str
    """The level of the intervals, for example ``95 %``; empty when there are none."""


def direction_label(direction: str) -> str:
    """Write a direction in words.

    >>> direction_label("ko-en")
    'Korean → English'
    """
    parts = direction.split("-")
    if not all(part in _LANGUAGES for part in parts):
        return direction
    return " → ".join(_LANGUAGES[part] for part in parts)


def split_test_set(test_set: str) -> tuple[str, str]:
    """Split ``parallel.dev/ko-en`` into the set and the direction, which is empty when there is none."""
    name, separator, direction = test_set.rpartition("/")
    return (name, direction) if separator and name else (test_set, "")


def build_tables(scores: Sequence[Score], comparisons: Sequence[Comparison] = ()) -> list[ScoreTable]:
    """Arrange scores in tables, in the order of the file.

    Scores of one metric and direction whose signatures differ are put in separate columns and named in `mixed`: they
    are never ranked against each other.
    """
    by_set: dict[str, list[Score]] = {}
    for score in scores:
        by_set.setdefault(split_test_set(score.test_set)[0], []).append(score)
    return [_table(name, items, comparisons) for name, items in by_set.items()]


def _table(name: str, scores: list[Score], comparisons: Sequence[Comparison]) -> ScoreTable:
    slots, sizes = _assign_columns(scores)
    places = [(key, index) for key, size in sizes.items() for index in range(size)]
    at = {(split_test_set(s.test_set)[1], s.subject, _key(s), slots[_slot_key(s)]): s for s in scores}
    here = [c for c in comparisons if any(c.test_set == s.test_set and c.metric == s.name for s in scores)]
    baselines = tuple(dict.fromkeys(comparison.baseline for comparison in here))
    groups = []
    for direction in dict.fromkeys(split_test_set(score.test_set)[1] for score in scores):
        subjects = dict.fromkeys(subject for found, subject, _, _ in at if found == direction)
        columns = [
            _cells([at.get((direction, subject, *place)) for subject in subjects], here, baselines, scores)
            for place in places
        ]
        rows = tuple(zip(subjects, zip(*columns, strict=True), strict=True))
        groups.append(Group(direction=direction, label=direction_label(direction), rows=rows))
    levels = dict.fromkeys(format_level(score.interval) for score in scores if score.interval)
    return ScoreTable(
        test_set=name,
        columns=tuple(_column(key, index, sizes[key], scores, slots) for key, index in places),
        groups=tuple(groups),
        baselines=baselines,
        mixed=tuple(dict.fromkeys(key[0] for key, size in sizes.items() if size > 1)),
        level=", ".join(levels),
    )


def _key(score: Score) -> _MetricKey:
    return score.name, score.unit, score.higher_is_better


def _slot_key(score: Score) -> tuple[_MetricKey, str, str]:
    return _key(score), split_test_set(score.test_set)[1], score.signature


def _assign_columns(
    scores: Sequence[Score],
) -> tuple[dict[tuple[_MetricKey, str, str], int], dict[_MetricKey, int]]:
    """Number the signatures of each metric and direction; a signature keeps its number across directions."""
    slots: dict[tuple[_MetricKey, str, str], int] = {}
    usual: dict[tuple[_MetricKey, str], int] = {}
    sizes: dict[_MetricKey, int] = {}
    for score in scores:
        key, direction, signature = place = _slot_key(score)
        if place not in slots:
            taken = {index for (k, d, _), index in slots.items() if (k, d) == (key, direction)}
            free = next(index for index in range(len(taken) + 1) if index not in taken)
            wanted = usual.get((key, signature), free)
            slots[place] = free if wanted in taken else wanted
            usual.setdefault((key, signature), slots[place])
        sizes[key] = max(sizes.get(key, 0), slots[place] + 1)
    return slots, sizes


def _column(
    key: _MetricKey, index: int, size: int, scores: Sequence[Score], slots: dict[tuple[_MetricKey, str, str], int]
) -> Column:
    found = {
        split_test_set(s.test_set)[1]: s.signature for s in scores if _key(s) == key and slots[_slot_key(s)] == index
    }
    one = len(set(found.values())) == 1
    signatures = [("", next(iter(found.values())))] if one else [(direction_label(d), s) for d, s in found.items()]
    return Column(
        metric=key[0],
        unit=key[1],
        higher_is_better=key[2],
        variant=chr(ord("a") + index % 26) if size > 1 else "",
        signatures=tuple(signatures),
    )


def _cells(
    column: list[Score | None], comparisons: Sequence[Comparison], baselines: tuple[str, ...], scores: Sequence[Score]
) -> list[Cell | None]:
    values = [score for score in column if score is not None]
    best = ""
    if len(values) > 1:
        choose = max if values[0].higher_is_better else min
        top = choose(values, key=lambda score: score.value)
        best = format_value(top.value, top.unit)
    cells: list[Cell | None] = []
    for score in column:
        if score is None:
            cells.append(None)
            continue
        text = format_value(score.value, score.unit)
        interval = "" if score.interval is None else format_interval(score.interval, score.unit)
        marks = _marks(score, comparisons, baselines, scores)
        cells.append(Cell(text=text, interval=interval, best=text == best, marks=marks, score=score))
    return cells


def _marks(
    score: Score, comparisons: Sequence[Comparison], baselines: tuple[str, ...], scores: Sequence[Score]
) -> tuple[Mark, ...]:
    marks = []
    for item in comparisons:
        if (item.subject, item.test_set, item.metric) != (score.subject, score.test_set, score.name):
            continue
        against = [s for s in scores if (s.subject, s.test_set, s.name) == (item.baseline, item.test_set, item.metric)]
        if against and all(other.signature != score.signature for other in against):
            continue
        finding = finding_of(item, higher_is_better=score.higher_is_better)
        number = baselines.index(item.baseline) + 1 if len(baselines) > 1 else None
        marks.append(Mark(finding=finding, baseline=item.baseline, number=number, p_value=item.p_value))
    return tuple(marks)


# Models compared: one row a metric.


CHANCE = "chance"
"""Name of the system that guesses; its score stands with the name of the metric, not in a column."""


@dataclass(frozen=True, slots=True)
class ModelCell:
    """One figure of one model."""

    subject: str
    value: float
    interval: Interval | None
    difference: float | None
    """To the first model, where both were measured alike."""
    difference_interval: Interval | None
    p_value: float | None
    finding: Finding | None


@dataclass(frozen=True, slots=True)
class ModelRow:
    """One figure of all models."""

    test_set: str
    direction: str
    """In words where there is one: ``Korean → English``."""
    metric: str
    unit: str
    higher_is_better: bool
    chance: float | None
    """What guessing would give, where that is known."""
    alike: bool
    """Whether all models were measured under the same settings."""
    cells: tuple[ModelCell | None, ...]
    """One for each model, in their order; ``None`` where it has no such figure."""

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary."""
        return asdict(self)


def model_rows(
    subjects: Sequence[str], scores: Sequence[Score], comparisons: Sequence[Comparison] = ()
) -> list[ModelRow]:
    """Arrange scores with a row for each test set and metric, in the order in which they were measured.

    The columns are ``subjects``; ``comparisons`` are differences to the first of them. Scores are of these models and
    of the system ``chance``.
    """
    by_place: dict[tuple[str, str], dict[str, Score]] = {}
    for score in scores:
        by_place.setdefault((score.test_set, score.name), {})[score.subject] = score
    differences = {(item.test_set, item.metric, item.subject): item for item in comparisons}
    rows = []
    for (test_set, metric), found in by_place.items():
        own = [found[subject] for subject in subjects if subject in found]
        if not own:
            continue
        name, direction = split_test_set(test_set)
        cells = [
            _model_cell(found[subject], differences.get((test_set, metric, subject))) if subject in found else None
            for subject in subjects
        ]
        rows.append(
            ModelRow(
                test_set=name,
                direction=direction_label(direction),
                metric=metric,
                unit=own[0].unit,
                higher_is_better=own[0].higher_is_better,
                chance=found[CHANCE].value if CHANCE in found and CHANCE not in subjects else None,
                alike=len({score.signature for score in own}) == 1,
                cells=tuple(cells),
            )
        )
    return rows


def _model_cell(score: Score, comparison: Comparison | None) -> ModelCell:
    if comparison is None:
        return ModelCell(score.subject, score.value, score.interval, None, None, None, None)
    return ModelCell(
        subject=score.subject,
        value=score.value,
        interval=score.interval,
        difference=comparison.difference,
        difference_interval=comparison.interval,
        p_value=comparison.p_value,
        finding=finding_of(comparison, higher_is_better=score.higher_is_better),
    )
