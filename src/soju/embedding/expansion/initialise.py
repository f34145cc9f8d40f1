"""Which few atoms add up to a vector, and with what coefficients? Orthogonal matching pursuit, many vectors at once.

Shape letters: N = targets, B = targets of a chunk, A = atoms, K = atoms of one target, F = width.

Which anchors is a token like, and how much? Cosines, made sparse weights that sum to one.

Shape letters: B = tokens of a chunk, A = anchors, K = the most anchors any of these tokens has, F = width.

Vectors of tokens from a text alone: what they stand beside, and how much more often than by chance.

They serve as a donor when the donor is a tokenizer without a model. Counts of neighbours become positive pointwise
mutual information, and a truncated singular value decomposition makes short vectors of its rows: what skip-gram does
implicitly, without an hour of training.

Shape letters: V = ids of the vocabulary, F = width of the vectors, M = tokens of a block, U = distinct pairs.

What does another model know about the new tokens? Its vectors, and the tokens it shares with the base.

Shape letters: T = tokens of the donor, A = anchors (tokens of both models), N = new tokens, F = width of the vectors.

Where do the rows of new tokens start? Six ways to make them from the old rows.

``mean``: the mean of the old rows a token was spelled with. ``weighted_mean``: the same, weighted by position. ``omp``:
what adds up to the donor's vector of the token, added up from the base's rows. ``focus``: the rows of tokens the donor
finds alike. ``aligned``: the rows of the tokens that translate it in sentence pairs. ``noise``: a random row, the
control. A token the donor has no vector for, or no pair a translation, gets its mean.

Shape letters: V = old tokens, D = width of the embedding, N = new tokens, P = old tokens of all new ones in a row,
B = new tokens of a chunk, K = old rows that one new row is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Literal, NamedTuple, Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array, diags_array
from scipy.sparse.linalg import svds
from torch import Tensor
from torch.nn.functional import normalize

from soju.core.errors import UserError

DEPENDENT = 1e-4
"""An atom of norm 1 that has less than this outside the span of those chosen adds nothing but rounding errors."""


def matching_pursuit(target_BF: Tensor, atom_AF: Tensor, sparsity: int) -> tuple[Tensor, Tensor]:
    """Choose atoms greedily, and refit all coefficients by least squares after each choice.

    Each round takes the atom with the largest absolute cosine to what is left of the target. The chosen atoms are kept
    as an orthonormal basis and a triangle (a QR factorisation that grows by a column), so a refit is one projection.

    Args:
        target_BF: What to approximate, float32; a chunk, see `chunk_size`.
        atom_AF: Float32, no row of zeros, of any norms.
        sparsity: How many atoms at most; no more than there are atoms or dimensions are used.

    Returns:
        Indices of the atoms ``(B, K)`` in the order of choice, and their coefficients ``(B, K)``: the approximation is
        ``sum_k coefficient_bk * atom[index_bk]``. Where a target was met exactly earlier, the rest of its coefficients
        are zero.

    References:
        Pati et al. 1993, Orthogonal Matching Pursuit. For new rows of an embedding: Goddard and Fernandes Neto 2025,
        arXiv:2506.06607.
    """
    rounds = min(sparsity, *atom_AF.shape)
    unit_AF = normalize(atom_AF, dim=1)
    floor_B = DEPENDENT * target_BF.norm(dim=1)
    rest_BF = target_BF.clone()
    index_BK = torch.zeros(len(target_BF), rounds, dtype=torch.long, device=target_BF.device)
    basis_BKF = target_BF.new_zeros(len(target_BF), rounds, target_BF.shape[1])
    triangle_BKK = torch.eye(rounds, device=target_BF.device).repeat(len(target_BF), 1, 1)
    for k in range(rounds):
        score_BA = (rest_BF @ unit_AF.T).abs_().scatter_(1, index_BK[:, :k], -1.0)
        best_B1, index_B1 = score_BA.max(dim=1, keepdim=True)
        atom_BF = unit_AF[index_B1.squeeze(1)]
        along_BK, outside_BF = _split(basis_BKF[:, :k], atom_BF)
        norm_B1 = outside_BF.norm(dim=1, keepdim=True)
        useful_B1 = (norm_B1 > DEPENDENT) & (best_B1 > floor_B[:, None])
        index_BK[:, k] = index_B1.squeeze(1)
        basis_BKF[:, k] = torch.where(useful_B1, outside_BF / norm_B1.clamp_min(DEPENDENT), 0.0)
        triangle_BKK[:, :k, k] = along_BK
        triangle_BKK[:, k, k] = torch.where(useful_B1, norm_B1, 1.0).squeeze(1)
        rest_BF = rest_BF - basis_BKF[:, k] * (basis_BKF[:, k] * rest_BF).sum(dim=1, keepdim=True)
    along_BK1 = basis_BKF @ target_BF[:, :, None]
    coefficient_BK = torch.linalg.solve_triangular(triangle_BKK, along_BK1, upper=True).squeeze(2)
    return index_BK, coefficient_BK / atom_AF.norm(dim=1)[index_BK]


def _split(basis_BKF: Tensor, vector_BF: Tensor) -> tuple[Tensor, Tensor]:
    """Return a vector's coordinates in a basis and what is outside; twice, as once loses digits in float32."""
    coordinates_BK = vector_BF.new_zeros(basis_BKF.shape[:2])
    for _ in range(2):
        step_BK = (basis_BKF @ vector_BF[:, :, None]).squeeze(2)
        coordinates_BK = coordinates_BK + step_BK
        vector_BF = vector_BF - (step_BK[:, None] @ basis_BKF).squeeze(1)
    return coordinates_BK, vector_BF


