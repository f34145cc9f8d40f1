"""How far have weights gone from where they started?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


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
