"""What does the page show of a text? The JSON of ``/api/expand`` and ``/api/search``."""

from __future__ import annotations

from soju.core.language import Language
from soju.report.run_contents import ExpansionTerm, Hit, MatchedTerm, Row


class ShownTerm(ExpansionTerm):
    """One active term."""

    in_text: bool
    """Whether the text itself holds it; the others were added by the model."""
    only_here: bool
    """Whether no other model on the page lights it up at all; false when there is one model."""


class LanguageShare(Row):
    """How much of a vector is in one language."""

    language: Language
    terms: int
    share: float
    """Of the sum of weights, 0–1."""


class ModelExpansion(Row):
    """What one model makes of a text."""

    model: str
    active_terms: int
    languages: tuple[LanguageShare, ...]
    terms: tuple[ShownTerm, ...]
    """The heaviest, heaviest first."""


class Expansions(Row):
    """The answer of ``/api/expand``."""

    text: str
    models: tuple[ModelExpansion, ...]


class ShownMatch(MatchedTerm):
    """A term that query and document share."""

    in_query: bool
    """Whether the query itself holds it; the others were added by the model."""


class PassagePart(Row):
    """A stretch of a passage; the parts of a passage joined are the passage."""

    text: str
    term: str | None = None
    """The matched term that stands here."""
    language: Language | None = None
    share: float = 0.0
    """Of the score, 0–1."""


class ShownHit(Hit):
    """One found document."""

    matched: tuple[ShownMatch, ...] = ()
    parts: tuple[PassagePart, ...]
    only_here: bool
    """Whether no other model on the page found it among its hits; false when only one searches."""


class ModelSearch(Row):
    """What one model found."""

    model: str
    hits: tuple[ShownHit, ...]


class Searches(Row):
    """The answer of ``/api/search``; models without an index are left out."""

    text: str
    models: tuple[ModelSearch, ...]
