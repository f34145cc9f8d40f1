"""Lexical baselines over analysed Korean and English words: BM25, and queries translated with a word list.

Shape letters: Q = queries, D = documents, W = words of the collection.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from soju.core.errors import UserError, require_extra
from soju.core.language import is_hangul, language_of, shared_kiwi
from soju.data.rows import TermRow

if TYPE_CHECKING:
    import Stemmer


K1 = 1.2
"""Saturation of the word count, Lucene's and OpenSearch's default."""
B = 0.75
"""Strength of the length normalisation, Lucene's and OpenSearch's default."""

_STOP_WORDS = """
a about after again all also am an and any are as at be because been before being both but by can could did do does
doing don down during each every few for from further had has have having he her here hers herself him himself his
how i if in into is isn it its itself just ll m me might mine more most must my myself no nor not of off on once
only or other our ours out over own re s same shall she should so some such t than that the their theirs them
themselves then there these they this those through to too under until up ve very was we were what when where which
while who whom whose why will with would you your yours yourself yourselves
"""
ENGLISH_STOP_WORDS = frozenset(_STOP_WORDS.split())
"""Function words, before stemming. Pieces of contractions ("don't" is ``don`` + ``t``) are among them."""

_WORD = re.compile(r"[^\W\d_]+|\d+(?:[.,]\d+)*")
_SURROGATES = re.compile("[\ud800-\udfff]")
_KOREAN_TAGS = frozenset({"NNG", "NNP", "NNB", "NR", "NP", "VV", "VA", "MM", "MAG", "XR", "SH"})
_WRITTEN_TAGS = frozenset({"SL", "SN"})

Ranking = tuple[list[NDArray[np.int64]], list[NDArray[np.float32]]]
"""Per query, document indices best first and their scores. Queries may have rankings of different length."""


class Analyzer(Protocol):
    """Turns texts into the words that are indexed."""

    def analyze(self, texts: Sequence[str]) -> list[list[str]]:
        """Return the words of each text in reading order, repeated words kept."""
        ...


class EnglishAnalyzer:
    """Lower-cased words and numbers, stop words removed, Snowball ("Porter 2") stems.

    Letters and digits are split from one another (``mp3`` is ``mp`` + ``3``) because Kiwi does so too, so that a word
    is the same in a Korean sentence and in an English one.
    """

    def analyze(self, texts: Sequence[str]) -> list[list[str]]:
        """Return the stems of each text."""
        stemmer = _stemmer()
        return [_stems(unicodedata.normalize("NFC", text), stemmer) for text in texts]


class KoreanEnglishAnalyzer:
    """Kiwi morphemes of Korean, stems of English, for texts in either language or both.

    Of Korean, what a Korean search engine keeps is kept: nouns, numerals and pronouns, verbs and adjectives by their
    dictionary form, adnouns and adverbs, roots, Chinese characters. Particles, endings, affixes, auxiliary verbs, the
    copula and conjunctions are dropped. Foreign words and numbers inside Korean go through `EnglishAnalyzer`, and a
    text without any Hangul goes there directly. The result does not depend on the other texts of the batch.

    Args:
        workers: Threads Kiwi uses for a batch; 1 means no thread pool beyond its own worker. All analysers of a process
            with the same number share one Kiwi, made at first use (about 2 seconds, 0.5 GB); it is safe to call from
            several threads.
    """

    def __init__(self, *, workers: int = 1) -> None:
        if workers < 1:
            raise UserError(f"workers: got {workers}; give the number of threads for Kiwi, 1 or more")
        self.workers = workers

    def analyze(self, texts: Sequence[str]) -> list[list[str]]:
        """Return morphemes and stems of each text."""
        stemmer = _stemmer()
        texts = [_SURROGATES.sub(" ", unicodedata.normalize("NFC", text)) for text in texts]
        korean = [index for index, text in enumerate(texts) if any(map(is_hangul, text))]
        words = [[] if any(map(is_hangul, text)) else _stems(text, stemmer) for text in texts]
        if korean:
            for index, tokens in zip(
                korean, shared_kiwi(self.workers).tokenize([texts[i] for i in korean]), strict=True
            ):
                words[index] = _morphemes(tokens, stemmer)
        return words


def _stemmer() -> Stemmer.Stemmer:
    """Make a stemmer for one batch: its cache is not thread-safe, and making one costs microseconds."""
    require_extra("English stemming", "train", "Stemmer")
    import Stemmer

    return Stemmer.Stemmer("english")


def _stems(text: str, stemmer: Stemmer.Stemmer) -> list[str]:
    words = [word for word in _WORD.findall(text.lower()) if word not in ENGLISH_STOP_WORDS]
    return list(stemmer.stemWords(words))


def _morphemes(tokens: Sequence[object], stemmer: Stemmer.Stemmer) -> list[str]:
    words: list[str] = []
    for token in tokens:
        tag = token.tag.partition("-")[0]  # type: ignore[attr-defined]  # VV-I, VA-R: irregular verbs
        if tag in _KOREAN_TAGS:
            words.extend(token.lemma.split())  # type: ignore[attr-defined]  # Kiwi joins some compounds by a space
        elif tag in _WRITTEN_TAGS or tag.startswith("W_"):
            words.extend(_stems(token.form, stemmer))  # type: ignore[attr-defined]
    return words


class Bm25Searcher:
    """BM25 in Lucene's variant over analysed documents.

    ``score(q, d) = Σ_w q_w · ln(1 + (D − df_w + ½) / (df_w + ½)) · tf / (tf + k1 · (1 − b + b · |d| / mean |d|))``,
    with k1 = 1.2 and b = 0.75. ``q_w`` is how often the query has the word, or any weight (`search_weighted`). Scores
    are unitless, higher is better. Equal scores are ranked by document order. Documents that share no word with the
    query are not returned, so a ranking may be shorter than k and that of a query without known words is empty.

    Args:
        documents: Texts to index; a text without any word is kept and never found.
        analyzer: What makes words of documents and queries.

    Raises:
        UserError: If there is no document.

    References:
        Robertson et al. 1994, Okapi at TREC-3. Kamphuis et al. 2020, the variants. Lù 2024, arXiv:2407.03618 (bm25s).
    """

    def __init__(self, documents: Sequence[str], analyzer: Analyzer) -> None:
        if not documents:
            raise UserError("no document to index; give at least one")
        self.analyzer = analyzer
        analyzed = analyzer.analyze(documents)
        # Word ids by first appearance: bm25s would number them by hash order, which changes from run to run.
        self._word_ids = {word: index for index, word in enumerate(dict.fromkeys(w for ws in analyzed for w in ws))}
        self.impacts_WD = _impacts([[self._word_ids[w] for w in words] for words in analyzed], self._word_ids)

    def search(self, queries: Sequence[str], k: int) -> Ranking:
        """Rank the documents for each query."""
        weights: list[dict[str, float]] = []
        for words in self.analyzer.analyze(queries):
            counts: dict[str, float] = {}
            for word in words:
                counts[word] = counts.get(word, 0.0) + 1.0
            weights.append(counts)
        return self.search_weighted(weights, k)

    def search_weighted(self, queries: Sequence[Mapping[str, float]], k: int) -> Ranking:
        """Rank the documents for queries given as weighted words; see `search`.

        Args:
            queries: Analysed words with weights >= 0, unitless. Unknown words are ignored.
            k: Longest ranking, >= 1.

        Returns:
            As `search`.

        Raises:
            UserError: If k < 1 or a weight is negative or not finite.
        """
        if k < 1:
            raise UserError(f"k: got {k}; ask for at least one document")
        indices: list[NDArray[np.int64]] = []
        scores: list[NDArray[np.float32]] = []
        for start in range(0, len(queries), 256):  # bounds the memory of the product
            scores_QD = self._query_matrix(queries[start : start + 256]) @ self.impacts_WD
            for row in range(scores_QD.shape[0]):
                span = slice(scores_QD.indptr[row], scores_QD.indptr[row + 1])
                best, best_scores = best_first(scores_QD.indices[span], scores_QD.data[span], k)
                indices.append(best)
                scores.append(best_scores.astype(np.float32))
        return indices, scores

    def _query_matrix(self, queries: Sequence[Mapping[str, float]]) -> sparse.csr_matrix:
        data, columns, ends = [], [], [0]
        for query in queries:
            for word, weight in query.items():
                if not 0.0 <= weight < float("inf"):
                    raise UserError(f'query word "{word}": weight {weight}; weights must be finite and >= 0')
                if word in self._word_ids:
                    data.append(weight)
                    columns.append(self._word_ids[word])
            ends.append(len(data))
        shape = (len(queries), len(self._word_ids))
        values = (np.array(data, dtype=np.float64), np.array(columns, dtype=np.int64), ends)
        return sparse.csr_matrix(values, shape=shape)


def best_first(
    documents: NDArray[np.integer], scores: NDArray[np.floating], k: int
) -> tuple[NDArray[np.int64], NDArray[np.floating]]:
    """Return the k best documents with a score above 0, best first, equal scores by document index.

    Args:
        documents: Distinct document indices, ``(n,)``.
        scores: Their scores, ``(n,)``, higher is better.
        k: Longest result.

    Returns:
        Document indices and scores, both ``(min(k, positive scores),)``.
    """
    keep = scores > 0
    if np.count_nonzero(keep) > k:  # all that tie with the k-th stay until the sort has decided
        keep &= scores >= np.partition(scores, len(scores) - k)[len(scores) - k]
    documents, scores = documents[keep], scores[keep]
    order = np.lexsort((documents, -scores))[:k]
    return documents[order].astype(np.int64), scores[order]


def _impacts(document_words: list[list[int]], word_ids: dict[str, int]) -> sparse.csr_matrix:
    """Return the BM25 weight of each word in each document, ``(W, D)``."""
    shape = (len(word_ids), len(document_words))
    if not word_ids:
        return sparse.csr_matrix(shape, dtype=np.float64)
    require_extra("BM25", "train", "bm25s")
    import bm25s

    index = bm25s.BM25(method="lucene", k1=K1, b=B)
    index.index((document_words, dict(word_ids)), create_empty_token=False, show_progress=False)
    columns = (index.scores["data"].astype(np.float64), index.scores["indices"], index.scores["indptr"])
    return sparse.csc_matrix(columns, shape=shape[::-1]).T.tocsr()


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
    """BM25 (`Bm25Searcher`) for queries expanded by a `Dictionary`."""

    def __init__(self, documents: Sequence[str], dictionary: Dictionary) -> None:
        self.dictionary = dictionary
        self._searcher = Bm25Searcher(documents, dictionary.analyzer)

    def search(self, queries: Sequence[str], k: int) -> Ranking:
        """Rank the documents for each query; see `Bm25Searcher.search`."""
        return self._searcher.search_weighted(self.dictionary.expand(queries), k)
