"""Dictionary look-up: translate the words of a query by the term rows, then BM25. A permanent baseline."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from soju.core.errors import UserError
from soju.core.language import language_of
from soju.data.records import TermRow
from soju.search.lexical import Analyzer, Bm25Searcher, Ranking

TRANSLATIONS = 10
"""Translations used of one entry, the most similar ones."""
OWN_WEIGHT = 0.7
"""Weight of the query's own words, which carry names and numbers across languages."""
INNER_WEIGHT = 0.5
"""Factor for translations of the single words inside a matched compound."""

_REMARK = re.compile(r"\([^)]*\)")
Words = tuple[str, ...]


class Dictionary:
    """Korean–English word list made from term rows, looked up in both directions by analysed words.

    An entry is an n-gram of analysed words: the head word "기계 학습" is found wherever the query has the morphemes
    기계 and 학습 in a row. Reversed, English terms lead to all heads that list them. Only translations are kept,
    not synonyms in the language of the head. Remarks in parentheses are ignored.

    Args:
        rows: Head words with terms. Where several rows give the same pair, the largest similarity counts.
        analyzer: What makes words of entries and queries; must handle both languages.

    Raises:
        UserError: If no row has a translation that is left with a word after analysis.
    """

    def __init__(self, rows: Sequence[TermRow], analyzer: Analyzer) -> None:
        self.analyzer = analyzer
        self._entries: dict[Words, dict[Words, float]] = {}
        pairs = [(row.ko, term) for row in rows for term in row.terms if language_of(term.text) == "en"]
        texts = list(dict.fromkeys(text for head, term in pairs for text in (head, term.text)))
        words = analyzer.analyze([_REMARK.sub(" ", text) for text in texts])
        words_of = {text: tuple(found) for text, found in zip(texts, words, strict=True)}
        for head_text, term in pairs:
            head, translation = words_of[head_text], words_of[term.text]
            if head and translation and head != translation:
                for source, target in ((head, translation), (translation, head)):
                    targets = self._entries.setdefault(source, {})
                    targets[target] = max(targets.get(target, 0.0), term.similarity)
        if not self._entries:
            raise UserError("the term rows hold no Korean–English pair; give rows with English terms")
        self._longest = max(map(len, self._entries))

    def expand(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """Return the words of each text with those of their translations, weighted.

        Entries are matched greedily, longest first, from left to right. A matched entry adds, for each of its
        `TRANSLATIONS` most similar translations, ``sim² / sqrt(Σ sim²)``: similar ones count more, and an entry with
        many translations says more in total than one with few, but not in proportion. The words of a translation
        share its weight; a word that several translations of one entry contain gets the largest. Words inside a
        matched compound are translated too, at half weight. Words of the text itself weigh 0.7 each time they occur.
        The constants are the best found on the development sets for Korean → English and English → Korean together.

        Args:
            texts: Queries in either language.

        Returns:
            Per text, analysed word -> weight > 0, unitless.
        """
        return [self._expand(words) for words in self.analyzer.analyze(texts)]

    def _expand(self, words: list[str]) -> dict[str, float]:
        weights: dict[str, float] = {}
        for word in words:
            weights[word] = weights.get(word, 0.0) + OWN_WEIGHT
        for entry in self._matches(words):
            parts = [((word,), INNER_WEIGHT) for word in entry if (word,) in self._entries] if len(entry) > 1 else []
            for source, factor in [(entry, 1.0), *parts]:
                for word, weight in self._translations(source).items():
                    weights[word] = weights.get(word, 0.0) + factor * weight
        return weights

    def _matches(self, words: list[str]) -> Iterator[Words]:
        start = 0
        while start < len(words):
            for length in range(min(self._longest, len(words) - start), 0, -1):
                entry = tuple(words[start : start + length])
                if entry in self._entries:
                    yield entry
                    start += length
                    break
            else:
                start += 1

    def _translations(self, source: Words) -> dict[str, float]:
        best = sorted(self._entries[source].items(), key=lambda item: (-item[1], item[0]))[:TRANSLATIONS]
        total = sum(similarity**2 for _, similarity in best) ** 0.5
        weights: dict[str, float] = {}
        for target, similarity in best:
            share = similarity**2 / total / len(target)
            for word in target:
                weights[word] = max(weights.get(word, 0.0), share)
        return weights


class DictionarySearcher:
    """BM25 (`Bm25Searcher`) for queries expanded by a `Dictionary`.

    Args:
        documents: Texts to index.
        dictionary: Word list; its analyser is used for the documents as well.
    """

    def __init__(self, documents: Sequence[str], dictionary: Dictionary) -> None:
        self.dictionary = dictionary
        self._searcher = Bm25Searcher(documents, dictionary.analyzer)

    def search(self, queries: Sequence[str], k: int) -> Ranking:
        """Rank the documents for each query; see `Bm25Searcher.search`."""
        return self._searcher.search_weighted(self.dictionary.expand(queries), k)
