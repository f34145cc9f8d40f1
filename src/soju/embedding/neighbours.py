"""What became of rows of an embedding table? Nearest neighbours, lengths, and how far rows have turned.

Everything is plain data for a report. Shape letters: V = rows of the table, N = rows looked at, D = dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from soju.core.errors import UserError
from soju.evaluation.similarity import cosines_of

ROWS = 8192
"""Of a table that are looked at in float64 at once."""


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The rows nearest to one row, the nearest first."""

    token: str
    nearest: tuple[tuple[str, float], ...]
    """Token and cosine."""


@dataclass(frozen=True, slots=True)
class NormStatistics:
    """How long rows are, in the unit of the table."""

    rows: int
    mean: float
    deviation: float
    minimum: float
    median: float
    maximum: float

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Drift:
    """Cosines between rows before and after training, counted in equal bins."""

    edges: tuple[float, ...]
    """Ends of the bins, ascending, one more than there are bins."""
    counts: tuple[int, ...]
    mean: float
    lowest: float
    unchanged: int
    """Rows whose every number is the same as before."""

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary."""
        return asdict(self)


def nearest_neighbours(
    table_VD: ArrayLike, tokens: Sequence[str], ids: Sequence[int], *, count: int = 5
) -> list[Neighbours]:
    """Find the rows of the highest cosine with each of some rows.

    Args:
        table_VD: The embedding table, ``(V, D)``.
        tokens: How each row reads, V texts.
        ids: Rows to look at.
        count: Neighbours of each, without the row itself; rows of equal cosine by their id.

    Returns:
        One entry for each id, in their order.

    Raises:
        UserError: If an id is outside the table, or there are not V tokens.
    """
    table = np.asarray(table_VD, np.float32)
    if len(tokens) != len(table):
        raise UserError(f"{len(tokens):,} tokens for {len(table):,} rows; give one for each row")
    if outside := [number for number in ids if not 0 <= number < len(table)]:
        raise UserError(f"token {outside[0]}: the table has {len(table):,} rows; give ids below that")
    lengths_V = np.linalg.norm(table, axis=1)
    found = []
    for number in ids:
        products_V = table @ table[number]
        scale_V = lengths_V * lengths_V[number]
        cosines_V = np.divide(products_V, scale_V, out=np.zeros_like(products_V), where=scale_V > 0)
        cosines_V[number] = -np.inf
        wanted = min(count, len(table) - 1)
        best = np.lexsort((np.arange(len(table)), -cosines_V))[:wanted]
        found.append(Neighbours(tokens[number], tuple((tokens[row], float(cosines_V[row])) for row in best)))
    return found


def norm_statistics(table_ND: ArrayLike) -> NormStatistics:
    """Describe the lengths of rows, ``(N, D)`` with N >= 1; `UserError` when there is none."""
    table = np.asarray(table_ND)
    if table.ndim != 2 or not len(table):
        raise UserError(f"rows of shape {table.shape}; give an embedding table with at least one row")
    norms_N = np.concatenate([np.linalg.norm(table[rows].astype(np.float64), axis=1) for rows in _blocks(len(table))])
    return NormStatistics(
        rows=len(norms_N),
        mean=float(norms_N.mean()),
        deviation=float(norms_N.std()),
        minimum=float(norms_N.min()),
        median=float(np.median(norms_N)),
        maximum=float(norms_N.max()),
    )


def drift(before_ND: ArrayLike, after_ND: ArrayLike, *, bins: int = 20) -> Drift:
    """Count how far rows, or the vectors of texts, have turned.

    Args:
        before_ND: Rows before, ``(N, D)``, N >= 1.
        after_ND: The same rows after.
        bins: Number of equal bins between the lowest cosine and 1. When no row has turned, all are in the last bin
            of [0, 1].

    Returns:
        The histogram of cosines with their mean and lowest.

    Raises:
        UserError: If the shapes differ or there is no row.
    """
    before, after = np.asarray(before_ND), np.asarray(after_ND)
    if before.shape != after.shape or before.ndim != 2 or not len(before):
        raise UserError(f"rows of shape {before.shape} before and {after.shape} after; give the same rows of both")
    cosines_N = _row_cosines(before, after)
    lowest = float(cosines_N.min())
    # Beyond rounding nothing turned: bins of a width of 1e-16 would show noise.
    low = lowest if lowest < 1 - 1e-9 else 0.0
    counts, edges = np.histogram(np.clip(cosines_N, low, 1.0), bins=bins, range=(low, 1.0))
    return Drift(
        edges=tuple(float(edge) for edge in edges),
        counts=tuple(int(number) for number in counts),
        mean=float(cosines_N.mean()),
        lowest=lowest,
        unchanged=int(np.all(before == after, axis=1).sum()),
    )


def _row_cosines(before: NDArray[Any], after: NDArray[Any]) -> NDArray[np.float64]:
    cosines_N = np.concatenate([cosines_of(before[rows], after[rows]) for rows in _blocks(len(before))])
    cosines_N[np.all(before == after, axis=1)] = 1.0  # a zero row has no direction, yet it has not turned
    return np.minimum(cosines_N, 1.0)


def _blocks(count: int) -> Iterator[slice]:
    """Yield slices of few enough rows that a copy of them in float64 is no matter beside the table."""
    for start in range(0, count, ROWS):
        yield slice(start, start + ROWS)
