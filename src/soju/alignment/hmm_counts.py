"""Expected counts of the hidden Markov aligner over a part of a bitext.

Shape letters: S = sentence pairs, N/M = source/target tokens, K = candidate (source, target) word pairs, F/E =
source/target words, D = jump classes.

Pairs are read in blocks. The look-ups of a block are made word by word as in `ibm1`: a source word marks its candidates
in one dense row, then visits its sentences. Then each sentence runs forward and backward in both directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from soju.alignment.bitext import Bitext, Floats, Ids, Offsets
from soju.alignment.hmm_sentence import Doubles, Workspace, find_posteriors, make_workspace

_BLOCK_TOKEN_PAIRS = 1 << 20
_ABSENT = -1


@dataclass(frozen=True, slots=True)
class Candidates:
    """Word pairs that may be aligned, as rows of source words with ascending targets; `NULL` has no row."""

    row_offsets: Offsets
    targets_K: Ids
    source_size: int
    target_size: int

    @property
    def sources_K(self) -> Ids:
        """Source word of each candidate."""
        return np.repeat(np.arange(self.source_size, dtype=np.int32), np.diff(self.row_offsets))


@dataclass(frozen=True, slots=True)
class Direction:
    """Parameters of one direction."""

    probabilities_K: Floats
    """``t(generated | generating)`` of each candidate."""
    null: Doubles
    """``t(generated | NULL)`` of every word of the generated side; never 0, so that every sentence is possible."""
    jumps_D: Doubles
    """Weight of each jump class, unnormalised."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What the E-step adds up for one direction."""

    links_K: Doubles
    null: Doubles
    made_D: Doubles
    chances_D: Doubles
    log_likelihood: float


def count_links(
    bitext: Bitext,
    candidates: Candidates,
    directions: tuple[Direction, Direction],
    sentences: range,
    *,
    p0: float,
    agree: bool,
) -> tuple[Counts, Counts]:
    """E-step over some sentence pairs, forward and backward direction.

    Args:
        bitext: All pairs.
        candidates: Word pairs that may be aligned.
        directions: Parameters, forward then backward.
        sentences: The pairs to count.
        p0: Probability of NULL.
        agree: Count the product of the two posteriors of a link in both directions. NULL keeps its own posterior.

    Returns:
        Counts of the forward and the backward direction.
    """
    counts = [_zeros_like(direction) for direction in directions]
    log_likelihoods = _count(
        bitext.source_N,
        bitext.source_offsets,
        bitext.target_M,
        bitext.target_offsets,
        bitext.weights_S,
        candidates.row_offsets,
        candidates.targets_K,
        *((direction.probabilities_K, direction.null, direction.jumps_D) for direction in directions),
        sentences.start,
        sentences.stop,
        p0,
        agree,
        *counts,
    )
    ahead, back = counts
    return Counts(*ahead, log_likelihoods[0]), Counts(*back, log_likelihoods[1])


def _zeros_like(direction: Direction) -> tuple[Doubles, Doubles, Doubles, Doubles]:
    jumps = len(direction.jumps_D)
    return np.zeros(len(direction.probabilities_K)), np.zeros(len(direction.null)), np.zeros(jumps), np.zeros(jumps)


@njit(cache=True, nogil=True)
def _count(
    source_N: Ids,
    source_offsets: Offsets,
    target_M: Ids,
    target_offsets: Offsets,
    weights_S: Floats,
    row_offsets: Offsets,
    targets_K: Ids,
    ahead: tuple[Floats, Doubles, Doubles],
    back: tuple[Floats, Doubles, Doubles],
    start: int,
    stop: int,
    p0: float,
    agree: bool,
    ahead_counts: tuple[Doubles, Doubles, Doubles, Doubles],
    back_counts: tuple[Doubles, Doubles, Doubles, Doubles],
) -> tuple[float, float]:
    """Fill the counts of both directions; tuples are the fields of `Direction` and `Counts` in order."""
    longest_source = longest_target = 1
    for s in range(start, stop):
        longest_source = max(longest_source, source_offsets[s + 1] - source_offsets[s] - 1)
        longest_target = max(longest_target, target_offsets[s + 1] - target_offsets[s])
    work = make_workspace(longest_target, longest_source)
    mirror = make_workspace(longest_source, longest_target)
    marks_E = np.full(len(ahead[1]), _ABSENT, np.int32)
    slots = np.empty(_BLOCK_TOKEN_PAIRS + longest_source * longest_target, np.int32)
    ahead_total = back_total = 0.0
    while start < stop:
        end, used = start, 0
        while end < stop and used < _BLOCK_TOKEN_PAIRS:
            used += (source_offsets[end + 1] - source_offsets[end] - 1) * (
                target_offsets[end + 1] - target_offsets[end]
            )
            end += 1
        _find_slots(
            source_N, source_offsets, target_M, target_offsets, row_offsets, targets_K, start, end, marks_E, slots
        )
        used = 0
        for s in range(start, end):
            source = source_N[source_offsets[s] + 1 : source_offsets[s + 1]]
            target = target_M[target_offsets[s] : target_offsets[s + 1]]
            L, J, weight = len(source), len(target), weights_S[s]
            slots_LJ = slots[used : used + L * J].reshape(L, J)
            used += L * J
            _fill_emissions(work, mirror, slots_LJ, source, target, ahead, back)
            ahead_total += weight * find_posteriors(work, J, L, ahead[2], p0, weight, ahead_counts[2], ahead_counts[3])
            back_total += weight * find_posteriors(mirror, L, J, back[2], p0, weight, back_counts[2], back_counts[3])
            _add_links(work, mirror, slots_LJ, source, target, weight, agree, ahead_counts, back_counts)
        start = end
    return ahead_total, back_total


