"""What rows ask and which texts answer, and which of the texts a miner found become negatives.

Pairs, terms, passages and triplets become questions. `choose` is a pure decision; nothing is read or encoded here.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field

from soju.core.config import Settings
from soju.core.language import Language, is_hangul, language_of
from soju.data.rows import PairRow, PassageRow, Row, TermRow, TripletRow
from soju.data.statistics import normalise_for_overlap

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
    """Which texts are known to answer which, in any row and in both directions."""

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


HARD_RANK = 10
"""Last rank that is hard."""
MEDIUM_RANK = 50
"""Last rank that is medium; later ones are easy."""

Pick = Literal["best", "sample"]
Reason = Literal[
    "known positive",
    "the query itself",
    "skipped rank",
    "base term or compound",
    "holds the term",
    "shared translation",
    "above the highest score",
    "too close to the positive",
]
"""Why a candidate is no negative, in the order that is asked."""


class Choice(Settings):
    """Which candidates become negatives."""

    per_query: int = Field(default=1, ge=1)
    """Negatives of a question at most."""
    skip: int = Field(default=0, ge=0)
    """Best ranks that are left out."""
    pick: Pick = "best"
    """``best``: the first that pass. ``sample``: any that pass, each as likely."""
    max_score: float | None = Field(default=None, allow_inf_nan=False)
    """A negative scores no higher, in the unit of the filter model; ``None`` sets no bound."""
    relative: float | None = Field(default=0.95, gt=0, allow_inf_nan=False)
    """A negative scores at most this share of the positive's score; ``None`` sets no bound."""
    seed: int = 0
    """Of ``sample``."""

    @property
    def filters(self) -> bool:
        """Tell whether scores decide."""
        return self.max_score is not None or self.relative is not None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A text that a miner found."""

    text: Text
    score: float
    """Of the filter model, or of the miner without one; higher is closer to the query."""


@dataclass(frozen=True, slots=True)
class Negative:
    """A text that does not answer a question but looks as if."""

    text: str
    rank: int
    """Its place among the found texts that are not known to answer the question, from 1."""
    score: float

    @property
    def difficulty(self) -> str:
        """``hard`` up to rank 10, ``medium`` up to 50, ``easy`` beyond."""
        return "hard" if self.rank <= HARD_RANK else "medium" if self.rank <= MEDIUM_RANK else "easy"


@dataclass(slots=True)
class Chosen:
    """What became of the candidates of one question."""

    negatives: list[Negative]
    dropped: Counter[Reason] = field(default_factory=Counter)
    positive_unknown: bool = False
    """The positive scores nothing, so nothing could be compared with it."""


class RelatedTerms:
    """Tells which terms are too closely related for one to be a negative of the other.

    증상 (symptom) answers much of what is asked about 임상증상 (clinical symptom), and a dictionary may give both the
    same translation. Two terms are related when

    - one contains the other, compared by letters and digits: as a base term and its compound,
    - the term rows give them a translation or synonym in common, or one as a translation of the other,
    - one contains a translation of the other: "symptom" is no negative of 임상증상.

    A longer text that holds a term, query or answer, is about it, and no negative either. Containment alone is
    sometimes accidental (art, start). That costs a negative; a missed relation teaches a falsehood. Queries that are no
    terms (`Text.is_term`) have no such relations: sentences share words.

    Args:
        rows: Head words with their terms.
    """

    def __init__(self, rows: Iterable[TermRow] = ()) -> None:
        self._related: dict[str, dict[str, Text]] = {}
        for row in rows:
            head = Text.of(row.ko)
            for term in (Text.of(term.text) for term in row.terms):
                self._related.setdefault(head.key, {})[term.key] = term
                self._related.setdefault(term.key, {})[head.key] = head

    def reason(self, anchors: Iterable[Text], candidate: Text) -> Reason | None:
        """Say why a candidate is no negative of the query and all that answers it, the anchors; none if it may be."""
        terms = [anchor for anchor in anchors if anchor.is_term]
        if not candidate.is_term:
            return "holds the term" if any(_is_part(term, candidate, hangul=2, other=4) for term in terms) else None
        if not terms:
            return None
        if any(_one_contains_the_other(anchor, candidate, hangul=1, other=3) for anchor in terms):
            return "base term or compound"
        related = self._related.get(candidate.key, {})
        reach = {anchor.key for anchor in terms}.union(*(self._related.get(anchor.key, {}) for anchor in terms))
        if candidate.key in reach or not reach.isdisjoint(related):
            return "shared translation"
        # A translation of one syllable or four letters stands in too many words to mean anything.
        translations = related.values()
        if any(_one_contains_the_other(a, t, hangul=2, other=5) for a in terms for t in translations):
            return "base term or compound"
        return None


def _one_contains_the_other(first: Text, second: Text, *, hangul: int, other: int) -> bool:
    short, long = (first, second) if len(first.key) <= len(second.key) else (second, first)
    return _is_part(short, long, hangul=hangul, other=other)


def _is_part(short: Text, long: Text, *, hangul: int, other: int) -> bool:
    """Tell whether one text stands in another and is long enough, in characters, for that to be no accident."""
    return short.key in long.key and len(short.key) >= (hangul if short.holds_hangul else other)


def choose(
    question: Question,
    candidates: Sequence[Candidate],
    known: Mapping[str, Text],
    related: RelatedTerms,
    choice: Choice,
    *,
    positive_score: float | None,
) -> Chosen:
    """Choose the negatives of one question.

    What answers the question is taken out of the ranking first, the rest gets its ranks, and then the ranks to skip,
    relations between terms and the scores decide. A score passes with ``score <= max_score`` and
    ``score <= relative * positive_score``: an unlabelled text that scores as high as the positive is probably one. When
    the positive itself scores nothing, a share of it is no bound, and there is no negative.

    Args:
        question: The query and its positive.
        candidates: What the miner found, best first.
        known: All that is known to answer the query, by key; see `soju.sparse.negatives.Answers`.
        related: Which terms are too closely related.
        choice: Which to take.
        positive_score: Score of the positive in the candidates' unit; ``None`` when nothing is filtered by scores.

    Returns:
        The negatives by rank, and how many candidates were dropped for which reason.

    References:
        de Souza P. Moreira et al. 2024, NV-Retriever: Improving text embedding models with effective hard-negative
        mining, arXiv:2407.15831: the bounds are its TopK-Abs and TopK-PercPos.
    """
    query, dropped = Text.of(question.query), Counter[Reason]()
    positives = {**known, **{text.key: text for text in map(Text.of, (question.positive, *question.other_positives))}}
    anchors = (query, *positives.values())
    passed: list[Negative] = []
    rank = 0
    for candidate in candidates:
        reason: Reason | None
        if candidate.text.key in positives:
            reason = "known positive"
        elif candidate.text.key == query.key:
            reason = "the query itself"
        else:
            rank += 1
            reason = "skipped rank" if rank <= choice.skip else related.reason(anchors, candidate.text)
            reason = reason or _too_high(candidate.score, positive_score, choice)
        if reason is None:
            passed.append(Negative(candidate.text.text, rank, candidate.score))
        else:
            dropped[reason] += 1
    if choice.relative is not None and positive_score is not None and positive_score <= 0:
        return Chosen([], dropped, positive_unknown=True)
    if choice.pick == "sample" and len(passed) > choice.per_query:
        # Seeded by the question, so that neither its place nor an interruption changes what is drawn.
        seed = hashlib.sha256(f"{choice.seed}\n{question.query}\n{question.positive}".encode()).digest()
        passed = sorted(random.Random(seed).sample(passed, choice.per_query), key=lambda negative: negative.rank)
    return Chosen(passed[: choice.per_query], dropped)


def _too_high(score: float, positive_score: float | None, choice: Choice) -> Reason | None:
    if choice.max_score is not None and score > choice.max_score:
        return "above the highest score"
    if choice.relative is not None and positive_score is not None and score > choice.relative * positive_score:
        return "too close to the positive"
    return None
