"""One line of a .jsonl, .tsv or .txt file becomes one raw object: names and values, not yet checked."""

from __future__ import annotations

import json
from typing import Any, Literal

from soju.data.fields import describe, show
from soju.data.log import SKIP, Place
from soju.data.rows import COLUMNS, Kind
from soju.data.similarity_pairs import HEADED, header_columns

Format = Literal["jsonl", "tsv", "txt"]

ENDINGS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".json-lines": "jsonl",
    ".ndjson": "jsonl",
    ".tsv": "tsv",
    ".txt": "txt",
}
"""File endings by format; each may be followed by ``.gz``."""

FORMATS: dict[Kind, tuple[Format, ...]] = {
    "terms": ("jsonl",),
    "pairs": ("jsonl", "tsv"),
    "query_pairs": ("jsonl", "tsv"),
    "triplets": ("jsonl", "tsv"),
    "documents": ("jsonl", "tsv", "txt"),
    "passages": ("jsonl", "tsv"),
    "judgements": ("tsv",),
    "similarity": ("jsonl", "tsv"),
    "inference": ("jsonl", "tsv"),
    "choices": ("jsonl",),
}
"""What each kind of row may be stored as."""


class _DuplicateKeyError(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKeyError(next(key for key in value if keys.count(key) > 1))
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def parse_json(text: str, place: Place) -> dict[str, Any] | None:
    """Read one JSON object.

    ``NaN`` and ``Infinity`` are read as Python does and refused where they are used.

    Args:
        text: One line.
        place: Gets ``not-json``, ``not-an-object`` or ``duplicate-key``.

    Returns:
        The object, or ``None`` when a problem was added.
    """
    try:
        value = _DECODER.decode(text)
    except _DuplicateKeyError as error:
        key = str(error)
        place.refuse("", f"the key {show(key)} stands twice", f"keep one of them, {SKIP}", "duplicate-key")
        return None
    except json.JSONDecodeError as error:
        what = f"not JSON: {error.msg} at character {error.pos + 1}"
        place.refuse("", what, f"write one JSON object a line, {SKIP}", "not-json")
        return None
    except (ValueError, RecursionError):
        what = "not usable JSON: nested too deeply or a number with too many digits"
        place.refuse("", what, f"write one flat JSON object a line, {SKIP}", "not-json")
        return None
    if not isinstance(value, dict):
        remedy = f'write one object a line, as {{"ko": ...}}, {SKIP}'
        place.refuse("", f"expected a JSON object, got {describe(value)}", remedy, "not-an-object")
        return None
    return value


def header_of(text: str, kind: Kind) -> tuple[str, ...] | None:
    """Return the columns in their order when the first line of a TSV file names exactly the columns of `kind`.

    Kinds of `soju.data.similarity_pairs.HEADED` may have more columns.
    """
    if kind in HEADED:
        found = header_columns(text, kind)
        return found if isinstance(found, tuple) else None
    names = tuple(name.strip().lower() for name in text.split("\t"))
    return names if sorted(names) == sorted(COLUMNS[kind]) else None


def parse_tsv(text: str, columns: tuple[str, ...], place: Place) -> dict[str, str] | None:
    """Read one line of tab-separated columns, without any quoting.

    Args:
        text: One line.
        columns: Their names in order.
        place: Gets ``wrong-columns``.

    Returns:
        The values by name, or ``None`` when a problem was added.
    """
    values = text.split("\t")
    if len(values) != len(columns):
        what = f"{len(values)} column{'s' if len(values) != 1 else ''} instead of {len(columns)}"
        remedy = f"write {'<TAB>'.join(columns)} without tabs inside a text, {SKIP}"
        place.refuse("", what, remedy, "wrong-columns")
        return None
    return dict(zip(columns, values, strict=True))
