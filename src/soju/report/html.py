"""Lay a report out as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from soju.core.language import language_of
from soju.report.number_format import format_weight
from soju.report.page import DrawnFigure, Headline, compose
from soju.report.paired_tests import SYMBOLS
from soju.report.run_contents import Expansion, ExpansionTerm, RunContents

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


def terms_by_language(expansion: Expansion) -> list[tuple[str, str, list[tuple[ExpansionTerm, float]]]]:
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
