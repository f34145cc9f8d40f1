"""A report and a model card as Markdown; text from elsewhere is escaped so that it stays text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Literal

import yaml
from pydantic import Field

from soju.core.config import Settings
from soju.core.results import Hit, Score
from soju.report.contents import Expansion, RunContents, Search
from soju.report.page import Block, DrawnFigure, Page, TimedStep, compose
from soju.report.tables import SYMBOLS, Cell, ScoreTable, build_tables, format_weight

_SPECIAL = re.compile(r"([\\`*_\[\]|~#$])")
_LIST_START = re.compile(r"^(\s*)([-+>=]|\d+[.)])")


def render_markdown(contents: RunContents, figures: Sequence[DrawnFigure] = ()) -> str:
    """Write a whole report as Markdown; plots are linked as ``plots/<id>.png``."""
    return "\n\n".join(_sections(compose(contents, figures))) + "\n"


def _sections(page: Page) -> Iterator[str]:
    yield f"# {escape(page.title)}"
    if page.origin:
        yield escape(page.origin)
    yield from (escape(sentence) for sentence in page.summary)
    if page.headlines:
        yield "\n".join(f"- {escape(headline.sentence)}" for headline in page.headlines)
    for title, tables in (("Scores", page.quality), ("Cost", page.cost)):
        if tables:
            yield f"## {title}"
            for item in tables:
                yield from render_score_table(item)
    yield from _tests(page)
    yield from _figures(page.figures)
    yield from _expansions(page.expansions)
    yield from _searches(page.searches)
    yield from _steps(page.steps)
    yield from _blocks("Data", page.data)
    if page.resolved_yaml:
        yield "## Configuration"
        yield code_block(page.resolved_yaml, "yaml")
    yield from _blocks("Environment", page.environment)


def render_score_table(item: ScoreTable) -> Iterator[str]:
    """Yield the paragraphs of one score table: heading, warnings, a table a direction, marks, signatures."""
    yield f"### {escape(item.test_set)}"
    for metric in item.mixed:
        yield (
            f"**Different settings.** {escape(metric)} was not measured in the same way for all systems. Values in"
            " columns with different letters must not be compared; the signatures below say what differs."
        )
    for group in item.groups:
        if group.label:
            yield f"**{escape(group.label)}**"
        header = ["System", *(escape(f"{column.heading} {column.note}") for column in item.columns)]
        rows = [[escape(subject), *(_cell(cell) for cell in cells)] for subject, cells in group.rows]
        yield table(header, rows, "l" + "r" * len(item.columns))
    yield _legend(item)
    yield "\n".join(
        f"- {escape(column.heading)}{f', {escape(direction)}' if direction else ''}: {code(text)}"
        for column in item.columns
        for direction, text in column.signatures
    )


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    value = f"**{cell.text}**" if cell.best else cell.text
    marks = "".join(f" {mark.symbol}" for mark in cell.marks)
    return f"{value}{marks}" + (f" ({cell.interval})" if cell.interval else "")


def _legend(item: ScoreTable) -> str:
    parts = ["Best value of a column in bold; ↑ higher is better, ↓ lower is better."]
    if item.level:
        parts.append(f"In brackets: {item.level} confidence interval.")
    if item.baselines:
        many = len(item.baselines) > 1
        names = ", ".join(f"({n}) {escape(b)}" if many else escape(b) for n, b in enumerate(item.baselines, start=1))
        parts.append(f"▲ better, ▼ worse, ≈ no proven difference in a paired test against {names}.")
    parts.append("Signatures:")
    return " ".join(parts)


def _tests(page: Page) -> Iterator[str]:
    if not page.tests:
        return
    yield "## Paired tests"
    yield "Each difference is the system’s value minus the baseline’s."
    rows = [
        [
            *(escape(text) for text in (test.subject, test.baseline, test.test_set, test.metric)),
            test.difference
            + (f" {SYMBOLS[test.finding]}" if test.finding else "")
            + (f" ({test.interval})" if test.interval else ""),
            escape(test.p_value),
            test.samples,
        ]
        for test in page.tests
    ]
    yield table(["System", "Baseline", "Test set", "Metric", "Difference", "p", "Samples"], rows, "llllrrr")


def _figures(figures: Sequence[DrawnFigure]) -> Iterator[str]:
    if figures:
        yield "## Plots"
    for figure in figures:
        yield f"### {escape(figure.spec.title)}"
        yield f"![{escape(figure.alt)}](plots/{figure.light.name})"
        if figure.caption:
            yield escape(figure.caption)


def _expansions(expansions: Sequence[Expansion]) -> Iterator[str]:
    if expansions:
        yield "## Expansions"
    for expansion in expansions:
        yield f"### {escape(expansion.text)}"
        terms = sorted(expansion.terms, key=lambda term: -term.weight)
        rows = [[escape(term.term), term.language, format_weight(term.weight)] for term in terms]
        yield table(["Term", "Language", "Weight"], rows, "llr")


def _searches(searches: Sequence[Search]) -> Iterator[str]:
    if searches:
        yield "## Searches"
    for search in searches:
        yield from _search(search)


def _search(search: Search) -> Iterator[str]:
    yield f"### {escape(search.query)}"
    yield f"Engine: {escape(search.engine)}"
    rows = [
        [str(hit.rank), escape(hit.document_id), f"{hit.score:.3f}", escape(hit.passage), _matched(hit)]
        for hit in search.hits
    ]
    columns = ["Rank", "Document", "Score", "Passage", "Matched terms"]
    yield table(columns, rows, "rlrll") if rows else "Nothing was found."


def _matched(hit: Hit) -> str:
    return ", ".join(
        f"{escape(term.term)} ({term.language}) {format_weight(term.query_weight)} ×"
        f" {format_weight(term.document_weight)} = {format_weight(term.contribution)}"
        for term in hit.matched
    )


def _steps(steps: Sequence[TimedStep]) -> Iterator[str]:
    if not steps:
        return
    yield "## How it was made"
    lines = []
    for number, step in enumerate(steps, start=1):
        duration = f" ({step.duration})" if step.duration else ""
        lines.append(f"{number}. **{escape(step.title)}**{duration} {escape(step.text)}".rstrip())
    yield "\n".join(lines)


def _blocks(title: str, blocks: Sequence[Block]) -> Iterator[str]:
    if blocks:
        yield f"## {title}"
    for block in blocks:
        if block.heading:
            yield f"### {escape(block.heading)}"
        header = [escape(name) for name in block.header] or ["", ""]
        yield table(header, [[escape(text) for text in row] for row in block.rows])


def escape(text: str) -> str:
    """Escape a text for one line of Markdown: no markup, no raw HTML, no new table cell."""
    flat = " ".join(text.split())
    flat = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    flat = _SPECIAL.sub(r"\\\1", flat)
    return _LIST_START.sub(lambda match: f"{match[1]}{match[2][:-1]}\\{match[2][-1]}", flat)


def code(text: str) -> str:
    """Write a text as inline code that is safe inside a table too."""
    flat = " ".join(text.split()).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", flat)), default=0))
    pad = " " if flat.startswith("`") or flat.endswith("`") else ""
    return f"{fence}{pad}{flat}{pad}{fence}"


def code_block(text: str, language: str = "") -> str:
    """Write a fenced block whose fence is longer than any inside it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{re.sub(r'[^A-Za-z0-9_+-]', '', language)}\n{text.rstrip()}\n{fence}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], align: str = "") -> str:
    """Write a table of cells that are Markdown already; ``align`` has ``l`` or ``r`` for each column, else left."""
    rule = ["---:" if side == "r" else "---" for side in align.ljust(len(header), "l")]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


