"""Models side by side: a row for each figure, a column for each model, differences to the first.

`model_rows` is plain data for any page; `models_table` draws it in a terminal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from soju.core.score import Interval, Score
from soju.report.number_format import format_difference, format_value, unit_heading
from soju.report.paired_tests import SYMBOLS, Finding, find
from soju.report.run_contents import Comparison
from soju.report.score_tables import direction_label, split_test_set

CHANCE = "chance"
"""Name of the system that guesses; its score is said beside the metric, not in a column."""
_COLOURS = {"better": "green", "worse": "red", "undecided": "bright_black"}


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

    Args:
        subjects: The models, in the order of the columns; the first is what the others are compared with.
        scores: Scores of these models, and of the system ``chance``.
        comparisons: Differences to the first model.

    Returns:
        The rows.
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
            _cell(found[subject], differences.get((test_set, metric, subject))) if subject in found else None
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


def models_table(subjects: Sequence[str], rows: Sequence[ModelRow]) -> Table:
    """Draw the rows: the value of each model, and below it its difference to the first with the interval.

    Args:
        subjects: The models, in the order of the columns.
        rows: What `model_rows` gave.

    Returns:
        The table, with a note on its signs.
    """
    against = f"▲ better, ▼ worse, ≈ no proven difference against {subjects[0]}" if len(subjects) > 1 else ""
    if not all(row.alike for row in rows):
        against += "\n* prompt, pooling or length differ between the models"
    table = Table(box=box.SIMPLE_HEAD, caption=Text(against) if against else None, caption_justify="left")
    table.add_column("measured on")
    table.add_column("figure")
    for subject in subjects:
        table.add_column(Text(subject), justify="right")
    before = None
    for row in rows:
        if before not in (None, row.test_set):
            table.add_section()
        before = row.test_set
        where = f"{row.test_set} {row.direction}".strip()
        table.add_row(Text(where), _figure(row), *(_drawn(cell, row) for cell in row.cells))
    return table


def _cell(score: Score, comparison: Comparison | None) -> ModelCell:
    if comparison is None:
        return ModelCell(score.subject, score.value, score.interval, None, None, None, None)
    return ModelCell(
        subject=score.subject,
        value=score.value,
        interval=score.interval,
        difference=comparison.difference,
        difference_interval=comparison.interval,
        p_value=comparison.p_value,
        finding=find(comparison, higher_is_better=score.higher_is_better),
    )


def _figure(row: ModelRow) -> Text:
    text = Text(f"{row.metric} {'↑' if row.higher_is_better else '↓'}{'' if row.alike else ' *'}")
    unit = unit_heading(row.unit)
    if unit and unit != row.metric:
        text.append(f" {unit}", style="dim")
    if row.chance is not None:
        text.append(f" chance {format_value(row.chance, row.unit)}", style="dim")
    return text


def _drawn(cell: ModelCell | None, row: ModelRow) -> Text:
    if cell is None:
        return Text("–", style="dim")
    text = Text(format_value(cell.value, row.unit))
    if cell.difference is None or cell.finding is None:
        return text
    text.append(f"\n{SYMBOLS[cell.finding]} {format_difference(cell.difference, row.unit)}", _COLOURS[cell.finding])
    if cell.difference_interval is not None:
        low, high = (
            format_difference(end, row.unit) for end in (cell.difference_interval.low, cell.difference_interval.high)
        )
        text.append(f" [{low}, {high}]", style="dim")
    return text
