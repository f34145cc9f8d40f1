"""Does a text find its translation among the others? Shape letters: B = texts, V = vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from soju.sparse.divergence import NEVER, cosines


def in_batch_translation(weights_BV: Tensor, partner_B: Tensor, *, temperature: float = 0.05) -> Tensor:
    """Let each text tell its translation from every other text of the batch, in both languages.

    ``-log softmax(cos / temperature)[partner]``, averaged over the texts that have a partner; a text is no candidate
    for itself. It is InfoNCE with the cosine, both directions at once.

    Args:
        weights_BV: Vectors, ``(B, V)``.
        partner_B: Row of each text's translation, ``(B,)`` int64, -1 for texts without one.
        temperature: Cosines are divided by it, > 0.

    Returns:
        Scalar float32 >= 0, in nats; 0 when no text has a partner.

    Raises:
        ValueError: If the shapes do not fit, a text is its own partner, or `temperature` is not > 0.

    References:
        van den Oord et al. 2018, arXiv:1807.03748 (InfoNCE).
    """
    if weights_BV.ndim != 2 or partner_B.shape != weights_BV.shape[:1] or len(weights_BV) == 0:
        shapes = f"{tuple(weights_BV.shape)} and {tuple(partner_B.shape)}"
        raise ValueError(f"vectors and partners must be (B, V) and (B,) of the same B >= 1 texts, got {shapes}")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    places_B = torch.arange(len(partner_B), device=partner_B.device)
    if bool((partner_B == places_B).any()):
        raise ValueError("a text is its own partner; give the row of its translation, or -1")
    paired = partner_B >= 0
    if not bool(paired.any()):
        return weights_BV.sum() * 0.0
    with torch.autocast(weights_BV.device.type, enabled=False):
        logits_BB = cosines(weights_BV) / temperature
        itself_BB = places_B[:, None] == places_B[None, :]
        return cross_entropy(logits_BB.masked_fill(itself_BB, NEVER)[paired], partner_B[paired])
