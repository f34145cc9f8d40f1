"""A model under its new tokens learns to say what it said under the old ones.

An appended merge only joins tokens: every new encoding is a coarsening of the old one, and the last old token inside a
new token has read exactly what the new token has read. So the hidden states there can be asked to agree.

Shape letters: B = texts, T = new tokens of a text with padding, S = old ones with padding, H = hidden width, D =
dimensions of a text's vector.

Korean vectors are pulled to where the frozen base put the English of the same meaning.

Shape letters: B = sentence pairs, D = dimensions.

How far have weights gone from where they started?

What labelled pairs teach: scores order or set cosines, what follows attracts and what contradicts repels.

Shape letters: B = pairs, D = dimensions.

Does a text find itself again after another dropout, among all others?

Shape letters: B = texts, N = texts of all ranks, D = dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

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
    `soju.sparse.losses.in_batch_translation`, which trains both sides and takes same-language texts as
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


def l2_to_start(weights: Mapping[str, Tensor], start: Mapping[str, Tensor], *, strength: float = 1.0) -> Tensor:
    """Penalise the distance of weights to their start, in place of their distance to zero.

    ``strength / 2 * sum over all numbers of (w - w0) ** 2``, the L2-SP penalty.

    Args:
        weights: Trainable weights by name.
        start: What they were, by the same names; no gradient flows into them.
        strength: Factor, >= 0, for example 0.01.

    Returns:
        Scalar float32 >= 0, in squared weight units, on the device of the first weight.

    Raises:
        ValueError: If there is no weight, the names or shapes differ, or `strength` is negative.

    References:
        Li et al. 2018, arXiv:1802.01483 (L2-SP).
    """
    if not weights or set(weights) != set(start):
        raise ValueError(f"weights and start must have the same names, got {sorted(set(weights) ^ set(start))[:3]}")
    if not strength >= 0:
        raise ValueError(f"strength must be >= 0, got {strength}")
    first = next(iter(weights.values()))
    total = torch.zeros((), dtype=torch.float32, device=first.device)
    for name, weight in weights.items():
        if weight.shape != start[name].shape:
            raise ValueError(f"{name} is {tuple(weight.shape)} and started as {tuple(start[name].shape)}")
        # In float32, or a step that bfloat16 rounds away would cost nothing.
        difference = weight.float() - start[name].detach().to(weight.device, torch.float32)
        total = total + difference.square().sum().to(total.device)
    return strength / 2 * total


class L2ToStart(nn.Module):
    """Remembers where the trainable weights of a model start, and is called for the penalty of `l2_to_start`."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], *, strength: float) -> None:
        """Copy the weights that are trained.

        Args:
            named: Names and parameters, for example ``model.named_parameters()``; frozen ones are left out.
            strength: See `l2_to_start`.

        Raises:
            ValueError: If none is trained.
        """
        super().__init__()
        # A plain dictionary: registering them would save, move and train what is another module's.
        self._weights = {name: weight for name, weight in named if weight.requires_grad}
        if not self._weights:
            raise ValueError("no weight is trained, so none can be kept near its start")
        self._start = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._strength = strength

    def forward(self) -> Tensor:
        """Return the penalty of the weights as they are now."""
        return l2_to_start(self._weights, self._start, strength=self._strength)


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


def simcse(
    first_BD: Tensor, second_BD: Tensor, *, temperature: float = 0.05, negatives_ND: Tensor | None = None, rank: int = 0
) -> Tensor:
    """Let each text of one pass tell its own vector of the other pass from those of all other texts.

    ``-log softmax(cos(first_b, second) / temperature)[b]``, averaged over the batch: InfoNCE with the cosine, in
    the one direction that is published.

    Args:
        first_BD: Vectors of one pass, ``(B, D)``, any float dtype.
        second_BD: Vectors of the same texts in a pass with another dropout, ``(B, D)``.
        temperature: Cosines are divided by it, > 0.
        negatives_ND: The second passes of all ranks, ``(N, D)``, from `gathered`; those of this rank alone when not
            given.
        rank: Which block of B rows of `negatives_ND` is this rank's.

    Returns:
        Scalar float32 >= 0, in nats; log N when all vectors are equal.

    Raises:
        ValueError: If the shapes do not fit or `temperature` is not > 0.

    References:
        Gao et al. 2021, arXiv:2104.08821 (SimCSE). van den Oord et al. 2018, arXiv:1807.03748 (InfoNCE).
    """
    if first_BD.ndim != 2 or first_BD.shape != second_BD.shape or len(first_BD) == 0:
        shapes = f"{tuple(first_BD.shape)} and {tuple(second_BD.shape)}"
        raise ValueError(f"both passes must be (B, D) of the same B >= 1 texts, got {shapes}")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    candidates_ND = second_BD if negatives_ND is None else negatives_ND
    start = rank * len(first_BD)
    if candidates_ND.shape[1:] != first_BD.shape[1:] or not 0 <= start <= len(candidates_ND) - len(first_BD):
        shape = tuple(candidates_ND.shape)
        raise ValueError(f"candidates of shape {shape} do not hold {len(first_BD)} texts of rank {rank}")
    # Half precision is no good for numbers that are divided by 0.05 and exponentiated.
    with torch.autocast(first_BD.device.type, enabled=False):
        cosines_BN = normalize(_wide(first_BD), dim=1) @ normalize(_wide(candidates_ND), dim=1).T
        own_B = torch.arange(start, start + len(first_BD), device=first_BD.device)
        return cross_entropy(cosines_BN / temperature, own_B)


def gathered(vectors_BD: Tensor) -> tuple[Tensor, int]:
    """Collect the vectors of all ranks, with gradients for the vectors of each.

    The gradient of a rank's vectors is the sum of what all ranks ask of them, so the average over ranks that DDP takes
    is the gradient of the mean loss of all texts.

    Args:
        vectors_BD: This rank's vectors, ``(B, D)``; B must be the same on all ranks.

    Returns:
        All vectors, ``(N, D)``, rank by rank, and this rank. Without a process group the vectors as given, and 0.
    """
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return vectors_BD, 0
    from torch.distributed.nn import functional  # loads a good deal that one process never needs

    parts = functional.all_gather(vectors_BD.contiguous())  # type: ignore[no-untyped-call]
    return torch.cat(parts), distributed.get_rank()


def passes_are_equal(first_BD: Tensor, second_BD: Tensor) -> bool:
    """Tell whether two passes of a batch came out equal, up to rounding, for every text: then dropout is off.

    A model without dropout (Qwen3 has ``attention_dropout: 0``) gives the same vector twice; the loss then has nothing
    to pull together and only pushes texts apart. A single text may come out equal by chance: a very short one gives
    attention dropout little to drop. Not-a-number differs from itself, so such passes count as different.

    Args:
        first_BD: Vectors of one pass, ``(B, D)``.
        second_BD: Vectors of the same texts in another, ``(B, D)``.

    Returns:
        True when no text moved by more than a millionth of its length.

    Raises:
        ValueError: If the shapes differ or there is no text.
    """
    if first_BD.shape != second_BD.shape or first_BD.ndim != 2 or len(first_BD) == 0:
        shapes = f"{tuple(first_BD.shape)} and {tuple(second_BD.shape)}"
        raise ValueError(f"both passes must be (B, D) of the same B >= 1 texts, got {shapes}")
    first, second = _wide(first_BD.detach()), _wide(second_BD.detach())
    return bool(((first - second).norm(dim=1) <= 1e-6 * first.norm(dim=1)).all())
