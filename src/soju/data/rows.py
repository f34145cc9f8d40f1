"""Rows of data: what they hold, and how a raw object of a file becomes one.

`KINDS` has a row for each kind of data: its parser, its file formats, its columns. A parser returns a typed row, or
records what is wrong and returns ``None``; a row with any problem is refused whole. Every text of a row that is handed
out is not empty, has no white space at its ends, is in Unicode NFC, encodes as UTF-8, and holds no control character
but tab and line ends.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from soju.data.log import (
    HANGUL,
    SKIP,
    Place,
    choice_of,
    clean_text,
    describe,
    id_of,
    score_of,
    show,
    similarity_of,
    text_field,
)


@dataclass(frozen=True, slots=True)
class Term:
    """One target term of a head word.

    >>> import soju
    >>> soju.TermRow("물", terms=(soju.Term("water", similarity=1.0),)).terms[0].text
    'water'
    """

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
class KnowledgeRow:
    """A question, and a text that says what a right answer needs to know."""

    id: str
    category: str
    query: str
    knowledge: str
    answer: str | None = None
    """A reference, for measuring alone."""
    paraphrases: tuple[str, ...] = ()
    """The question in other words, two or three, for measuring alone."""
    facts: tuple[str, ...] = ()
    """What a right answer contains, each one or several spellings with ``|`` between."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question of general use, to see what a model forgets."""

    id: str
    query: str
    language: str


@dataclass(frozen=True, slots=True)
class Judgement:
    """What one document is worth as an answer to one query."""

    query: str
    document: str
    gain: int
    """1 or more is relevant, the more the better; 0 or less is not."""


PAIR_TYPES = ("single_term", "monolingual", "cross_lingual")
DIFFICULTIES = ("easy", "medium", "hard")
HIGHEST = 5.0
"""Similarity of two texts that mean the same, on the scale of the STS tasks; 0 is no relation at all."""
RELATIONS = ("entailment", "neutral", "contradiction")
CONNECTORS = {"결과": "그래서", "원인": "왜냐하면"}
"""How a sentence goes on with its effect (결과) or its cause (원인)."""
LETTERS = ("A", "B", "C", "D", "E")
"""How questions of KMMLU name their answers."""

_DECIMAL = re.compile("[-+]?([0-9]+[.]?[0-9]*|[.][0-9]+)(e[-+]?[0-9]+)?", re.IGNORECASE | re.ASCII)
_WHOLE_NUMBER = re.compile("[+-]?[0-9]{1,9}")

Row = (
    TermRow
    | PairRow
    | TripletRow
    | Document
    | PassageRow
    | Judgement
    | SimilarityPair
    | InferencePair
    | ChoiceQuestion
    | KnowledgeRow
    | Question
)
RowT = TypeVar("RowT", bound=Row)
RawRow = Mapping[str, Any]
"""The JSON object of a line, or the columns of a TSV line by name, all of them text."""
Format = Literal["jsonl", "tsv", "txt", "json"]


@dataclass(frozen=True, slots=True)
class Kind(Generic[RowT]):
    """One kind of data."""

    name: str
    parse: Callable[[RawRow, Place], RowT | None]
    formats: tuple[Format, ...]
    """What its rows may be stored as."""
    columns: tuple[str, ...] = ()
    """Columns of a TSV file."""
    headed: bool = False
    """Whether a TSV file needs a header. Published files of these kinds name and order their columns each in its own
    way; columns that are not needed are passed over."""
    telling: frozenset[str] = frozenset()
    """Fields that tell a JSON row of this kind from those of others; none where it is never told by its fields."""

    def header(self, text: str) -> tuple[str, ...] | None:
        """Return the columns in their order when a line names them: all and no others, or with `headed` each once."""
        names = column_names(text)
        known = not self.missing(text) if self.headed else sorted(names) == sorted(self.columns)
        return names if known else None

    def missing(self, text: str) -> list[str]:
        """Return the columns that a header does not name, or names more than once."""
        names = column_names(text)
        return [column for column in self.columns if names.count(column) != 1]


def column_names(text: str) -> tuple[str, ...]:
    """Return the names that the first line of a TSV file gives its columns."""
    return tuple(name.strip().lower() for name in text.split("\t"))


