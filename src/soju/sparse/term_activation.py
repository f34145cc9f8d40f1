"""Which terms an encoder activates for words it never saw in training, and for fifteen published probe words.

A Korean head word should keep its own tokens (preservation) and activate the tokens of its English translations
(activation). The probes are terms of computing, watched while a student trains: a display, about 25 tokens in all;
nothing is chosen by them, and none of them is trained on.

Shape letters: N = head words, V = terms of the vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse import csr_array

from soju.core.errors import UserError
from soju.core.language import is_hangul, is_latin, language_of
from soju.core.score import Score, Setting
from soju.data.rows import TermRow
from soju.search.lexical import ENGLISH_STOP_WORDS
from soju.sparse.model import TermEncoder, load
from soju.sparse.static.encoder import StaticEncoder

_KOREAN = """
은 는 이 가 을 를 의 에 에서 에게 께 와 과 로 으로 도 만 까지 부터 보다 처럼 하고 다 고 며 및 또는 그리고 그러나 하지만
"""
KOREAN_FUNCTION_WORDS = frozenset(_KOREAN.split())
"""Particles, endings and conjunctions as they appear as tokens of their own; join with English stop words."""

_MARKS = "▁Ġ …"
"""What tokenizers, or we, put where a piece begins or is cut from its word; ``##`` is handled apart."""


def top_terms(weights_NV: sparse.csr_matrix | sparse.csr_array, k: int) -> list[NDArray[np.int64]]:
    """Return the k heaviest terms of each text, heaviest first, equal weights by id; only weights above 0.

    Args:
        weights_NV: Term weights, ``(N, V)``.
        k: Longest list, >= 1.

    Returns:
        Per text, at most k term ids.

    Raises:
        UserError: If k < 1.
    """
    if k < 1:
        raise UserError(f"k: got {k}; ask for at least one term")
    rows = sparse.csr_array(weights_NV)
    result = []
    for start, end in zip(rows.indptr[:-1], rows.indptr[1:], strict=True):
        ids, weights = rows.indices[start:end], rows.data[start:end]
        ids, weights = ids[weights > 0], weights[weights > 0]
        result.append(ids[np.lexsort((ids, -weights))[:k]].astype(np.int64))
    return result


def found_share(top: Sequence[NDArray[np.int64]], expected: Sequence[Set[int]]) -> float:
    """Return the share of expected tokens that are among the top terms, counted over the tokens of all texts.

    A fraction in [0, 1], higher is better. Nothing expected of any text is a `UserError`.
    """
    if len(top) != len(expected):
        raise UserError(f"{len(top):,} texts but expected terms for {len(expected):,}; give one set a text")
    total = sum(len(ids) for ids in expected)
    if total == 0:
        raise UserError("no token is expected of any text; give rows whose terms the vocabulary can spell")
    found = sum(len(set(ids.tolist()) & wanted) for ids, wanted in zip(top, expected, strict=True))
    return found / total


def is_noise(piece: str, function_words: Set[str]) -> bool:
    """Tell whether a vocabulary piece says nothing about a text.

    Noise is a single Latin letter or Korean jamo, a function word, or anything with a letter of a script that is
    neither Hangul nor Latin. Numbers, punctuation and special tokens are not counted.
    """
    word = piece.removeprefix("##").strip(_MARKS).lower()
    letters = [character for character in word if character.isalpha()]
    if any(not (is_hangul(letter) or is_latin(letter)) for letter in letters):
        return True
    if len(word) == 1 and letters and not "가" <= word <= "힣":
        return True
    return word in function_words


def noise_share(top: Sequence[NDArray[np.int64]], vocabulary: Sequence[str], function_words: Set[str]) -> float:
    """Return the share of noise among the top terms of all texts, in [0, 1], lower is better; see `is_noise`."""
    ids = [int(index) for terms in top for index in terms]
    noisy = {index for index in set(ids) if is_noise(vocabulary[index], function_words)}
    return sum(index in noisy for index in ids) / max(1, len(ids))


def evaluate_terms(
    weights_NV: sparse.csr_matrix | sparse.csr_array,
    *,
    english: Sequence[Set[int]],
    korean: Sequence[Set[int]],
    vocabulary: Sequence[str],
    function_words: Set[str],
    setting: Setting,
    cutoffs: Sequence[int] = (10, 50),
) -> list[Score]:
    """Score the expanded vectors of held-out head words.

    Args:
        weights_NV: Expanded vectors of the head words, ``(N, V)``.
        english: Per head word, token ids of its English terms.
        korean: Per head word, token ids of itself and its Korean terms.
        vocabulary: Piece of each term id, ``(V,)``.
        function_words: Lower-cased function words of both languages.
        setting: What is measured on what; the hash must cover head words and expected terms.
        cutoffs: Numbers k of top terms looked at.

    Returns:
        For each k ``activation.en@k`` and ``preservation.ko@k`` (higher is better) and, at the largest k, ``noise@k``
        (lower is better); fractions.

    Raises:
        UserError: If rows, expected sets and vocabulary do not fit together, or nothing is expected.
    """
    if weights_NV.shape[1] != len(vocabulary):
        raise UserError(
            f"vectors have {weights_NV.shape[1]:,} terms and the vocabulary {len(vocabulary):,}; use the encoder's own"
        )
    texts, pieces = weights_NV.shape[0], _digest(list(vocabulary))
    scores = []
    for k in cutoffs:
        top = top_terms(weights_NV, k)
        for name, expected in (("activation.en", english), ("preservation.ko", korean)):
            scores.append(
                setting.score(
                    f"{name}@{k}",
                    found_share(top, expected),
                    unit="fraction",
                    higher_is_better=True,
                    texts=texts,
                    vocabulary=pieces,
                    expected=_digest([sorted(map(int, ids)) for ids in expected]),
                )
            )
    k = max(cutoffs)
    scores.append(
        setting.score(
            f"noise@{k}",
            noise_share(top_terms(weights_NV, k), vocabulary, function_words),
            unit="fraction",
            higher_is_better=False,
            texts=texts,
            vocabulary=pieces,
            function_words=_digest(sorted(function_words)),
        )
    )
    return scores


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


