"""The rows that travel between parts. Readers in `soju.data` make them; nothing else parses text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Term:
    """One target term of a head word."""

    text: str
    similarity: float
    """How close the term is to the head word, in (0, 1], unitless; 1 is an exact translation."""


@dataclass(frozen=True, slots=True)
class TermRow:
    """A Korean head word with its English translations and Korean synonyms, best first."""

    ko: str
    terms: tuple[Term, ...]
    sources: tuple[str, ...] = ()
    """Where the row comes from, when the file says so (``src``), to select by licence."""


@dataclass(frozen=True, slots=True)
class PairRow:
    """A Korean text and its English translation."""

    ko: str
    en: str


@dataclass(frozen=True, slots=True)
class TripletRow:
    """A query with a text that answers it and one that does not."""

    query: str
    positive: str
    negative: str
    pair_type: str
    difficulty: str
    positive_score: float | None = None
    """How well a teacher says the positive answers the query, in the teacher's unit; `negative_score` alike."""
    negative_score: float | None = None


@dataclass(frozen=True, slots=True)
class Document:
    """A text to index; `id` is what a search returns."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class PassageRow:
    """A passage in both languages with a query for it in both: four retrieval directions from one row."""

    id: str
    domain: str
    ko: str
    en: str
    query_ko: str
    query_en: str


@dataclass(frozen=True, slots=True)
class SimilarityPair:
    """Two texts and how alike people find them."""

    first: str
    second: str
    score: float
    """From 0, no relation, to 5, the same meaning."""


@dataclass(frozen=True, slots=True)
class InferencePair:
    """A text and one that follows from it, may follow, or contradicts it."""

    premise: str
    hypothesis: str
    label: str
    """``entailment``, ``neutral`` or ``contradiction``."""


@dataclass(frozen=True, slots=True)
class ChoiceQuestion:
    """A text and several ways to go on or to answer, one of them right."""

    context: str
    choices: tuple[str, ...]
    answer: int
    """Position of the right one in `choices`, from 0."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What one document is worth as an answer to one query."""

    query: str
    document: str
    gain: int
    """1 or more is relevant, the more the better; 0 or less is not."""
