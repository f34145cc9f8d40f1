"""Losses of embedding models: functions of tensors, the row that each is in a stage, and the module that sums rows.

An appended merge only joins tokens, so every new encoding is a coarsening of the old one, and the last old token inside
a new token has read exactly what the new token has read. Self-distillation asks the hidden states there to agree.

Shape letters: B = texts or pairs of the batch, N = texts of all ranks, T = new tokens of a text with padding, S = old
ones with padding, H = hidden width, D = dimensions of a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from soju.training.cached_gradients import cached_losses

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


def state_distillation(new_BTH: Tensor, old_BSH: Tensor, last_old_BT: Tensor) -> Tensor:
    """Pull the student's hidden states at its new tokens to the teacher's at the last old token of each.

    Squared distance over the width, divided by the mean square of the teacher's state, token by token, so that tokens
    count alike however long their states are; averaged over the tokens of all texts, never over padding.

    Args:
        new_BTH: The student's hidden states under the new tokenisation, ``(B, T, H)``.
        old_BSH: The teacher's under the old one, ``(B, S, H)``; no gradient flows into them.
        last_old_BT: See `aligned_states`.

    Returns:
        Scalar float32 >= 0, unitless; 0 when there is no token but padding.

    Raises:
        ValueError: If the shapes do not fit.

    References:
        Hinton et al. 2015, arXiv:1503.02531. Dobler et al. 2025, arXiv:2505.20133 (hidden states of a new token are
        those after its old ones).
    """
    if new_BTH.shape[:2] != last_old_BT.shape or new_BTH.shape[2:] != old_BSH.shape[2:]:
        shapes = f"{tuple(new_BTH.shape)}, {tuple(old_BSH.shape)} and {tuple(last_old_BT.shape)}"
        raise ValueError(f"new states, old states and positions must be (B, T, H), (B, S, H) and (B, T), got {shapes}")
    counts_BT = last_old_BT != NOWHERE
    if not bool(counts_BT.any()):
        return new_BTH.sum() * 0.0
    with torch.autocast(new_BTH.device.type, enabled=False):
        student_NH = _wide(new_BTH[counts_BT])
        teacher_NH = _wide(aligned_states(old_BSH.detach(), last_old_BT)[counts_BT])
        scale_N = teacher_NH.square().mean(dim=1).clamp_min(1e-12)
        return ((student_NH - teacher_NH).square().mean(dim=1) / scale_N).mean()


def pooled_distillation(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """Pull the vector of each text to a fixed one: ``1 - cos``, averaged over texts.

    The fixed vector is the untouched model's, of the same text under its old tokens, or of its English translation
    (anchoring): under a fixed target the two languages cannot meet somewhere else, as they could if both were trained.

    Args:
        student_BD: Vectors of the model in training, ``(B, D)``.
        teacher_BD: What they are pulled to, ``(B, D)``; no gradient flows into them.

    Returns:
        Scalar float32 in [0, 2], unitless; 0 when every direction agrees.

    Raises:
        ValueError: If the shapes do not fit.

    References:
        Reimers and Gurevych 2020, arXiv:2004.09813 (a student's translations take the teacher's vectors).
    """
    if student_BD.ndim != 2 or student_BD.shape != teacher_BD.shape or len(student_BD) == 0:
        shapes = f"{tuple(student_BD.shape)} and {tuple(teacher_BD.shape)}"
        raise ValueError(f"student and teacher must be (B, D) of the same B >= 1 texts, got {shapes}")
    with torch.autocast(student_BD.device.type, enabled=False):
        return (1 - cosine_similarity(_wide(student_BD), _wide(teacher_BD.detach()), dim=1)).mean()


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


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


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch as its loss components read it."""

    vectors_BD: Tensor
    """Of the texts, in the first of two passes, or of the first texts of pairs."""
    other_BD: Tensor
    """Of the texts in the second pass, or of the second texts of pairs; the same as `vectors_BD` under one pass."""
    states_BTH: Tensor
    """The student's states of the tokens; empty where texts are encoded in mini-batches."""
    labels: Mapping[str, Tensor]
    """What the collator and `StageLoss.complete` put there."""


@dataclass(frozen=True, slots=True)
class LossComponent:
    """One summand of a stage's loss."""

    name: str
    """``loss_NAME`` in the history."""
    label: str
    """In tables and plots."""
    weight: Callable[[Any], float]
    """Of the settings of the stage; a component of weight 0 is logged and not minimised."""
    compute: Callable[[Batch, Any], Tensor | None]
    """Unweighted, of a batch and the settings; ``None`` where the batch has nothing to compute it from."""


@dataclass(frozen=True, slots=True)
class Objective:
    """What a stage minimises."""

    components: tuple[LossComponent, ...]
    """In the order they are summed in."""
    reads: Literal["texts", "texts twice", "pairs"] = "texts"


def _simcse(batch: Batch, settings: Any) -> Tensor:
    each = []
    for width in (*settings.matryoshka, batch.vectors_BD.shape[1]):
        candidates_ND, rank = gathered(batch.other_BD[:, :width])
        both = batch.vectors_BD[:, :width], batch.other_BD[:, :width]
        each.append(simcse(*both, temperature=settings.temperature, negatives_ND=candidates_ND, rank=rank))
    return torch.stack(each).mean()


def _hidden(batch: Batch, settings: Any) -> Tensor:
    return state_distillation(batch.states_BTH, batch.labels["taught_states"], batch.labels["last_old_BT"])


def _pooled(batch: Batch, settings: Any) -> Tensor:
    widths = (*settings.matryoshka, batch.vectors_BD.shape[1])
    sides = batch.vectors_BD, batch.labels["taught_vectors"]
    return torch.stack([pooled_distillation(*(side[:, :width] for side in sides)) for width in widths]).mean()


