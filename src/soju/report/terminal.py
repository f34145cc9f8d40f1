"""Tables for the terminal. Functions return rich renderables; the command line prints them."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.cells import cell_len, set_cell_size
from rich.console import Group
from rich.table import Table
from rich.text import Text

from soju.core.results import Comparison, Score
from soju.report.contents import Expansion, Search, read_run
from soju.report.tables import (
    SYMBOLS,
    Cell,
    Finding,
    ModelCell,
    ModelRow,
    ScoreTable,
    build_tables,
    format_difference,
    format_value,
    format_weight,
    is_cost,
    unit_heading,
)

_COLOURS = {"ko": "blue", "en": "yellow", "other": "bright_black"}
_FINDINGS: dict[Finding, str] = {"better": "green", "worse": "red", "undecided": "bright_black"}
_BAR_WIDTH = 24
_JOINERS = "\u200c\u200d"  # part of emoji and of some scripts


def scores_table(scores: Sequence[Score], comparisons: Sequence[Comparison] = ()) -> Group:
    """Return one table a test set: systems down, metrics across, best value bold."""
    return Group(*(_score_table(table) for table in build_tables(scores, comparisons)))


def models_table(subjects: Sequence[str], rows: Sequence[ModelRow]) -> Table:
    """Return one line a row: the value of each model, and below it its difference to the first with the interval."""
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
        table.add_row(Text(where), _figure(row), *(_model_cell(cell, row) for cell in row.cells))
    return table


def differences_table(comparisons: Sequence[Comparison], *, title: str) -> Table:
    """Return one line a metric and test set: the difference of two runs with its interval."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("test set", "metric", "difference", "95 % interval", "p"):
        table.add_column(column, justify="left" if column in ("test set", "metric") else "right")
    for item in comparisons:
        interval = f"[{item.interval.low:+.4f}, {item.interval.high:+.4f}]"
        table.add_row(item.test_set, item.metric, f"{item.difference:+.4f}", interval, f"{item.p_value:.4f}")
    return table


