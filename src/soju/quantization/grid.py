"""Training on the grid that CTranslate2's int8 puts weights and activations on.

Each row of a matrix, and each token's activations, is multiplied by ``127 / max |row|`` and rounded to whole numbers,
half to even. `fake_quantise` does that and divides again; its gradient is the identity (straight-through), so a model
trained with it learns weights that lose little when they are really rounded.

On x86 without VNNI the int8 product saturates; ``levels=63`` is the grid of seven bits in the same format, which does
not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from soju.core.errors import UserError

LEVELS = 127
"""The largest code of CTranslate2's int8."""


def row_scale(values: Tensor, levels: int = LEVELS) -> Tensor:
    """Return the scale of each row, ``(..., 1)`` float32: ``levels / max |row|``, 1 for a row of zeros."""
    largest = values.abs().amax(dim=-1, keepdim=True).float()
    least = 2 * levels / torch.finfo(torch.float32).max  # a smaller row would have an infinite scale
    # A number over a tensor would be taken times its reciprocal, which misses CTranslate2's scale by a bit.
    scale = torch.full_like(largest, levels) / largest.clamp_min(least)
    return torch.where(largest > 0, scale, 1.0)


def quantise(values: Tensor, levels: int = LEVELS) -> tuple[Tensor, Tensor]:
    """Return int8 codes and their scale; ``codes / scale`` are the values again.

    Args:
        values: ``(..., K)``, finite.
        levels: Largest code, 1 to 127.

    Returns:
        Codes ``(..., K)`` int8 and scale ``(..., 1)``.

    Raises:
        UserError: If `levels` is no such number.
    """
    if not 1 <= levels <= LEVELS:
        raise UserError(f"int8 grid: {levels} levels; give 1 to {LEVELS}")
    scale = row_scale(values, levels)
    return (values * scale).round().to(torch.int8), scale


def fake_quantise(values: Tensor, levels: int = LEVELS) -> Tensor:
    """Return the values on the grid, in their dtype; the gradient passes as if nothing had been done.

    Args:
        values: ``(..., K)``; each row of the last dimension has a scale of its own.
        levels: Largest code.

    Returns:
        ``round(values * scale) / scale``.

    References:
        Bengio et al. 2013, arXiv:1308.3432 (straight-through). Jacob et al. 2018, arXiv:1712.05877 (training).
    """
    result: Tensor = _StraightThrough.apply(values, levels)  # type: ignore[no-untyped-call]
    return result


class _StraightThrough(torch.autograd.Function):
    """An own function: ``values + (rounded - values).detach()`` would miss the grid in the last bits."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, levels: int) -> Tensor:
        scale = row_scale(values, levels)
        return (values * scale).round_().div_(scale).to(values.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class QatLinear(nn.Linear):
    """`nn.Linear` whose weights and inputs are on the grid; parameters and their names stay."""

    levels: int

    @classmethod
    def from_linear(cls, layer: nn.Linear, *, levels: int = LEVELS) -> Self:
        """Return a layer with the very parameters of another, so that tied weights stay tied."""
        result = cls(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        result.weight, result.bias, result.levels = layer.weight, layer.bias, levels
        return result.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        """Return the product of inputs and weights on the grid, plus the bias."""
        return linear(fake_quantise(input), fake_quantise(self.weight, self.levels), self.bias)


@dataclass(slots=True)
class Prepared:
    """What `prepare` changed, to be taken back."""

    places: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)
    """Parent, name and former module."""
    handles: list[Any] = field(default_factory=list)

    def remove(self) -> None:
        """Put the former modules back; the parameters keep what they learnt."""
        for parent, name, former in self.places:
            setattr(parent, name, former)
        for handle in self.handles:
            handle.remove()
        self.places.clear()
        self.handles.clear()


def prepare(model: nn.Module, *, levels: int = LEVELS) -> Prepared:
    """Put every linear layer and every embedding of a model on the grid, in place.

    The rows of an embedding are rounded where they are read; a factor on them changes nothing, since the scale of a row
    follows it.

    Args:
        model: Its parameters, their names and ties stay, so checkpoints fit either way.
        levels: Largest code of the weights; activations always have 127.

    Returns:
        What takes it back.

    Raises:
        UserError: If the model is prepared already or `levels` is no number from 1 to 127.
    """
    if not 1 <= levels <= LEVELS:
        raise UserError(f"int8 grid: {levels} levels; give 1 to {LEVELS}")
    if any(isinstance(module, QatLinear) for module in model.modules()):
        raise UserError("int8 grid: the model is prepared already; take that back first")
    prepared = Prepared()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, QatLinear.from_linear(child, levels=levels))
                prepared.places.append((parent, name, child))
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            prepared.handles.append(
                module.register_forward_hook(lambda _module, _inputs, rows: fake_quantise(rows, levels))
            )
    return prepared
