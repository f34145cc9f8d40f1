"""The published probe words: what a student lights up for fifteen terms of computing, watched while it trains.

They are a display, about 25 tokens in all; nothing is chosen by them, and none of them is trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any

from scipy.sparse import csr_array

from soju.sparse.unseen_terms import found_share, noise_share, top_terms

TOP = 50
"""Heaviest terms that are looked at."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A Korean word and the words it should light up; each of their tokens counts."""

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
    """Describe what the probes light up.

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
