"""What does a row ask, and which texts answer it? Pairs, terms, passages and triplets as questions to mine for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from soju.core.language import Language, is_hangul, language_of
from soju.data.checks import normalise_for_overlap
from soju.data.records import PairRow, PassageRow, TermRow, TripletRow
from soju.data.rows import Row

TERM_WORDS = 3
"""Words, split at white space, that a term has at most."""
TERM_CHARACTERS = 30
"""Unicode code points that a term has at most."""


@dataclass(frozen=True, slots=True)
class Text:
    """A text with what it is compared by."""

    text: str
    key: str
    """Letters and digits, case-folded; the text itself when it holds none."""
    is_term: bool
    """At most `TERM_WORDS` words and `TERM_CHARACTERS` characters."""

    @classmethod
    def of(cls, text: str) -> Text:
        """Look at a text once."""
        is_term = len(text) <= TERM_CHARACTERS and len(text.split()) <= TERM_WORDS
        return cls(text, normalise_for_overlap(text) or text, is_term)

    @property
    def holds_hangul(self) -> bool:
        """Tell whether any character is Hangul."""
        return any(map(is_hangul, self.key))


@dataclass(frozen=True, slots=True)
class Question:
    """A query with one text that answers it."""

    query: str
    positive: str
    pair_type: str
    """One of `soju.data.rows.PAIR_TYPES`."""
    source: str = ""
    """File the row stands in."""
    other_positives: tuple[str, ...] = ()
    """Further texts of the row that answer it."""

    @property
    def answer_language(self) -> Language:
        """Language of the positive, and so of the negatives."""
        return language_of(self.positive)

    @property
    def crosses_languages(self) -> bool:
        """Tell whether it is asked in Korean and answered in English or the other way round."""
        return {language_of(self.query), self.answer_language} == {"ko", "en"}


def pair_type_of(query: str, positive: str) -> str:
    """Name the kind of a query and its answer.

    ``single_term`` when both are terms (see `Text.is_term`), in one language or two; otherwise ``cross_lingual`` when
    one is Korean and the other English, and ``monolingual`` when not.
    """
    if Text.of(query).is_term and Text.of(positive).is_term:
        return "single_term"
    return "cross_lingual" if {language_of(query), language_of(positive)} == {"ko", "en"} else "monolingual"


def questions_of(row: Row, source: str = "") -> Iterator[Question]:
    """Yield what a row asks.

    A pair asks in both directions. A passage is asked for by both of its queries in both languages. A head word asks
    for its best English term and that term for the head word; the row's other terms are answers too. A triplet asks
    what it asks, keeps its ``pair_type``, and its negative is forgotten.

    Args:
        row: A pair, terms, a passage or a triplet.
        source: File it stands in.

    Yields:
        Questions whose query and positive differ.
    """
    for query, positive, others in _asked(row):
        if query != positive:
            kind = row.pair_type if isinstance(row, TripletRow) else pair_type_of(query, positive)
            yield Question(query, positive, kind, source, others)


def _asked(row: Row) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    match row:
        case PairRow():
            yield row.ko, row.en, ()
            yield row.en, row.ko, ()
        case PassageRow():
            for query in (row.query_ko, row.query_en):
                yield query, row.ko, (row.en,)
                yield query, row.en, (row.ko,)
        case TermRow():
            texts = tuple(term.text for term in row.terms)
            best = next((text for text in texts if language_of(text) == "en"), None)
            if best is not None:
                others = tuple(text for text in texts if text != best)
                yield row.ko, best, others
                yield best, row.ko, others
        case TripletRow():
            yield row.query, row.positive, ()
        case _:
            raise ValueError(f"a row of type {type(row).__name__} asks nothing")


def distinct(questions: Iterable[Question]) -> list[Question]:
    """Return questions without repetitions of query and positive (compared by letters and digits); the first stays."""
    found: dict[tuple[str, str], Question] = {}
    for question in questions:
        found.setdefault((Text.of(question.query).key, Text.of(question.positive).key), question)
    return list(found.values())


class Answers:
    """Which texts are known to answer which, in any row and in both directions.

    Args:
        questions: All questions, those that are repeated too.
    """

    def __init__(self, questions: Iterable[Question]) -> None:
        self._known: dict[str, dict[str, Text]] = {}
        for question in questions:
            query = Text.of(question.query)
            for text in (question.positive, *question.other_positives):
                positive = Text.of(text)
                self._known.setdefault(query.key, {})[positive.key] = positive
                self._known.setdefault(positive.key, {})[query.key] = query

    def of(self, query: Text) -> dict[str, Text]:
        """Return what answers a query, by key."""
        return self._known.get(query.key, {})