def probes_table(reports: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return one column a model: the terms that the probe words activate, heaviest first."""
    table = Table(title="Probe words (display only)", title_justify="left", box=box.SIMPLE_HEAD, show_lines=False)
    table.add_column("probe")
    for model in reports:
        table.add_column(Text(model), overflow="fold")
    for name in ("preservation", "activation", "combined", "noise", "active_terms"):
        table.add_row(name.replace("_", " "), *(f"{report[name]:.3g}" for report in reports.values()))
    for probe in next(iter(reports.values()))["top"]:
        tops = [report["top"][probe][:5] for report in reports.values()]
        table.add_row(Text(probe), *(Text(" ".join(term for term, _ in top)) for top in tops))
    return table


def figures_table(scores: Sequence[Score]) -> Table:
    """Return one line a figure: what a system scored or cost where there is nothing to compare it with."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("figure", overflow="fold")
    table.add_column("value", justify="right")
    for test_set in dict.fromkeys(score.test_set for score in scores):
        table.add_row(Text(_plain(test_set), style="italic dim"))
        for score in (score for score in scores if score.test_set == test_set):
            value = format_value(score.value, score.unit)
            unit = unit_heading(score.unit) if is_cost(score.unit) else ""
            arrow = "↑" if score.higher_is_better else "↓"
            table.add_row(_text(f"{score.name} {arrow}"), _text(f"{value} {unit}".strip()))
        table.add_section()
    return table


def expansion_table(expansion: Expansion) -> Table:
    """Return the terms of a text, heaviest first, with a bar each."""
    table = Table(title=_text(expansion.text), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    table.add_column("term")
    table.add_column("language")
    table.add_column("weight", justify="right")
    table.add_column("")
    heaviest = max((term.weight for term in expansion.terms), default=0.0)
    for term in sorted(expansion.terms, key=lambda item: -item.weight):
        share = max(0.0, term.weight) / heaviest if heaviest > 0 else 0.0
        colour = _COLOURS[term.language]
        bar = Text("█" * max(1, round(share * _BAR_WIDTH)), style=colour)
        table.add_row(_text(term.term), Text(term.language, style=colour), format_weight(term.weight), bar)
    return table


def hits_table(search: Search, *, passage_width: int = 160) -> Table:
    """Return what an engine found, one line a hit: rank, document, score, passage and the terms that matched.

    A passage is cut after ``passage_width`` columns of the terminal, of which a Hangul syllable takes two.
    """
    title = Text.assemble(_text(search.query), (f"  {_plain(search.engine)}", "not bold dim"))
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("document", no_wrap=True)
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("passage", ratio=3)
    table.add_column("matched terms", ratio=2)
    for hit in search.hits:
        matched = Text(" ").join(
            Text.assemble((_plain(term.term), _COLOURS[term.language]), (f" {format_weight(term.contribution)}", "dim"))
            for term in hit.matched
        )
        passage = Text(_cut(_plain(hit.passage), passage_width))
        table.add_row(str(hit.rank), _text(hit.document_id), f"{hit.score:.3f}", passage, matched)
    return table


def _score_table(item: ScoreTable) -> Table:
    table = Table(
        title=_text(item.test_set), caption=_caption(item), box=box.SIMPLE_HEAD, title_justify="left",
        title_style="bold", caption_justify="left",
    )  # fmt: skip
    table.add_column("system")
    for column in item.columns:
        table.add_column(Text.assemble(_plain(column.heading), (f"\n{_plain(column.note)}", "dim")), justify="right")
    for group in item.groups:
        if group.label:
            table.add_row(Text(_plain(group.label), style="italic dim"))
        for subject, cells in group.rows:
            table.add_row(_text(subject), *(_cell(cell) for cell in cells))
        table.add_section()
    return table


def _cell(cell: Cell | None) -> Text:
    if cell is None:
        return Text("–", style="dim")
    text = Text(cell.text, style="bold" if cell.best else "")
    text.append(" " if cell.marks else "")
    for mark in cell.marks:
        text.append(mark.symbol, style=_FINDINGS[mark.finding])
    return text


def _caption(item: ScoreTable) -> Text | None:
    lines = [f"{_plain(metric)}: different settings; do not compare columns (a), (b)" for metric in item.mixed]
    if item.baselines:
        many = len(item.baselines) > 1
        names = ", ".join(f"({n}) {b}" if many else b for n, b in enumerate(map(_plain, item.baselines), start=1))
        lines.append(f"▲ better, ▼ worse, ≈ no proven difference against {names}")
    return Text("\n".join(lines)) if lines else None


def _figure(row: ModelRow) -> Text:
    text = Text(f"{row.metric} {'↑' if row.higher_is_better else '↓'}{'' if row.alike else ' *'}")
    unit = unit_heading(row.unit)
    if unit and unit != row.metric:
        text.append(f" {unit}", style="dim")
    if row.chance is not None:
        text.append(f" chance {format_value(row.chance, row.unit)}", style="dim")
    return text


def _model_cell(cell: ModelCell | None, row: ModelRow) -> Text:
    if cell is None:
        return Text("–", style="dim")
    text = Text(format_value(cell.value, row.unit))
    if cell.difference is None or cell.finding is None:
        return text
    text.append(f"\n{SYMBOLS[cell.finding]} {format_difference(cell.difference, row.unit)}", _FINDINGS[cell.finding])
    if cell.difference_interval is not None:
        low, high = (
            format_difference(end, row.unit) for end in (cell.difference_interval.low, cell.difference_interval.high)
        )
        text.append(f" [{low}, {high}]", style="dim")
    return text


def _text(value: str) -> Text:
    return Text(_plain(value))


def _plain(value: str) -> str:
    """Return a text without control characters, so that no file can steer the terminal."""
    flat = " ".join(value.split())
    return "".join("�" if _steers(character) else character for character in flat)


def _steers(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Cs") and character not in _JOINERS


def _cut(text: str, width: int) -> str:
    return text if cell_len(text) <= width else set_cell_size(text, width - 1).rstrip() + "…"


def run_tables(run_folder: Path) -> Group:
    """Return the scores of a run folder for the terminal."""
    contents = read_run(run_folder)
    return measured_tables(contents.scores, contents.comparisons)


def measured_tables(scores: Sequence[Score], comparisons: Sequence[Comparison] = ()) -> Group:
    """Return a table of the test sets with several systems, and a list of figures for the others."""
    systems: dict[str, set[str]] = {}
    for score in scores:
        systems.setdefault(score.test_set, set()).add(score.subject)
    compared = [score for score in scores if len(systems[score.test_set]) > 1]
    alone = [score for score in scores if len(systems[score.test_set]) == 1]
    tables = [scores_table(compared, comparisons)] if compared else []
    return Group(*tables, *([figures_table(alone)] if alone else []))
