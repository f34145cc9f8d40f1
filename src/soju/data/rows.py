"""One raw object of a file becomes one typed row, or a list of what is wrong with it.

A row with any problem is refused whole. Every text of a row that is handed out is not empty, has no white space at its
ends, is in Unicode NFC, encodes as UTF-8, and holds no control character but tab and line ends.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from soju.data.fields import HANGUL, choice_of, clean_text, describe, id_of, score_of, show, similarity_of, text_field
from soju.data.log import SKIP, Place
from soju.data.records import (
    ChoiceQuestion,
    Document,
    InferencePair,
    Judgement,
    PairRow,
    PassageRow,
    SimilarityPair,
    Term,
    TermRow,
    TripletRow,
)
from soju.data.similarity_pairs import HeadedKind, parse_choices, parse_inference, parse_similarity

Kind = Literal["terms", "pairs", "query_pairs", "triplets", "documents", "passages", "judgements"] | HeadedKind
Row = (
    TermRow | PairRow | TripletRow | Document | PassageRow | Judgement | SimilarityPair | InferencePair | ChoiceQuestion
)
RawRow = Mapping[str, Any]

PAIR_TYPES = ("single_term", "monolingual", "cross_lingual")
DIFFICULTIES = ("easy", "medium", "hard")
_WHOLE_NUMBER = re.compile("[+-]?[0-9]{1,9}")

COLUMNS: dict[Kind, tuple[str, ...]] = {
    "pairs": ("ko", "en"),
    "query_pairs": ("ko", "en"),
    "triplets": ("query", "positive", "negative", "pair_type", "difficulty"),
    "documents": ("id", "text"),
    "passages": ("id", "domain", "ko", "en", "query_ko", "query_en"),
    "judgements": ("query-id", "corpus-id", "score"),
}
"""Columns of a TSV file without a header, by kind. Terms have no TSV form; others need a header, see
`soju.data.similarity_pairs.HEADED`."""


def parse_terms(row: RawRow, place: Place) -> TermRow | None:
    """Read ``{"ko": "프로그램", "terms": [{"term": "program", "sim": 0.95}, "software"]}``.

    A bare string is a term of similarity 1. Terms are ordered best first; equal ones keep their order. ``src``, a list
    of names, is kept as the row's sources; other keys are ignored.

    Args:
        row: The JSON object.
        place: Gets the problems.

    Returns:
        The row, or ``None`` when it was refused.
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
    """Read ``{"ko": ..., "en": ...}``. The Korean side needs one Hangul character, the English side more other letters.

    Args:
        row: The JSON object, or the columns of a TSV line by name.
        place: Gets the problems.

    Returns:
        The row, or ``None`` when it was refused.
    """
    ko = text_field(row, "ko", place)
    en = text_field(row, "en", place)
    _check_sides(ko, en, place)
    if ko is None or en is None or place.problems:
        return None
    return PairRow(ko, en)


def parse_query_pair(row: RawRow, place: Place) -> PairRow | None:
    """Read ``{"ko": ..., "en": ...}`` to search with: people also ask in Latin letters, the same on both sides.

    Args:
        row: The JSON object, or the columns of a TSV line by name.
        place: Gets the problems.

    Returns:
        The row, or ``None`` when it was refused.
    """
    ko = text_field(row, "ko", place)
    en = text_field(row, "en", place)
    if ko is not None and en is not None and HANGUL.search(ko) is None and mostly_hangul(en):
        what = "the languages look swapped: ko holds no Hangul and en does"
        place.refuse("ko", what, f"exchange the two columns, {SKIP}", "swapped-languages")
    return None if ko is None or en is None or place.problems else PairRow(ko, en)


def parse_triplet(row: RawRow, place: Place) -> TripletRow | None:
    """Read query, positive, negative, pair_type (`PAIR_TYPES`) and difficulty (`DIFFICULTIES`), all strings.

    A teacher's numbers positive_score and negative_score may stand beside them.

    Args:
        row: The JSON object, or the columns of a TSV line by name.
        place: Gets the problems; two equal texts among query, positive and negative are one.

    Returns:
        The row, or ``None`` when it was refused.
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

    Args:
        row: The JSON object, or the columns of a TSV line by name.
        place: Gets the problems.

    Returns:
        The document, or ``None`` when it was refused.
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

    Args:
        row: The JSON object, or the columns of a TSV line by name.
        place: Gets the problems.

    Returns:
        The row, or ``None`` when it was refused.
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
    """Read BEIR's query-id, corpus-id and score, a whole number: 1 or more is relevant, 0 or less is not.

    Args:
        row: The columns of a TSV line by name.
        place: Gets the problems.

    Returns:
        The judgement, or ``None`` when it was refused.
    """
    query = text_field(row, "query-id", place)
    document = text_field(row, "corpus-id", place)
    score = text_field(row, "score", place)
    if score is not None and _WHOLE_NUMBER.fullmatch(score) is None:
        what = f"{show(score)} is no whole number"
        place.refuse("score", what, f"write 1 or more for an answer, 0 for none, {SKIP}", "not-a-whole-number")
    if query is None or document is None or score is None or place.problems:
        return None
    return Judgement(query, document, int(score))


PARSERS: dict[Kind, Callable[[RawRow, Place], Row | None]] = {
    "terms": parse_terms,
    "pairs": parse_pair,
    "query_pairs": parse_query_pair,
    "triplets": parse_triplet,
    "documents": parse_document,
    "passages": parse_passage,
    "judgements": parse_judgement,
    "similarity": parse_similarity,
    "inference": parse_inference,
    "choices": parse_choices,
}


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
