"""Which merges does a corpus want? BPE training that goes on from the base and makes only what is wanted.

Plain BPE training counts neighbours in the corpus and merges the most frequent pair, again and again. Here it starts
from the base's own encoding and may make candidates only, and the first two bytes of their Hangul characters, which a
base without Korean needs on the way.

References:
    Sennrich, Haddow and Birch 2016, arXiv:1508.07909 (BPE). Purason et al. 2025, arXiv:2512.03989 (continued BPE).
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from itertools import pairwise

from soju.core.language import is_hangul
from soju.core.progress import track
from soju.embedding.expansion.byte_bpe import ByteBpe
from soju.embedding.expansion.byte_level import token_bytes, token_text
from soju.embedding.expansion.hangul_pieces import is_unfinished_syllable
from soju.embedding.expansion.merge_building import MergeBuilder, Pair


def count_pre_tokens(base: ByteBpe, texts: Iterable[str]) -> Counter[str]:
    """Count the pre-tokens of texts that hold Hangul.

    Args:
        base: Normalises and pre-tokenises.
        texts: Any number.

    Returns:
        Count by text of the pre-token.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(base.pre_tokens(base.normalise(text)))
    read = {token_text(spelling): count for spelling, count in counts.items()}
    return Counter({text: count for text, count in read.items() if text is not None and any(map(is_hangul, text))})


def continue_bpe(builder: MergeBuilder, base: ByteBpe, counts: Mapping[str, int], *, min_count: int = 2) -> None:
    """Merge the most frequent allowed pair until none is left that occurs `min_count` times.

    Args:
        builder: Gets merges and tokens.
        base: Gives the old encoding of the pre-tokens.
        counts: Result of `count_pre_tokens`.
        min_count: Rarest pair that is merged; rarer pre-tokens are left out.
    """
    texts = sorted(text for text, count in counts.items() if count >= min_count)
    words = list(track(base.encode(texts), "corpus", total=len(texts)))
    pairs = _PairCounts(builder, words, [counts[text] for text in texts])
    while (pair := pairs.pop(min_count)) is not None:
        if builder.refusal(*pair) is None:  # a token that another merge made meanwhile may stand in its way
            builder.append(*pair)
            pairs.merge(pair)


class _PairCounts:
    """How often each allowed pair of neighbours stands in the words, kept current."""

    def __init__(self, builder: MergeBuilder, words: list[list[int]], frequencies: list[int]) -> None:
        self._builder = builder
        self._words = words
        self._frequencies = frequencies
        self._counts: dict[Pair, int] = {}
        self._places: dict[Pair, list[int]] = {}
        self._allowed: dict[Pair, bool] = {}
        self._candidates = "\n".join(builder.candidates)
        for number in range(len(words)):
            self._add(number)
        self._heap = [(-count, pair) for pair, count in self._counts.items()]
        heapq.heapify(self._heap)

    def pop(self, min_count: int) -> Pair | None:
        """Return the most frequent pair, of equals the one with the lowest ids, and forget it."""
        while self._heap:
            stored, pair = heapq.heappop(self._heap)
            count = self._counts.get(pair, 0)
            if -stored == count >= min_count:
                return pair
            if count >= min_count:  # it changed since it was pushed
                heapq.heappush(self._heap, (-count, pair))
        return None

    def merge(self, pair: Pair) -> None:
        """Bring the words with a pair up to date with the builder's merges."""
        counts, grown = self._counts, set()
        for number in sorted(set(self._places.pop(pair))):
            word = self._words[number]
            before = list(pairwise(word))
            if pair not in before:  # another merge took it since
                continue
            for gone in before:
                if gone in counts:
                    counts[gone] -= self._frequencies[number]
            self._builder.settle(word)
            grown.update(self._add(number, set(before)))
        del counts[pair]
        for new in grown:
            heapq.heappush(self._heap, (-counts[new], new))

    def _add(self, number: int, known: Container[Pair] = ()) -> list[Pair]:
        """Count the pairs of a word; return those that are allowed and were not known to be in it."""
        counts, allowed, added = self._counts, self._allowed, []
        for pair in pairwise(self._words[number]):
            if pair not in allowed:
                allowed[pair] = self._is_allowed(pair)
            if allowed[pair]:
                counts[pair] = counts.get(pair, 0) + self._frequencies[number]
                if pair not in known:
                    self._places.setdefault(pair, []).append(number)
                    added.append(pair)
        return added

    def _is_allowed(self, pair: Pair) -> bool:
        made = self._builder.spelling(pair[0]) + self._builder.spelling(pair[1])
        if made in self._builder.candidates:
            return True
        is_part = made in self._candidates and is_unfinished_syllable(token_bytes(made))
        return is_part and self._builder.refusal(*pair) is None
