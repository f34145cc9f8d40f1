"""Rows that say how alike two texts are: scored pairs, pairs with a relation, questions with several answers.

The files that are published name and order their columns each in its own way, so a TSV file of these kinds needs a
header; columns that are not needed are passed over.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from soju.data.fields import choice_of, clean_text, describe, text_field
from soju.data.log import SKIP, Place
from soju.data.records import ChoiceQuestion, InferencePair, SimilarityPair

__all__ = ["HEADED", "ChoiceQuestion", "InferencePair", "SimilarityPair", "header_columns"]

HIGHEST = 5.0
"""Similarity of two texts that mean the same, on the scale of the STS tasks; 0 is no relation at all."""
RELATIONS = ("entailment", "neutral", "contradiction")
CONNECTORS = {"결과": "그래서", "원인": "왜냐하면"}
"""How a sentence goes on with its effect (결과) or its cause (원인)."""
_DECIMAL = re.compile("[-+]?([0-9]+[.]?[0-9]*|[.][0-9]+)(e[-+]?[0-9]+)?", re.IGNORECASE | re.ASCII)
LETTERS = ("A", "B", "C", "D", "E")

HeadedKind = Literal["similarity", "inference", "choices"]
HEADED: dict[str, tuple[str, ...]] = {
    "similarity": ("sentence1", "sentence2", "score"),
    "inference": ("premise", "hypothesis", "label"),
    "choices": (),
}
"""Columns that the header of a TSV file must name, in any order; ``choices`` have no TSV form."""


def header_columns(text: str, kind: str) -> tuple[str, ...] | list[str]:
    """Read the header of a TSV file.

    Args:
        text: Its first line.
        kind: A kind in `HEADED`.

    Returns:
        The columns in their order as a tuple, or a list of the needed ones that are not named.
    """
    names = tuple(name.strip().lower() for name in text.split("\t"))
    missing = [name for name in HEADED[kind] if names.count(name) != 1]
    return missing or names


def parse_similarity(row: Mapping[str, Any], place: Place) -> SimilarityPair | None:
    """Read ``{"sentence1": ..., "sentence2": ..., "score": 3.8}``, the score from 0 to `HIGHEST`.

    Args:
        row: The JSON object, or the columns of a TSV line by name, in which the score is text.
        place: Gets the problems.

    Returns:
        The pair, or ``None`` when it was refused. The two texts may be equal.
    """
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
    """Read ``{"premise": ..., "hypothesis": ..., "label": "entailment"}``, the label one of `RELATIONS`.

    Args:
        row: The JSON object, or the columns of a TSV line by name.
        place: Gets the problems.

    Returns:
        The pair, or ``None`` when it was refused.
    """
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

    Args:
        row: The JSON object.
        place: Gets the problems.

    Returns:
        The question, or ``None`` when it was refused.
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
