"""Keyed noise: each draw is a pure function of what it is for, so a text does not depend on how it was computed.

A uniform number comes from an integer hash of (seed, epoch, row, position, role) and not from a generator with a state.
The block length, the batch, the order of the rows, padding, the number of ranks and a resume therefore change no draw.

Shape letters: B = rows, V = tokens of the vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor


class Role(IntEnum):
    """What a draw is for; both may happen at one position."""

    PROPOSE = 0
    REPLACE = 1


def row_keys(ids: Sequence[str | int]) -> NDArray[np.uint64]:
    """Hash the ids of rows to 64 bits; a number and its decimal digits are the same id.

    >>> row_keys(["tradition_001", 7])
    array([10495331279448069142,  9407870976149377255], dtype=uint64)
    """
    digests = [hashlib.blake2b(str(row).encode(), digest_size=8).digest() for row in ids]
    return np.array([int.from_bytes(digest, "little") for digest in digests], dtype=np.uint64)


def keyed_uniform(
    seed: int, epoch: int, keys: NDArray[np.uint64], positions: ArrayLike, role: Role
) -> NDArray[np.float64]:
    """Return a number in [0, 1) for each pair of row and position.

    Args:
        seed: >= 0.
        epoch: >= 0.
        keys: From `row_keys`.
        positions: Place of the token in its text, >= 0; broadcast against `keys`.
        role: What is drawn.

    Returns:
        Multiples of 2**-53, in the broadcast shape.
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        state = mix(np.uint64(seed))
        state = mix(state ^ np.uint64(epoch))
        states = mix(state ^ keys)
        states = mix(states ^ np.asarray(positions).astype(np.uint64))
        states = mix(states ^ np.uint64(role))
    return (states >> np.uint64(11)).astype(np.float64) * 2.0**-53


def mix(state: NDArray[np.uint64] | np.uint64) -> NDArray[np.uint64]:
    """Scramble 64 bits: one step of SplitMix64, in which each input bit flips about half of the output bits.

    References:
        Steele, Lea and Flood 2014, Fast splittable pseudorandom number generators.
    """
    with np.errstate(over="ignore"):
        x = np.asarray(state, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(x ^ (x >> np.uint64(31)), dtype=np.uint64)


def draw(logits_BV: Tensor, temperature: float, uniform_B: Tensor) -> Tensor:
    """Draw one token a row: the first whose cumulative probability exceeds the row's uniform number.

    Probabilities are summed in float64 in the order of the vocabulary: in float32 the sum over 150,000 tokens would
    move the limits between them. The sum is not normalised; its last value scales the uniform number instead.

    Args:
        logits_BV: ``(B, V)``, any float dtype; -inf for a token that must not be drawn.
        temperature: Divides the logits; 0 takes the largest.
        uniform_B: In [0, 1), float64, on the same device; not read at temperature 0.

    Returns:
        Token ids, ``(B,)``; -1 where the logits are not finite.
    """
    if temperature == 0:
        top_B = logits_BV.max(dim=-1)
        return top_B.indices.masked_fill(~torch.isfinite(top_B.values), -1)
    scaled_BV = logits_BV.double() / temperature
    scaled_BV -= scaled_BV.amax(dim=-1, keepdim=True)
    cumulative_BV = scaled_BV.exp_().cumsum(dim=-1)
    total_B = cumulative_BV[:, -1]
    tokens_B = torch.searchsorted(cumulative_BV, (uniform_B * total_B)[:, None], right=True).squeeze(1)
    # A parallel sum on a GPU need not be monotone in its last bits, so the search may run past the end.
    tokens_B = tokens_B.clamp_max(logits_BV.shape[-1] - 1)
    return tokens_B.masked_fill(~torch.isfinite(total_B), -1)
