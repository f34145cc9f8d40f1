"""Sentence pairs as flat arrays of token ids, and the table that both directions of an aligner become.

``forward`` is ``t(target | source)``, ``(F, E)``; ``backward`` is ``t(source | target)``, ``(E, F)``; both as
`TranslationTable.to_csr` returns them. Results are ``(F, E)`` float32 with an empty row and column for `NULL`, which
explains words but translates none. A direction errs on its own side: ``t(e | f)`` of a rare f spreads over all words
of its few sentences, while ``t(f | e)`` of the same words does not. What both directions support is mostly right.

Shape letters: S = sentence pairs, N = source tokens in all pairs, M = target tokens in all pairs, F = source words,
E = target words, V = terms of both languages; a table of terms is ``(V, V)``, row = source term, column = its
translation.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array

from soju.core.errors import UserError

Ids = NDArray[np.int32]
Offsets = NDArray[np.int64]
Floats = NDArray[np.float32]

NULL = 0
"""Source id that explains target tokens without a counterpart. `Bitext` puts it in front of every source sentence."""


@dataclass(frozen=True, slots=True)
class Bitext:
    """Aligned sentences of two languages; arrays may be memory-mapped, they are read in order."""

    source_N: Ids
    source_offsets: Offsets
    """``(S + 1,)``: pair s owns ``source_N[source_offsets[s]:source_offsets[s + 1]]``, its first token is `NULL`."""
    target_M: Ids
    target_offsets: Offsets
    weights_S: Floats
    """How often each pair counts, unitless, > 0."""
    source_size: int
    """Number of source ids, `NULL` included."""
    target_size: int

    def __len__(self) -> int:
        return len(self.weights_S)

    @property
    def token_pairs(self) -> int:
        """Number of (source token, target token) combinations: the unit of the aligner's cost."""
        return int(np.dot(np.diff(self.source_offsets), np.diff(self.target_offsets)))

    def reversed(self) -> Bitext:
        """Return the same pairs with source and target exchanged."""
        source_N, source_offsets = _with_null(self.target_M, self.target_offsets)
        target_M, target_offsets = _without_null(self.source_N, self.source_offsets)
        return Bitext(
            source_N=source_N,
            source_offsets=source_offsets,
            target_M=target_M,
            target_offsets=target_offsets,
            weights_S=self.weights_S,
            source_size=self.target_size,
            target_size=self.source_size,
        )


def make_bitext(
    pairs: Iterable[tuple[Ids, Ids, float]], *, source_size: int, target_size: int, max_tokens: int = 200
) -> Bitext:
    """Pack pairs of token ids.

    Args:
        pairs: Source ids, target ids, weight. Ids are >= 1 on both sides (0 is `NULL`) and below the sizes.
        source_size: Number of source ids, `NULL` included.
        target_size: Number of target ids, `NULL` included.
        max_tokens: Longer sides are cut here, so that one broken row cannot cost quadratic time.

    Returns:
        The pairs that have tokens on both sides, in the given order.

    Raises:
        UserError: If there is no pair with tokens on both sides.
        ValueError: If an id is out of range.
    """
    sources: list[Ids] = []
    targets: list[Ids] = []
    weights: list[float] = []
    for source, target, weight in pairs:
        if len(source) and len(target):
            sources.append(np.asarray(source[:max_tokens], np.int32))
            targets.append(np.asarray(target[:max_tokens], np.int32))
            weights.append(weight)
    if not sources:
        raise UserError("no pair has a known word on both sides, so there is nothing to align; check the training data")
    source_N, source_offsets = _pack(sources)
    target_M, target_offsets = _pack(targets)
    for name, ids, size in (("source", source_N, source_size), ("target", target_M, target_size)):
        if ids.min() < 1 or ids.max() >= size:
            raise ValueError(f"{name} ids must be in [1, {size}), got [{ids.min()}, {ids.max()}]")
    source_N, source_offsets = _with_null(source_N, source_offsets)
    return Bitext(
        source_N=source_N,
        source_offsets=source_offsets,
        target_M=target_M,
        target_offsets=target_offsets,
        weights_S=np.asarray(weights, np.float32),
        source_size=source_size,
        target_size=target_size,
    )


def _pack(sentences: list[Ids]) -> tuple[Ids, Offsets]:
    offsets = np.zeros(len(sentences) + 1, np.int64)
    np.cumsum([len(sentence) for sentence in sentences], out=offsets[1:])
    return np.concatenate(sentences), offsets


def _with_null(ids: Ids, offsets: Offsets) -> tuple[Ids, Offsets]:
    return np.insert(ids, offsets[:-1], NULL).astype(np.int32), offsets + np.arange(len(offsets))


def _without_null(ids: Ids, offsets: Offsets) -> tuple[Ids, Offsets]:
    return np.delete(ids, offsets[:-1]), offsets - np.arange(len(offsets))


def average(forward: csr_array, backward: csr_array) -> csr_array:
    """Return ``(t(e | f) + t(f | e)) / 2``: word pairs of either direction, the safest for recall."""
    first, second = _both(forward, backward)
    return csr_array((first + second) * np.float32(0.5))


