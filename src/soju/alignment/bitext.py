"""Sentence pairs as flat arrays of token ids.

Shape letters: S = sentence pairs, N = source tokens in all pairs, M = target tokens in all pairs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
