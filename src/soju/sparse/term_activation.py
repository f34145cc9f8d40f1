"""What a sparse encoder activates and what that costs: unseen words, probe words, posting lists, bytes, time.

A Korean head word that was never trained on should keep its own tokens (preservation) and activate the tokens of its
English translations (activation). The probes are fifteen published terms of computing, watched while a student trains:
a display; nothing is chosen by them, and none of them is trained on.

Shape letters: N = texts or head words, Q = queries, D = documents, V = terms of the vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse import csr_array

from soju.core.errors import UserError
from soju.core.language import is_hangul, is_latin, language_of
from soju.core.results import Score, Setting
from soju.data.rows import TermRow
from soju.search.lexical import ENGLISH_STOP_WORDS
from soju.sparse.model import TermEncoder, load
from soju.sparse.static.encoder import StaticEncoder

Clock = Callable[[], int]
"""Returns nanoseconds that never run backwards."""


def active_terms(
    weights_NV: sparse.csr_matrix | sparse.csr_array, setting: Setting, *, side: Literal["query", "document"]
) -> list[Score]:
    """Count the terms with a weight other than 0 in each text; stored zeros do not count.

    Gives ``active_terms.SIDE.mean``, ``.p50`` and ``.p95`` in terms a text, lower is better (cheaper).
    """
    counts_N = np.bincount(_active(weights_NV).row, minlength=weights_NV.shape[0])
    values = {
        "mean": counts_N.mean(),
        "p50": np.quantile(counts_N, 0.5),
        "p95": np.quantile(counts_N, 0.95),
    }
    return [
        setting.score(
            f"active_terms.{side}.{name}", value, unit="terms", higher_is_better=False, texts=weights_NV.shape[0]
        )
        for name, value in values.items()
    ]


def flops(
    queries_QV: sparse.csr_matrix | sparse.csr_array,
    documents_DV: sparse.csr_matrix | sparse.csr_array,
    setting: Setting,
) -> Score:
    """Return the expected number of products when a random query meets a random document.

    ``FLOPS = Σ_v q_v · d_v``, where q_v and d_v are the shares of queries and documents that activate term v.

    Args:
        queries_QV: Query weights, ``(Q, V)``, Q >= 1.
        documents_DV: Document weights, ``(D, V)``, D >= 1, the same vocabulary.
        setting: What is measured on what.

    Returns:
        ``flops`` in products a pair, lower is better.

    Raises:
        UserError: If a side has no text or the vocabularies differ in size.

    References:
        Paria et al. 2020, arXiv:2004.05665. Formal et al. 2021, arXiv:2109.10086 (as an evaluation measure).
    """
    if queries_QV.shape[1] != documents_DV.shape[1]:
        raise UserError(
            f"queries have {queries_QV.shape[1]:,} terms and documents {documents_DV.shape[1]:,}; "
            "encode both with the same vocabulary"
        )
    query_share_V = _posting_lengths(queries_QV) / queries_QV.shape[0]
    document_share_V = _posting_lengths(documents_DV) / documents_DV.shape[0]
    return setting.score(
        "flops",
        float(query_share_V @ document_share_V),
        unit="products",
        higher_is_better=False,
        queries=queries_QV.shape[0],
        documents=documents_DV.shape[0],
    )


def posting_skew(documents_DV: sparse.csr_matrix | sparse.csr_array, setting: Setting) -> list[Score]:
    """Tell how unevenly the postings are spread over the posting lists; long lists make slow queries.

    Gives ``postings.longest_1_percent``: share of all postings in the 1 % longest lists (rounded up to whole lists),
    and ``postings.gini``: Gini coefficient of the list lengths, 0 when all are equal. Fractions, lower is better. Empty
    lists do not count.
    """
    lengths_V = np.sort(_posting_lengths(documents_DV))
    lengths_V = lengths_V[lengths_V > 0].astype(np.float64)
    if len(lengths_V) == 0:
        raise UserError("no document has an active term, so there is no posting list; check the encoder")
    count, total = len(lengths_V), lengths_V.sum()
    longest = -(-count // 100)
    gini = 2 * (np.arange(1, count + 1) @ lengths_V) / (count * total) - (count + 1) / count
    values = {"longest_1_percent": lengths_V[-longest:].sum() / total, "gini": gini}
    return [
        setting.score(
            f"postings.{name}", value, unit="postings share", higher_is_better=False, documents=documents_DV.shape[0]
        )
        for name, value in values.items()
    ]


def bytes_on_disk(path: Path, setting: Setting) -> Score:
    """Add up the sizes of all files below a folder, or of one file; links are not followed. Lower is better."""
    if not path.exists():
        raise UserError(f"{path}: does not exist; build it first or check the path")
    files = [path] if path.is_file() else [item for item in path.rglob("*") if item.is_file() and not item.is_symlink()]
    return setting.score(
        "bytes_on_disk", sum(item.stat().st_size for item in files), unit="bytes", higher_is_better=False
    )


def latency(
    search: Callable[[str], object],
    queries: Sequence[str],
    setting: Setting,
    *,
    warm_up: int = 10,
    clock: Clock = time.perf_counter_ns,
) -> list[Score]:
    """Time a search, one query at a time.

    Args:
        search: Answers one query; its result is thrown away.
        queries: Texts, each timed once.
        setting: What is measured on what.
        warm_up: Queries answered before timing starts, taken from the front and repeated when there are fewer.
        clock: Where the time comes from.

    Returns:
        ``latency.p50``, ``.p95`` and ``.p99`` in milliseconds a query, lower is better. The machine is in the
        signature.

    Raises:
        UserError: If there is no query or warm_up is negative.
    """
    if not queries:
        raise UserError("no query to time; give at least one")
    if warm_up < 0:
        raise UserError(f"warm_up: got {warm_up}; give 0 or more queries")
    for index in range(warm_up):
        search(queries[index % len(queries)])
    nanoseconds_Q = np.empty(len(queries))
    for index, query in enumerate(queries):
        start = clock()
        search(query)
        nanoseconds_Q[index] = clock() - start
    return [
        setting.score(
            f"latency.p{percent}",
            np.percentile(nanoseconds_Q, percent) / 1e6,
            unit="milliseconds",
            higher_is_better=False,
            queries=len(queries),
            warm_up=warm_up,
            machine=_machine(),
        )
        for percent in (50, 95, 99)
    ]


def throughput(
    encode: Callable[[Sequence[str]], object],
    texts: Sequence[str],
    setting: Setting,
    *,
    batch_size: int = 32,
    clock: Clock = time.perf_counter_ns,
) -> Score:
    """Time encoding in batches, after one batch to warm up; each text is encoded once and the results are thrown away.

    Gives ``encode_throughput`` in texts a second, higher is better. The machine is in the signature.
    """
    if not texts:
        raise UserError("no text to encode; give at least one")
    if batch_size < 1:
        raise UserError(f"batch_size: got {batch_size}; give at least 1")
    encode(texts[:batch_size])
    start = clock()
    for first in range(0, len(texts), batch_size):
        encode(texts[first : first + batch_size])
    seconds = max(clock() - start, 1) / 1e9
    return setting.score(
        "encode_throughput",
        len(texts) / seconds,
        unit="texts/second",
        higher_is_better=True,
        texts=len(texts),
        batch_size=batch_size,
        machine=_machine(),
    )


def _active(weights_NV: sparse.csr_matrix | sparse.csr_array) -> sparse.coo_array:
    if weights_NV.shape[0] == 0:
        raise UserError("no text was encoded; give at least one")
    entries = sparse.coo_array(weights_NV)
    keep = entries.data != 0
    return sparse.coo_array((entries.data[keep], (entries.row[keep], entries.col[keep])), shape=entries.shape)


def _posting_lengths(weights_NV: sparse.csr_matrix | sparse.csr_array) -> NDArray[np.int64]:
    return np.bincount(_active(weights_NV).col, minlength=weights_NV.shape[1])


def _machine() -> str:
    return f"{platform.system()}-{platform.machine()}-{os.cpu_count()}cpu"


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
