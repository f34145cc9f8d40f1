"""Vectors of tokens from a text alone: what they stand beside, and how much more often than by chance.

They serve as a donor when the donor is a tokenizer without a model. Counts of neighbours become positive pointwise
mutual information, and a truncated singular value decomposition makes short vectors of its rows: what skip-gram does
implicitly, without an hour of training.

Shape letters: V = ids of the vocabulary, F = width of the vectors, M = tokens of a block, U = distinct pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array, diags_array
from scipy.sparse.linalg import svds

from soju.core.errors import UserError

BLOCK = 2**20
"""Tokens counted at once."""
SMOOTHING = 0.75
"""Exponent on the counts of neighbours: keeps rare ones from being everybody's closest (Levy et al. 2015)."""


def cooccurrence_vectors(
    texts: Iterable[Sequence[int]],
    vocabulary_size: int,
    *,
    width: int = 256,
    window: int = 5,
    max_pairs: int = 2**26,
    seed: int = 0,
) -> NDArray[np.float32]:
    """Make a vector of each id from the texts that hold it.

    Args:
        texts: Ids of each text; read once, never held. Windows end where texts do.
        vocabulary_size: One more than the largest id.
        width: Of the vectors; at most one less than the number of ids that occur.
        window: How far away, in tokens, a neighbour may be.
        max_pairs: When more distinct pairs than this were met, those met least often are forgotten until no more are
            left. Bounds the memory: 16 bytes a pair, and what one block of text adds.
        seed: Of the first vector of the iteration. It may turn the vectors, never what is alike.

    Returns:
        ``(V, F)`` float32; zeros for ids without neighbours. Signs are such that the largest number of each column is
        positive, so the same texts give the same vectors.

    Raises:
        UserError: If hardly any ids occur together.

    References:
        Levy and Goldberg 2014, Neural Word Embedding as Implicit Matrix Factorization; Levy et al. 2015, Improving
        Distributional Similarity with Lessons Learned from Word Embeddings.
    """
    counts_VV = count_neighbours(texts, vocabulary_size, window=window, max_pairs=max_pairs)
    present = np.flatnonzero(np.diff(counts_VV.indptr))
    if len(present) < 3:
        raise UserError("the corpus holds fewer than three different tokens side by side; give more text")
    ppmi = positive_pmi(csr_array(counts_VV[present][:, present]))
    rank = min(width, len(present) - 1)
    start = np.random.default_rng(seed).standard_normal(len(present))
    left, scale, _ = svds(ppmi.astype(np.float64), k=rank, v0=start)
    order = np.argsort(-scale)
    left, scale = left[:, order], scale[order]
    left *= np.sign(left[np.abs(left).argmax(axis=0), np.arange(rank)])
    vectors_VF = np.zeros((vocabulary_size, rank), np.float32)
    vectors_VF[present] = left * np.sqrt(scale)  # the root, not the scale: better for similarity (Levy et al. 2015)
    return vectors_VF


def count_neighbours(texts: Iterable[Sequence[int]], vocabulary_size: int, *, window: int, max_pairs: int) -> csr_array:
    """Count how often two ids stand at most `window` tokens apart; symmetric, ``(V, V)``."""
    keys_U, counts_U = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for ids_M, text_M in _blocks(texts):
        if ids_M.min(initial=0) < 0 or ids_M.max(initial=0) >= vocabulary_size:
            raise ValueError(f"ids must be in [0, {vocabulary_size})")
        met = [_pair_keys(ids_M, text_M, distance, vocabulary_size) for distance in range(1, window + 1)]
        new_keys, new_counts = np.unique(np.concatenate(met), return_counts=True)
        keys_U, place = np.unique(np.concatenate([keys_U, new_keys]), return_inverse=True)
        counts_U = np.bincount(place, np.concatenate([counts_U, new_counts]), len(keys_U)).astype(np.int64)
        while len(keys_U) > max_pairs:
            often_U = counts_U > counts_U.min()
            keys_U, counts_U = keys_U[often_U], counts_U[often_U]
    low_U, high_U = np.divmod(keys_U, vocabulary_size)
    half_VV = csr_array(coo_array((counts_U.astype(np.float64), (low_U, high_U)), shape=(vocabulary_size,) * 2))
    return csr_array(half_VV + half_VV.T)


def positive_pmi(counts: csr_array) -> csr_array:
    """Return ``max(0, log(p(v, w) / (p(v) p'(w))))`` where counts are, with ``p'`` from counts to the power of 0.75."""
    sums = counts.sum(axis=1)
    smoothed = sums**SMOOTHING
    chance = diags_array(1 / sums) @ counts @ diags_array(smoothed.sum() / smoothed)
    chance = csr_array(chance)
    chance.data = np.maximum(np.log(chance.data), 0)
    chance.eliminate_zeros()
    return chance


def _blocks(texts: Iterable[Sequence[int]]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield ids of many texts in a row, and the number of each one's text; a text is never cut."""
    held: list[NDArray[np.int64]] = []
    size = 0
    for text in texts:
        held.append(np.asarray(text, np.int64))
        size += len(held[-1])
        if size >= BLOCK:
            yield _joined(held)
            held, size = [], 0
    if size:
        yield _joined(held)


def _joined(held: list[NDArray[np.int64]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return np.concatenate(held), np.repeat(np.arange(len(held)), [len(text) for text in held])


def _pair_keys(
    ids_M: NDArray[np.int64], text_M: NDArray[np.int64], distance: int, vocabulary_size: int
) -> NDArray[np.int64]:
    """Return one number for each pair of ids at this distance in one text, whichever comes first."""
    left, right = ids_M[:-distance], ids_M[distance:]
    inside = text_M[:-distance] == text_M[distance:]
    left, right = left[inside], right[inside]
    return np.minimum(left, right) * vocabulary_size + np.maximum(left, right)
