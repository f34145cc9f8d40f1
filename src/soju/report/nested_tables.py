"""How is a nested dictionary laid out as flat tables?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Block:
    """One flat table under a heading."""

    heading: str
    header: tuple[str, ...]
    """Column names; empty for a table of names and values."""
    rows: tuple[tuple[str, ...], ...]


def lay_out(value: Mapping[str, Any], *, heading: str = "") -> list[Block]:
    """Turn a nested dictionary into tables: plain values first, then one table a nested group.

    >>> lay_out({"pairs": 1200, "by_domain": {"news": {"rows": 3}, "law": {"rows": 5}}})[1].rows
    (('news', '3'), ('law', '5'))
    """
    blocks = []
    plain = [(_name(key), _text(key, item)) for key, item in value.items() if _is_plain(item)]
    if plain:
        blocks.append(Block(heading=heading, header=(), rows=tuple(plain)))
    for key, item in value.items():
        if _is_plain(item):
            continue
        inner = f"{heading} › {_name(key)}" if heading else _name(key)
        if isinstance(item, Mapping):
            blocks += _grid(inner, item) or lay_out(item, heading=inner)
        else:
            blocks += _list(inner, item)
    return blocks


def _list(heading: str, items: Sequence[Any]) -> list[Block]:
    if all(_is_flat(item) for item in items):
        columns = list(dict.fromkeys(key for item in items for key in item))
        rows = tuple(tuple(_text(key, item.get(key, "")) for key in columns) for item in items)
        return [Block(heading=heading, header=tuple(_name(key) for key in columns), rows=rows)]
    rows = tuple((str(index), json.dumps(item, ensure_ascii=False)) for index, item in enumerate(items, start=1))
    return [Block(heading=heading, header=(), rows=rows)]


def _grid(heading: str, value: Mapping[str, Any]) -> list[Block]:
    if len(value) < 2 or not all(_is_flat(item) for item in value.values()):
        return []
    columns = list(dict.fromkeys(key for item in value.values() for key in item))
    shared = sum(len(item) for item in value.values())
    if not columns or shared * 2 <= len(columns) * len(value):
        return []
    rows = tuple((_name(name), *(_text(key, item.get(key, "")) for key in columns)) for name, item in value.items())
    return [Block(heading=heading, header=("", *(_name(key) for key in columns)), rows=rows)]


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return not value
    if isinstance(value, list):
        return all(item is None or isinstance(item, str | int | float) for item in value)
    return True


def _is_flat(value: Any) -> bool:
    return isinstance(value, Mapping) and all(_is_plain(item) for item in value.values())


def _name(key: str) -> str:
    return str(key).replace("_", " ")


def _text(key: str, value: Any) -> str:
    if value is None or value == [] or value == {}:
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        joiner = " " if key == "arguments" else ", "
        return joiner.join(_text(key, item) for item in value)
    if isinstance(value, int):
        return str(value) if "seed" in key else f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return str(value)