def parse_terms(row: RawRow, place: Place) -> TermRow | None:
    """Read ``{"ko": "프로그램", "terms": [{"term": "program", "sim": 0.95}, "software"]}``.

    A bare string is a term of similarity 1. Terms are ordered best first; equal ones keep their order. ``src``, a list
    of names, is kept as the row's sources; other keys are ignored.
    """
    ko = text_field(row, "ko", place)
    if ko is not None:
        _require_hangul(ko, "ko", place)
    terms = _terms_of(row, place)
    seen: set[str] = set()
    for number, term in terms:
        if term.text == ko:
            what = f"{show(ko)} is the head word itself"
            place.refuse(f"terms[{number}]", what, f"remove the term, {SKIP}", "identical-sides")
        if term.text in seen:
            what = f"{show(term.text)} stands twice in the row"
            place.refuse(f"terms[{number}]", what, f"keep one of them, {SKIP}", "duplicate-term")
        seen.add(term.text)
    if ko is None or place.problems:
        return None
    return TermRow(ko, tuple(sorted((term for _, term in terms), key=lambda term: -term.similarity)), _sources_of(row))


def _sources_of(row: RawRow) -> tuple[str, ...]:
    sources = row.get("src", [])
    return tuple(name for name in sources if isinstance(name, str)) if isinstance(sources, list) else ()


def _terms_of(row: RawRow, place: Place) -> list[tuple[int, Term]]:
    remedy = f'write "terms": [{{"term": "program", "sim": 0.95}}], {SKIP}'
    if "terms" not in row:
        place.refuse("terms", "missing", remedy, "missing-field")
        return []
    items = row["terms"]
    if not isinstance(items, list):
        place.refuse("terms", f"expected a list, got {describe(items)}", remedy, "wrong-type")
        return []
    if not items:
        place.refuse("terms", "the list is empty", remedy, "no-terms")
    parsed = ((number, _term_of(item, f"terms[{number}]", place)) for number, item in enumerate(items))
    return [(number, term) for number, term in parsed if term is not None]


def _term_of(item: object, field: str, place: Place) -> Term | None:
    if isinstance(item, str):
        text = clean_text(item, field, place)
        return None if text is None else Term(text, 1.0)
    if not isinstance(item, dict):
        what = f"expected a string or an object, got {describe(item)}"
        place.refuse(field, what, f'write {{"term": "program", "sim": 0.95}} or "program", {SKIP}', "wrong-type")
        return None
    for key in ("term", "sim"):
        if key not in item:
            remedy = f'write {{"term": "program", "sim": 0.95}} or "program", {SKIP}'
            place.refuse(f"{field}.{key}", "missing", remedy, "missing-field")
    text = clean_text(item["term"], f"{field}.term", place) if "term" in item else None
    similarity = similarity_of(item["sim"], f"{field}.sim", place) if "sim" in item else None
    return None if text is None or similarity is None else Term(text, similarity)


def parse_pair(row: RawRow, place: Place) -> PairRow | None:
    """Read ``{"ko": ..., "en": ...}``. Korean needs one Hangul character, English more other letters."""
    ko = text_field(row, "ko", place)
    en = text_field(row, "en", place)
    _check_sides(ko, en, place)
    if ko is None or en is None or place.problems:
        return None
    return PairRow(ko, en)


def parse_query_pair(row: RawRow, place: Place) -> PairRow | None:
    """Read ``{"ko": ..., "en": ...}`` to search with: people also ask in Latin letters, the same on both sides."""
    ko = text_field(row, "ko", place)
    en = text_field(row, "en", place)
    if ko is not None and en is not None and HANGUL.search(ko) is None and mostly_hangul(en):
        what = "the languages look swapped: ko holds no Hangul and en does"
        place.refuse("ko", what, f"exchange the two columns, {SKIP}", "swapped-languages")
    return None if ko is None or en is None or place.problems else PairRow(ko, en)


def parse_triplet(row: RawRow, place: Place) -> TripletRow | None:
    """Read query, positive, negative, pair_type (`PAIR_TYPES`) and difficulty (`DIFFICULTIES`), all strings.

    A teacher's numbers positive_score and negative_score may stand beside them.
    """
    query = text_field(row, "query", place)
    positive = text_field(row, "positive", place)
    negative = text_field(row, "negative", place)
    pair_type = choice_of(row, "pair_type", PAIR_TYPES, place)
    difficulty = choice_of(row, "difficulty", DIFFICULTIES, place)
    for field, text, others in (
        ("positive", positive, {"query": query}),
        ("negative", negative, {"query": query, "positive": positive}),
    ):
        for name, other in others.items():
            if text is not None and text == other:
                what = f"identical to {name}, so the row teaches nothing"
                place.refuse(field, what, f"use another {field}, {SKIP}", "identical-sides")
    if query is None or positive is None or negative is None or pair_type is None or difficulty is None:
        return None
    scores = [score_of(row, field, place) for field in ("positive_score", "negative_score")]
    return None if place.problems else TripletRow(query, positive, negative, pair_type, difficulty, *scores)


