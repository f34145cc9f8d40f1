"""Which bytes occur in Hangul only? A merge that makes such a piece can change no text without Hangul."""

from __future__ import annotations

import re

_HANGUL_ONLY = re.compile(
    rb"[\xeb-\xed]"  # U+B000-U+D7FF: syllables and old jamo, the rest is unassigned
    rb"|\xea[\xb0-\xbf]"  # U+AC00-U+AFFF
    rb"|\xe1[\x84-\x87]"  # U+1100-U+11FF: jamo
    rb"|\xe3\x85"  # U+3140-U+317F: compatibility jamo; E3 84 and E3 86 are shared with other scripts
    rb"|\xe3\x84[\xb0-\xbf]|\xe3\x86[\x80-\x8f]|\xea\xa5[\xa0-\xbf]"  # whole characters of the shared ones
)
_UNFINISHED = re.compile(rb"(?: ?)(?:[\xeb-\xed][\x80-\xbf]|\xea[\xb0-\xbf]|\xe1[\x84-\x87]|\xe3\x85)")


def is_hangul_piece(piece: bytes) -> bool:
    """Tell whether a piece holds bytes that valid UTF-8 has in Hangul characters only.

    Every lead byte is followed by its own character in valid UTF-8, so a text with these bytes holds Hangul. The lead
    bytes EA, E1 and E3 alone are shared with Yi, Vai, Ethiopic, kana and others and do not count.

    >>> is_hangul_piece("한".encode()[:2]), is_hangul_piece("あ".encode())
    (True, False)
    """
    return _HANGUL_ONLY.search(piece) is not None


def is_unfinished_syllable(piece: bytes) -> bool:
    """Tell whether a piece is the first two bytes of one Hangul character, with or without a space before it."""
    return _UNFINISHED.fullmatch(piece) is not None


def starts_whole(piece: bytes) -> bool:
    """Tell whether a piece starts with a whole character and only its last one may be cut off."""
    try:
        piece.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return True
