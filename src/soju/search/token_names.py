"""How is a term called where dots, blanks or control characters are refused? Percent-encoding with an exact inverse."""

from __future__ import annotations

import re

from soju.core.errors import UserError

_EMPTY = "%"
_UNSAFE = re.compile(r"[%.\s\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_ESCAPED = re.compile(r"(?:%[0-9A-F]{2})+")


def escape_token(name: str) -> str:
    """Return a name the engines take: ``%``, ``.``, white space and control characters become ``%`` and hex digits.

    OpenSearch and Elasticsearch refuse dots and empty names, Anserini cuts at white space. Two digits a UTF-8 byte, as
    in URLs. The empty name becomes a lone ``%``, which nothing else turns into.

    >>> escape_token("3.5%")
    '3%2E5%25'
    """
    return _UNSAFE.sub(lambda match: _bytes(match[0]), name) or _EMPTY


def unescape_token(token: str) -> str:
    """Return the name `escape_token` was given.

    Args:
        token: Result of `escape_token`.

    Returns:
        The name.

    Raises:
        UserError: If `token` is not a result of `escape_token`.
    """
    try:
        name = "" if token == _EMPTY else _ESCAPED.sub(lambda match: _text(match[0]), token)
    except UnicodeDecodeError:
        name = None
    if name is None or escape_token(name) != token:
        raise UserError(f"{token!r} is no escaped token; only what escape_token returns can be read back")
    return name


def _bytes(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogatepass"))


def _text(escaped: str) -> str:
    return bytes.fromhex(escaped.replace("%", "")).decode("utf-8", "surrogatepass")


def token_names(terms: tuple[str, ...], pieces: tuple[str, ...]) -> tuple[str, ...]:
    """Name the V terms of a model for an engine: readable where no two are alike, else as the tokenizer spells them.

    Args:
        terms: Readable names, ``V``, perhaps not unique.
        pieces: The tokenizer's spelling, ``V``, unique.

    Returns:
        V escaped, unique names.

    Raises:
        UserError: If the pieces are not unique either.
    """
    for names in (terms, pieces):
        if len(set(names)) == len(names):
            return tuple(escape_token(name) for name in names)
    raise UserError("two pieces of the tokenizer are spelled alike, so their weights would be mixed; rename one")
