"""How is foreign text put into Markdown so that it stays text?"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Literal

_SPECIAL = re.compile(r"([\\`*_\[\]|~#$])")
_LIST_START = re.compile(r"^(\s*)([-+>=]|\d+[.)])")


def escape(text: str) -> str:
    """Escape a text for one line of Markdown: no markup, no raw HTML, no new table cell."""
    flat = " ".join(text.split())
    flat = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    flat = _SPECIAL.sub(r"\\\1", flat)
    return _LIST_START.sub(lambda match: f"{match[1]}{match[2][:-1]}\\{match[2][-1]}", flat)


def code(text: str) -> str:
    """Write a text as inline code that is safe inside a table too."""
    flat = " ".join(text.split()).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", flat)), default=0))
    pad = " " if flat.startswith("`") or flat.endswith("`") else ""
    return f"{fence}{pad}{flat}{pad}{fence}"


def code_block(text: str, language: str = "") -> str:
    """Write a fenced block whose fence is longer than any inside it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{re.sub(r'[^A-Za-z0-9_+-]', '', language)}\n{text.rstrip()}\n{fence}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], align: str = "") -> str:
    """Write a table of cells that are Markdown already.

    Args:
        header: One text a column.
        rows: As many texts a row.
        align: ``l`` or ``r`` for each column; left when it is shorter.

    Returns:
        A GitHub-flavoured table.
    """
    sides: list[Literal["l", "r"]] = ["r" if side == "r" else "l" for side in align.ljust(len(header), "l")]
    rule = ["---:" if side == "r" else "---" for side in sides]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))
