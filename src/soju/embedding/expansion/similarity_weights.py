"""Which anchors is a token like, and how much? Cosines, made sparse weights that sum to one.

Shape letters: B = tokens of a chunk, A = anchors, K = the most anchors any of these tokens has, F = width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

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
