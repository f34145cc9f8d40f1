"""Reciprocal rank fusion: one ranking out of several, from ranks alone."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

from soju.core.errors import UserError

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
