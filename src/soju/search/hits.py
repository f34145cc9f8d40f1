"""From what an engine found to hits: the terms that matched, the best passage of each document, the fusion of rankings.

Shape letter: T = terms of the query.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from soju.core.errors import UserError
from soju.core.language import language_of
from soju.core.results import Hit, MatchedTerm, TermWeight


def explain(
    names: Sequence[str],
    terms_T: NDArray[np.int32],
    query_weights_T: NDArray[np.float32],
    impacts_T: NDArray[np.float32],
) -> tuple[MatchedTerm, ...]:
    """List the terms that query and chunk share."""
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


def heaviest(vectors: csr_array, row: int, names: Sequence[str], k: int) -> list[TermWeight]:
    """Return the k heaviest terms of a row of ``(B, V)`` vectors; equal weights by term number."""
    start, stop = vectors.indptr[row : row + 2]
    weighted = zip(vectors.data[start:stop].tolist(), vectors.indices[start:stop].tolist(), strict=True)
    best = sorted(weighted, key=lambda pair: (-pair[0], pair[1]))[:k]
    return [TermWeight(names[term], language_of(names[term]), weight) for weight, term in best]


MOST = 10_000
"""Most passages one search may ask for (``index.max_result_window`` of OpenSearch)."""


@dataclass(frozen=True, slots=True)
class Found:
    """One passage as an engine returned it."""

    document_id: str
    number: int
    score: float
    text: str
    start: int
    end: int
    weights: Mapping[int, float]
    """Stored weight of the terms, by term id; those of the query suffice."""


def best_of_each(fetch: Callable[[int], Sequence[Found]], k: int, *, one_each: bool) -> list[Found]:
    """Return the best passage of each of k documents, equal scores in corpus order.

    Asks for more passages until k documents are found or no more come: exact, and it needs no grouping in the engine,
    which neither SEISMIC nor a two-phase pipeline combines with.

    Args:
        fetch: Returns the best passages, at most as many as asked for, best first.
        k: Most documents.
        one_each: Whether every document has one passage, so that the first answer will do.

    Returns:
        At most k passages of different documents.
    """
    size = k if one_each else min(MOST, 3 * k)
    while True:
        found = fetch(size)
        best: dict[str, Found] = {}
        for passage in sorted(found, key=lambda passage: (-passage.score, passage.number)):
            best.setdefault(passage.document_id, passage)
        if len(best) >= k or len(found) < size or size >= MOST or one_each:
            return list(best.values())[:k]
        size = min(MOST, 2 * size)


def to_hits(
    found: Sequence[Found], names: Sequence[str], terms_T: NDArray[np.int32], weights_T: NDArray[np.float32]
) -> list[Hit]:
    """Add the terms that matched, from the stored weights."""
    return [
        Hit(
            rank=rank,
            document_id=passage.document_id,
            score=passage.score,
            passage=passage.text,
            matched=explain(
                names, terms_T, weights_T, np.array([passage.weights.get(int(t), 0.0) for t in terms_T], np.float32)
            ),
            start=passage.start,
            end=passage.end,
        )
        for rank, passage in enumerate(found, start=1)
    ]


IdT = TypeVar("IdT", bound=Hashable)


def reciprocal_rank_fusion(
    rankings: Sequence[Sequence[IdT]], *, k: int = 60, limit: int | None = None
) -> list[tuple[IdT, float]]:
    """Fuse the rankings that several systems gave for one query.

    ``score(d) = Σ_systems 1 / (k + rank(d))``, ranks from 1; a system that does not return d adds nothing. Scores are
    unitless, higher is better. Equal scores are ranked by the best single rank, then by the order of the systems.

    Args:
        rankings: Per system, document ids best first.
        k: Damping of the first ranks, > 0; 60 in the paper.
        limit: Longest result, or ``None`` for all documents.

    Returns:
        Document ids with fused scores, best first.

    Raises:
        UserError: If k or limit is not positive, or a ranking holds a document twice.

    References:
        Cormack, Clarke and Büttcher 2009, Reciprocal Rank Fusion outperforms Condorcet, SIGIR.
    """
    if k <= 0:
        raise UserError(f"k: got {k}; it must be above 0 (60 is usual)")
    if limit is not None and limit < 1:
        raise UserError(f"limit: got {limit}; ask for at least one document, or None for all")
    ranks: dict[IdT, list[int]] = {}
    order: dict[IdT, tuple[int, int]] = {}  # best rank, first system that gave it
    for system, ranking in enumerate(rankings):
        if len(set(ranking)) != len(ranking):
            raise UserError(f"ranking {system + 1} holds a document twice; remove the later one")
        for rank, document in enumerate(ranking, start=1):
            ranks.setdefault(document, []).append(rank)
            order[document] = min(order.get(document, (rank, system)), (rank, system))
    # Ascending ranks make the float sum independent of which system gave which rank.
    scores = {document: sum(1.0 / (k + rank) for rank in sorted(found)) for document, found in ranks.items()}
    best = sorted(scores, key=lambda document: (-scores[document], order[document]))
    return [(document, scores[document]) for document in best[:limit]]
