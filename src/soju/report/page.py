"""What a report says and in which order, the same for every format, and the HTML page made of it.

`compose` arranges what a run folder holds; `render_html` lays it out as one file that needs nothing else, and
`soju.report.markdown` as Markdown.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from soju.core.language import language_of
from soju.core.results import Score, TermWeight
from soju.report.contents import Expansion, FigureSpec, RunContents, Search
from soju.report.tables import (
    SYMBOLS,
    Group,
    PairedTest,
    ScoreTable,
    build_tables,
    describe_tests,
    format_duration,
    format_weight,
    is_cost,
)

_LANGUAGES = (("ko", "Korean"), ("en", "English"), ("other", "Other"))


@dataclass(frozen=True, slots=True)
class DrawnFigure:
    """A figure and its two pictures."""

    spec: FigureSpec
    light: Path
    dark: Path
    alt: str
    caption: str
    """The caption of the figure, and what the picture had to replace."""


@dataclass(frozen=True, slots=True)
class Headline:
    """The best system of one direction, by the first metric of its table."""

    test_set: str
    direction: str
    metric: str
    subject: str
    value: str
    interval: str
    level: str
    systems: int

    @property
    def sentence(self) -> str:
        """The headline as a sentence."""
        place = f"{self.test_set}, {self.direction}" if self.direction else self.test_set
        interval = f" ({self.level} interval {self.interval})" if self.interval else ""
        rank = f", the best of {self.systems} systems" if self.systems > 1 else ""
        return f"{place}: {self.subject} reaches {self.metric} {self.value}{interval}{rank}."


@dataclass(frozen=True, slots=True)
class TimedStep:
    """One step of the recipe and how long it took."""

    title: str
    text: str
    duration: str


@dataclass(frozen=True, slots=True)
class Block:
    """One flat table under a heading."""

    heading: str
    header: tuple[str, ...]
    """Column names; empty for a table of names and values."""
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Page:
    """A whole report, ready to be laid out."""

    title: str
    origin: str
    """Where the numbers come from: start, seed, commit, version."""
    summary: tuple[str, ...]
    headlines: tuple[Headline, ...]
    steps: tuple[TimedStep, ...]
    quality: tuple[ScoreTable, ...]
    cost: tuple[ScoreTable, ...]
    tests: tuple[PairedTest, ...]
    figures: tuple[DrawnFigure, ...]
    expansions: tuple[Expansion, ...]
    searches: tuple[Search, ...]
    data: tuple[Block, ...]
    environment: tuple[Block, ...]
    resolved_yaml: str
    config_yaml: str


def compose(contents: RunContents, figures: Sequence[DrawnFigure] = ()) -> Page:
    """Arrange what a run folder holds."""
    quality = build_tables(_only(contents.scores, cost=False), contents.comparisons)
    return Page(
        title=contents.story.title or contents.name,
        origin=_origin(contents),
        summary=contents.story.summary,
        headlines=tuple(find_headlines(quality)),
        steps=tuple(
            TimedStep(step.title, step.text, "" if step.seconds is None else format_duration(step.seconds))
            for step in contents.story.steps
        ),
        quality=tuple(quality),
        cost=tuple(build_tables(_only(contents.scores, cost=True), contents.comparisons)),
        tests=tuple(describe_tests(contents.comparisons, contents.scores)),
        figures=tuple(figures),
        expansions=contents.expansions,
        searches=contents.searches,
        data=tuple(lay_out(contents.data)),
        environment=tuple(lay_out(contents.environment)),
        resolved_yaml=contents.resolved_yaml.rstrip(),
        config_yaml=contents.config_yaml.rstrip(),
    )


def find_headlines(tables: Sequence[ScoreTable]) -> list[Headline]:
    """Find the best system of each direction by the first metric that all its systems share a signature on."""
    headlines = []
    for table in tables:
        for group in table.groups:
            column = _leading_column(table, group)
            if column is None:
                continue
            cells = [(subject, cell) for subject, row in group.rows if (cell := row[column]) is not None]
            subject, cell = next(((s, c) for s, c in cells if c.best), cells[0])
            headlines.append(
                Headline(
                    test_set=table.test_set,
                    direction=group.label,
                    metric=table.columns[column].metric,
                    subject=subject,
                    value=cell.text,
                    interval=cell.interval,
                    level=table.level,
                    systems=len(cells),
                )
            )
    return headlines


def _leading_column(table: ScoreTable, group: Group) -> int | None:
    for index, column in enumerate(table.columns):
        if not column.variant and any(row[index] is not None for _, row in group.rows):
            return index
    return None


def _only(scores: Sequence[Score], *, cost: bool) -> list[Score]:
    return [score for score in scores if is_cost(score.unit) == cost]


def _origin(contents: RunContents) -> str:
    known = contents.environment
    parts = []
    if isinstance(started := known.get("started"), str):
        parts.append(started[:16].replace("T", " ") + (" UTC" if started.endswith(("+00:00", "Z")) else ""))
    if isinstance(version := known.get("soju"), str):
        parts.append(f"soju {version}")
    if isinstance(commit := known.get("commit"), str):
        parts.append(f"commit {commit[:8]}")
    if (seed := known.get("seed")) is not None:
        parts.append(f"seed {seed}")
    return " · ".join(parts)


def lay_out(value: Mapping[str, Any], *, heading: str = "") -> list[Block]:
    """Turn a nested dictionary into tables: plain values first, then one table a nested group.

    >>> lay_out({"pairs": 1200, "by_domain": {"news": {"rows": 3}, "law": {"rows": 5}}})[1].rows
    (('news', '3'), ('law', '5'))
    """
    blocks = []
    plain = [(_heading(key), _value_text(key, item)) for key, item in value.items() if _is_plain(item)]
    if plain:
        blocks.append(Block(heading=heading, header=(), rows=tuple(plain)))
    for key, item in value.items():
        if _is_plain(item):
            continue
        inner = f"{heading} › {_heading(key)}" if heading else _heading(key)
        if isinstance(item, Mapping):
            blocks += _grid_blocks(inner, item) or lay_out(item, heading=inner)
        else:
            blocks += _list_blocks(inner, item)
    return blocks


def _list_blocks(heading: str, items: Sequence[Any]) -> list[Block]:
    if all(_is_flat(item) for item in items):
        columns = list(dict.fromkeys(key for item in items for key in item))
        rows = tuple(tuple(_value_text(key, item.get(key, "")) for key in columns) for item in items)
        return [Block(heading=heading, header=tuple(_heading(key) for key in columns), rows=rows)]
    rows = tuple((str(index), json.dumps(item, ensure_ascii=False)) for index, item in enumerate(items, start=1))
    return [Block(heading=heading, header=(), rows=rows)]


def _grid_blocks(heading: str, value: Mapping[str, Any]) -> list[Block]:
    if len(value) < 2 or not all(_is_flat(item) for item in value.values()):
        return []
    columns = list(dict.fromkeys(key for item in value.values() for key in item))
    shared = sum(len(item) for item in value.values())
    if not columns or shared * 2 <= len(columns) * len(value):
        return []
    rows = tuple(
        (_heading(name), *(_value_text(key, item.get(key, "")) for key in columns)) for name, item in value.items()
    )
    return [Block(heading=heading, header=("", *(_heading(key) for key in columns)), rows=rows)]


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return not value
    if isinstance(value, list):
        return all(item is None or isinstance(item, str | int | float) for item in value)
    return True


def _is_flat(value: Any) -> bool:
    return isinstance(value, Mapping) and all(_is_plain(item) for item in value.values())


def _heading(key: str) -> str:
    return str(key).replace("_", " ")


def _value_text(key: str, value: Any) -> str:
    if value is None or value == [] or value == {}:
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        joiner = " " if key == "arguments" else ", "
        return joiner.join(_value_text(key, item) for item in value)
    if isinstance(value, int):
        return str(value) if "seed" in key else f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return str(value)


def render_html(contents: RunContents, figures: Sequence[DrawnFigure] = ()) -> str:
    """Write a whole report as one self-contained HTML page; every text of the run is escaped."""
    page = compose(contents, figures)
    pictures = [(figure, _data_uri(figure.light), _data_uri(figure.dark)) for figure in page.figures]
    headlines: dict[str, list[Headline]] = {}
    for headline in page.headlines:
        headlines.setdefault(headline.test_set, []).append(headline)
    template = _environment().get_template("report.html")
    return template.render(page=page, pictures=pictures, headlines=headlines)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("soju.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["weight"] = format_weight
    environment.filters["language"] = language_of
    environment.globals["by_language"] = terms_by_language
    environment.globals["symbols"] = SYMBOLS
    return environment


def terms_by_language(expansion: Expansion) -> list[tuple[str, str, list[tuple[TermWeight, float]]]]:
    """Group terms by language, heaviest first, each with its share of the heaviest weight in percent."""
    heaviest = max((term.weight for term in expansion.terms), default=0.0)
    groups = []
    for code, name in _LANGUAGES:
        terms = sorted((term for term in expansion.terms if term.language == code), key=lambda term: -term.weight)
        shares = [(term, round(100 * max(0.0, term.weight) / heaviest, 1) if heaviest > 0 else 0.0) for term in terms]
        if shares:
            groups.append((code, name, shares))
    return groups


def _data_uri(path: Path) -> str:
    content = base64.b64encode(path.read_bytes()).decode("ascii")
    return f"data:image/png;base64,{content}"
