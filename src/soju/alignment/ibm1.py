"""IBM Model 1 by expectation maximisation, one source word at a time.

Shape letters: S = sentence pairs, N/M = source/target tokens, K = (source, target) word pairs that occur together.

The usual loop looks every token pair up in a table. Here each source word scatters its row of the table into one dense
row, walks the sentences it occurs in, and gathers the row back: no look-up, no hash, and cost linear in token pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.special import digamma

from soju.alignment.bitext import Bitext, Floats, Ids, Offsets


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
    """Where each source word occurs: word f owns ``sentences[offsets[f]:offsets[f + 1]]``, repeats included."""

    offsets: Offsets
    sentences: Ids


def find_postings(bitext: Bitext) -> Postings:
    """Sort the source tokens by word, keeping the order of sentences."""
    sentence_of_N = np.repeat(np.arange(len(bitext), dtype=np.int32), np.diff(bitext.source_offsets))
    order = np.argsort(bitext.source_N, kind="stable")
    offsets = np.zeros(bitext.source_size + 1, np.int64)
    np.cumsum(np.bincount(bitext.source_N, minlength=bitext.source_size), out=offsets[1:])
    return Postings(offsets, sentence_of_N[order])


def train_ibm1(
    bitext: Bitext,
    *,
    iterations: int = 6,
    prior: float = 0.0,
    on_iteration: Callable[[int, float], None] | None = None,
) -> TranslationTable:
    """Learn ``t(target | source)`` from sentence pairs.

    Args:
        bitext: The pairs, `NULL` in front of every source sentence.
        iterations: Rounds of expectation maximisation, >= 1, from the uniform table.
        prior: Concentration of a symmetric Dirichlet prior over the targets seen with a source word; 0 is maximum
            likelihood, about 0.01 keeps rare source words from collecting whatever stands beside them.
        on_iteration: Called with the iteration (from 1) and the mean log-likelihood per target token in nats, of the
            table the iteration started from.

    Returns:
        The table of the last iteration.

    References:
        Brown et al. 1993, "The Mathematics of Statistical Machine Translation" (Model 1). Riley and Gildea 2012,
        "Improving the IBM Alignment Models Using Variational Bayes" (the prior).
    """
    if iterations < 1:
        raise ValueError(f"iterations must be >= 1, got {iterations}")
    postings = find_postings(bitext)
    row_offsets, targets_K = _cooccurring(
        postings.offsets, postings.sentences, bitext.target_M, bitext.target_offsets, bitext.target_size
    )
    probabilities_K = np.full(len(targets_K), 1.0 / bitext.target_size, np.float32)
    source_lengths_S = np.diff(bitext.source_offsets).astype(np.float32)
    target_weights_M = np.repeat(bitext.weights_S, np.diff(bitext.target_offsets))
    target_sources_M = np.repeat(source_lengths_S, np.diff(bitext.target_offsets))
    for iteration in range(1, iterations + 1):
        counts_K, total_M = _expected_counts(
            postings.offsets,
            postings.sentences,
            bitext.target_M,
            bitext.target_offsets,
            bitext.weights_S,
            row_offsets,
            targets_K,
            probabilities_K,
            bitext.target_size,
        )
        if on_iteration is not None:
            log_likelihood = np.dot(target_weights_M, np.log(total_M / target_sources_M)) / target_weights_M.sum()
            on_iteration(iteration, float(log_likelihood))
        probabilities_K = normalise_rows(row_offsets, counts_K, prior=prior)
    return TranslationTable(row_offsets, targets_K, probabilities_K, bitext.target_size)


def normalise_rows(
    row_offsets: Offsets, counts_K: NDArray[np.float64], *, prior: float = 0.0
) -> Floats:
    """Turn expected counts into probabilities per row; with a prior, their variational estimate (sums below 1)."""
    rows = np.diff(row_offsets)
    cumulative = np.concatenate(([0.0], np.cumsum(counts_K)))
    totals = np.repeat(cumulative[row_offsets[1:]] - cumulative[row_offsets[:-1]], rows)
    if prior > 0:
        log_probabilities = digamma(counts_K + prior) - digamma(totals + prior * np.repeat(rows, rows))
        return np.exp(log_probabilities).astype(np.float32)
    return np.divide(counts_K, totals, out=np.zeros_like(counts_K), where=totals > 0).astype(np.float32)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _cooccurring(
    posting_offsets: Offsets, posting_sentences: Ids, target_M: Ids, target_offsets: Offsets, target_size: int
) -> tuple[Offsets, Ids]:
    """List, for every source word, the distinct target words of its sentences, ascending."""
    words = len(posting_offsets) - 1
    row_offsets = np.zeros(words + 1, np.int64)
    targets = np.empty(1 << 16, np.int32)
    seen_by = np.full(target_size, -1, np.int32)
    used = 0
    for word in range(words):
        start = used
        for p in range(posting_offsets[word], posting_offsets[word + 1]):
            sentence = posting_sentences[p]
            for m in range(target_offsets[sentence], target_offsets[sentence + 1]):
                target = target_M[m]
                if seen_by[target] != word:
                    seen_by[target] = word
                    if used == len(targets):
                        grown = np.empty(2 * len(targets), np.int32)
                        grown[:used] = targets
                        targets = grown
                    targets[used] = target
                    used += 1
        targets[start:used].sort()
        row_offsets[word + 1] = used
    return row_offsets, targets[:used].copy()


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _expected_counts(
    posting_offsets: Offsets,
    posting_sentences: Ids,
    target_M: Ids,
    target_offsets: Offsets,
    weights_S: Floats,
    row_offsets: Offsets,
    targets_K: Ids,
    probabilities_K: Floats,
    target_size: int,
) -> tuple[NDArray[np.float64], Floats]:
    """E-step: how often each word pair is expected to be aligned, and each target token's total probability."""
    words = len(posting_offsets) - 1
    row = np.zeros(target_size, np.float32)
    total_M = np.zeros(len(target_M), np.float32)
    for word in range(words):
        for k in range(row_offsets[word], row_offsets[word + 1]):
            row[targets_K[k]] = probabilities_K[k]
        for p in range(posting_offsets[word], posting_offsets[word + 1]):
            sentence = posting_sentences[p]
            for m in range(target_offsets[sentence], target_offsets[sentence + 1]):
                total_M[m] += row[target_M[m]]
    counts_K = np.zeros(len(targets_K), np.float64)
    mass = np.zeros(target_size, np.float64)
    for word in range(words):
        for k in range(row_offsets[word], row_offsets[word + 1]):
            mass[targets_K[k]] = 0.0
        for p in range(posting_offsets[word], posting_offsets[word + 1]):
            sentence = posting_sentences[p]
            weight = weights_S[sentence]
            for m in range(target_offsets[sentence], target_offsets[sentence + 1]):
                if total_M[m] > 0:
                    mass[target_M[m]] += weight / total_M[m]
        for k in range(row_offsets[word], row_offsets[word + 1]):
            counts_K[k] = mass[targets_K[k]] * probabilities_K[k]
    return counts_K, total_M