def parse_document(row: RawRow, place: Place) -> Document | None:
    """Read ``{"id": ..., "text": ...}``, or BEIR's ``{"_id": ..., "title": ..., "text": ...}``.

    The id is a string or a whole number. A title is put before the text with a space between; with a title the text may
    be empty.
    """
    name = id_of(row, ("id", "_id"), place)
    title = row.get("title")
    if title is None or (isinstance(title, str) and not title.strip()):
        text = text_field(row, "text", place)
    else:
        text = clean_text(title, "title", place)
        if "text" not in row or not isinstance(row["text"], str) or row["text"].strip():
            body = text_field(row, "text", place)
            text = None if text is None or body is None else f"{text} {body}"
    if name is None or text is None or place.problems:
        return None
    return Document(name, text)


def parse_passage(row: RawRow, place: Place) -> PassageRow | None:
    """Read id, domain, ko, en, query_ko and query_en.

    The two passages are checked as the sides of a pair. A Korean query may be without Hangul ("GPU vs CPU"), an English
    one may not be mostly Hangul.
    """
    name = id_of(row, ("id",), place)
    texts = [text_field(row, field, place) for field in ("domain", "ko", "en", "query_ko", "query_en")]
    domain, ko, en, query_ko, query_en = texts
    _check_sides(ko, en, place)
    if query_en is not None:
        _refuse_hangul(query_en, "query_en", place)
    if name is None or domain is None or ko is None or en is None or query_ko is None or query_en is None:
        return None
    return None if place.problems else PassageRow(name, domain, ko, en, query_ko, query_en)


def parse_judgement(row: RawRow, place: Place) -> Judgement | None:
    """Read BEIR's query-id, corpus-id and score, a whole number: 1 or more is relevant, 0 or less is not."""
    query = text_field(row, "query-id", place)
    document = text_field(row, "corpus-id", place)
    score = text_field(row, "score", place)
    if score is not None and _WHOLE_NUMBER.fullmatch(score) is None:
        what = f"{show(score)} is no whole number"
        place.refuse("score", what, f"write 1 or more for an answer, 0 for none, {SKIP}", "not-a-whole-number")
    if query is None or document is None or score is None or place.problems:
        return None
    return Judgement(query, document, int(score))


def parse_similarity(row: Mapping[str, Any], place: Place) -> SimilarityPair | None:
    """Read ``{"sentence1": ..., "sentence2": ..., "score": 3.8}``, the score from 0 to `HIGHEST`."""
    first = text_field(row, "sentence1", place)
    second = text_field(row, "sentence2", place)
    score = _grade(row, place)
    if first is None or second is None or score is None:
        return None
    return SimilarityPair(first, second, score)


def _grade(row: Mapping[str, Any], place: Place) -> float | None:
    remedy = f"write a number from 0 to {HIGHEST:g}, {SKIP}"
    if "score" not in row:
        place.refuse("score", "missing", f'add "score" to the row, {SKIP}', "missing-field")
        return None
    number = _number(row["score"])
    if number is None:
        place.refuse("score", f"expected a number, got {describe(row['score'])}", remedy, "wrong-type")
        return None
    if not math.isfinite(number):
        place.refuse("score", f"{number} is not a finite number", remedy, "not-finite")
        return None
    if not 0 <= number <= HIGHEST:
        place.refuse("score", f"{describe(row['score'])} is outside [0, {HIGHEST:g}]", remedy, "out-of-range")
        return None
    return number


def _number(value: object) -> float | None:
    if isinstance(value, str):
        return float(value) if _DECIMAL.fullmatch(value.strip()) else None
    if type(value) is int:
        return float(max(-9, min(value, 9)))  # one of a thousand digits has no float; beyond the scale is beyond it
    return value if type(value) is float else None


def parse_inference(row: Mapping[str, Any], place: Place) -> InferencePair | None:
    """Read ``{"premise": ..., "hypothesis": ..., "label": "entailment"}``, the label one of `RELATIONS`."""
    premise = text_field(row, "premise", place)
    hypothesis = text_field(row, "hypothesis", place)
    label = choice_of(row, "label", RELATIONS, place)
    if premise is None or hypothesis is None or label is None:
        return None
    return InferencePair(premise, hypothesis, label)


