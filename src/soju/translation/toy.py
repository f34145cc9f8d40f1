"""A toy language: Korean and English sentences of a small grammar, so that a pico model learns to translate.

Korean is verb-final with particles that follow the last consonant of the noun; English has its own order and plurals.
"""

from __future__ import annotations

import random

from soju.core.errors import UserError
from soju.translation.data import TranslationPair

_SUBJECTS = (
    *(("학생", "student"), ("고양이", "cat"), ("친구", "friend"), ("의사", "doctor"), ("아이", "child")),
    *(("엄마", "mother"), ("기자", "reporter"), ("형", "brother"), ("선생님", "teacher"), ("강아지", "dog")),
)
_OBJECTS = (
    *(("사과", "apple"), ("책", "book"), ("편지", "letter"), ("빵", "cake"), ("노래", "song")),
    *(("문", "door"), ("차", "car"), ("꽃", "flower"), ("그림", "picture"), ("가방", "bag")),
)
_VERBS = (
    *(("봤다", "saw"), ("읽었다", "read"), ("찾았다", "found"), ("받았다", "got"), ("샀다", "bought")),
    *(("팔았다", "sold"), ("좋아했다", "liked"), ("씻었다", "washed")),
)
_ADJECTIVES = (("작은", "small"), ("큰", "big"), ("예쁜", "pretty"), ("낡은", "old"), ("새로운", "new"))
_PLACES = (("학교", "school"), ("집", "home"), ("시장", "market"), ("공원", "park"), ("서울", "Seoul"))
_DOMAINS = ("things", "places")
MOST = 20_000
"""Sentences that are drawn soon: the grammar has some 800,000."""


def toy_pairs(count: int, *, seed: int = 0) -> list[TranslationPair]:
    """Return so many different sentence pairs, in a fixed order for a seed; those with a place are a domain of theirs.

    Raises `UserError` if they are more than `MOST`.
    """
    if count > MOST:
        raise UserError(f"data.toy_pairs: {count:,} sentences of the toy language; give at most {MOST:,}")
    generator = random.Random(seed)
    found: dict[str, TranslationPair] = {}
    english: set[str] = set()
    while len(found) < count:
        pair = _sentence(generator)
        if pair.ko not in found and pair.en not in english:
            found[pair.ko] = pair
            english.add(pair.en)
    return list(found.values())


def _sentence(generator: random.Random) -> TranslationPair:
    subject, thing, verb = generator.choice(_SUBJECTS), generator.choice(_OBJECTS), generator.choice(_VERBS)
    first = generator.choice((None, *_ADJECTIVES))
    second = generator.choice((None, *_ADJECTIVES))
    place = generator.choice((None, *_PLACES))
    number = generator.choice((None, None, 2, 3, 4, 5))
    ko = [
        *([first[0]] if first else []),
        subject[0] + ("은" if _has_final(subject[0]) else "는"),
        *([place[0] + "에서"] if place else []),
        *([second[0]] if second else []),
        *([thing[0], f"{number}개를"] if number else [thing[0] + ("을" if _has_final(thing[0]) else "를")]),
        verb[0] + ".",
    ]
    en = [
        "the",
        *([first[1]] if first else []),
        subject[1],
        verb[1],
        *([str(number)] if number else ["the"]),
        *([second[1]] if second else []),
        thing[1] + ("s" if number else ""),
        *(["at", place[1]] if place else []),
    ]
    return TranslationPair(" ".join(ko), " ".join(en) + ".", domain=_DOMAINS[place is not None])


def _has_final(word: str) -> bool:
    """Tell whether the last syllable ends in a consonant."""
    return (ord(word[-1]) - ord("가")) % 28 > 0
