"""Which few atoms add up to a vector, and with what coefficients? Orthogonal matching pursuit, many vectors at once.

Shape letters: N = targets, B = targets of a chunk, A = atoms, K = atoms of one target, F = width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

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