def parse_choices(row: Mapping[str, Any], place: Place) -> ChoiceQuestion | None:
    """Read a question with several answers, in one of the forms that are published.

    - ``{"context": ..., "choices": [...], "label": 0}``: the label counts from 0 (KoBEST HellaSwag, and our own).
    - ``{"premise": ..., "question": "결과", "choice1": ..., "choice2": ..., "label": 1}``: the label counts from 1
      (KoBEST COPA). The premise goes on with `CONNECTORS`, or cause and effect would be asked alike.
    - ``{"question": ..., "A": ..., "B": ..., "C": ..., "D": ..., "answer": 1}``: the answer counts from 1, or is its
      letter (KMMLU).
    """
    if "premise" in row:
        premise = text_field(row, "premise", place)
        asked = choice_of(row, "question", tuple(CONNECTORS), place)
        context = None if premise is None or asked is None else f"{premise} {CONNECTORS[asked]}"
        answers = [text_field(row, field, place) for field in ("choice1", "choice2")]
        answer = _position(row, "label", len(answers), place, first=1)
    elif "choices" in row:
        context = text_field(row, "context", place)
        answers = _listed(row["choices"], place)
        answer = _position(row, "label", len(answers), place, first=0)
    else:
        context = text_field(row, "question", place)
        answers = [text_field(row, field, place) for field in LETTERS if field in row]
        if len(answers) < 2:
            place.refuse("choices", "missing", f'add "choices", a list, to the row, {SKIP}', "missing-field")
            return None
        answer = _position(row, "answer", len(answers), place, first=1)
    texts = tuple(text for text in answers if text is not None)
    if len(set(texts)) < len(texts):
        place.refuse("choices", "two of them are equal", f"change one of them, {SKIP}", "identical-sides")
    if context is None or answer is None or place.problems:
        return None
    return ChoiceQuestion(context, texts, answer)


def _listed(value: object, place: Place) -> list[str | None]:
    remedy = f'write "choices": ["one", "another"], {SKIP}'
    if not isinstance(value, list):
        place.refuse("choices", f"expected a list, got {describe(value)}", remedy, "wrong-type")
        return []
    if len(value) < 2:
        place.refuse("choices", f"{len(value)} in the list, at least 2 are needed", remedy, "too-few-choices")
    return [clean_text(item, f"choices[{number}]", place) for number, item in enumerate(value)]


def _position(row: Mapping[str, Any], field: str, count: int, place: Place, *, first: int) -> int | None:
    """Return which choice is right, counted from 0; the row counts from `first`, or names it by its letter."""
    if field not in row:
        place.refuse(field, "missing", f'add "{field}" to the row, {SKIP}', "missing-field")
        return None
    value = row[field]
    if isinstance(value, str) and value in LETTERS[:count]:
        return LETTERS.index(value)
    if type(value) is int and first <= value < first + count:
        return value - first
    what = f"{describe(value)} is not the number of one of {count} choices"
    place.refuse(field, what, f"write a number from {first} to {first + count - 1}, {SKIP}", "out-of-range")
    return None


def parse_knowledge(row: RawRow, place: Place) -> KnowledgeRow | None:
    """Read ``{"id": ..., "category": ..., "query": ..., "knowledge": ...}``, all that training needs.

    ``answer``, ``paraphrases`` (two or three) and ``facts`` may stand beside them; null is as good as absent.
    """
    name = id_of(row, ("id",), place)
    category, query, knowledge = (text_field(row, field, place) for field in ("category", "query", "knowledge"))
    answer = None if row.get("answer") is None else clean_text(row["answer"], "answer", place)
    paraphrases = _texts_of(row, "paraphrases", place)
    if len(paraphrases) not in (0, 2, 3):
        what = f"{len(paraphrases)} in the list; the first validates, the others test"
        place.refuse("paraphrases", what, f"write two or three, or leave the field out, {SKIP}", "paraphrase-count")
    facts = _texts_of(row, "facts", place)
    for number, fact in enumerate(facts):
        if not all(spelling.strip() for spelling in fact.split("|")):
            what = f"{show(fact)} has an empty spelling, which every text contains"
            place.refuse(f"facts[{number}]", what, f'write "1434|1434년", {SKIP}', "empty-spelling")
    if answer is not None and facts and not any(holds_fact(answer, fact) for fact in facts):
        what = f"holds none of the facts {', '.join(facts)}"
        place.refuse("answer", what, f"write the facts as the answer spells them, {SKIP}", "answer-without-fact")
    if name is None or category is None or query is None or knowledge is None or place.problems:
        return None
    return KnowledgeRow(name, category, query, knowledge, answer, paraphrases, facts)


