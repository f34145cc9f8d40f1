"""What a morphological analyser sees in Korean text: stretches of it, each with the dictionary words it stands for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from soju.core.korean import shared_kiwi
from soju.core.language import is_hangul

_CONTENT = frozenset({"NNG", "NNP", "NR", "VV", "VA", "MM", "MAG", "MAJ", "XR", "XPN"})
_PREDICATES = frozenset({"VV", "VA"})


@dataclass(frozen=True, slots=True)
class Stretch:
    """A piece of text that morphemes cannot be split further: contracted syllables (``했`` = 하 + 았) stay together."""

    start: int
    end: int
    words: tuple[str, ...]
    """Dictionary forms of the content words in it; empty for particles, endings and punctuation."""


def analyse(texts: Iterable[str], *, workers: int = 2) -> Iterator[list[Stretch]]:
    """Split each text into stretches, in order, lazily.

    Args:
        texts: NFC Korean text; offsets count its characters.
        workers: Threads of the analyser.

    Yields:
        The stretches of one text, in order.
    """
    for tokens in shared_kiwi(workers).tokenize(texts):
        yield _stretches(tokens)


def _stretches(tokens: Sequence[Any]) -> list[Stretch]:
    found: list[Stretch] = []
    for token in tokens:
        start, end, words = token.start, token.start + token.len, _content_words(token)
        if found and start < found[-1].end:
            last = found.pop()
            start, end, words = last.start, max(last.end, end), last.words + words
        if start < end:  # an elided copula has no text: 사과다 = 사과 + (이) + 다
            found.append(Stretch(start, end, words))
    return found


def _content_words(token: Any) -> tuple[str, ...]:
    tag = token.tag.partition("-")[0]  # VV-I, VA-R: irregular and regular conjugation
    if tag not in _CONTENT or not all(is_hangul(character) for character in token.form):
        return ()
    return (token.form + "다",) if tag in _PREDICATES else (token.form,)
