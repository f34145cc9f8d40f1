"""What does a report say, and in which order? The same for every format.

Lay a report out as one HTML file that needs nothing else.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from soju.core.hits import TermWeight
from soju.core.language import language_of
from soju.core.score import Score
from soju.report.contents import Expansion, FigureSpec, RunContents, Search
from soju.report.number_format import format_duration, format_weight, is_cost
from soju.report.tables import SYMBOLS, Block, Group, PairedTest, ScoreTable, build_tables, describe_tests, lay_out


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
        """Say it in plain words."""
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


_LANGUAGES = (("ko", "Korean"), ("en", "English"), ("other", "Other"))


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
