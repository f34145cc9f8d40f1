"""Is one value of a row a clean text, a similarity, an id?"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from soju.data.log import SKIP, Place

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