def geometric_mean(forward: csr_array, backward: csr_array) -> csr_array:
    """Return ``sqrt(t(e | f) * t(f | e))``: word pairs of both directions.

    The root of the product of Liang et al. 2006, "Alignment by Agreement", so that values stay on the scale of
    probabilities.
    """
    first, second = _both(forward, backward)
    product = csr_array(first.multiply(second))
    product.data **= 0.5
    return product


def _both(forward: csr_array, backward: csr_array) -> tuple[csr_array, csr_array]:
    if forward.shape != backward.shape[::-1]:
        raise ValueError(
            f"backward must be {forward.shape[::-1]} for a forward of {forward.shape}, got {backward.shape}"
        )
    return _without_null_row(forward), _without_null_row(csr_array(backward.T))


def _without_null_row(table: csr_array) -> csr_array:
    pairs = table.tocoo()
    kept = (pairs.row != NULL) & (pairs.col != NULL)
    return csr_array((pairs.data[kept], (pairs.row[kept], pairs.col[kept])), shape=table.shape)


def dictionary_table(entries: Iterable[tuple[Ids, Ids, float]], *, size: int) -> csr_array:
    """Turn dictionary entries into a table.

    Args:
        entries: Terms of a head word, terms of one translation, similarity in (0, 1]. An entry of several terms shares
            ``similarity ** 2`` evenly among its term pairs, so that compounds say little about their parts.
        size: V.

    Returns:
        ``(V, V)`` float32, rows are head words; not normalised.
    """
    sources: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    for heads, translations, similarity in entries:
        for head in heads.tolist():
            for translation in translations.tolist():
                sources.append(head)
                targets.append(translation)
                weights.append(similarity**2 / (len(heads) * len(translations)))
    table = coo_array((np.array(weights, np.float32), (sources, targets)), shape=(size, size)).tocsr()
    table.sum_duplicates()
    return table


def mix(first: csr_array, second: csr_array, *, share: float) -> csr_array:
    """Return ``(1 - share) * first + share * second``, the rows of both normalised to sum 1 before.

    A row that only one table has is scaled by that table's share alone; `expansion_weights` looks at ratios within a
    row, so nothing is lost.
    """
    return (_rows_sum_to_one(first) * (1 - share) + _rows_sum_to_one(second) * share).tocsr()


def expansion_weights(table: csr_array, *, power: float = 0.7, confidence: float = 0.2) -> csr_array:
    """Turn translation probabilities into query weights.

    ``w = (p / p_best) ** power * p_best ** confidence`` with ``p_best`` the largest of the row: the best translation of
    a term counts nearly as much as the term itself, its alternatives follow, and a term with no clear translation
    counts less.

    Args:
        table: Probabilities, rows sum to at most 1.
        power: Below 1 lifts the alternatives.
        confidence: 0 ignores how sure the best translation is.

    Returns:
        Weights in [0, 1], same sparsity.
    """
    best_K = np.repeat(_row_maxima(table), np.diff(table.indptr))
    weights_K = (table.data / best_K) ** power * best_K**confidence
    return csr_array((weights_K.astype(np.float32), table.indices, table.indptr), shape=table.shape)


def prune_by_mass(table: csr_array, *, mass: float, min_weight: float = 0.0, max_terms: int | None = None) -> csr_array:
    """Keep, in each row, the fewest largest weights that hold `mass` of the row's sum.

    Args:
        table: Non-negative weights.
        mass: Share of each row's sum to keep, in (0, 1].
        min_weight: Weights below it go in any case.
        max_terms: At most so many weights a row.

    Returns:
        The pruned table; kept weights are unchanged. Equal weights are kept in column order.

    Raises:
        ValueError: If `mass` is outside (0, 1].
    """
    if not 0 < mass <= 1:
        raise ValueError(f"mass must be in (0, 1], got {mass}")
    rows_K = np.repeat(np.arange(table.shape[0]), np.diff(table.indptr))
    order = np.lexsort((table.indices, -table.data, rows_K))
    data_K = table.data[order].astype(np.float64)
    starts_K = table.indptr[rows_K]
    cumulative_K = np.cumsum(data_K)
    before_row = np.concatenate(([0.0], cumulative_K))[starts_K]
    kept_before_K = cumulative_K - data_K - before_row
    totals_K = np.concatenate(([0.0], cumulative_K))[table.indptr[rows_K + 1]] - before_row
    within_K = kept_before_K < mass * totals_K * (1 - 1e-9) if mass < 1 else data_K > 0
    keep_K = within_K & (data_K >= min_weight)
    if max_terms is not None:
        keep_K &= np.arange(len(data_K)) - starts_K < max_terms
    kept = order[keep_K]
    pruned = coo_array((table.data[kept], (rows_K[keep_K], table.indices[kept])), shape=table.shape).tocsr()
    pruned.sort_indices()
    return pruned


def _row_maxima(table: csr_array) -> NDArray[np.float32]:
    maxima = table.max(axis=1).toarray().ravel()
    return np.where(maxima > 0, maxima, 1).astype(np.float32)


def _rows_sum_to_one(table: csr_array) -> csr_array:
    sums = np.asarray(table.sum(axis=1)).ravel()
    sums[sums == 0] = 1
    return csr_array((table.data / np.repeat(sums, np.diff(table.indptr)), table.indices, table.indptr), table.shape)
