"""How does a byte-level vocabulary spell bytes? GPT-2's alphabet: one printable character for each of the 256 bytes."""

from __future__ import annotations

from soju.core.errors import UserError


def _alphabet() -> str:
    """Return the character of each byte, in order of the bytes.

    Bytes that are printable in Latin-1 stand for themselves; the others take the characters from U+0100 on, in order.
    """
    shifted = iter(range(0x100, 0x200))
    return "".join(chr(byte) if _is_printable(byte) else chr(next(shifted)) for byte in range(256))


def _is_printable(byte: int) -> bool:
    return 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or 0xAE <= byte <= 0xFF


ALPHABET = _alphabet()
"""The character that stands for byte ``i`` is ``ALPHABET[i]``."""

_BYTES = {ord(character): byte for byte, character in enumerate(ALPHABET)}
_LATIN_1 = {byte: ord(character) for byte, character in enumerate(ALPHABET)}


def is_spelling(token: str) -> bool:
    """Tell whether every character of a token stands for a byte."""
    return all(ord(character) in _BYTES for character in token)


def token_bytes(token: str) -> bytes:
    """Return the bytes that a token of a byte-level vocabulary stands for.

    >>> token_bytes("Ġíķľ").decode()
    ' 한'

    Args:
        token: A token as the vocabulary spells it; never an added token, whose content is plain text.

    Returns:
        The bytes, perhaps only a part of a character.

    Raises:
        UserError: If a character stands for no byte.
    """
    try:
        return bytes(_BYTES[ord(character)] for character in token)
    except KeyError as error:
        character = chr(error.args[0])
        raise UserError(
            f"{token!r} is no byte-level token: {character!r} stands for no byte; give a byte-level BPE vocabulary"
        ) from None


def token_spelling(text: str | bytes) -> str:
    """Return how a byte-level vocabulary spells a text or bytes; the inverse of `token_bytes`.

    >>> token_spelling(" 한")
    'Ġíķľ'
    """
    raw = text.encode("utf-8") if isinstance(text, str) else text
    return raw.decode("latin-1").translate(_LATIN_1)


def token_text(token: str) -> str | None:
    """Return the text of a token, or ``None`` when its bytes are not whole characters or no bytes at all."""
    if not is_spelling(token):
        return None
    try:
        return token_bytes(token).decode("utf-8")
    except UnicodeDecodeError:
        return None
