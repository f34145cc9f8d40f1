"""The distillation loss of translation, value and gradient in one pass over tiles of rows.

Autograd writes some ten ``(N, V)`` tensors for ``kl_div`` and ``cross_entropy``. Here a tile of a few rows stays in the
cache from the logits to the gradient, which is the only ``(N, V)`` tensor written; from hidden states none is.

Shape letters: N = target positions, V = vocabulary, R = rows of one tile, D = width of the student, E = of the teacher.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from soju.core.config import Settings

IGNORED = -100
"""Label of a position that is padding."""
_TILE_CELLS = {"cpu": 1 << 19}
"""Logits of one tile, R × V: 2 MB in float32, so that the working set of four tiles fits the cache."""
_OTHER_TILE_CELLS = 1 << 26
_BLOCK_ROWS = 128
"""Rows of one product with the head: enough for the product to be limited by arithmetic and not by reading the head."""


class LossSettings(Settings):
    """How a student learns from the teacher and from the references."""

    temperature: float = Field(6.0, gt=0)
    """Both sides' logits are divided by it in the distillation term."""
    alpha: float = Field(0.8, ge=0)
    """Weight of ``temperature ** 2 * KL(teacher‖student)``."""
    beta: float = Field(0.2, ge=0)
    """Weight of the cross-entropy with the references."""
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    """Share of the reference's probability that is spread over the vocabulary."""
    hidden_weight: float = Field(0.0, ge=0)
    """Weight of the mean squared error of the last decoder states; 0 is off."""


@dataclass(frozen=True, slots=True)
class LossTerms:
    """The loss and what it is made of."""

    loss: Tensor
    """``alpha * distillation + beta * cross_entropy + hidden_weight * hidden``; the only part with a gradient."""
    distillation: Tensor
    """``T² · KL(teacher‖student)`` at temperature T, in nats, mean over the positions counted."""
    cross_entropy: Tensor
    """Label-smoothed, in nats, mean over the positions counted."""
    hidden: Tensor | None
    """Mean squared error of the states, when it was asked for."""
    distillation_gradient_norm: Tensor
    """Euclidean norm of the weighted term's gradient at the logits of this call."""
    cross_entropy_gradient_norm: Tensor
    """The same for the cross-entropy: what either target contributes, which the values do not tell."""

    def named(self) -> dict[str, Tensor]:
        """Return the terms by name, detached, for the log."""
        terms = {
            "distillation": self.distillation,
            "cross_entropy": self.cross_entropy,
            "distillation_gradient_norm": self.distillation_gradient_norm,
            "cross_entropy_gradient_norm": self.cross_entropy_gradient_norm,
        }
        return {"loss": self.loss.detach(), **terms, **({} if self.hidden is None else {"hidden": self.hidden})}


def distillation_loss(
    student_NV: Tensor, teacher_NV: Tensor, labels_N: Tensor, settings: LossSettings, *, positions: float | None = None
) -> LossTerms:
    """Return ``alpha · T² · KL(teacher‖student) + beta · CE`` with the gradient of the student's logits.

    Args:
        student_NV: The student's logits, ``(..., V)``.
        teacher_NV: The teacher's logits of the same positions; no gradient flows into them.
        labels_N: Reference tokens, ``(...)``; `IGNORED` where there is none: such rows have no part in anything.
        settings: Weights and temperature.
        positions: What sums are divided by: the real target positions of the whole optimiser step, when this call sees
            only some of them. Those of this call when not given.

    Returns:
        The terms, in float32 at least; all 0 when no position is real.

    Raises:
        ValueError: If shapes do not fit or a label is outside the vocabulary.

    References:
        Hinton et al. 2015, arXiv:1503.02531. Szegedy et al. 2016, arXiv:1512.00567 (label smoothing).
    """
    if student_NV.shape != teacher_NV.shape or student_NV.shape[:-1] != labels_N.shape:
        shapes = f"{tuple(student_NV.shape)}, {tuple(teacher_NV.shape)} and {tuple(labels_N.shape)}"
        raise ValueError(f"student, teacher and labels must be (..., V), (..., V) and (...), got {shapes}")
    _check_labels(labels_N, student_NV.shape[-1])
    numbers: tuple[Tensor, ...] = _LogitLoss.apply(  # type: ignore[no-untyped-call]
        student_NV.flatten(0, -2), teacher_NV.detach().flatten(0, -2), labels_N.flatten(), settings, positions
    )
    return _terms(numbers)


