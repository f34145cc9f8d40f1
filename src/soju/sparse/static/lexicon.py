"""A shared Korean–English tokenizer whose pieces are words, and the terms its pieces count for.

1. A morphological analyser splits Korean training text into stretches, each with the dictionary words it stands for.
2. The tokenizer cuts Korean by a unigram language model over these stretches: the analyser's knowledge, distilled into
   a ``tokenizer.json``, so that no analyser is needed when a query comes. English words are whole pieces between two
   ``▁``; words the lexicon lacks fall back to sub-words.
3. Pieces count for terms: ``했`` for 하다, ``networks`` for network, a particle for nothing.

References:
    Kudo 2018, "Subword Regularization", arXiv:1804.10959 (unigram segmentation).

Shape letters: V = pieces in the vocabulary; terms are pieces too.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array
from tokenizers import Regex, Tokenizer
from tokenizers.models import Unigram
from tokenizers.normalizers import NFKC, Lowercase, Replace
from tokenizers.normalizers import Sequence as Normalizers
from tokenizers.pre_tokenizers import Split
from tokenizers.trainers import UnigramTrainer

from soju.core.errors import UserError, require_extra
from soju.core.language import is_hangul, is_syllable, shared_kiwi

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
    """Yield the stretches of each text, lazily; texts are NFC Korean, and offsets count their characters."""
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
    """Make a unigram tokenizer that any program reads from ``tokenizer.json``.

    Stretches and words seen less than `min_count` times are left to sub-words, unless the term list has them;
    `sub_words` is the size of the sub-word vocabulary for English words outside the lexicon. It is a `UserError` if
    nothing was counted in one of the languages, or nothing often enough.
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


MIN_SHARE = 0.1
"""A piece maps to a term when at least this share of its occurrences stood for it."""

Span = tuple[int, int]


class PieceReadings:
    """Counts, piece by piece, what the analyser said its occurrences stood for."""

    def __init__(self, vocabulary: Mapping[str, int]) -> None:
        self._vocabulary = vocabulary
        self._readings: Counter[tuple[int, int]] = Counter()
        self._occurrences: Counter[int] = Counter()

    def add(self, pieces: Sequence[int], spans: Sequence[Span], stretches: Sequence[Stretch]) -> None:
        """Count one text: its piece ids, their character spans, and the analyser's stretches of it; both in order."""
        stretches = [stretch for stretch in stretches if stretch.words]
        first = 0
        for piece, (start, end) in zip(pieces, spans, strict=True):
            self._occurrences[piece] += 1
            while first < len(stretches) and stretches[first].end <= start:
                first += 1
            for stretch in stretches[first:]:
                if stretch.start >= end:
                    break
                self._count(piece, start, end, stretch)

    def _count(self, piece: int, start: int, end: int, stretch: Stretch) -> None:
        covers_it = start <= stretch.start and stretch.end <= end
        overlap = (min(end, stretch.end) - max(start, stretch.start)) / (end - start)
        for word in stretch.words:
            term = self._vocabulary.get(word)
            if covers_it and term is not None:
                self._readings[piece, term] += 1
            else:
                self._readings[piece, piece] += overlap  # type: ignore[assignment]  # part of a rarer word

    def shares(self) -> dict[int, dict[int, float]]:
        """Return, for each piece that occurred, the expected count of each term per occurrence."""
        result: dict[int, dict[int, float]] = {piece: {} for piece in self._occurrences}
        for (piece, term), count in self._readings.items():
            result[piece][term] = count / self._occurrences[piece]
        return result


def canonical_terms(
    vocabulary: Mapping[str, int],
    readings: PieceReadings,
    latin_counts: Mapping[str, int],
    *,
    sub_word_weight: float = 0.5,
    function_words: Set[str] = frozenset(),
    function_word_weight: float = 0.4,
) -> csr_array:
    """Build the matrix that turns piece counts into term counts.

    Args:
        vocabulary: Piece to id.
        readings: What the Korean pieces stood for.
        latin_counts: How often each English word was seen; the commonest word of a stem names its term.
        sub_word_weight: What a piece of an unknown English word counts for; such a word has two or three pieces.
        function_words: English words like "the" and "how".
        function_word_weight: What these count for. They carry little, but in questions not nothing.

    Returns:
        ``(V, V)`` float32: row p holds the terms one occurrence of piece p counts for. Particles, endings, the
        unknown piece and punctuation have empty rows.
    """
    rows: dict[int, dict[int, float]] = {}
    shares = readings.shares()
    for piece, index in vocabulary.items():
        if all(map(is_hangul, piece)):
            found = shares.get(index)
            rows[index] = {index: 1.0} if found is None else {t: s for t, s in found.items() if s >= MIN_SHARE}
        elif piece not in (UNKNOWN, BOUNDARY):
            rows[index] = {index: sub_word_weight if _is_latin_sub_word(piece) else 1.0}
    rows.update(_stem_classes(vocabulary, latin_counts))
    for word in function_words:
        piece_id = vocabulary.get(BOUNDARY + word + BOUNDARY)
        if piece_id is not None:
            rows[piece_id] = dict.fromkeys(rows[piece_id], function_word_weight)
    entries = [
        (piece, term, weight) for piece, terms in rows.items() for term, weight in sorted(terms.items()) if weight
    ]
    pieces, terms, weights = zip(*entries, strict=True)
    size = len(vocabulary)
    return coo_array((np.array(weights, np.float32), (pieces, terms)), shape=(size, size)).tocsr()


def _is_latin_sub_word(piece: str) -> bool:
    return piece.strip(BOUNDARY).replace("'", "").isalnum()


def _stem_classes(vocabulary: Mapping[str, int], counts: Mapping[str, int]) -> dict[int, dict[int, float]]:
    require_extra("training a static encoder", "train", "Stemmer")
    import Stemmer

    stemmer = Stemmer.Stemmer("english")
    classes: defaultdict[str, list[str]] = defaultdict(list)
    for piece in vocabulary:
        word = piece[1:-1]
        if len(piece) > 2 and piece[0] == piece[-1] == BOUNDARY and BOUNDARY not in word:
            classes[stemmer.stemWord(word.removesuffix("'s"))].append(word)
    rows: dict[int, dict[int, float]] = {}
    for words in classes.values():
        name = min(words, key=lambda word: (-counts.get(word, 0), len(word), word))
        for word in words:
            rows[vocabulary[BOUNDARY + word + BOUNDARY]] = {vocabulary[BOUNDARY + name + BOUNDARY]: 1.0}
    return rows


def strongest_terms(canonical_VV: csr_array, *, at_least: float = 0.3) -> NDArray[np.int32]:
    """Return, ``(V,)``, the term each piece most often stands for, or 0 when it seldom stands for any.

    Args:
        canonical_VV: Result of `canonical_terms`.
        at_least: Expected terms per occurrence below which a piece counts for nothing; so do pieces whose
            `sub_word_weight` or `function_word_weight` is below it.

    Returns:
        Term ids, ``(V,)``.
    """
    strongest_V = np.zeros(canonical_VV.shape[0], np.int32)
    totals_V = np.asarray(canonical_VV.sum(axis=1)).ravel()
    for piece in np.flatnonzero(totals_V >= at_least):
        start, stop = canonical_VV.indptr[piece : piece + 2]
        strongest_V[piece] = canonical_VV.indices[start + int(np.argmax(canonical_VV.data[start:stop]))]
    return strongest_V
