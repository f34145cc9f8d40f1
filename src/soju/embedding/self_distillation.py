"""A model under its new tokens learns to say what it said under the old ones.

An appended merge only joins tokens: every new encoding is a coarsening of the old one, and the last old token inside a
new token has read exactly what the new token has read. So the hidden states there can be asked to agree.

Shape letters: B = texts, T = new tokens of a text with padding, S = old ones with padding, H = hidden width, D =
dimensions of a text's vector.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

NOWHERE = -1
"""Index of a new token that has no old one: padding."""


def aligned_states(old_BSH: Tensor, last_old_BT: Tensor) -> Tensor:
    """Take the teacher's hidden state at the last old token of each new token.

    Args:
        old_BSH: The teacher's hidden states under the old tokenisation, ``(B, S, H)``.
        last_old_BT: Position of that old token, ``(B, T)`` int64; `NOWHERE` for padding.

    Returns:
        ``(B, T, H)``; zeros where there is no old token.

    Raises:
        ValueError: If the shapes do not fit or a position is outside the old tokens.
    """
    if old_BSH.ndim != 3 or last_old_BT.ndim != 2 or len(old_BSH) != len(last_old_BT):
        shapes = f"{tuple(old_BSH.shape)} and {tuple(last_old_BT.shape)}"
        raise ValueError(f"old states and positions must be (B, S, H) and (B, T), got {shapes}")
    if last_old_BT.numel() and not NOWHERE <= int(last_old_BT.min()) <= int(last_old_BT.max()) < old_BSH.shape[1]:
        raise ValueError(f"positions must be {NOWHERE} or below {old_BSH.shape[1]}, the old tokens of a text")
    nowhere_BT1 = (last_old_BT == NOWHERE)[:, :, None]
    index_BTH = last_old_BT.clamp(min=0)[:, :, None].expand(-1, -1, old_BSH.shape[2])
    # Filled rather than multiplied: the states of padding, which stand in for these, may be no numbers.
    return old_BSH.gather(1, index_BTH).masked_fill(nowhere_BT1, 0.0)


def last_old_positions(lengths_BT: Tensor, *, start_B: Tensor | None = None) -> Tensor:
    """Turn how many old tokens each new token joins into the position of the last of them.

    Args:
        lengths_BT: Old tokens in each new token, ``(B, T)`` int64: 1 for an old token, more for a new one, 0 for
            padding, on either side.
        start_B: Position of the first old token of each text, ``(B,)``, above 0 under left padding; 0 when not given.

    Returns:
        ``(B, T)`` int64 for `aligned_states`.

    Raises:
        ValueError: If the shapes do not fit or a length is negative.
    """
    if lengths_BT.ndim != 2 or (start_B is not None and start_B.shape != lengths_BT.shape[:1]):
        raise ValueError(f"lengths must be (B, T) and starts (B,), got {tuple(lengths_BT.shape)}")
    if lengths_BT.numel() and int(lengths_BT.min()) < 0:
        raise ValueError("a token cannot join fewer than 0 old ones")
    last_BT = lengths_BT.cumsum(dim=1) - 1 + (0 if start_B is None else start_B[:, None])
    return last_BT.masked_fill(lengths_BT == 0, NOWHERE)


def state_distillation(
    new_BTH: Tensor,
    old_BSH: Tensor,
    last_old_BT: Tensor,
    *,
    distance: Literal["mse", "cosine"] = "mse",
    only_BT: Tensor | None = None,
) -> Tensor:
    """Pull the student's hidden states at its new tokens to the teacher's at the last old token of each.

    ``mse``: squared distance over the width, divided by the mean square of the teacher's state, token by token, so that
    tokens count alike however long their states are. ``cosine``: ``1 - cos``.

    Args:
        new_BTH: The student's hidden states under the new tokenisation, ``(B, T, H)``.
        old_BSH: The teacher's under the old one, ``(B, S, H)``; no gradient flows into them.
        last_old_BT: See `aligned_states`.
        distance: Which of the two.
        only_BT: Tokens that count, ``(B, T)`` bool, for example those with a trainable row or after one; all but
            padding when not given.

    Returns:
        Scalar float32 >= 0, unitless, averaged over the tokens that count in all texts; 0 when there is none.

    Raises:
        ValueError: If the shapes do not fit or the distance is unknown.

    References:
        Hinton et al. 2015, arXiv:1503.02531. Dobler et al. 2025, arXiv:2505.20133 (hidden states of a new token are
        those after its old ones).
    """
    if new_BTH.shape[:2] != last_old_BT.shape or new_BTH.shape[2:] != old_BSH.shape[2:]:
        shapes = f"{tuple(new_BTH.shape)}, {tuple(old_BSH.shape)} and {tuple(last_old_BT.shape)}"
        raise ValueError(f"new states, old states and positions must be (B, T, H), (B, S, H) and (B, T), got {shapes}")
    counts_BT = last_old_BT != NOWHERE
    if only_BT is not None:
        if only_BT.shape != counts_BT.shape or only_BT.dtype != torch.bool:
            raise ValueError(f"only_BT must be bool {tuple(counts_BT.shape)}, got {tuple(only_BT.shape)}")
        counts_BT = counts_BT & only_BT
    if not bool(counts_BT.any()):
        return new_BTH.sum() * 0.0
    with torch.autocast(new_BTH.device.type, enabled=False):
        student_NH = _wide(new_BTH[counts_BT])
        teacher_NH = _wide(aligned_states(old_BSH.detach(), last_old_BT)[counts_BT])
        if distance == "cosine":
            return (1 - cosine_similarity(student_NH, teacher_NH, dim=1)).mean()
        if distance != "mse":
            raise ValueError(f'distance must be "mse" or "cosine", got {distance!r}')
        scale_N = teacher_NH.square().mean(dim=1).clamp_min(1e-12)
        return ((student_NH - teacher_NH).square().mean(dim=1) / scale_N).mean()


def pooled_distillation(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """Pull the vector of each text to the teacher's: ``1 - cos``, averaged over texts.

    Args:
        student_BD: Vectors under the new tokenisation, ``(B, D)``.
        teacher_BD: Vectors of the same texts under the old one, ``(B, D)``; no gradient flows into them.

    Returns:
        Scalar float32 in [0, 2], unitless; 0 when every direction agrees.

    Raises:
        ValueError: If the shapes do not fit.
    """
    if student_BD.ndim != 2 or student_BD.shape != teacher_BD.shape or len(student_BD) == 0:
        shapes = f"{tuple(student_BD.shape)} and {tuple(teacher_BD.shape)}"
        raise ValueError(f"student and teacher must be (B, D) of the same B >= 1 texts, got {shapes}")
    with torch.autocast(student_BD.device.type, enabled=False):
        return (1 - cosine_similarity(_wide(student_BD), _wide(teacher_BD.detach()), dim=1)).mean()


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
