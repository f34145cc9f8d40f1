"""IBM Model 1 by expectation maximisation, one source word at a time.

Shape letters: S = sentence pairs, N/M = source/target tokens, K = (source, target) word pairs that occur together,
E = target words.

The usual loop looks every token pair up in a table. Here each source word works on one dense row of the table, walks
the sentences it occurs in and gathers the row back: no look-up, no hash, and cost linear in token pairs. One sweep over
the words does the E-step of a round, its M-step, and the sentence totals of the next round, so that the expected counts
are never held for more than one word. Memory: 8 bytes a co-occurring word pair and 12 a target token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy.sparse import csr_array

from soju.alignment.bitext import Bitext, Floats, Ids, Offsets

_TINY = np.finfo(np.float32).tiny


@dataclass(frozen=True, slots=True)
class TranslationTable:
    """Sparse ``t(target | source)``: row f holds the targets seen with source word f, ascending."""

    row_offsets: Offsets
    targets_K: Ids
    probabilities_K: Floats
    target_size: int

    def to_csr(self) -> csr_array:
        """Return the table as ``(source_size, target_size)``; each row sums to at most 1."""
        shape = (len(self.row_offsets) - 1, self.target_size)
        return csr_array((self.probabilities_K, self.targets_K, self.row_offsets), shape=shape)


@dataclass(frozen=True, slots=True)
class Postings:
    """Where each word occurs: word f owns ``sentences[offsets[f]:offsets[f + 1]]``, repeats included."""

    offsets: Offsets
    sentences: Ids


def find_postings(ids: Ids, offsets: Offsets, *, size: int) -> Postings:
    """Sort the tokens of one side of a bitext by word, keeping the order of sentences."""
    sentence_of_token = np.repeat(np.arange(len(offsets) - 1, dtype=np.int32), np.diff(offsets))
    order = np.argsort(ids, kind="stable")
    posting_offsets = np.zeros(size + 1, np.int64)
    np.cumsum(np.bincount(ids, minlength=size), out=posting_offsets[1:])
    return Postings(posting_offsets, sentence_of_token[order])


def train_ibm1(
    bitext: Bitext,
    *,
    iterations: int = 6,
    prior: float = 0.0,
    on_iteration: Callable[[int, float], None] | None = None,
) -> TranslationTable:
    """Learn ``t(target | source)`` from sentence pairs.

    Each round adds ``weight * t(e | f) / sum_f' t(e | f')`` to the count of (f, e) for every token pair of a sentence,
    then divides the counts of each source word by their sum. Counts are added in float64 and in a fixed order: equal
    input gives equal bits.

    Args:
        bitext: The pairs, `NULL` in front of every source sentence.
        iterations: Rounds of expectation maximisation, >= 1, from the uniform table.
        prior: Concentration of a symmetric Dirichlet prior over the targets seen with a source word, >= 0; 0 is maximum
            likelihood, about 0.01 keeps rare source words from collecting whatever stands beside them.
        on_iteration: Called with the iteration (from 1) and the mean log-likelihood per target token in nats, of the
            table the iteration started from.

    Returns:
        The table of the last iteration.

    Raises:
        ValueError: If ``iterations`` is below 1 or ``prior`` is negative.

    References:
        Brown et al. 1993, "The Mathematics of Statistical Machine Translation" (Model 1). Riley and Gildea 2012,
        "Improving the IBM Alignment Models Using Variational Bayes" (the prior).
    """
    if iterations < 1:
        raise ValueError(f"iterations must be >= 1, got {iterations}")
    if not prior >= 0:
        raise ValueError(f"prior must be >= 0, got {prior}")
    postings = find_postings(bitext.source_N, bitext.source_offsets, size=bitext.source_size)
    row_offsets, targets_K = find_cooccurring(bitext)
    probabilities_K = np.full(len(targets_K), 1.0 / bitext.target_size, np.float32)
    target_lengths_S = np.diff(bitext.target_offsets)
    weights_M = np.repeat(bitext.weights_S, target_lengths_S)
    sources_M = np.repeat(np.diff(bitext.source_offsets).astype(np.float32), target_lengths_S)
    total_M = sources_M / np.float32(bitext.target_size)
    for iteration in range(1, iterations + 1):
        if on_iteration is not None:
            log_likelihood_M = np.log(np.maximum(total_M, _TINY) / sources_M, dtype=np.float64)
            on_iteration(iteration, float(np.dot(weights_M, log_likelihood_M) / weights_M.sum(dtype=np.float64)))
        share_M = np.divide(weights_M, total_M, out=np.zeros_like(total_M), where=total_M > 0)
        total_M[:] = 0
        _sweep(
            postings.offsets,
            postings.sentences,
            bitext.target_M.view(np.uint32),  # numba checks signed indices for being negative; unsigned are faster
            bitext.target_offsets,
            row_offsets,
            targets_K.view(np.uint32),
            share_M,
            prior,
            np.zeros(bitext.target_size),
            probabilities_K,
            total_M,
        )
    return TranslationTable(row_offsets, targets_K, probabilities_K, bitext.target_size)


def find_cooccurring(bitext: Bitext) -> tuple[Offsets, Ids]:
    """List, for every source word, the distinct target words of its sentences, ascending."""
    postings = find_postings(bitext.target_M, bitext.target_offsets, size=bitext.target_size)
    arrays = (postings.offsets, postings.sentences, bitext.source_N.view(np.uint32), bitext.source_offsets)
    row_offsets = np.zeros(bitext.source_size + 1, np.int64)
    np.cumsum(_count_cooccurring(*arrays, bitext.source_size), out=row_offsets[1:])
    targets_K = np.empty(row_offsets[-1], np.int32)
    _fill_cooccurring(*arrays, row_offsets[:-1].copy(), targets_K)
    return row_offsets, targets_K


@njit(cache=True, nogil=True)
def _count_cooccurring(
    posting_offsets: Offsets,
    posting_sentences: Ids,
    source_N: NDArray[np.uint32],
    source_offsets: Offsets,
    source_size: int,
) -> Offsets:
    """Count the distinct target words of each source word."""
    # Target words are visited one after the other, so the last one seen with a source word tells whether this one was
    # counted: one number a source word instead of a set of pairs.
    counts = np.zeros(source_size, np.int64)
    seen_with = np.full(source_size, -1, np.int32)
    for target in range(len(posting_offsets) - 1):
        for p in range(posting_offsets[target], posting_offsets[target + 1]):
            sentence = posting_sentences[p]
            for n in range(source_offsets[sentence], source_offsets[sentence + 1]):
                source = source_N[n]
                if seen_with[source] != target:
                    seen_with[source] = target
                    counts[source] += 1
    return counts


@njit(cache=True, nogil=True)
def _fill_cooccurring(
    posting_offsets: Offsets,
    posting_sentences: Ids,
    source_N: NDArray[np.uint32],
    source_offsets: Offsets,
    row_ends: Offsets,
    targets_K: Ids,
) -> None:
    """Write what `_count_cooccurring` counted; targets are visited in ascending order, so each row is sorted."""
    seen_with = np.full(len(row_ends), -1, np.int32)
    for target in range(len(posting_offsets) - 1):
        for p in range(posting_offsets[target], posting_offsets[target + 1]):
            sentence = posting_sentences[p]
            for n in range(source_offsets[sentence], source_offsets[sentence + 1]):
                source = source_N[n]
                if seen_with[source] != target:
                    seen_with[source] = target
                    targets_K[row_ends[source]] = target
                    row_ends[source] += 1


@njit(cache=True, nogil=True)
def _sweep(
    posting_offsets: Offsets,
    posting_sentences: Ids,
    target_M: NDArray[np.uint32],
    target_offsets: Offsets,
    row_offsets: Offsets,
    targets_K: NDArray[np.uint32],
    share_M: Floats,
    prior: float,
    row_E: NDArray[np.float64],
    probabilities_K: Floats,
    total_M: Floats,
) -> None:
    """Replace the table by that of the next round and add its total probability to every target token.

    Args:
        posting_offsets: See `Postings`, as the next one.
        posting_sentences: Sentences of each source word.
        target_M: Target tokens.
        target_offsets: ``(S + 1,)``.
        row_offsets: Row of each source word in the table.
        targets_K: Target words of the table.
        share_M: ``weight / sum_f t(e | f)`` of each target token under the old table.
        prior: See `train_ibm1`.
        row_E: Zeros, one a target word; zeros again at the end.
        probabilities_K: Old table in, new table out.
        total_M: Zeros in, ``sum_f t(e | f)`` of each target token under the new table out.
    """
    # After the sentences of one source word its counts are complete: nothing else adds to that row. So it can be
    # divided by its sum at once, and the new row be added to the totals that the next round divides by. Source words
    # come in order, hence so do the additions to each total: equal input gives equal bits. Sharing the words out to
    # threads would change the order of the float32 additions.
    for word in range(len(posting_offsets) - 1):
        first, last = posting_offsets[word], posting_offsets[word + 1]
        for p in range(first, last):
            sentence = posting_sentences[p]
            for m in range(target_offsets[sentence], target_offsets[sentence + 1]):
                row_E[target_M[m]] += share_M[m]  # t(e | f) of the old table is multiplied in below, once a word pair
        row = slice(row_offsets[word], row_offsets[word + 1])
        targets, probabilities = targets_K[row], probabilities_K[row]
        for k in range(len(targets)):
            row_E[targets[k]] *= probabilities[k]
            probabilities[k] = row_E[targets[k]]
        normalise_row(probabilities, prior)
        for k in range(len(targets)):
            row_E[targets[k]] = probabilities[k]
        for p in range(first, last):
            sentence = posting_sentences[p]
            for m in range(target_offsets[sentence], target_offsets[sentence + 1]):
                total_M[m] += row_E[target_M[m]]
        for k in range(len(targets)):  # all that was touched: the sentences hold no other target word
            row_E[targets[k]] = 0.0


@njit(cache=True, nogil=True)
def normalise_row(counts: Floats, prior: float) -> None:
    """Turn expected counts into probabilities in place; with a prior, their variational estimate (sum below 1)."""
    total = 0.0
    for k in range(len(counts)):
        total += counts[k]
    if prior > 0 and len(counts) > 0:
        log_total = _digamma(total + prior * len(counts))
        for k in range(len(counts)):
            counts[k] = math.exp(_digamma(counts[k] + prior) - log_total)
    elif total > 0:
        for k in range(len(counts)):
            counts[k] /= total


@njit(cache=True, nogil=True)
def _digamma(x: float) -> float:
    """Return the derivative of log gamma for x > 0: recurrence up to 6, then the asymptotic series."""
    below = 0.0
    while x < 6.0:
        below += 1.0 / x
        x += 1.0
    f = 1.0 / (x * x)
    return math.log(x) - 0.5 / x - f * (1 / 12 - f * (1 / 120 - f * (1 / 252 - f / 240))) - below
