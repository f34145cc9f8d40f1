"""What reading kept and what it refused: the log, the place of a row, and the checks of a row's values."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from soju.core.errors import DataError, Problem

OnError = Literal["stop", "skip"]

MAX_PROBLEMS = 1000
"""Problems kept in full; later ones are only counted, so that a log stays small whatever is read."""

SKIP = "drop the row or set data.on_error: skip"
"""The last resort in the remedy of every refused row."""


def printable(text: str) -> str:
    """Return `text` with bytes and characters that no terminal or file can take written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class Place:
    """Where the row that is being read stands, and what is wrong with it so far."""

    __slots__ = ("file", "line", "normalised", "problems")

    def __init__(self, file: str, line: int = 0) -> None:
        self.file = file
        self.line = line
        self.normalised = False
        self.problems: list[Problem] = []

    def refuse(self, field: str, what: str, remedy: str, reason: str) -> None:
        """Add one problem of the present row."""
        self.problems.append(Problem(self.file, self.line, field, printable(what), printable(remedy), reason))


@dataclass(slots=True)
class SourceCounts:
    """Lines of one source by what became of them."""

    kept: int = 0
    """Rows handed out."""
    refused: int = 0
    """Rows with at least one problem."""
    normalised: int = 0
    """Kept rows in which a text was not in Unicode NFC and was brought to it."""
    blank: int = 0
    """Lines with nothing but white space; passed over."""
    deselected: int = 0
    """Lines a `SourceFilter` left out; not parsed."""


@dataclass(slots=True)
class ReadLog:
    """Counts and problems of one reading, in bounded memory. One log may serve several readings."""

    sources: dict[str, SourceCounts] = field(default_factory=dict)
    """Counts by file, sample or hub data set, in the order they were opened."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Problems by reason. A row with two problems counts twice here and once in `SourceCounts.refused`."""
    selected: Counter[str] = field(default_factory=Counter)
    """Lines a `SourceFilter` let through, by source; refused rows are among them."""
    problems: list[Problem] = field(default_factory=list)
    """The first `MAX_PROBLEMS` problems, of files and of rows."""
    file_problems: list[Problem] = field(default_factory=list)
    """Those that concern a whole file; ``on_error: skip`` does not pass over them."""

    def source(self, name: str) -> SourceCounts:
        """Return the counts of one source, made on first use."""
        return self.sources.setdefault(name, SourceCounts())

    def refuse_row(self, problems: Iterable[Problem]) -> None:
        """Record why one row was refused."""
        for problem in problems:
            self.reasons[problem.reason] += 1
            if len(self.problems) < MAX_PROBLEMS:
                self.problems.append(problem)

    def refuse_file(self, file: str, line: int, what: str, remedy: str, reason: str) -> None:
        """Record why a file could not be read (line 0) or not be read further (the line where it broke)."""
        problem = Problem(printable(file), line, "", printable(what), printable(remedy), reason)
        self.refuse_row([problem])
        if len(self.file_problems) < MAX_PROBLEMS:
            self.file_problems.append(problem)

    @property
    def kept(self) -> int:
        """Rows handed out by all sources."""
        return sum(counts.kept for counts in self.sources.values())

    @property
    def refused(self) -> int:
        """Rows refused in all sources."""
        return sum(counts.refused for counts in self.sources.values())

    @property
    def normalised(self) -> int:
        """Kept rows that were brought to Unicode NFC."""
        return sum(counts.normalised for counts in self.sources.values())

    def raise_if_broken(self, on_error: OnError = "stop") -> None:
        """Stop the run when what was read cannot be trained on.

        Args:
            on_error: ``stop`` refuses any problem. ``skip`` accepts refused rows, but neither a problem of a whole file
                (missing, truncated, wrong encoding ...) nor a reading that kept no row.

        Raises:
            DataError: With the problems, the first 20 shown, and their count.
        """
        total = self.reasons.total()
        if total and (on_error == "stop" or self.kept == 0):
            raise DataError(self.problems, count=total)
        if self.file_problems:
            raise DataError(self.file_problems)

    def to_json(self) -> dict[str, Any]:
        """Return all counts, in rows except ``reasons`` (problems), for ``data.json``."""
        return {
            "kept": self.kept,
            "refused": self.refused,
            "normalised": self.normalised,
            "reasons": dict(self.reasons.most_common()),
            "sources": {printable(name): asdict(counts) for name, counts in self.sources.items()},
        }


HANGUL = re.compile("[\u1100-\u11ff\u3130-\u318f\ua960-\ua97f\uac00-\ud7a3\ud7b0-\ud7ff]")
"""The characters `soju.core.language.is_hangul` accepts."""

_UNUSABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_INVISIBLE = " \t\r\n\u00ad\u200b\u200c\u200d\u2060\u3164\ufeff"
_SHOWN_CHARACTERS = 40