def distillation_loss_from_states(
    student_ND: Tensor,
    head_VD: Tensor,
    teacher_NE: Tensor,
    teacher_head_VE: Tensor,
    labels_N: Tensor,
    settings: LossSettings,
    *,
    positions: float | None = None,
) -> LossTerms:
    """Return `distillation_loss` from the last decoder states and the two heads, without the ``(N, V)`` logits.

    Args:
        student_ND: The student's states, ``(..., D)``.
        head_VD: The student's output embedding, without bias.
        teacher_NE: The teacher's states, for example from a cache in float16.
        teacher_head_VE: The teacher's output embedding.
        labels_N: As in `distillation_loss`.
        settings: As in `distillation_loss`; ``hidden_weight`` is not read here.
        positions: As in `distillation_loss`.

    Returns:
        The terms; the gradient norms are those at the logits.

    Raises:
        ValueError: If shapes do not fit or a label is outside the vocabulary.
    """
    fits = len(head_VD) == len(teacher_head_VE) and student_ND.shape[:-1] == teacher_NE.shape[:-1] == labels_N.shape
    if not fits or student_ND.shape[-1] != head_VD.shape[1] or teacher_NE.shape[-1] != teacher_head_VE.shape[1]:
        given = (student_ND, head_VD, teacher_NE, teacher_head_VE, labels_N)
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in given)
        raise ValueError(f"expected (..., D), (V, D), (..., E), (V, E) and (...), got {shapes}")
    _check_labels(labels_N, len(head_VD))
    labels_N = labels_N.flatten()
    real_N = (labels_N != IGNORED).nonzero().squeeze(1)
    numbers: tuple[Tensor, ...] = _StateLoss.apply(  # type: ignore[no-untyped-call]
        student_ND.flatten(0, -2)[real_N],
        head_VD,
        teacher_NE.detach().flatten(0, -2)[real_N],
        teacher_head_VE.detach(),
        labels_N[real_N],
        settings,
        positions,
    )
    return _terms(numbers)


def hidden_state_error(
    student_NE: Tensor, teacher_NE: Tensor, labels_N: Tensor, *, positions: float | None = None
) -> Tensor:
    """Return the squared error of projected student states, mean over dimensions and over the real positions.

    Args:
        student_NE: The student's states, projected to the teacher's width.
        teacher_NE: The teacher's states; no gradient flows into them.
        labels_N: As in `distillation_loss`.
        positions: As in `distillation_loss`.

    Returns:
        Scalar, in squared units of the states.
    """
    real_N = labels_N != IGNORED
    difference_NE = student_NE[real_N].float() - teacher_NE.detach()[real_N].float()
    return difference_NE.square().mean(dim=-1).sum() / _divisor(len(difference_NE), positions)


class _Sums(NamedTuple):
    """Weighted sums over the positions seen, not divided yet, and the squared norms of both gradients."""

    distillation: Tensor
    cross_entropy: Tensor
    distillation_square: Tensor
    cross_entropy_square: Tensor


