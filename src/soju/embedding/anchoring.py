"""Korean vectors are pulled to where the frozen base put the English of the same meaning.

Shape letters: B = sentence pairs, D = dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from soju.embedding.self_distillation import pooled_distillation


def anchor(korean_BD: Tensor, english_BD: Tensor) -> Tensor:
    """Pull each Korean vector to the base's vector of its English translation: ``1 - cos``, averaged over pairs.

    The English side is a fixed target. Under a frozen base it need not be kept close to itself, and the two languages
    cannot meet somewhere else, as they could if both were trained.

    Args:
        korean_BD: Vectors of Korean texts by the model in training, ``(B, D)``.
        english_BD: The base's vectors of their translations, ``(B, D)``; no gradient flows into them.

    Returns:
        Scalar float32 in [0, 2], unitless.

    References:
        Reimers and Gurevych 2020, arXiv:2004.09813 (a student's translations take the teacher's vectors).
    """
    return pooled_distillation(korean_BD, english_BD)


def contrastive_anchor(korean_BD: Tensor, english_BD: Tensor, *, temperature: float = 0.05) -> Tensor:
    """Let each Korean text tell its translation from the other English texts of the batch, whose vectors are fixed.

    ``-log softmax(cos(korean_b, english) / temperature)[b]``, averaged over pairs; one direction of
    `soju.sparse.contrastive.in_batch_translation`, which trains both sides and takes same-language texts as
    candidates too.

    Args:
        korean_BD: Vectors of Korean texts by the model in training, ``(B, D)``.
        english_BD: The base's vectors of their translations, ``(B, D)``; no gradient flows into them.
        temperature: Cosines are divided by it, > 0.

    Returns:
        Scalar float32 >= 0, in nats.

    Raises:
        ValueError: If the shapes do not fit or `temperature` is not > 0.

    References:
        van den Oord et al. 2018, arXiv:1807.03748 (InfoNCE).
    """
    if korean_BD.ndim != 2 or korean_BD.shape != english_BD.shape or len(korean_BD) == 0:
        shapes = f"{tuple(korean_BD.shape)} and {tuple(english_BD.shape)}"
        raise ValueError(f"both languages must be (B, D) of the same B >= 1 pairs, got {shapes}")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    with torch.autocast(korean_BD.device.type, enabled=False):
        wide = torch.float64 if korean_BD.dtype == torch.float64 else torch.float32
        targets_BD = normalize(english_BD.detach().to(wide), dim=1)
        logits_BB = normalize(korean_BD.to(wide), dim=1) @ targets_BD.T / temperature
        return cross_entropy(logits_BB, torch.arange(len(korean_BD), device=korean_BD.device))
