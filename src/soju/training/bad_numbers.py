"""Steps whose loss or gradient is not finite: named, counted and refused; several in a row end the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from soju.core.errors import BadNumbersError

_SHOWN = 10
"""Rows or parameters that a message names."""


class BadNumbers:
    """Counts refused steps; equal on every rank because every rank refuses the same steps."""

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"limit must be >= 1, got {limit}")
        self.limit = limit
        self.in_a_row = 0
        self.total = 0

    def accept(self) -> None:
        """Note a good step."""
        self.in_a_row = 0

    def refuse(self, step: int, what: str) -> None:
        """Note a refused step.

        Args:
            step: Number of the optimiser step, from 1.
            what: Which numbers, as `describe` says it.

        Raises:
            BadNumbersError: If this is the last one allowed in a row.
        """
        self.in_a_row += 1
        self.total += 1
        if self.in_a_row >= self.limit:
            raise BadNumbersError(
                f"step {step}: {what}; {self.in_a_row} steps in a row were refused; lower the learning rate, clip "
                "harder or check those rows, then train again with --resume"
            )

    def state_dict(self) -> dict[str, int]:
        """Return the counts."""
        return {"in_a_row": self.in_a_row, "total": self.total}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back the counts."""
        self.in_a_row, self.total = int(state["in_a_row"]), int(state["total"])


def describe(
    micro_batches: Sequence[Mapping[str, Tensor]], parameters: Sequence[tuple[str, nn.Parameter]], *, total: str
) -> str:
    """Name what is not finite.

    Args:
        micro_batches: Loss components of each micro-batch of the step: scalars, or ``(rows,)`` to have rows named.
        parameters: Named parameters with the step's gradient.
        total: Name of the total; it is named only when no component explains it.

    Returns:
        For example ``flops is nan in rows 3, 7 of micro-batch 2``.
    """
    faults = []
    for number, components in enumerate(micro_batches, start=1):
        place = f" of micro-batch {number}" if len(micro_batches) > 1 else ""
        named = [(name, value) for name, value in components.items() if name != total and not _finite(value)]
        if not named and not _finite(components[total]):
            named = [(total, components[total])]
        faults += [f"{name} is {_kind(value)}{_rows(value)}{place}" for name, value in named]
    return ", ".join(faults) or _describe_gradient(parameters)


def _describe_gradient(parameters: Sequence[tuple[str, nn.Parameter]]) -> str:
    names = [name for name, parameter in parameters if parameter.grad is not None and not _finite(parameter.grad)]
    if not names or len(names) == len(parameters):  # clipping by a norm that is nan spreads it to all of them
        return "the gradient is not finite while the loss is"
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return f"the gradient of {', '.join(names[:_SHOWN])}{more} is not finite while the loss is"


def _finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value).all())


def _kind(value: Tensor) -> str:
    return "nan" if bool(torch.isnan(value).any()) else "infinite"


def _rows(value: Tensor) -> str:
    if value.ndim == 0:
        return ""
    rows = torch.nonzero(~torch.isfinite(value.flatten(1).sum(1) if value.ndim > 1 else value)).flatten().tolist()
    more = f" and {len(rows) - _SHOWN:,} more" if len(rows) > _SHOWN else ""
    return f" in row{'s' * (len(rows) > 1)} {', '.join(map(str, rows[:_SHOWN]))}{more}"