FUNCTION_WORDS = ENGLISH_STOP_WORDS | KOREAN_FUNCTION_WORDS
TermsOf = Callable[[Sequence[str]], list[list[int]]]
"""From texts to the ids of their terms, unexpanded."""


def expected_terms(rows: Sequence[TermRow], terms_of: TermsOf) -> tuple[list[set[int]], list[set[int]]]:
    """Collect what each head word should activate: in Korean itself and its synonyms, in English its translations."""
    texts = [text for row in rows for text in (row.ko, *(term.text.lower() for term in row.terms))]
    ids = iter(terms_of(texts))
    english: list[set[int]] = []
    korean: list[set[int]] = []
    for row in rows:
        sides: dict[str, set[int]] = {"ko": set(next(ids)), "en": set()}
        for term in row.terms:
            sides["ko" if language_of(term.text) == "ko" else "en"] |= set(next(ids))
        english.append(sides["en"])
        korean.append(sides["ko"])
    return english, korean


def terms_of(encoder: TermEncoder) -> TermsOf:
    """Return how an encoder alone tells which terms a text holds: a static one by its documents, others by pieces."""
    if isinstance(encoder, StaticEncoder):
        return partial(_counted_terms, encoder)
    from soju.sparse.initial import plain_vocabulary
    from soju.sparse.neural_encoders import NeuralEncoder  # seconds; not for static ones

    assert isinstance(encoder, NeuralEncoder)
    return plain_vocabulary(encoder.model.tokenizer).terms


def _counted_terms(encoder: StaticEncoder, texts: Sequence[str]) -> list[list[int]]:
    vectors = encoder.encode_documents(texts)
    return [vectors.indices[start:stop].tolist() for start, stop in pairwise(vectors.indptr)]


TOP = 50
"""Heaviest terms that are looked at."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A Korean word and the words it should activate; each of their tokens counts."""

    source: str
    english: str
    korean: str


PROBES = (
    Probe("머신러닝", "machine learning", "머신 러닝 기계학습"),
    Probe("딥러닝", "deep learning", "딥 러닝 심층학습"),
    Probe("자연어처리", "natural language processing", "자연어 처리"),
    Probe("인공지능", "artificial intelligence", "인공 지능"),
    Probe("검색엔진", "search engine", "검색 엔진"),
    Probe("데이터베이스", "database", "데이터 베이스"),
    Probe("클라우드", "cloud", "클라우드"),
    Probe("서버", "server", "서버"),
    Probe("네트워크", "network", "네트워크"),
    Probe("추천시스템", "recommend system", "추천 시스템"),
    Probe("추천", "recommend recommendation", "추천"),
    Probe("신경망", "neural network", "신경망 신경"),
    Probe("강화학습", "reinforcement learning", "강화 학습"),
    Probe("컴퓨터비전", "computer vision", "컴퓨터 비전"),
    Probe("음성인식", "speech recognition", "음성 인식"),
)


def probe_report(
    vectors: csr_array,
    terms_of: Callable[[Sequence[str]], list[list[int]]],
    terms: Sequence[str],
    *,
    function_words: Set[str],
) -> dict[str, Any]:
    """Describe what the probes activate.

    Args:
        vectors: Vectors of the probes in order, ``(probes, V)``.
        terms_of: From texts to the ids of their terms, unexpanded.
        terms: Name of each term, ``(V,)``.
        function_words: Function words of both languages, which count as noise.

    Returns:
        ``preservation`` and ``activation`` (0 where the vocabulary can spell none of the words), their sum
        ``combined``, ``noise`` (fractions), ``active_terms``, and the ten heaviest terms of each probe.
    """
    top = top_terms(vectors, TOP)
    korean = [set(ids) for ids in terms_of([probe.korean for probe in PROBES])]
    english = [set(ids) for ids in terms_of([probe.english for probe in PROBES])]
    preservation, activation = (found_share(top, expected) if any(expected) else 0.0 for expected in (korean, english))
    return {
        "preservation": preservation,
        "activation": activation,
        "combined": preservation + activation,
        "noise": noise_share(top, terms, function_words),
        "active_terms": vectors.nnz / len(PROBES),
        "top": {
            probe.source: [[terms[index], round(float(vectors[row, index]), 3)] for index in top[row][:10]]
            for row, probe in enumerate(PROBES)
        },
    }


def probe_models(models: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Describe what each of several models, by their names, activates for the probes; see `probe_report`."""
    reports = {}
    for model in models:
        encoder = load(model).encoder
        vectors = encoder.encode_queries([probe.source for probe in PROBES])
        vocabulary = terms_of(encoder)
        reports[model] = probe_report(vectors, vocabulary, encoder.terms, function_words=FUNCTION_WORDS)
    return reports