_JSON_TYPES = {
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


def show(value: object) -> str:
    """Return a short form of `value` that is safe to print."""
    text = repr(value[: _SHOWN_CHARACTERS + 1] if isinstance(value, str) else value)
    return text if len(text) <= _SHOWN_CHARACTERS + 2 else text[:_SHOWN_CHARACTERS] + "..."


def describe(value: object) -> str:
    """Return the JSON name of the type of `value` with its article, and a plain value itself."""
    name = "null" if value is None else _JSON_TYPES.get(type(value), type(value).__name__)
    return f"{name} {show(value)}" if isinstance(value, str | int | float) else name


def text_field(row: Mapping[str, Any], field: str, place: Place) -> str | None:
    """Return ``row[field]`` as a clean text; see `clean_text`."""
    if field not in row:
        place.refuse(field, "missing", f'add "{field}" to the row, {SKIP}', "missing-field")
        return None
    return clean_text(row[field], field, place)


def clean_text(value: object, field: str, place: Place) -> str | None:
    """Return a text without white space at its ends and in Unicode NFC.

    Args:
        value: What the file holds.
        field: Its name in problems.
        place: Gets ``wrong-type``, ``empty``, ``nul-byte``, ``lone-surrogate`` or ``control-character``, and is marked
            as normalised when NFC changed the text. Tabs and line ends inside a text are allowed.

    Returns:
        The text, or ``None`` when a problem was added.
    """
    if type(value) is not str:
        remedy = f"write it as a JSON string in double quotes, {SKIP}"
        place.refuse(field, f"expected a string, got {describe(value)}", remedy, "wrong-type")
        return None
    text = value.strip()
    if not text or (text[0] in _INVISIBLE and not text.strip(_INVISIBLE)):
        what = "empty" if not value else "nothing but white space"
        place.refuse(field, what, f"write the text, {SKIP}", "empty")
        return None
    # isprintable is much faster than the pattern and true for nearly every text.
    unusable = None if text.isprintable() else _UNUSABLE.search(text)
    if unusable:
        _refuse_character(unusable, field, place)
        return None
    if not unicodedata.is_normalized("NFC", text):
        place.normalised = True
        return unicodedata.normalize("NFC", text)
    return text


def _refuse_character(match: re.Match[str], field: str, place: Place) -> None:
    code = ord(match.group())
    where = f"at character {match.start() + 1}"
    if code == 0:
        remedy = f"remove the NUL, {SKIP}"
        place.refuse(field, f"NUL (U+0000) {where}", remedy, "nul-byte")
    elif 0xD800 <= code <= 0xDFFF:
        what = f"lone surrogate U+{code:04X} {where}, half of a character that was cut in two"
        place.refuse(field, what, f"write the whole character, {SKIP}", "lone-surrogate")
    else:
        remedy = f"remove the character, {SKIP}"
        place.refuse(field, f"control character U+{code:04X} {where}", remedy, "control-character")


def similarity_of(value: object, field: str, place: Place) -> float | None:
    """Return a similarity, unitless, in (0, 1]; booleans, strings, NaN and infinities are refused."""
    remedy = f"write a number above 0 and at most 1, {SKIP}"
    if type(value) is not int and type(value) is not float:
        place.refuse(field, f"expected a number, got {describe(value)}", remedy, "wrong-type")
        return None
    assert isinstance(value, int | float)
    if isinstance(value, float) and not math.isfinite(value):
        place.refuse(field, f"{value} is not a finite number", remedy, "not-finite")
        return None
    if not 0 < value <= 1:
        shown = show(value) if isinstance(value, float) or abs(value) < 10**20 else "a huge number"
        place.refuse(field, f"{shown} is outside (0, 1]", remedy, "out-of-range")
        return None
    return float(value)


def score_of(row: Mapping[str, Any], field: str, place: Place) -> float | None:
    """Return ``row[field]`` when it is there: any finite number."""
    value = row.get(field)
    if value is None:
        return None
    if type(value) is not int and type(value) is not float:
        place.refuse(field, f"expected a number, got {describe(value)}", f"write a number, {SKIP}", "wrong-type")
        return None
    if isinstance(value, float) and not math.isfinite(value):
        place.refuse(field, f"{value} is not a finite number", f"write a number, {SKIP}", "not-finite")
        return None
    if isinstance(value, int) and abs(value) > 10**30:
        place.refuse(field, "a huge number", f"write a number, {SKIP}", "out-of-range")
        return None
    return float(value)


def id_of(row: Mapping[str, Any], names: tuple[str, ...], place: Place) -> str | None:
    """Return the id under the first of `names` that is there; a whole number becomes its digits."""
    for name in names:
        if name in row:
            value = row[name]
            if type(value) is int:
                value = f"{value:d}" if abs(value) < 10**40 else value
            return clean_text(value, name, place)
    place.refuse(names[0], "missing", f'add "{names[0]}" to the row, {SKIP}', "missing-field")
    return None


def choice_of(row: Mapping[str, Any], field: str, choices: tuple[str, ...], place: Place) -> str | None:
    """Return ``row[field]`` when it is one of `choices`."""
    text = text_field(row, field, place)
    if text is not None and text not in choices:
        known = ", ".join(choices)
        place.refuse(field, f"{show(text)} is not known", f"write one of {known}, or {SKIP}", "unknown-value")
        return None
    return text
