"""Which documents are best when an engine returns passages? The best passage of each, as our own index ranks them.

Shape letter: T = terms of the query.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from soju.search.hits import Hit, explain

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
    """Add the terms that matched, from the stored weights.

    Args:
        found: Passages, best first.
        names: Readable name of every term.
        terms_T: Terms of the query.
        weights_T: Their weights.

    Returns:
        Hits. Contributions are of the weights as sent; the engine's score may differ by what it rounds.
    """
    return [
        Hit(
            document_id=passage.document_id,
            score=passage.score,
            text=passage.text,
            start=passage.start,
            end=passage.end,
            matched=explain(
                names, terms_T, weights_T, np.array([passage.weights.get(int(t), 0.0) for t in terms_T], np.float32)
            ),
        )
        for passage in found
    ]