class _Tiles:
    """The pass over tiles: from logits of R rows to their part of the value and, in place, their gradient.

    Buffers are made once: new memory for every tile would cost as much as the arithmetic.
    """

    def __init__(self, vocabulary: int, like: Tensor, settings: LossSettings, divisor: float) -> None:
        self.settings, self.divisor, self.vocabulary = settings, divisor, vocabulary
        cells = _TILE_CELLS.get(like.device.type, _OTHER_TILE_CELLS)
        self.rows = max(1, cells // vocabulary)
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.buffers = [torch.empty(self.rows, vocabulary, dtype=dtype, device=like.device) for _ in range(4)]
        self.sums = _Sums(*torch.zeros(4, dtype=torch.float64, device=like.device).unbind())

    def slices(self, rows: int) -> Iterator[slice]:
        """Yield the tiles of so many rows."""
        for start in range(0, rows, self.rows):
            yield slice(start, min(start + self.rows, rows))

    def add(self, student_RV: Tensor, teacher_RV: Tensor, labels_R: Tensor, *, gradient: bool) -> Tensor | None:
        """Add the value of R rows with real labels; return their gradient in a buffer that the next call overwrites."""
        with torch.autocast(student_RV.device.type, enabled=False):  # it would take sums of 32,000 in half precision
            return self._add(student_RV, teacher_RV, labels_R, gradient=gradient)

    def _add(self, student_RV: Tensor, teacher_RV: Tensor, labels_R: Tensor, *, gradient: bool) -> Tensor | None:
        hot_RV, cold_RV, student_T_RV, teacher_T_RV = (buffer[: len(student_RV)] for buffer in self.buffers)
        temperature, smoothing = self.settings.temperature, self.settings.label_smoothing
        index_R1 = labels_R[:, None]

        # Cross-entropy at temperature 1: log Z − z_y, and log Z − mean z for the smoothed share.
        largest_R1 = student_RV.amax(dim=1, keepdim=True).to(cold_RV.dtype)
        torch.sub(student_RV, largest_R1, out=cold_RV)  # z − max z
        torch.mul(cold_RV, 1 / temperature, out=student_T_RV)
        spread_R = smoothing * cold_RV.mean(dim=1) + (1 - smoothing) * cold_RV.gather(1, index_R1)[:, 0]
        cold_RV.exp_()
        mass_R1 = cold_RV.sum(dim=1, keepdim=True)
        self.sums.cross_entropy.add_((mass_R1[:, 0].log() - spread_R).sum())

        # Divergence at the temperature: Σ q (log q − log p), with both partition functions taken out of the sum.
        torch.sub(teacher_RV, teacher_RV.amax(dim=1, keepdim=True), out=teacher_T_RV).mul_(1 / temperature)
        torch.sub(teacher_T_RV, student_T_RV, out=hot_RV)
        teacher_T_RV.exp_()
        student_T_RV.exp_()
        teacher_mass_R1 = teacher_T_RV.sum(dim=1, keepdim=True)
        student_mass_R1 = student_T_RV.sum(dim=1, keepdim=True)
        expected_R = torch.linalg.vecdot(teacher_T_RV, hot_RV) / teacher_mass_R1[:, 0]
        divergence_R = expected_R - teacher_mass_R1[:, 0].log() + student_mass_R1[:, 0].log()
        self.sums.distillation.add_(temperature**2 * divergence_R.sum())
        if not gradient:
            return None

        # d/dz of the first term is alpha T (p_T − q_T), of the second beta (p − target).
        scale = self.settings.alpha * temperature / self.divisor
        teacher_T_RV.mul_(-scale / teacher_mass_R1)
        torch.addcmul(teacher_T_RV, student_T_RV, scale / student_mass_R1, out=hot_RV)
        self.sums.distillation_square.add_(hot_RV.flatten().dot(hot_RV.flatten()))
        weight = self.settings.beta / self.divisor
        cold_RV.mul_(weight / mass_R1).sub_(weight * smoothing / self.vocabulary)
        cold_RV.scatter_add_(1, index_R1, cold_RV.new_full(index_R1.shape, -weight * (1 - smoothing)))
        self.sums.cross_entropy_square.add_(cold_RV.flatten().dot(cold_RV.flatten()))
        return hot_RV.add_(cold_RV)

    def numbers(self, like: Tensor) -> tuple[Tensor, ...]:
        """Return the loss, both terms as means, and both gradient norms."""
        distillation, cross_entropy = self.sums.distillation / self.divisor, self.sums.cross_entropy / self.divisor
        loss = self.settings.alpha * distillation + self.settings.beta * cross_entropy
        norms = self.sums.distillation_square.sqrt(), self.sums.cross_entropy_square.sqrt()
        dtype = torch.promote_types(like.dtype, torch.float32)
        return tuple(number.to(dtype) for number in (loss, distillation, cross_entropy, *norms))


class _LogitLoss(torch.autograd.Function):
    """`distillation_loss` of flat rows; the gradient is made in the forward pass and only scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        student_NV: Tensor,
        teacher_NV: Tensor,
        labels_N: Tensor,
        settings: LossSettings,
        positions: float | None,
    ) -> tuple[Tensor, ...]:
        real_N = labels_N != IGNORED
        count = int(real_N.sum())
        all_real = count == len(labels_N)
        rows_N = None if all_real else real_N.nonzero().squeeze(1)
        tiles = _Tiles(student_NV.shape[1], student_NV, settings, _divisor(count, positions))
        wanted = ctx.needs_input_grad[0]
        gradient_NV = None
        if wanted:
            gradient_NV = torch.empty_like(student_NV) if all_real else torch.zeros_like(student_NV)
        for part in tiles.slices(count):
            chosen = part if rows_N is None else rows_N[part]
            gradient_RV = tiles.add(student_NV[chosen], teacher_NV[chosen], labels_N[chosen], gradient=wanted)
            if gradient_NV is not None and gradient_RV is not None:
                gradient_NV[chosen] = gradient_RV.to(gradient_NV.dtype)
        if gradient_NV is not None:
            ctx.save_for_backward(gradient_NV)
        numbers = tiles.numbers(student_NV)
        ctx.mark_non_differentiable(*numbers[1:])
        return numbers

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_NV,) = ctx.saved_tensors
        return gradient_NV * scale.to(gradient_NV.dtype), None, None, None, None


class _StateLoss(torch.autograd.Function):
    """`distillation_loss_from_states` of real rows.

    Products are made for blocks of rows and tiles inside them, so that at most ``_BLOCK_ROWS`` rows of logits exist.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_ND: Tensor,
        head_VD: Tensor,
        teacher_NE: Tensor,
        teacher_head_VE: Tensor,
        labels_N: Tensor,
        settings: LossSettings,
        positions: float | None,
    ) -> tuple[Tensor, ...]:
        tiles = _Tiles(len(head_VD), student_ND, settings, _divisor(len(labels_N), positions))
        wanted = any(ctx.needs_input_grad[:2])
        states_gradient_ND, head_gradient_VD = torch.empty_like(student_ND), torch.zeros_like(head_VD)
        for start in range(0, len(labels_N), _BLOCK_ROWS):
            block = slice(start, start + _BLOCK_ROWS)
            logits_NV = linear(student_ND[block], head_VD)
            teacher_NV = linear(teacher_NE[block].to(teacher_head_VE.dtype), teacher_head_VE)
            for part in tiles.slices(len(logits_NV)):
                found_RV = tiles.add(logits_NV[part], teacher_NV[part], labels_N[block][part], gradient=wanted)
                if found_RV is not None:
                    logits_NV[part] = found_RV.to(logits_NV.dtype)  # the logits are not read again
            if wanted:
                states_gradient_ND[block] = (logits_NV @ head_VD).to(student_ND.dtype)
                head_gradient_VD += (logits_NV.T @ student_ND[block]).to(head_VD.dtype)
        if wanted:
            ctx.save_for_backward(states_gradient_ND, head_gradient_VD)
        numbers = tiles.numbers(student_ND)
        ctx.mark_non_differentiable(*numbers[1:])
        return numbers

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        states_gradient_ND, head_gradient_VD = ctx.saved_tensors
        by_state = states_gradient_ND * scale.to(states_gradient_ND.dtype)
        return by_state, head_gradient_VD * scale.to(head_gradient_VD.dtype), None, None, None, None, None


