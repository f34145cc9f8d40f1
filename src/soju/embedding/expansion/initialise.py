"""Initial rows of new tokens.

* ``mean``: the mean of the old rows a token was spelled with.
* ``omp``: what adds up to the donor's vector of the token, added up from the base's rows. The donor is a model, or
  vectors that are made from a text.
* ``aligned``: the rows of the tokens that translate it in sentence pairs.
* ``noise``: a random row, the control.

A token the donor has no vector for, or no pair a translation, gets its mean.

Shape letters: V = old tokens, D = width of the embedding, N = new tokens, P = old tokens of all new ones in a row,
B = new tokens of a chunk, K = old rows that one new row is made of; T = tokens of the donor, A = anchors (tokens of
both models, the atoms of a pursuit), F = width of the donor's vectors; M = tokens of a block, U = distinct pairs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple, Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array, diags_array
from scipy.sparse.linalg import svds
from torch import Tensor
from torch.nn.functional import normalize

from soju.alignment.bitext import geometric_mean, make_bitext, prune_by_mass
from soju.alignment.ibm1 import train_ibm1
from soju.core.errors import UserError
from soju.data.rows import PairRow
from soju.embedding.config import Initialiser
from soju.embedding.expansion.byte_bpe import ByteBpe, is_spelling, token_bytes
from soju.embedding.expansion.merges import Expansion

INITIALISERS: tuple[Initialiser, ...] = get_args(Initialiser)
NEED_DONOR, NEED_PAIRS = ("omp",), ("aligned",)
SPARSITY = 64
"""Anchors of one token in ``omp``."""
CHUNK = 2**24
"""Numbers gathered at once: 64 MiB of float32."""


def new_rows(
    old_VD: Tensor,
    expansion: Expansion,
    method: Initialiser,
    *,
    base: ByteBpe,
    expanded: ByteBpe,
    donor: ByteBpe,
    corpus: Sequence[str] = (),
    pairs: Sequence[PairRow] = (),
    seed: int = 0,
) -> Tensor:
    """Make the rows of the new tokens from tokenizers and texts.

    Args:
        old_VD: The base's embedding.
        expansion: The new tokens.
        method: One of `INITIALISERS`. ``omp`` takes the vectors of the donor's model, or without one co-occurrence
            vectors of the corpus in the expanded vocabulary.
        base: Its tokenizer.
        expanded: The expanded tokenizer.
        donor: The donor's tokenizer, in the folder of its model if there is one.
        corpus: Texts.
        pairs: Sentence pairs, for ``aligned``.
        seed: Of ``noise`` and of the co-occurrence vectors.

    Returns:
        ``(N, D)`` float32.
    """
    vectors = translations = None
    if method in NEED_DONOR:
        vectors = donor_vectors(expansion, base, expanded, donor=donor, corpus=corpus, seed=seed)
    if method in NEED_PAIRS:
        translations = token_translations(pairs, base, expanded, expansion)
    return initialise(old_VD, expansion.decompositions, method, donor=vectors, translations=translations, seed=seed)


def check_initialiser(name: str, donor: ByteBpe, *, with_corpus: bool, with_pairs: bool) -> Initialiser:
    """Return the initialiser of a name; `UserError` if there is none or it lacks what it needs."""
    method = next((one for one in INITIALISERS if one == name), None)
    if method is None:
        raise UserError(f"{name}: no initialiser; choose one of {', '.join(INITIALISERS)}")
    if name in NEED_DONOR and _embedding_file(donor) is None and not with_corpus:
        raise UserError(
            f"{name} needs vectors of the donor's tokens, and {donor.name} is a tokenizer without a model; give "
            f"--corpus, from which they are made, or --init mean"
        )
    if name in NEED_PAIRS and not with_pairs:
        raise UserError(f"{name} learns from sentence pairs which tokens translate which; give --pairs, or --init mean")
    return method


def initialise(
    old_VD: Tensor,
    decompositions: Sequence[Sequence[int]],
    method: Initialiser = "mean",
    *,
    donor: DonorVectors | None = None,
    translations: csr_array | None = None,
    sparsity: int = SPARSITY,
    seed: int = 0,
) -> Tensor:
    """Make a row for every new token. Call it a second time for an output embedding that is not tied.

    Args:
        old_VD: The old rows, of any float type; not changed.
        decompositions: The old ids each new token was spelled with, none empty.
        method: One of `INITIALISERS`.
        donor: For ``omp``.
        translations: For ``aligned``: ``(N, V)``, how likely an old token is the translation of a new one. Rows sum to
            1, or to 0 where there is no translation. A new row is as long as its translations are on average.
        sparsity: How many anchors ``omp`` adds up.
        seed: For ``noise``.

    Returns:
        ``(N, D)`` float32 on the device of the old rows. Memory beyond it does not grow with N.

    Raises:
        ValueError: If a decomposition is empty or names an id that is none, or shapes do not fit.
        UserError: If the method needs a donor or translations and there are none, or it is no method.

    References:
        OMP: Goddard and Fernandes Neto 2025, arXiv:2506.06607. Rows by word alignment: Remy et al. 2024,
        Trans-Tokenization and Cross-lingual Vocabulary Transfers, arXiv:2408.04303.
    """
    if method not in INITIALISERS:
        raise UserError(f"initialiser {method!r} is none of {', '.join(INITIALISERS)}")
    pieces = _pieces(decompositions, len(old_VD))
    if method == "noise":
        return _noise(old_VD, len(decompositions), seed)
    new_ND = _means(old_VD, pieces)
    if method in NEED_DONOR:
        _from_donor(new_ND, old_VD, donor, sparsity)
    if method in NEED_PAIRS:
        _from_translations(new_ND, old_VD, translations)
    return new_ND


class _Pieces(NamedTuple):
    ids_P: Tensor
    length_N: Tensor
    start_N: Tensor


def _pieces(decompositions: Sequence[Sequence[int]], size: int) -> _Pieces:
    length_N = torch.tensor([len(ids) for ids in decompositions], dtype=torch.long)
    if len(length_N) and int(length_N.min()) == 0:
        raise ValueError(f"new token {int(length_N.argmin())} has no old tokens; every new token needs its spelling")
    ids_P = torch.tensor(list(chain.from_iterable(decompositions)), dtype=torch.long)
    if len(ids_P) and not 0 <= int(ids_P.min()) <= int(ids_P.max()) < size:
        least, most = int(ids_P.min()), int(ids_P.max())
        raise ValueError(f"decompositions name ids in [{least}, {most}], old ids are below {size}")
    return _Pieces(ids_P, length_N, length_N.cumsum(0) - length_N)


def _means(old_VD: Tensor, pieces: _Pieces) -> Tensor:
    """Return the mean of each token's rows, of few enough tokens at once to gather their rows."""
    device, count, width = old_VD.device, len(pieces.length_N), old_VD.shape[1]
    new_ND = torch.empty(count, width, device=device)
    step = max(1, CHUNK // (width * int(pieces.length_N.max()))) if count else 1
    for first in range(0, count, step):
        length_B = pieces.length_N[first : first + step]
        start = int(pieces.start_N[first])
        ids_P = pieces.ids_P[start : start + int(length_B.sum())]
        share_P = (1.0 / length_B).repeat_interleave(length_B)
        row_PD = old_VD[ids_P.to(device)].float() * share_P[:, None].to(device)
        new_ND[first : first + step] = torch.segment_reduce(row_PD, "sum", lengths=length_B.to(device))
    return new_ND


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


def _from_donor(new_ND: Tensor, old_VD: Tensor, donor: DonorVectors | None, sparsity: int) -> None:
    """Overwrite the rows of the tokens that the donor has a vector for."""
    if donor is None:
        raise UserError("initialiser omp needs vectors of a donor; give a donor with weights, or a corpus")
    if len(donor.known_N) != len(new_ND):
        raise ValueError(f"the donor's vectors are of {len(donor.known_N):,} new tokens, not of {len(new_ND):,}")
    if not bool(donor.known_N.any()):
        return
    for token_B in torch.split(donor.known_N.nonzero().squeeze(1), chunk_size(donor.anchor_AF, sparsity)):
        index_BK, weight_BK = matching_pursuit(donor.new_NF[token_B], donor.anchor_AF, sparsity)
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


DEPENDENT = 1e-4
"""An atom of norm 1 that has less than this outside the span of those chosen adds nothing but rounding errors."""


def matching_pursuit(target_BF: Tensor, atom_AF: Tensor, sparsity: int) -> tuple[Tensor, Tensor]:
    """Approximate each target by few atoms, chosen greedily, all coefficients refitted by least squares each time.

    Each round takes the atom with the largest absolute cosine to what is left of the target. The chosen atoms are kept
    as an orthonormal basis and a triangle (a QR factorisation that grows by a column), so a refit is one projection.

    Args:
        target_BF: What to approximate, float32; a chunk, see `chunk_size`.
        atom_AF: Float32, no row of zeros, of any norms.
        sparsity: How many atoms at most; no more than there are atoms or dimensions are used.

    Returns:
        Indices of the atoms ``(B, K)`` in the order of choice, and their coefficients ``(B, K)``; zero where a target
        was met exactly earlier.

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


IBM1_ITERATIONS, PRIOR = 5, 0.01
MASS, MOST = 0.9, 16
"""Of a token's translations, the most likely ones are kept until they hold this share; and how many at most."""


def token_translations(pairs: Sequence[PairRow], base: ByteBpe, expanded: ByteBpe, expansion: Expansion) -> csr_array:
    """Align the new tokens of Korean sentences with the old tokens of their English sides.

    Returns ``(N, V)`` float32: how likely both directions of IBM Model 1 hold an old token for the translation of a new
    one. Rows sum to 1, or to 0 for a token without a translation. Raises `UserError` if no pair holds tokens on both
    sides.
    """
    korean, english = (expanded.encode([pair.ko for pair in pairs]), base.encode([pair.en for pair in pairs]))
    rows = ((np.asarray(ko) + 1, np.asarray(en) + 1, 1.0) for ko, en in zip(korean, english, strict=True))
    bitext = make_bitext(rows, source_size=expanded.size + 1, target_size=base.size + 1)
    forward = train_ibm1(bitext, iterations=IBM1_ITERATIONS, prior=PRIOR)
    backward = train_ibm1(bitext.reversed(), iterations=IBM1_ITERATIONS, prior=PRIOR)
    both = geometric_mean(forward.to_csr(), backward.to_csr())
    new = csr_array(both[expansion.first_id + 1 : expansion.size + 1, 1:])
    kept = prune_by_mass(new, mass=MASS, max_terms=MOST)
    total_N = kept.sum(axis=1)
    return csr_array(kept / np.where(total_N > 0, total_N, 1)[:, None])


@dataclass(frozen=True)
class DonorVectors:
    """What another model knows about the new tokens: vectors of them and of anchors in one space.

    Tokens are the same when their bytes are. Decoding them to text first would turn every token that is a part of a
    character into the same replacement character, and so make anchors of tokens that have nothing in common.
    """

    new_NF: Tensor
    """Of the new tokens, in their order; zeros where the donor has no vector."""
    known_N: Tensor
    """Bool: whether the donor has a vector. It lacks the intermediates of merges, and what its corpus does not hold."""
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


def donor_vectors(
    expansion: Expansion,
    base: ByteBpe,
    expanded: ByteBpe,
    *,
    donor: ByteBpe | None = None,
    corpus: Sequence[str] = (),
    seed: int = 0,
) -> DonorVectors:
    """Match the new tokens, and the old ones as anchors, with vectors of the donor's model.

    Without a donor in whose folder there is a model, co-occurrence vectors of `corpus` take their place.
    """
    read = None if donor is None else _donor_embedding(donor)
    vectors_TF = _corpus_vectors(expanded, corpus, seed) if read is None else read
    return DonorVectors.match(
        vectors_TF,
        _bytes_by_id(expanded if donor is None or read is None else donor),
        base_tokens=_bytes_by_id(base),
        new_tokens=[token_bytes(token) for token in expansion.tokens],
    )


EMBEDDING_NAMES = ("model.embed_tokens.weight", "embed_tokens.weight", "transformer.wte.weight", "wte.weight")


def _corpus_vectors(expanded: ByteBpe, corpus: Sequence[str], seed: int) -> Tensor:
    return torch.from_numpy(cooccurrence_vectors(expanded.encode(corpus), expanded.size, seed=seed))


def _bytes_by_id(tokenizer: ByteBpe) -> list[bytes | None]:
    found: list[bytes | None] = [None] * tokenizer.size
    for token, number in tokenizer.vocabulary.items():
        if token not in tokenizer.added_tokens and is_spelling(token):
            found[number] = token_bytes(token)
    return found


def _embedding_file(donor: ByteBpe) -> tuple[Path, str] | None:
    """Return the safetensors file that holds the embedding of the donor's model and the tensor's name."""
    from safetensors import safe_open

    if donor.folder is None:
        return None
    index, file = donor.folder / "model.safetensors.index.json", donor.folder / "model.safetensors"
    with _told_as_user_error(donor):
        if index.is_file():
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return next(((donor.folder / places[name], name) for name in EMBEDDING_NAMES if name in places), None)
        if not file.is_file():
            return None
        with safe_open(file, "pt") as tensors:
            names = set(tensors.keys())
    return next(((file, name) for name in EMBEDDING_NAMES if name in names), None)


def _donor_embedding(donor: ByteBpe) -> Tensor | None:
    from safetensors import safe_open

    place = _embedding_file(donor)
    if place is None:
        return None
    with _told_as_user_error(donor), safe_open(place[0], "pt") as tensors:
        return tensors.get_tensor(place[1])


@contextmanager
def _told_as_user_error(donor: ByteBpe) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f"{donor.name}: the weights in its folder cannot be read ({error}); fetch them again, or take them "
            f"away to use the tokenizer alone"
        ) from None


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
        raise UserError("the corpus holds fewer than three different tokens next to each other; give more text")
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
