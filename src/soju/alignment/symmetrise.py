"""One table from the two directions of an aligner.

Shape letters: F = source words, E = target words. ``forward`` is ``t(target | source)``, ``(F, E)``; ``backward`` is
``t(source | target)``, ``(E, F)``; both as `TranslationTable.to_csr` returns them. Results are ``(F, E)`` float32 with
an empty row and column for `NULL`, which explains words but translates none.

A direction errs on its own side: ``t(e | f)`` of a rare f spreads over all that stood beside it, while ``t(f | e)`` of
the same words does not. What both directions believe is mostly right.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_array

from soju.alignment.bitext import NULL


def average(forward: csr_array, backward: csr_array) -> csr_array:
    """Return ``(t(e | f) + t(f | e)) / 2``: word pairs of either direction, the safest for recall.

    Args:
        forward: ``(F, E)``.
        backward: ``(E, F)``.

    Returns:
        ``(F, E)`` float32.
    """
    first, second = _both(forward, backward)
    return csr_array((first + second) * np.float32(0.5))


def geometric_mean(forward: csr_array, backward: csr_array) -> csr_array:
    """Return ``sqrt(t(e | f) * t(f | e))``: word pairs of both directions.

    The root of the product of Liang et al. 2006, "Alignment by Agreement", so that values stay on the scale of
    probabilities.

    Args:
        forward: ``(F, E)``.
        backward: ``(E, F)``.

    Returns:
        ``(F, E)`` float32.
    """
    first, second = _both(forward, backward)
    product = csr_array(first.multiply(second))
    product.data **= 0.5
    return product


def agreement(forward: csr_array, backward: csr_array) -> csr_array:
    """Return the harmonic mean ``2 ab / (a + b)``: high only where both directions are sure.

    It lies between the smaller probability and twice that, so one sure direction cannot make up for an unsure one.

    Args:
        forward: ``(F, E)``.
        backward: ``(E, F)``.

    Returns:
        ``(F, E)`` float32.
    """
    first, second = _both(forward, backward)
    product = csr_array(first.multiply(second))
    product.eliminate_zeros()
    pairs = product.tocoo()
    product.data *= 2 / np.asarray((first + second)[pairs.row, pairs.col]).ravel()
    return product


def _both(forward: csr_array, backward: csr_array) -> tuple[csr_array, csr_array]:
    if forward.shape != backward.shape[::-1]:
        raise ValueError(
            f"backward must be {forward.shape[::-1]} for a forward of {forward.shape}, got {backward.shape}"
        )
    return _without_null(forward), _without_null(csr_array(backward.T))


def _without_null(table: csr_array) -> csr_array:
    pairs = table.tocoo()
    kept = (pairs.row != NULL) & (pairs.col != NULL)
    return csr_array((pairs.data[kept], (pairs.row[kept], pairs.col[kept])), shape=table.shape)