def _divisor(count: int, positions: float | None) -> float:
    if positions is None:
        return float(max(count, 1))
    if not positions > 0:
        raise ValueError(f"positions must be > 0, got {positions}")
    return float(positions)


def _check_labels(labels_N: Tensor, vocabulary: int) -> None:
    real_N = labels_N[labels_N != IGNORED]
    if not len(real_N):
        return
    lowest, highest = int(real_N.min()), int(real_N.max())
    if lowest < 0 or highest >= vocabulary:
        outside = lowest if lowest < 0 else highest
        raise ValueError(f"label {outside} is outside the vocabulary of {vocabulary:,}; use {IGNORED} for padding")


def _terms(numbers: tuple[Tensor, ...]) -> LossTerms:
    loss, distillation, cross_entropy, distillation_norm, cross_entropy_norm = numbers
    return LossTerms(loss, distillation, cross_entropy, None, distillation_norm, cross_entropy_norm)


class DistillationLoss(nn.Module):
    """The loss as a module: settings, and the projection of the states when their error has a weight."""

    def __init__(self, settings: LossSettings, *, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.settings = settings
        wanted = settings.hidden_weight > 0
        self.projection = nn.Linear(student_width, teacher_width, bias=False) if wanted else None

    def forward(
        self,
        student_ND: Tensor,
        head_VD: Tensor,
        teacher_NE: Tensor,
        teacher_head_VE: Tensor,
        labels_N: Tensor,
        *,
        positions: float | None = None,
    ) -> LossTerms:
        """Return the terms of `distillation_loss_from_states`, with the hidden-state error where it has a weight."""
        terms = distillation_loss_from_states(
            student_ND, head_VD, teacher_NE, teacher_head_VE, labels_N, self.settings, positions=positions
        )
        if self.projection is None:
            return terms
        error = hidden_state_error(self.projection(student_ND), teacher_NE, labels_N, positions=positions)
        return LossTerms(
            terms.loss + self.settings.hidden_weight * error,
            terms.distillation,
            terms.cross_entropy,
            error.detach(),
            terms.distillation_gradient_norm,
            terms.cross_entropy_gradient_norm,
        )
