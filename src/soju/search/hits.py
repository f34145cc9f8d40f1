"""What does a search return, and why did it match? Hits with the terms that made their score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from soju.core.language import Language, language_of


@dataclass(frozen=True, slots=True)
class MatchedTerm:
    """One term that the query and the chunk share."""

    term: str
    language: Language
    query_weight: float
    """Weight in the query, idf included."""
    document_weight: float
    """Impact in the chunk."""
    contribution: float
    """``query_weight * document_weight``: its part of the score."""


@dataclass(frozen=True, slots=True)
class Hit:
    """One document that was found, through its best chunk."""

    document_id: str
    score: float
    """Sum of the contributions, unitless; comparable within one query only."""
    text: str
    """The chunk that matched."""
    start: int
    """Where the chunk starts in the document, in characters."""
    end: int
    """Where it ends."""
    matched: tuple[MatchedTerm, ...]
    """Largest contribution first; empty when no explanation was asked for."""


def explain(
    names: Sequence[str],
    terms_T: NDArray[np.int32],
    query_weights_T: NDArray[np.float32],
    impacts_T: NDArray[np.float32],
) -> tuple[MatchedTerm, ...]:
    """List the terms that query and chunk share.

    Args:
        names: The V terms of the index.
        terms_T: Terms of the query.
        query_weights_T: Their weights, idf included.
        impacts_T: Their impacts in the chunk, 0 where it lacks the term.

    Returns:
        Largest contribution first, equal ones by term number.
    """
    contributions_T = query_weights_T * impacts_T
    return tuple(
        MatchedTerm(
            term=names[terms_T[t]],
            language=language_of(names[terms_T[t]]),
            query_weight=float(query_weights_T[t]),
            document_weight=float(impacts_T[t]),
            contribution=float(contributions_T[t]),
        )
        for t in np.argsort(-contributions_T, kind="stable")
        if contributions_T[t] > 0
    )
