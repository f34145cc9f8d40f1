"""What labelled pairs teach: scores order or set cosines, what follows attracts and what contradicts repels.

Shape letters: B = pairs, D = dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, normalize


def cosent(cosine_B: Tensor, score_B: Tensor, *, temperature: float = 0.05) -> Tensor:
    """Penalise pairs whose cosine is not above that of pairs people find less alike.

    ``log(1 + sum exp((cos_j - cos_i) / temperature))`` over all i, j with ``score_i > score_j``.

    Args:
        cosine_B: Cosines of pairs, ``(B,)``.
        score_B: How alike people find them, ``(B,)``, in any unit: only the order counts.
        temperature: Differences are divided by it, > 0.

    Returns:
        Scalar float32 >= 0, in nats; 0 when no score is above another.

    Raises:
        ValueError: If the shapes do not fit or `temperature` is not > 0.

    References:
        Su 2022, CoSENT (kexue.fm/archives/8847).
    """
    if cosine_B.ndim != 1 or cosine_B.shape != score_B.shape:
        raise ValueError(f"cosines and scores must be (B,), got {tuple(cosine_B.shape)} and {tuple(score_B.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    with torch.autocast(cosine_B.device.type, enabled=False):
        differences_BB = (cosine_B[None, :] - cosine_B[:, None]).float() / temperature
        wrong = differences_BB[score_B[:, None] > score_B[None, :]]
        return torch.logsumexp(torch.cat([wrong.new_zeros(1), wrong]), dim=0)


def cosine_score(cosine_B: Tensor, score_B: Tensor) -> Tensor:
    """Squared difference of each cosine to the score in [0, 1], averaged over pairs; scalar float32."""
    if cosine_B.shape != score_B.shape:
        raise ValueError(f"cosines and scores must be (B,), got {tuple(cosine_B.shape)} and {tuple(score_B.shape)}")
    return (cosine_B.float() - score_B.float()).square().mean()


def entailment_contrast(
    premise_BD: Tensor, hypothesis_BD: Tensor, entailed_B: Tensor, *, temperature: float = 0.05
) -> Tensor:
    """Let each premise tell what follows from it from all other hypotheses, contradictions of its own among them.

    Args:
        premise_BD: Vectors, ``(B, D)``.
        hypothesis_BD: Vectors of the hypotheses of the same pairs, ``(B, D)``.
        entailed_B: Whether the hypothesis follows, ``(B,)`` bool; the others are candidates only.
        temperature: Cosines are divided by it, > 0.

    Returns:
        Scalar float32 >= 0, in nats, averaged over the pairs that follow; 0 when there is none.

    Raises:
        ValueError: If the shapes do not fit or `temperature` is not > 0.

    References:
        Gao et al. 2021, arXiv:2104.08821 (supervised SimCSE).
    """
    if premise_BD.ndim != 2 or premise_BD.shape != hypothesis_BD.shape or entailed_B.shape != premise_BD.shape[:1]:
        shapes = f"{tuple(premise_BD.shape)}, {tuple(hypothesis_BD.shape)} and {tuple(entailed_B.shape)}"
        raise ValueError(f"premises, hypotheses and labels must be (B, D), (B, D) and (B,), got {shapes}")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    with torch.autocast(premise_BD.device.type, enabled=False):
        scores_BB = normalize(premise_BD.float(), dim=1) @ normalize(hypothesis_BD.float(), dim=1).T / temperature
        own_B = torch.arange(len(premise_BD), device=premise_BD.device)
        each_B = cross_entropy(scores_BB, own_B, reduction="none")
        return (each_B * entailed_B).sum() / entailed_B.sum().clamp_min(1)


def cosines(first_BD: Tensor, second_BD: Tensor) -> Tensor:
    """Return the cosine of each pair in float32, ``(B,)``."""
    with torch.autocast(first_BD.device.type, enabled=False):
        return cosine_similarity(first_BD.float(), second_BD.float(), dim=1)