class DataSource(Settings):
    """One source of training data."""

    name: str
    """What it is called, and its version or date."""
    rows: Annotated[int, Field(ge=0)]
    """Rows that were used."""
    licence: str
    """Its licence, as its owner names it."""
    attribution: str = ""
    """The words its licence asks for."""


class Example(Settings):
    """One way to use the model."""

    title: str
    """What it does, in a few words."""
    language: Literal["python", "bash", "json", "text"] = "python"
    """What the code is written in."""
    code: str
    """The code itself; it runs as it stands."""


class ModelCard(Settings):
    """Everything a model card says."""

    name: str
    """The name of the model."""
    summary: str
    """What the model does and for whom, in a few sentences."""
    licence: str
    """Licence of the weights, by the hub's identifier, for example ``apache-2.0``; ``other`` needs `licence_name`."""
    licence_name: str | None = None
    """Name of a licence the hub does not know."""
    languages: tuple[str, ...] = ("ko", "en")
    """ISO 639-1 codes."""
    tags: tuple[str, ...] = ()
    """What the hub finds the model by."""
    pipeline_tag: str | None = None
    """The hub's task, for example ``feature-extraction``, ``sentence-similarity`` or ``translation``."""
    library_name: str | None = None
    """What loads the model, for example ``sentence-transformers``."""
    base_model: str | None = None
    """Hub id of the model this one was made from."""
    examples: tuple[Example, ...] = ()
    """How to use it."""
    scores: tuple[Score, ...] = ()
    """Final scores, baselines included."""
    data: tuple[DataSource, ...] = ()
    """What it was trained on."""
    command: str = ""
    """The command that makes it again."""
    seed: int | None = None
    """The seed of that command."""
    limits: tuple[str, ...] = ()
    """What it must not be used for, and where it is weak."""


def render_model_card(card: ModelCard) -> str:
    """Write a ``README.md`` with YAML front matter; every text is escaped."""
    return _front_matter(card) + "\n\n".join(_card_sections(card)) + "\n"


def _front_matter(card: ModelCard) -> str:
    fields = {
        "language": list(card.languages),
        "license": card.licence,
        "license_name": card.licence_name,
        "library_name": card.library_name,
        "pipeline_tag": card.pipeline_tag,
        "base_model": card.base_model,
        "tags": list(card.tags),
    }
    kept = {key: value for key, value in fields.items() if value}
    return f"---\n{yaml.safe_dump(kept, allow_unicode=True, sort_keys=False)}---\n\n"


def _card_sections(card: ModelCard) -> Iterator[str]:
    yield f"# {escape(card.name)}"
    yield escape(card.summary)
    if card.examples:
        yield "## How to use it"
        for example in card.examples:
            yield escape(example.title)
            yield code_block(example.code, example.language)
    if card.scores:
        yield "## Scores"
        for item in build_tables(card.scores):
            yield from render_score_table(item)
    if card.data:
        yield "## Training data"
        rows = [
            [escape(source.name), f"{source.rows:,}", escape(source.licence), escape(source.attribution)]
            for source in card.data
        ]
        yield table(["Source", "Rows", "Licence", "Attribution"], rows, "lrll")
    if card.command:
        yield "## How to make it again"
        yield code_block(card.command, "bash")
        if card.seed is not None:
            yield f"Seed: {code(str(card.seed))}"
    if card.limits:
        yield "## Limits"
        yield "\n".join(f"- {escape(limit)}" for limit in card.limits)
    yield "## Licence"
    yield escape(card.licence_name or card.licence)
