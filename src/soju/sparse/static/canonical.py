"""From pieces to terms: ``했`` counts for 하다, ``networks`` for network, a particle for nothing.

Shape letters: V = pieces in the vocabulary; terms are pieces too.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence, Set

import numpy as np
import Stemmer
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array

from soju.core.language import is_hangul
from soju.sparse.static.lexicon_tokenizer import BOUNDARY, UNKNOWN
from soju.sparse.static.morphemes import Stretch

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
