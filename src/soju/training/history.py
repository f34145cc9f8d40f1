"""The history of a run: means of the unweighted loss components, and steps refused because they are not finite.

Means are kept in full precision, also across an interruption: the stock trainers log weighted losses rounded to four
decimals, where FLOPS at weight 5e-5 reads 0.0004. A step whose loss or gradient is not finite is named, counted and
refused; several in a row end the run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from soju.core.errors import BadNumbersError
from soju.core.files import append_json_line, read_json_lines, write_text

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
        named = [(name, value) for name, value in components.items() if name != total and not _all_finite(value)]
        if not named and not _all_finite(components[total]):
            named = [(total, components[total])]
        faults += [f"{name} is {_kind(value)}{_rows(value)}{place}" for name, value in named]
    return ", ".join(faults) or _describe_gradient(parameters)


def _describe_gradient(parameters: Sequence[tuple[str, nn.Parameter]]) -> str:
    names = [name for name, parameter in parameters if parameter.grad is not None and not _all_finite(parameter.grad)]
    if not names or len(names) == len(parameters):  # clipping by a norm that is nan spreads it to all of them
        return "the gradient is not finite while the loss is"
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return f"the gradient of {', '.join(names[:_SHOWN])}{more} is not finite while the loss is"


def _all_finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value).all())


def _kind(value: Tensor) -> str:
    return "nan" if bool(torch.isnan(value).any()) else "infinite"


def _rows(value: Tensor) -> str:
    if value.ndim == 0:
        return ""
    rows = torch.nonzero(~torch.isfinite(value.flatten(1).sum(1) if value.ndim > 1 else value)).flatten().tolist()
    more = f" and {len(rows) - _SHOWN:,} more" if len(rows) > _SHOWN else ""
    return f" in row{'s' * (len(rows) > 1)} {', '.join(map(str, rows[:_SHOWN]))}{more}"


LOSS = "loss"
"""Name of the total among the components: the weighted sum that is minimised."""


class LossWindow:
    """Means of loss components over the optimiser steps since the last log line, kept on the device."""

    def __init__(self) -> None:
        self.pending: list[dict[str, Tensor]] = []
        """Components of each micro-batch of the step under way, detached, scalars or ``(rows,)``."""
        self.steps = 0
        """Optimiser steps counted."""
        self.refused = 0
        """Optimiser steps refused."""
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, loss: Tensor, components: Mapping[str, Tensor]) -> None:
        """Take one micro-batch: its share of the step's loss and its unweighted components, scalars or one value a row.

        Nothing is copied from the device.
        """
        self.pending.append({LOSS: loss.detach(), **{name: value.detach() for name, value in components.items()}})

    def accept(self) -> None:
        """Count the step under way."""
        for components in self.pending:
            for name, value in components.items():
                mean = value.to(_wide(value)).mean()
                self._sums[name] = self._sums[name] + mean if name in self._sums else mean
                self._counts[name] = self._counts.get(name, 0) + 1
        self.pending = []
        self.steps += 1

    def refuse(self) -> None:
        """Forget the step under way and count that."""
        self.pending = []
        self.refused += 1

    def totals(self) -> dict[str, tuple[float, int]]:
        """Return sum and count by component; the loss counts optimiser steps, the others micro-batches."""
        names = sorted(self._sums)
        values = torch.stack([self._sums[name] for name in names]).tolist() if names else []
        counts = {**self._counts, LOSS: self.steps}
        return {name: (value, counts[name]) for name, value in zip(names, values, strict=True)}

    def clear(self) -> None:
        """Begin a new window."""
        self.pending = []
        self.steps = self.refused = 0
        self._sums, self._counts = {}, {}

    def load(self, totals: Mapping[str, Iterable[float]], *, steps: int, refused: int, device: torch.device) -> None:
        """Go on with a window that a checkpoint interrupted."""
        self.clear()
        self.steps, self.refused = steps, refused
        for name, (total, count) in totals.items():
            value = torch.zeros((), device=device)
            self._sums[name] = torch.tensor(total, dtype=_wide(value), device=device)
            self._counts[name] = int(count)


def add_totals(ranks: Iterable[Mapping[str, tuple[float, int]]]) -> dict[str, tuple[float, int]]:
    """Add up what `LossWindow.totals` returned on each rank.

    >>> add_totals([{"flops": (1.0, 2)}, {"flops": (3.0, 2)}])
    {'flops': (4.0, 4)}
    """
    result: dict[str, tuple[float, int]] = {}
    for totals in ranks:
        for name, (value, count) in totals.items():
            before = result.get(name, (0.0, 0))
            result[name] = (before[0] + value, before[1] + count)
    return result


class HistoryFile:
    """``history.jsonl``: one row a log line or evaluation, never one twice."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, step: int) -> None:
        """Leave out everything after the step that training starts from, 0 for a new run."""
        rows = [row for row in read_json_lines(self.path) if row["step"] <= step] if step else []
        write_text(self.path, "".join(_line(row) for row in rows))

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one row; numbers that are not finite become ``null``."""
        append_json_line(self.path, {key: _finite(value) for key, value in row.items()})


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _wide(value: Tensor) -> torch.dtype:
    return torch.float32 if value.device.type == "mps" else torch.float64
