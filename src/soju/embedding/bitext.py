"""Does a sentence find its translation among all others? Tatoeba-style accuracy, in both directions.

Shape letters: N = sentence pairs, D = dimensions, C = sentences of a block.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from soju.core.errors import UserError
from soju.core.setting import Setting
from soju.data.records import PairRow
from soju.evaluation.significance import Measurement, mean_interval

_CELLS = 1 << 22


def mine(queries_ND: ArrayLike, documents_ND: ArrayLike) -> NDArray[np.int64]:
    """Return the document of the highest cosine for each query; of equal ones the first.

    Args:
        queries_ND: Vectors, ``(N, D)``, any length.
        documents_ND: Vectors, ``(M, D)``.

    Returns:
        Positions of documents, ``(N,)``.

    Raises:
        ValueError: If the shapes do not fit.
    """
    queries, documents = _unit(queries_ND), _unit(documents_ND)
    if queries.shape[1] != documents.shape[1] or not len(documents):
        raise ValueError(f"vectors must be (N, D) and (M, D) with M >= 1, got {queries.shape} and {documents.shape}")
    block = max(1, _CELLS // len(documents))
    found = [np.argmax(queries[start : start + block] @ documents.T, axis=1) for start in range(0, len(queries), block)]
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def evaluate_bitext(
    ko_ND: ArrayLike,
    en_ND: ArrayLike,
    pairs: Sequence[PairRow],
    *,
    subject: str,
    test_set: str,
    samples: int = 2_000,
    seed: int = 0,
    **decisive: object,
) -> list[Measurement]:
    """Measure how often the nearest sentence of the other language is the translation.

    A sentence that stands in several pairs is right whichever of its copies is found.

    Args:
        ko_ND: Vectors of the Korean sides, ``(N, D)``.
        en_ND: Vectors of the English sides, ``(N, D)``.
        pairs: The N sentence pairs, N >= 2.
        subject: Name of the system.
        test_set: Name of the pairs; scores add ``/ko-en`` and ``/en-ko``.
        samples: Draws for the interval; 0 for none.
        seed: Seed of the draws.
        **decisive: What else decides the value: prompt, pooling, length.

    Returns:
        Accuracy of both directions, with 1 or 0 for each pair.

    Raises:
        UserError: If there are fewer than two pairs.

    References:
        Artetxe and Schwenk 2019, arXiv:1812.10464 (Tatoeba by cosine).
    """
    if len(pairs) < 2:
        raise UserError(f"{test_set}: fewer than two sentence pairs; give more, or leave the set out")
    texts = {"ko": [pair.ko for pair in pairs], "en": [pair.en for pair in pairs]}
    vectors = {"ko": ko_ND, "en": en_ND}
    found = []
    for asked, wanted in (("ko", "en"), ("en", "ko")):
        answers = mine(vectors[asked], vectors[wanted])
        right_N = np.array([texts[wanted][answer] == own for answer, own in zip(answers, texts[wanted], strict=True)])
        values_N = right_N.astype(np.float64)
        setting = Setting.of_texts(
            [text for both in zip(texts[asked], texts[wanted], strict=True) for text in both],
            subject=subject,
            test_set=f"{test_set}/{asked}-{wanted}",
        )
        score = setting.score(
            "accuracy",
            values_N.mean(),
            unit="fraction",
            higher_is_better=True,
            interval=mean_interval(values_N, samples=samples, seed=seed) if samples else None,
            similarity="cosine",
            candidates=len(pairs),
            ties="equal-texts-count",
            **decisive,
        )
        found.append(Measurement(score, values_N))
    return found


def _unit(vectors_ND: ArrayLike) -> NDArray[np.float32]:
    vectors = np.asarray(vectors_ND, np.float32)
    if vectors.ndim != 2:
        raise ValueError(f"vectors must be (N, D), got {vectors.shape}")
    lengths_N1 = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, lengths_N1, out=np.zeros_like(vectors), where=lengths_N1 > 0)
