"""Languages: which one a text is in, told by its script, and the process's one Korean morphological analyser."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Literal

from soju.core.errors import require_extra

if TYPE_CHECKING:
    from kiwipiepy import Kiwi


Language = Literal["ko", "en", "other"]

_HANGUL_RANGES = ((0xAC00, 0xD7A3), (0x1100, 0x11FF), (0x3130, 0x318F), (0xA960, 0xA97F), (0xD7B0, 0xD7FF))


def is_hangul(character: str) -> bool:
    """Tell whether one character is a Hangul syllable or jamo."""
    code = ord(character)
    return any(low <= code <= high for low, high in _HANGUL_RANGES)


def is_syllable(character: str) -> bool:
    """Tell whether one character is a composed Hangul syllable: what NFC and NFKC leave of ordinary Korean text."""
    return "가" <= character <= "힣"


def is_latin(character: str) -> bool:
    """Tell whether one character is a letter of the Latin script, accented ones included."""
    return character.isalpha() and ord(character) < 0x0250


def language_of(text: str) -> Language:
    """Return ``ko`` if the text holds Hangul, else ``en`` if it holds a Latin letter, else ``other``."""
    if any(is_hangul(character) for character in text):
        return "ko"
    if any(is_latin(character) for character in text):
        return "en"
    return "other"


_kiwis: dict[int, Kiwi] = {}
_lock = threading.Lock()


def shared_kiwi(workers: int = 1) -> Kiwi:
    """Return the process's Kiwi with this many threads, made at first use (about 2 seconds, 0.5 GB).

    It may be called from several threads.
    """
    with _lock:
        if workers not in _kiwis:
            require_extra("Korean morphological analysis", "train", "kiwipiepy")
            from kiwipiepy import Kiwi

            _kiwis[workers] = Kiwi(num_workers=workers)
        return _kiwis[workers]