def chunk_size(atom_AF: Tensor, sparsity: int, *, numbers: int = 2**26) -> int:
    """Return how many targets at once keep scores, basis and triangle within so many numbers (256 MiB of float32)."""
    atoms, width = atom_AF.shape
    rounds = min(sparsity, atoms, width)
    return max(1, numbers // (2 * atoms + rounds * (width + rounds)))


FIRST_LOOK = 256


def similarity_weights(target_BF: Tensor, anchor_AF: Tensor) -> tuple[Tensor, Tensor]:
    """Weigh anchors by the sparsemax of their cosines.

    Args:
        target_BF: Vectors of the tokens, float32, none of zeros; a chunk.
        anchor_AF: Vectors of the anchors in the same space, none of zeros.

    Returns:
        Indices of the anchors ``(B, K)`` from the most alike on, and weights ``(B, K)`` in [0, 1], each row's sum is 1.

    References:
        Dobler and de Melo 2023, FOCUS, arXiv:2305.14481. Sparsemax: Martins and Astudillo 2016, arXiv:1602.02068.
    """
    cosine_BA = normalize(target_BF, dim=1) @ normalize(anchor_AF, dim=1).T
    kept = min(FIRST_LOOK, len(anchor_AF))
    while True:
        # The weights depend only on the largest cosines; sorting all of them is for rows that need all.
        top_BK, index_BK = cosine_BA.topk(kept, dim=1)
        weight_BK = sparsemax_of_sorted(top_BK)
        if kept == len(anchor_AF) or not (weight_BK[:, -1] > 0).any():
            break
        kept = min(8 * kept, len(anchor_AF))
    used = int((weight_BK > 0).sum(dim=1).max())
    return index_BK[:, :used], weight_BK[:, :used]


def sparsemax_of_sorted(score_BK: Tensor) -> Tensor:
    """Project each row, sorted from large to small, on the simplex: ``max(score - threshold, 0)`` that sums to one."""
    sum_BK = score_BK.cumsum(dim=1) - 1
    rank_K = torch.arange(1, score_BK.shape[1] + 1, device=score_BK.device)
    size_B1 = (rank_K * score_BK > sum_BK).sum(dim=1, keepdim=True)
    return (score_BK - sum_BK.gather(1, size_B1 - 1) / size_B1).clamp_min(0)


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


@dataclass(frozen=True)
class DonorVectors:
    """Vectors of new tokens and of anchors in one space, which may be a model's embedding or made from a corpus.

    Tokens are the same when their bytes are. Decoding them to text first would turn every token that is a part of a
    character into the same replacement character, and so make anchors of tokens that have nothing in common.
    """

    new_NF: Tensor
    """Of the new tokens, in their order; zeros where the donor has no vector."""
    known_N: Tensor
    """Bool: does the donor have a vector? It lacks the intermediates of merges, and what its corpus does not hold."""
    anchor_AF: Tensor
    anchor_ids_A: Tensor
    """Ids of the anchors in the base, ascending."""

    @classmethod
    def match(
        cls,
        vectors_TF: Tensor,
        tokens: Sequence[bytes | None],
        *,
        base_tokens: Sequence[bytes | None],
        new_tokens: Sequence[bytes],
        limit: int | None = None,
    ) -> Self:
        """Find the new tokens and the anchors among the donor's tokens.

        Args:
            vectors_TF: One row for each of the donor's tokens, any float type; a row of zeros counts as none.
            tokens: The bytes of each of them; ``None`` for special and added tokens, which match nothing.
            base_tokens: The same for the base, by id.
            new_tokens: The bytes of each new token.
            limit: How many anchors at most: those with the lowest ids of the base, which in a BPE are its commonest.

        Returns:
            The vectors, float32.

        Raises:
            UserError: If there are more tokens than rows, or the two share no token.
        """
        if len(vectors_TF) < len(tokens):
            raise UserError(
                f"the donor's tokenizer has {len(tokens):,} ids and its model {len(vectors_TF):,} rows; give a donor "
                f"whose tokenizer and model belong together"
            )
        has_vector_T = vectors_TF.abs().amax(dim=1) > 0
        row = {token: place for place, token in enumerate(tokens) if token is not None and has_vector_T[place]}
        shared = [(number, row[token]) for number, token in enumerate(base_tokens) if token and token in row]
        if not shared:
            raise UserError("the donor shares no token with the base; choose another donor, or an initialiser without")
        ids, rows = zip(*shared[:limit], strict=True)
        known_N = torch.tensor([token in row for token in new_tokens], dtype=torch.bool)
        new_NF = vectors_TF[[row.get(token, 0) for token in new_tokens]].float()
        return cls(new_NF * known_N[:, None], known_N, vectors_TF[list(rows)].float(), torch.tensor(ids))


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
