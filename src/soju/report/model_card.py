"""The README of a model folder: a model card as the Hugging Face hub reads it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import yaml
from pydantic import Field

from soju.core.config import Settings
from soju.core.score import Score
from soju.report.markdown import code, code_block, escape, render_score_table, table
from soju.report.tables import build_tables


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
    return _front_matter(card) + "\n\n".join(_sections(card)) + "\n"


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


def _sections(card: ModelCard) -> Iterator[str]:
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
