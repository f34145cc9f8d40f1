"""A shared Korean–English tokenizer whose pieces are words, so that no analyser is needed when a query comes.

Korean is cut by a unigram language model over the stretches a morphological analyser found in the training text: the
analyser's knowledge, distilled into a ``tokenizer.json``. English words are whole pieces between two ``▁``; words the
lexicon lacks fall back to sub-words.

References:
    Kudo 2018, "Subword Regularization", arXiv:1804.10959 (unigram segmentation).
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tokenizers import Regex, Tokenizer
from tokenizers.models import Unigram
from tokenizers.normalizers import NFKC, Lowercase, Replace
from tokenizers.normalizers import Sequence as Normalizers
from tokenizers.pre_tokenizers import Split
from tokenizers.trainers import UnigramTrainer

from soju.core.errors import UserError
from soju.core.language import is_syllable
from soju.sparse.static.morphemes import Stretch

UNKNOWN = "<unk>"
BOUNDARY = "▁"
"""Stands before and after every Latin word or number."""

_LATIN_WORD = re.compile(r"[a-z0-9]+(?:'[a-z][a-z0-9]*)*")
_BOUNDARIES = Regex(r"(?<![a-z0-9])(?:(?<![a-z0-9]')(?=[a-z])|(?=[0-9]))|(?<=[a-z0-9])(?![a-z0-9]|'[a-z])")
"""Where `_LATIN_WORD` starts or ends: an apostrophe is inside a word only between its letters."""
_PRE_TOKENS = Regex(r"▁[^▁]+▁|[가-힣]+|[^\s▁가-힣]")
_SUB_WORD_PENALTY = 6.0
"""Nats a sub-word pays, so that a known word is never cut."""


def latin_words(text: str) -> list[str]:
    """Return the lower-cased Latin words and numbers of a text, as the tokenizer delimits them.

    >>> latin_words("Don't use API를 v2")
    ["don't", 'use', 'api', 'v2']
    """
    return _LATIN_WORD.findall(unicodedata.normalize("NFKC", text).replace("’", "'").lower())


@dataclass(slots=True)
class LexiconCounts:
    """How often each stretch of Korean, each dictionary word and each English word was seen."""

    stretches: Counter[str] = field(default_factory=Counter)
    words: Counter[str] = field(default_factory=Counter)
    latin: Counter[str] = field(default_factory=Counter)
    always: set[str] = field(default_factory=set)
    """Korean pieces and English words to keep whatever their count: those of the term list."""

    def add_korean(self, text: str, stretches: Iterable[Stretch], *, always: bool = False) -> None:
        """Count one analysed Korean text."""
        for stretch in stretches:
            surface = text[stretch.start : stretch.end]
            if all(map(is_syllable, surface)):
                self.stretches[surface] += 1
                if always:
                    self.always.add(surface)
            self.words.update(stretch.words)
            if always:
                self.always.update(stretch.words)
        self.add_latin(text, always=always)

    def add_latin(self, text: str, *, always: bool = False) -> None:
        """Count the Latin words of one text."""
        words = latin_words(text)
        self.latin.update(words)
        if always:
            self.always.update(words)


def build_tokenizer(counts: LexiconCounts, *, min_count: int = 2, sub_words: int = 4000) -> Tokenizer:
    """Make the tokenizer.

    Args:
        counts: What was seen in the training text.
        min_count: Stretches and words seen less often are left to sub-words, unless the term list has them.
        sub_words: Size of the sub-word vocabulary for English words outside the lexicon.

    Returns:
        A `tokenizers.Tokenizer` (unigram) that any program reads from ``tokenizer.json``.

    Raises:
        UserError: If nothing was counted in one of the languages, or nothing often enough.
    """
    if not counts.stretches or not counts.latin:
        raise UserError("both Korean and English text are needed to build the tokenizer")
    korean = _kept(counts.stretches, counts.always, min_count)
    latin = _kept(counts.latin, counts.always, min_count)
    if not korean or not latin:
        what = "English" if korean else "Korean"
        raise UserError(f"no {what} word occurs {min_count} times; lower tokenizer.min_count or give more text")
    scores: dict[str, float] = {UNKNOWN: 0.0}
    total = math.log(sum(korean.values()))
    scores.update((piece, math.log(count) - total) for piece, count in korean.items())
    rare = -math.log(1000) - total
    syllables = sorted({character for piece in counts.stretches for character in piece})
    lemmas = sorted(_kept(counts.words, counts.always, min_count))
    for piece in (*lemmas, *syllables):
        scores.setdefault(piece, rare)
    total = math.log(sum(latin.values()))
    scores.update((BOUNDARY + word + BOUNDARY, math.log(count) - total) for word, count in latin.items())
    for piece, score in _latin_sub_words(latin, size=sub_words).items():
        scores.setdefault(piece, score - _SUB_WORD_PENALTY)
    rounded = [(piece, round(score, 2)) for piece, score in scores.items()]  # saves a third of the file
    tokenizer = Tokenizer(Unigram(rounded, unk_id=0, byte_fallback=False))
    tokenizer.normalizer = Normalizers(
        [NFKC(), Replace("’", "'"), Lowercase(), Replace(BOUNDARY, " "), Replace(_BOUNDARIES, BOUNDARY)]
    )
    tokenizer.pre_tokenizer = Split(_PRE_TOKENS, "removed", invert=True)
    return tokenizer


def _kept(counts: Mapping[str, int], always: set[str], min_count: int) -> dict[str, int]:
    kept = {piece: count for piece, count in counts.items() if count >= min_count or piece in always}
    return dict(sorted(kept.items(), key=lambda item: (-item[1], item[0])))


def _latin_sub_words(words: Mapping[str, int], *, size: int) -> dict[str, float]:
    """Train sub-words on the word types, each once: rare words are what they are for."""
    trainer = UnigramTrainer(
        vocab_size=size,
        special_tokens=[],
        show_progress=False,
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz0123456789'" + BOUNDARY),
    )
    model = Tokenizer(Unigram())
    model.train_from_iterator((BOUNDARY + word + BOUNDARY for word in words), trainer)
    scores: dict[str, float] = dict(json.loads(model.to_str())["model"]["vocab"])
    # Characters that the trainer adds only to cover the alphabet get scores in the order of a randomly seeded hash map,
    # 0.0001 apart: give them one.
    lowest = min((score for piece, score in scores.items() if len(piece) > 1), default=min(scores.values()))
    kept = {piece: max(score, lowest) for piece, score in scores.items() if re.fullmatch(r"▁?[a-z0-9']*▁?", piece)}
    return dict(sorted(kept.items(), key=lambda item: (-round(item[1], 2), item[0])))
