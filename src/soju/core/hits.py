"""What searching a text and expanding it give: hits with the terms that matched, and weighted terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from soju.core.language import Language


@dataclass(frozen=True, slots=True)
class TermWeight:
    """One active term of a text.

    >>> import soju
    >>> (heaviest,) = soju.load("ko-en-static").expand("물", k=1)
    >>> heaviest == soju.TermWeight("물", "ko", heaviest.weight)
    True
    """

    term: str
    language: Language
    weight: float
    """Unitless, above 0; of a static model's queries without the idf, which the index adds."""


@dataclass(frozen=True, slots=True)
class MatchedTerm:
    """One term that the query and the passage share.

    >>> import soju
    >>> match = soju.MatchedTerm("heart", "en", query_weight=2.0, document_weight=0.5, contribution=1.0)
    >>> match.query_weight * match.document_weight == match.contribution
    True
    """

    term: str
    language: Language
    query_weight: float
    """Weight in the query, idf included."""
    document_weight: float
    """Impact in the passage."""
    contribution: float
    """``query_weight * document_weight``: its part of the score."""


@dataclass(frozen=True, slots=True)
class Hit:
    """One document that was found, through its best passage.

    >>> import soju
    >>> soju.Hit(rank=1, document_id="tea", score=1.5, passage="Green tea.").matched
    ()
    """

    rank: int
    """From 1."""
    document_id: str
    score: float
    """Sum of the contributions, unitless; comparable within one query only."""
    passage: str
    """The part of the document that matched."""
    matched: tuple[MatchedTerm, ...] = ()
    """Largest contribution first; empty when no explanation was asked for."""
    start: Annotated[int, Field(exclude=True)] = 0
    """Where the passage starts in the document, in characters. JSON leaves out both ends."""
    end: Annotated[int | None, Field(exclude=True)] = None
    """Where it ends; ``None`` when the passage is the whole of what was searched."""
