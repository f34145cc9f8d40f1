"""How far is one distribution from another? Shape letters: B = texts, V = vocabulary, D = teacher's dimensions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

NEVER = -1e4
"""A logit whose probability is 0; finite, because 0 times the logarithm of 0 must stay 0."""
SHORTEST = 1e-6
"""Vectors shorter than this count as zero: their direction is noise and its gradient, 1 / length, has no bound."""


def in_batch_distillation(
    student_BV: Tensor, teacher_BD: Tensor, *, temperature: float = 0.05, with_self: bool = True
) -> Tensor:
    """Teach the student which texts of a batch are alike.

    ``KL(softmax(cos_T / temperature) || softmax(cos_S / temperature))``, row by row over the ``(B, B)`` cosines of each
    side, averaged over rows. Direction: forward, the teacher is the reference.

    Args:
        student_BV: Student vectors, ``(B, V)``. A zero vector (a text that lights no term) has cosine 0 with every
            text, itself too, and gets no gradient.
        teacher_BD: Teacher vectors of the same texts, ``(B, D)``, any length; no gradient flows into them.
        temperature: Cosines are divided by it, > 0.
        with_self: Whether a text is compared with itself too, as published. Where a batch holds translations, whose
            teacher vectors are equal, half of each row's mass then lies on the text itself, and its translation must
            come as close as that; without, the translation only has to come before all others.

    Returns:
        Scalar float32 >= 0, in nats; 0 for a batch of one.

    Raises:
        ValueError: If the shapes do not fit or `temperature` is not > 0.

    References:
        Hinton et al. 2015, arXiv:1503.02531 (distillation).
        Tung and Mori 2019, arXiv:1907.09682 (similarities within a batch).
    """
    if student_BV.ndim != 2 or teacher_BD.ndim != 2 or len(student_BV) != len(teacher_BD) or len(student_BV) == 0:
        shapes = f"{tuple(student_BV.shape)} and {tuple(teacher_BD.shape)}"
        raise ValueError(f"student and teacher must be (B, V) and (B, D) of the same B >= 1 texts, got {shapes}")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    # Half precision is no good for numbers that are divided by 0.05 and exponentiated.
    with torch.autocast(student_BV.device.type, enabled=False):
        student_BB = cosines(student_BV) / temperature
        teacher_BB = cosines(teacher_BD.detach()) / temperature
        if not with_self:
            itself_BB = torch.eye(len(student_BB), dtype=torch.bool, device=student_BB.device)
            student_BB = student_BB.masked_fill(itself_BB, NEVER)
            teacher_BB = teacher_BB.masked_fill(itself_BB, NEVER)
        target_BB = log_softmax(teacher_BB, dim=1).to(student_BB.dtype)
        return kl_div(log_softmax(student_BB, dim=1), target_BB, log_target=True, reduction="batchmean")


def cosines(vectors: Tensor) -> Tensor:
    """Return the ``(B, B)`` cosines without a normalised copy of the vectors; float64 stays float64."""
    if vectors.dtype != torch.float64:
        vectors = vectors.float()
    # Differentiate one side and mirror it: one matrix product backward instead of two and their sum.
    half_BB = vectors @ vectors.detach().T
    gram_BB = half_BB + half_BB.T - half_BB.detach()
    squares_B = gram_BB.diagonal()
    usable_B = squares_B > SHORTEST**2
    # Inside the square root as well, or a zero's infinite slope times 0 is NaN.
    inverse_B = torch.where(usable_B, squares_B, 1.0).rsqrt() * usable_B
    return gram_BB * inverse_B[:, None] * inverse_B[None, :]