def _anchor(batch: Batch, settings: Any) -> Tensor | None:
    if "target" not in batch.labels:
        return None
    has_B = batch.labels["has_target"]
    if not bool(has_B.any()):
        return batch.vectors_BD.sum() * 0.0
    return pooled_distillation(batch.vectors_BD[has_B], batch.labels["target"][has_B])


def _target(batch: Batch, settings: Any) -> Tensor:
    return pooled_distillation(batch.vectors_BD, batch.labels["target"])


def _cosent(batch: Batch, settings: Any) -> Tensor:
    cosine_B = cosines(batch.vectors_BD, batch.other_BD)
    return cosent(cosine_B, batch.labels["score"], temperature=settings.temperature)


def _cosine(batch: Batch, settings: Any) -> Tensor:
    return cosine_score(cosines(batch.vectors_BD, batch.other_BD), batch.labels["score"])


def _inference(batch: Batch, settings: Any) -> Tensor:
    entailed_B = batch.labels["score"] > 0
    return entailment_contrast(batch.vectors_BD, batch.other_BD, entailed_B, temperature=settings.temperature)


def _one(settings: Any) -> float:
    return 1.0


SIMCSE = LossComponent("simcse", "SimCSE", _one, _simcse)
HIDDEN = LossComponent("hidden", "hidden states", lambda settings: settings.hidden_weight, _hidden)
POOLED = LossComponent("pooled", "text vector", lambda settings: settings.pooled_weight, _pooled)
ANCHOR = LossComponent("anchor", "anchoring", lambda settings: settings.anchor_weight, _anchor)
COSENT = LossComponent("cosent", "CoSENT", _one, _cosent)
COSINE = LossComponent("cosine", "cosine", _one, _cosine)
INFERENCE = LossComponent("inference", "entailment", _one, _inference)
TARGET = LossComponent("target", "teacher's vectors", _one, _target)
START, START_LABEL = "start", "distance to start"
"""The distance to the start is a function of the weights, so it is no component of a batch."""

OBJECTIVES = {
    "simcse": Objective((SIMCSE, ANCHOR), reads="texts twice"),
    "self_distillation": Objective((HIDDEN, POOLED, ANCHOR)),
    "cosent": Objective((COSENT,), reads="pairs"),
    "cosine": Objective((COSINE,), reads="pairs"),
    "inference": Objective((INFERENCE,), reads="pairs"),
    "target": Objective((TARGET,)),
}
"""By the name that settings have for them; ``target`` is how a base from scratch learns from a teacher."""
_COMPONENTS = (SIMCSE, HIDDEN, POOLED, ANCHOR, COSENT, COSINE, INFERENCE, TARGET)
LABELS = {"loss": "total loss", **{f"loss_{one.name}": one.label for one in _COMPONENTS}, f"loss_{START}": START_LABEL}
"""What plots call the losses of the history."""


class StageLoss(nn.Module):
    """The weighted sum of an objective's components, in the shape a sentence-transformers trainer takes.

    Args:
        model: The student.
        objective: One of `OBJECTIVES`.
        settings: Of the stage; weights and temperature of the components.
        complete: Adds to the labels of a batch, or changes them, before components read them.
        mini_batch_size: Texts encoded at a time (cached gradients); all at once when not given.
        l2_sp_weight: Weight of the distance to the start.
        moving: What is trained, by name, for that distance.
    """

    loss_components: dict[str, Tensor]
    """Components of the last batch, detached and unweighted."""

    def __init__(
        self,
        model: Any,
        objective: str,
        settings: Any,
        *,
        complete: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None,
        mini_batch_size: int | None = None,
        l2_sp_weight: float = 0.0,
        moving: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.loss_components = {}
        self._objective, self._settings, self._complete = OBJECTIVES[objective], settings, complete
        self._mini_batch_size, self._l2_sp_weight = mini_batch_size, l2_sp_weight
        # Plain dictionaries: registering these would save, move and train what is another module's.
        self._moving = dict(moving or {}) if l2_sp_weight else {}
        self._start = {name: weight.detach().clone() for name, weight in self._moving.items()}

    def forward(self, features: Sequence[Mapping[str, Tensor]], labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weighted losses by name; their sum is what is minimised."""
        (texts,) = features
        known = labels if self._complete is None else self._complete(labels)
        given = dict(texts)
        if self._objective.reads == "texts twice":
            given = {name: torch.cat([texts[name], texts[name]]) for name in ("input_ids", "attention_mask")}
        if self._mini_batch_size is None or not torch.is_grad_enabled():
            output = self.model(given)
            losses = self._losses(output["sentence_embedding"], output["token_embeddings"], known)
        else:
            losses = cached_losses(
                lambda part: self.model(part)["sentence_embedding"],
                given,
                lambda vectors: self._losses(vectors, vectors.new_zeros(0), known),
                mini_batch=self._mini_batch_size,
            )
        if self._start:
            # After the cached losses: their backward pass reaches the weights through vectors alone.
            distance = l2_to_start(self._moving, self._start)
            self.loss_components[START] = distance.detach()
            losses = {**losses, START: self._l2_sp_weight * distance}
        return losses

    def _losses(self, vectors: Tensor, states: Tensor, labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        once = self._objective.reads == "texts"
        first_BD, second_BD = (vectors, vectors) if once else vectors.chunk(2)
        batch = Batch(first_BD, second_BD, states, labels)
        found = [(one, one.compute(batch, self._settings)) for one in self._objective.components]
        raw = [(one, value) for one, value in found if value is not None]
        self.loss_components = {one.name: value.detach() for one, value in raw}
        weighted = [(one.name, one.weight(self._settings), value) for one, value in raw]
        return {name: weight * value for name, weight, value in weighted if weight > 0}
