"""How is a label drawn when the installed fonts lack its glyphs?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from matplotlib import font_manager

from soju.core.language import is_hangul

_LATIN = "DejaVu Sans"  # ships inside matplotlib
_KOREAN = (
    "Pretendard",
    "Noto Sans KR",
    "Noto Sans CJK KR",
    "Noto Sans CJK JP",  # a .ttc is known by its first face; that face holds Hangul too
    "Source Han Sans KR",
    "Source Han Sans K",
    "Apple SD Gothic Neo",
    "AppleGothic",
    "Malgun Gothic",
    "NanumGothic",
    "NanumBarunGothic",
    "Spoqa Han Sans Neo",
    "UnDotum",
    "Baekmuk Dotum",
)
# The place in the list is the place in the syllable block; "-" is silent.
_INITIALS = "g kk n d tt r m b pp s ss - j jj ch k t p h"
_VOWELS = "a ae ya yae eo e yeo ye o wa wae oe yo u wo we wi yu eu ui i"
_FINALS = "- k k k n n n t l k m l l l p l m p p t t ng t t k t p t"


@dataclass(frozen=True, slots=True)
class Fonts:
    """Font families to draw with, in order, and their files."""

    families: tuple[str, ...]
    files: tuple[str, ...]

    def has(self, character: str) -> bool:
        """Tell whether one of the fonts can draw a character."""
        return any(font_manager.get_font(file).get_char_index(ord(character)) for file in self.files)

    def readable(self, text: str, *, longest: int = 34) -> str:
        """Return a text that these fonts can draw, cut to what fits beside a plot.

        Args:
            text: Any text. Where glyphs are missing, Hangul is romanised and other characters are ``?``.
            longest: Characters after which it is cut.

        Returns:
            One line that draws without a warning.
        """
        text = " ".join(text.split())
        drawn = "".join(c if self.has(c) else romanise(c) if is_hangul(c) else "?" for c in text)
        if len(drawn) > longest:
            drawn = drawn[: longest - 1].rstrip() + "…"
        return f" {drawn}" if drawn.startswith("_") else drawn  # matplotlib hides labels that start with "_"

    def replaces(self, texts: Iterable[str]) -> bool:
        """Tell whether any of the texts is drawn otherwise than written."""
        return any(not self.has(c) for text in texts for c in text if not c.isspace())


@lru_cache(maxsize=1)
def find_fonts() -> Fonts:
    """Find a Korean font among the installed ones; matplotlib's own font always comes first."""
    installed = {entry.name: entry.fname for entry in font_manager.fontManager.ttflist}
    latin = font_manager.findfont(_LATIN)
    for family in _KOREAN:
        file = installed.get(family)
        if file and Path(file).is_file() and font_manager.get_font(file).get_char_index(ord("가")):
            return Fonts((_LATIN, family), (latin, file))
    return Fonts((_LATIN,), (latin,))


def romanise(syllable: str) -> str:
    """Write one Hangul syllable in Latin letters, without sound changes between syllables; a lone jamo is ``?``.

    >>> "".join(romanise(c) for c in "한국")
    'hanguk'

    References:
        Revised Romanization of Korean, Ministry of Culture and Tourism 2000-8.
    """
    index = ord(syllable) - 0xAC00
    if not 0 <= index < 11172:
        return "?"
    letters = _INITIALS.split()[index // 588] + _VOWELS.split()[index % 588 // 28] + _FINALS.split()[index % 28]
    return letters.replace("-", "")