def holds_fact(text: str, fact: str) -> bool:
    """Tell whether a text contains one of the spellings of a fact, to the letter.

    >>> holds_fact("It was built in 1434.", "1434|1434년")
    True
    """
    return any(spelling.strip() in text for spelling in fact.split("|"))


def parse_question(row: RawRow, place: Place) -> Question | None:
    """Read ``{"id": ..., "query": ..., "language": "ko"}``."""
    name = id_of(row, ("id",), place)
    query = text_field(row, "query", place)
    language = choice_of(row, "language", ("ko", "en"), place)
    return None if name is None or query is None or language is None else Question(name, query, language)


def _texts_of(row: RawRow, field: str, place: Place) -> tuple[str, ...]:
    value = row.get(field)
    if value is None:
        return ()
    if not isinstance(value, list):
        remedy = f'write "{field}": ["one", "another"], {SKIP}'
        place.refuse(field, f"expected a list, got {describe(value)}", remedy, "wrong-type")
        return ()
    texts = [clean_text(item, f"{field}[{number}]", place) for number, item in enumerate(value)]
    return tuple(text for text in texts if text is not None)


def mostly_hangul(text: str) -> bool:
    """Tell whether more than half of the letters of `text` are Hangul."""
    if text.isascii() or HANGUL.search(text) is None:
        return False
    return 2 * len(HANGUL.findall(text)) > sum(character.isalpha() for character in text)


def _check_sides(ko: str | None, en: str | None, place: Place) -> None:
    if ko is not None and en is not None:
        if ko == en:
            what = "identical to ko, so there is no translation"
            place.refuse("en", what, f"translate one side, {SKIP}", "identical-sides")
            return
        if HANGUL.search(ko) is None and mostly_hangul(en):
            what = "the languages look swapped: ko holds no Hangul and en does"
            place.refuse("ko", what, f"exchange the two columns, {SKIP}", "swapped-languages")
            return
    if ko is not None:
        _require_hangul(ko, "ko", place)
    if en is not None:
        _refuse_hangul(en, "en", place)


def _require_hangul(text: str, field: str, place: Place) -> None:
    if HANGUL.search(text) is None:
        place.refuse(field, f"no Hangul in {show(text)}", f"write Korean in {field}, {SKIP}", "no-hangul")


def _refuse_hangul(text: str, field: str, place: Place) -> None:
    if mostly_hangul(text):
        place.refuse(field, f"mostly Hangul: {show(text)}", f"write English in {field}, {SKIP}", "mostly-hangul")


TERMS = Kind("terms", parse_terms, ("jsonl",), telling=frozenset({"terms"}))
PAIRS = Kind("pairs", parse_pair, ("jsonl", "tsv"), ("ko", "en"), telling=frozenset({"ko", "en"}))
QUERY_PAIRS = Kind("query_pairs", parse_query_pair, ("jsonl", "tsv"), ("ko", "en"))
TRIPLETS = Kind(
    "triplets",
    parse_triplet,
    ("jsonl", "tsv"),
    ("query", "positive", "negative", "pair_type", "difficulty"),
    telling=frozenset({"query", "positive"}),
)
DOCUMENTS = Kind("documents", parse_document, ("jsonl", "tsv", "txt"), ("id", "text"))
PASSAGES = Kind(
    "passages",
    parse_passage,
    ("jsonl", "tsv"),
    ("id", "domain", "ko", "en", "query_ko", "query_en"),
    telling=frozenset({"query_ko", "query_en"}),
)
JUDGEMENTS = Kind("judgements", parse_judgement, ("tsv",), ("query-id", "corpus-id", "score"))
SIMILARITY = Kind("similarity", parse_similarity, ("jsonl", "tsv"), ("sentence1", "sentence2", "score"), headed=True)
INFERENCE = Kind("inference", parse_inference, ("jsonl", "tsv"), ("premise", "hypothesis", "label"), headed=True)
CHOICES = Kind("choices", parse_choices, ("jsonl",))
KNOWLEDGE = Kind("knowledge", parse_knowledge, ("jsonl", "json"))
QUESTIONS = Kind("questions", parse_question, ("jsonl",))

_TO_LEARN = (TERMS, PASSAGES, KNOWLEDGE, TRIPLETS, PAIRS, QUERY_PAIRS, DOCUMENTS)
_TO_MEASURE = (JUDGEMENTS, SIMILARITY, INFERENCE, CHOICES, QUESTIONS)
KINDS: Mapping[str, Kind[Any]] = {kind.name: kind for kind in (*_TO_LEARN, *_TO_MEASURE)}
"""Every kind by its name. A passage has the fields of a pair too, so it is told first."""