@njit(cache=True, nogil=True)
def _find_slots(
    source_N: Ids,
    source_offsets: Offsets,
    target_M: Ids,
    target_offsets: Offsets,
    row_offsets: Offsets,
    targets_K: Ids,
    start: int,
    end: int,
    marks_E: Ids,
    slots: Ids,
) -> None:
    """Write the candidate of every token pair of sentences [start, end), or `_ABSENT`, source tokens outermost."""
    first = source_offsets[start]
    tokens = source_offsets[end] - first
    sentence_of = np.empty(tokens, np.int64)
    slot_of = np.empty(tokens, np.int64)
    used = 0
    for s in range(start, end):
        null = source_offsets[s] - first
        sentence_of[null] = s
        for n in range(null + 1, source_offsets[s + 1] - first):
            sentence_of[n] = s
            slot_of[n] = used
            used += target_offsets[s + 1] - target_offsets[s]
    order = np.argsort(source_N[first : first + tokens], kind="mergesort")
    marked = 0
    for n in order:
        word = source_N[first + n]
        if word == 0:
            continue
        if word != marked:
            for k in range(row_offsets[marked], row_offsets[marked + 1]):
                marks_E[targets_K[k]] = _ABSENT
            for k in range(row_offsets[word], row_offsets[word + 1]):
                marks_E[targets_K[k]] = k
            marked = word
        s, slot = sentence_of[n], slot_of[n]
        for m in range(target_offsets[s], target_offsets[s + 1]):
            slots[slot] = marks_E[target_M[m]]
            slot += 1
    for k in range(row_offsets[marked], row_offsets[marked + 1]):
        marks_E[targets_K[k]] = _ABSENT


@njit(cache=True, nogil=True)
def _fill_emissions(
    work: Workspace,
    mirror: Workspace,
    slots_LJ: NDArray[np.int32],
    source: Ids,
    target: Ids,
    ahead: tuple[Floats, Doubles, Doubles],
    back: tuple[Floats, Doubles, Doubles],
) -> None:
    for j in range(len(target)):
        work.null[j] = ahead[1][target[j]]
    for i in range(len(source)):
        mirror.null[i] = back[1][source[i]]
        for j in range(len(target)):
            k = slots_LJ[i, j]
            if k == _ABSENT:
                work.emission[j, i] = 0.0
                mirror.emission[i, j] = 0.0
            else:
                work.emission[j, i] = ahead[0][k]
                mirror.emission[i, j] = back[0][k]


@njit(cache=True, nogil=True)
def _add_links(
    work: Workspace,
    mirror: Workspace,
    slots_LJ: NDArray[np.int32],
    source: Ids,
    target: Ids,
    weight: float,
    agree: bool,
    ahead_counts: tuple[Doubles, Doubles, Doubles, Doubles],
    back_counts: tuple[Doubles, Doubles, Doubles, Doubles],
) -> None:
    for j in range(len(target)):
        ahead_counts[1][target[j]] += weight * work.null_posterior[j]
    for i in range(len(source)):
        back_counts[1][source[i]] += weight * mirror.null_posterior[i]
        for j in range(len(target)):
            k = slots_LJ[i, j]
            if k != _ABSENT:
                first, second = work.posterior[j, i], mirror.posterior[i, j]
                if agree:
                    first = second = first * second
                ahead_counts[0][k] += weight * first
                back_counts[0][k] += weight * second
