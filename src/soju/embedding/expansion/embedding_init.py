"""Where do the rows of new tokens start? Six ways to make them from the old rows.

``mean``: the mean of the old rows a token was spelled with. ``weighted_mean``: the same, weighted by position. ``omp``:
what adds up to the donor's vector of the token, added up from the base's rows. ``focus``: the rows of tokens the donor
finds alike. ``aligned``: the rows of the tokens that translate it in sentence pairs. ``noise``: a random row, the
control. A token the donor has no vector for, or no pair a translation, gets its mean.

Shape letters: V = old tokens, D = width of the embedding, N = new tokens, P = old tokens of all new ones in a row,
B = new tokens of a chunk, K = old rows that one new row is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from soju.core.errors import UserError
from soju.embedding.expansion.donor_vectors import DonorVectors
from soju.embedding.expansion.matching_pursuit import chunk_size, matching_pursuit
from soju.embedding.expansion.similarity_weights import similarity_weights

Initialiser = Literal["mean", "weighted_mean", "omp", "focus", "aligned", "noise"]
INITIALISERS: tuple[Initialiser, ...] = get_args(Initialiser)
NEED_DONOR = ("omp", "focus")
NEED_PAIRS = ("aligned",)
Side = Literal["input", "output"]

GROWTH = 2.0
"""A piece weighs exp(2) times the one before it (AdaptiVocab)."""
RARE = 1e-3
"""Share of the text at which a piece weighs half (Arora et al. 2017)."""
SPARSITY = 64
"""Anchors of one token in ``omp``."""
CHUNK = 2**24
"""Numbers gathered at once: 64 MiB of float32."""


def initialise(
    old_VD: Tensor,
    decompositions: Sequence[Sequence[int]],
    method: Initialiser = "mean",
    *,
    donor: DonorVectors | None = None,
    counts: Tensor | None = None,
    translations: csr_array | None = None,
    side: Side = "input",
    rescale: bool = False,
    sparsity: int = SPARSITY,
    seed: int = 0,
) -> Tensor:
    """Make a row for every new token. Call it a second time for an output embedding that is not tied.

    Args:
        old_VD: The old rows, of any float type; not changed.
        decompositions: The old ids each new token was spelled with, none empty.
        method: One of `INITIALISERS`.
        donor: For ``omp`` and ``focus``.
        counts: How often each old id occurs in a text, ``(V,)``, for ``weighted_mean``: common pieces, such as parts of
            characters, then weigh less.
        translations: For ``aligned``: ``(N, V)``, how likely an old token is the translation of a new one. Rows sum to
            1, or to 0 where there is no translation. A new row is as long as its translations are on average.
        side: Which matrix the rows are of. ``weighted_mean`` weighs the last piece most on the input side: there a
            causal model has read the whole word. On the output side it weighs the first one most, which is the one
            that the model had to predict. With a tied matrix ask for the input side.
        rescale: Give each row the mean norm of the old rows it was spelled with. Off, because a longer row is no better
            aimed: a mean of rows that disagree is short, and says so. See docs/embedding_modules.md.
        sparsity: How many anchors ``omp`` adds up.
        seed: For ``noise``.

    Returns:
        ``(N, D)`` float32 on the device of the old rows. Memory beyond it does not grow with N.

    Raises:
        ValueError: If a decomposition is empty or names an id that is none, or shapes do not fit.
        UserError: If the method needs a donor or translations and there are none, or it is no method.

    References:
        AdaptiVocab: Nakash et al. 2025, arXiv:2503.19693. OMP: Goddard and Fernandes Neto 2025, arXiv:2506.06607.
        FOCUS: Dobler and de Melo 2023, arXiv:2305.14481. Weights of common words: Arora et al. 2017, A Simple but
        Tough-to-Beat Baseline for Sentence Embeddings. Rows by word alignment: Remy et al. 2024, Trans-Tokenization and
        Cross-lingual Vocabulary Transfers, arXiv:2408.04303.
    """
    if method not in INITIALISERS:
        raise UserError(f"initialiser {method!r} is none of {', '.join(INITIALISERS)}")
    pieces = _pieces(decompositions, len(old_VD))
    if method == "noise":
        new_ND = _noise(old_VD, len(decompositions), seed)
    elif method == "weighted_mean":
        new_ND = _sums(old_VD, pieces, _position_weights(pieces, side) * _rarity_weights(pieces, counts, len(old_VD)))
    else:
        new_ND = _sums(old_VD, pieces, torch.ones(len(pieces.ids_P)))
    if method in NEED_DONOR:
        _from_donor(new_ND, old_VD, method, donor, sparsity)
    if method in NEED_PAIRS:
        _from_translations(new_ND, old_VD, translations)
    if rescale:
        new_ND *= (_mean_norms(old_VD, pieces) / new_ND.norm(dim=1).clamp_min(1e-12))[:, None]
    return new_ND


class _Pieces(NamedTuple):
    ids_P: Tensor
    length_N: Tensor
    start_N: Tensor
    place_P: Tensor
    """Place of each piece in its token, from 0."""


def _pieces(decompositions: Sequence[Sequence[int]], size: int) -> _Pieces:
    length_N = torch.tensor([len(ids) for ids in decompositions], dtype=torch.long)
    if len(length_N) and int(length_N.min()) == 0:
        raise ValueError(f"new token {int(length_N.argmin())} has no old tokens; every new token needs its spelling")
    ids_P = torch.tensor(list(chain.from_iterable(decompositions)), dtype=torch.long)
    if len(ids_P) and not 0 <= int(ids_P.min()) <= int(ids_P.max()) < size:
        least, most = int(ids_P.min()), int(ids_P.max())
        raise ValueError(f"decompositions name ids in [{least}, {most}], old ids are below {size}")
    start_N = length_N.cumsum(0) - length_N
    return _Pieces(ids_P, length_N, start_N, torch.arange(len(ids_P)) - start_N.repeat_interleave(length_N))


def _position_weights(pieces: _Pieces, side: Side) -> Tensor:
    from_last_P = pieces.length_N.repeat_interleave(pieces.length_N) - 1 - pieces.place_P
    return torch.exp(-GROWTH * (from_last_P if side == "input" else pieces.place_P))


def _rarity_weights(pieces: _Pieces, counts: Tensor | None, size: int) -> Tensor:
    if counts is None:
        return torch.ones(len(pieces.ids_P))
    if counts.shape != (size,):
        raise ValueError(f"counts must be ({size},), one for each old id, got {tuple(counts.shape)}")
    share_V = counts.double().cpu() / counts.sum().clamp_min(1).cpu()
    return (RARE / (RARE + share_V)).float()[pieces.ids_P]


def _sums(old_VD: Tensor, pieces: _Pieces, weight_P: Tensor) -> Tensor:
    """Return the weighted means of rows; the weights of each token are made to sum to one."""
    if not len(pieces.length_N):
        return old_VD.new_empty(0, old_VD.shape[1], dtype=torch.float32)
    total_N = torch.segment_reduce(weight_P, "sum", lengths=pieces.length_N)
    weight_P = weight_P / total_N.repeat_interleave(pieces.length_N)
    new_ND = torch.empty(len(pieces.length_N), old_VD.shape[1], device=old_VD.device)
    for tokens, span in _chunks(pieces, old_VD.shape[1]):
        row_PD = old_VD[pieces.ids_P[span].to(old_VD.device)].float() * weight_P[span, None].to(old_VD.device)
        new_ND[tokens] = torch.segment_reduce(row_PD, "sum", lengths=pieces.length_N[tokens].to(old_VD.device))
    return new_ND


def _mean_norms(old_VD: Tensor, pieces: _Pieces) -> Tensor:
    norm_N = torch.empty(len(pieces.length_N), device=old_VD.device)
    for tokens, span in _chunks(pieces, old_VD.shape[1]):
        norm_P = old_VD[pieces.ids_P[span].to(old_VD.device)].float().norm(dim=1)
        norm_N[tokens] = torch.segment_reduce(norm_P, "mean", lengths=pieces.length_N[tokens].to(old_VD.device))
    return norm_N


def _chunks(pieces: _Pieces, width: int) -> Iterator[tuple[slice, slice]]:
    """Yield slices of new tokens and of their pieces, few enough to gather their rows."""
    if not len(pieces.length_N):
        return
    step = max(1, CHUNK // (width * int(pieces.length_N.max())))
    for first in range(0, len(pieces.length_N), step):
        last = min(first + step, len(pieces.length_N)) - 1
        yield (
            slice(first, last + 1),
            slice(int(pieces.start_N[first]), int(pieces.start_N[last] + pieces.length_N[last])),
        )


def _noise(old_VD: Tensor, count: int, seed: int) -> Tensor:
    """Draw rows with the mean and the variance that each dimension has in the old rows."""
    step = max(1, CHUNK // old_VD.shape[1])
    sum_D = sum(old_VD[first : first + step].double().sum(dim=0) for first in range(0, len(old_VD), step))
    mean_D = torch.as_tensor(sum_D) / len(old_VD)
    square_D = sum(
        (old_VD[first : first + step].double() - mean_D).square().sum(dim=0) for first in range(0, len(old_VD), step)
    )
    deviation_D = (torch.as_tensor(square_D) / len(old_VD)).sqrt()
    drawn_ND = torch.randn(count, old_VD.shape[1], generator=torch.Generator().manual_seed(seed)).to(old_VD.device)
    return drawn_ND.mul_(deviation_D.float()).add_(mean_D.float())


def _from_donor(new_ND: Tensor, old_VD: Tensor, method: str, donor: DonorVectors | None, sparsity: int) -> None:
    """Overwrite the rows of the tokens that the donor has a vector for."""
    if donor is None:
        raise UserError(f"initialiser {method} needs vectors of a donor; give a donor with weights, or a corpus")
    if len(donor.known_N) != len(new_ND):
        raise ValueError(f"the donor's vectors are of {len(donor.known_N):,} new tokens, not of {len(new_ND):,}")
    if not bool(donor.known_N.any()):
        return
    solve: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    if method == "omp":
        step, solve = chunk_size(donor.anchor_AF, sparsity), partial(matching_pursuit, sparsity=sparsity)
    else:
        step, solve = max(1, CHUNK // len(donor.anchor_AF)), similarity_weights
    for token_B in torch.split(donor.known_N.nonzero().squeeze(1), step):
        index_BK, weight_BK = solve(donor.new_NF[token_B], donor.anchor_AF)
        new_ND[token_B] = _combine(old_VD, donor.anchor_ids_A[index_BK], weight_BK)


def _from_translations(new_ND: Tensor, old_VD: Tensor, translations: csr_array | None) -> None:
    """Overwrite the rows of the tokens that have a translation."""
    if translations is None:
        raise UserError("initialiser aligned needs translations; give sentence pairs")
    if translations.shape != (len(new_ND), len(old_VD)):
        raise ValueError(f"translations must be ({len(new_ND)}, {len(old_VD)}), got {translations.shape}")
    step = max(1, CHUNK // old_VD.shape[1])
    for first in range(0, len(new_ND), step):
        part_BV = translations[first : first + step]
        used_K = np.unique(part_BV.indices)
        used_KD = old_VD[torch.from_numpy(used_K.astype(np.int64)).to(old_VD.device)].float().cpu()
        weight_BK = csr_array(part_BV[:, used_K])
        sum_BD = torch.from_numpy(weight_BK @ used_KD.numpy())
        length_B = torch.from_numpy(weight_BK @ used_KD.norm(dim=1).numpy())
        sum_BD *= (length_B / sum_BD.norm(dim=1).clamp_min(1e-12))[:, None]
        known_B = torch.from_numpy(np.diff(part_BV.indptr) > 0).to(new_ND.device)
        new_ND[first : first + step][known_B] = sum_BD.to(new_ND.device)[known_B]


def _combine(old_VD: Tensor, ids_BK: Tensor, weight_BK: Tensor) -> Tensor:
    """Return ``sum_k weight_bk * old[ids_bk]`` in chunks."""
    step = max(1, CHUNK // (ids_BK.shape[1] * old_VD.shape[1]))
    parts = zip(torch.split(ids_BK, step), torch.split(weight_BK, step), strict=True)
    device = old_VD.device
    return torch.cat([weight[:, None].to(device) @ old_VD[ids.to(device)].float() for ids, weight in parts]).squeeze(1)
