"""Hidden Markov word alignment of both directions at once, from tables of IBM Model 1.

Shape letters: S = sentence pairs, N/M = source/target tokens, K = candidate (source, target) word pairs, F/E =
source/target words, D = jump classes.

Both directions share one list of candidates, so one look-up a token pair serves both. Memory: 16 bytes a candidate and
shard, 16 bytes a candidate, 4 bytes a token pair of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from soju.alignment.bitext import NULL, Bitext, Ids
from soju.alignment.hmm_counts import Candidates, Counts, Direction, count_links
from soju.alignment.ibm1 import TranslationTable

SHARDS = 4
"""Parts of the bitext whose counts are added up in order; fixed, so that the result does not depend on the threads."""
_SMALLEST_NULL = 1e-10
_SMALLEST_LINK = 1e-7
"""A candidate that falls below is out: numbers that fade away for ever are slow to compute with."""


def train_hmm(
    bitext: Bitext,
    forward: TranslationTable,
    backward: TranslationTable,
    *,
    iterations: int = 3,
    agree: bool = True,
    p0: float = 0.2,
    prune: float = 1e-3,
    longest_jump: int = 7,
    threads: int = 2,
    on_iteration: Callable[[int, float, float], None] | None = None,
) -> tuple[TranslationTable, TranslationTable]:
    """Refine tables of IBM Model 1 by where words stand.

    Args:
        bitext: The pairs both tables were trained on.
        forward: ``t(target | source)`` to start from.
        backward: ``t(source | target)`` to start from, trained on ``bitext.reversed()``.
        iterations: Rounds of expectation maximisation, >= 1.
        agree: Count a link with the product of its posteriors in both directions, so that each direction learns from
            links the other believes in, too. Without it the directions are independent and their log-likelihoods never
            fall.
        p0: Probability that a token has no counterpart, in (0, 1), not learnt.
        prune: A word pair is a candidate when its probability is at least this in one of the directions.
        longest_jump: Jumps of this length and longer are one class, >= 1.
        threads: Threads, >= 1. The result does not depend on it.
        on_iteration: Called with the iteration (from 1) and the mean log-likelihood per generated token in nats, of
            the forward and of the backward parameters the iteration started from.

    Returns:
        Forward and backward table.

    Raises:
        ValueError: If a setting is out of its range, or the tables do not fit the bitext.

    References:
        See `hmm_sentence`. Liang, Taskar and Klein 2006, "Alignment by Agreement" (``agree``). Hunter 2004, "MM
        Algorithms for Generalized Bradley-Terry Models" (the update of the jump weights).
    """
    _check(bitext, forward, backward, iterations=iterations, p0=p0, longest_jump=longest_jump, threads=threads)
    candidates, directions = _start(forward, backward, prune=prune, classes=2 * longest_jump + 1)
    cuts = [len(bitext) * shard // SHARDS for shard in range(SHARDS + 1)]
    with ThreadPoolExecutor(threads) as pool:
        for iteration in range(1, iterations + 1):

            def count(shard: int, directions: tuple[Direction, Direction] = directions) -> tuple[Counts, Counts]:
                sentences = range(cuts[shard], cuts[shard + 1])
                return count_links(bitext, candidates, directions, sentences, p0=p0, agree=agree)

            ahead, back = zip(*pool.map(count, range(SHARDS)), strict=True)
            both = _add(ahead), _add(back)
            if on_iteration is not None:
                tokens = (np.diff(bitext.target_offsets), np.diff(bitext.source_offsets) - 1)
                means = [c.log_likelihood / np.dot(bitext.weights_S, n) for c, n in zip(both, tokens, strict=True)]
                on_iteration(iteration, float(means[0]), float(means[1]))
            directions = (
                _maximise(both[0], directions[0], candidates.sources_K),
                _maximise(both[1], directions[1], candidates.targets_K),
            )
    return _tables(candidates, *directions)


def _check(
    bitext: Bitext,
    forward: TranslationTable,
    backward: TranslationTable,
    *,
    iterations: int,
    p0: float,
    longest_jump: int,
    threads: int,
) -> None:
    for name, value in (("iterations", iterations), ("longest_jump", longest_jump), ("threads", threads)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if not 0 < p0 < 1:
        raise ValueError(f"p0 must be between 0 and 1, both excluded, got {p0}")
    shape = (bitext.source_size, bitext.target_size)
    for name, table, expected in (("forward", forward, shape), ("backward", backward, shape[::-1])):
        actual = (len(table.row_offsets) - 1, table.target_size)
        if actual != expected:
            raise ValueError(f"the {name} table must be {expected} for this bitext, got {actual}")


def _start(
    forward: TranslationTable, backward: TranslationTable, *, prune: float, classes: int
) -> tuple[Candidates, tuple[Direction, Direction]]:
    """Prune the tables to one list of candidates; jumps start with ``1 / (1 + |jump - 1|)``, one step ahead first."""
    ahead, back = forward.to_csr(), csr_array(backward.to_csr().T)
    kept = (ahead >= max(prune, _SMALLEST_LINK)) + (back >= max(prune, _SMALLEST_LINK))
    pairs = kept.tocoo()
    real = (pairs.row != NULL) & (pairs.col != NULL)
    rows, columns = pairs.row[real], pairs.col[real]
    order = np.lexsort((columns, rows))
    rows, columns = rows[order], columns[order]
    row_offsets = np.searchsorted(rows, np.arange(ahead.shape[0] + 1)).astype(np.int64)
    jumps_D = 1.0 / (1.0 + np.abs(np.arange(classes) - classes // 2 - 1.0))

    def direction(table: csr_array, null: NDArray[np.float32]) -> Direction:
        probabilities_K = np.asarray(table[rows, columns], np.float32).ravel()
        return Direction(probabilities_K, np.maximum(null.astype(np.float64), _SMALLEST_NULL), jumps_D / jumps_D.sum())

    candidates = Candidates(row_offsets, columns.astype(np.int32), *ahead.shape)
    return candidates, (direction(ahead, ahead[[NULL]].toarray()[0]), direction(back, back[:, [NULL]].toarray()[:, 0]))


def _add(parts: tuple[Counts, ...]) -> Counts:
    return Counts(
        np.sum([part.links_K for part in parts], axis=0),
        np.sum([part.null for part in parts], axis=0),
        np.sum([part.made_D for part in parts], axis=0),
        np.sum([part.chances_D for part in parts], axis=0),
        sum(part.log_likelihood for part in parts),
    )


def _maximise(counts: Counts, old: Direction, generating_K: Ids) -> Direction:
    """M-step. A jump weight is ``made / chances``, which never lowers the likelihood; classes nobody could use stay."""
    totals_K = np.bincount(generating_K, counts.links_K)[generating_K]
    probabilities_K = np.divide(counts.links_K, totals_K, out=np.zeros_like(totals_K), where=totals_K > 0)
    probabilities_K[probabilities_K < _SMALLEST_LINK] = 0
    jumps_D = np.divide(counts.made_D, counts.chances_D, out=old.jumps_D.copy(), where=counts.made_D > 0)
    null_total = counts.null.sum()
    null = counts.null / null_total if null_total > 0 else old.null
    return Direction(probabilities_K.astype(np.float32), np.maximum(null, _SMALLEST_NULL), jumps_D / jumps_D.sum())


def _tables(candidates: Candidates, ahead: Direction, back: Direction) -> tuple[TranslationTable, TranslationTable]:
    """Put the NULL rows back in front and drop what became 0."""
    sources_K, targets_K = candidates.sources_K, candidates.targets_K
    return (
        _table(ahead, sources_K, targets_K, candidates.source_size, candidates.target_size),
        _table(back, targets_K, sources_K, candidates.target_size, candidates.source_size),
    )


def _table(direction: Direction, generating_K: Ids, generated_K: Ids, rows: int, columns: int) -> TranslationTable:
    by_null = np.flatnonzero(direction.null > _SMALLEST_NULL)
    kept = direction.probabilities_K > 0
    row = np.concatenate((np.full(len(by_null), NULL), generating_K[kept]))
    column = np.concatenate((by_null, generated_K[kept])).astype(np.int32)
    values = np.concatenate((direction.null[by_null], direction.probabilities_K[kept])).astype(np.float32)
    order = np.lexsort((column, row))
    row_offsets = np.searchsorted(row[order], np.arange(rows + 1)).astype(np.int64)
    return TranslationTable(row_offsets, column[order], values[order], columns)
