"""A curriculum: stages with their own settings and mix of rows, each a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a curriculum."""

    share: float
    """Share of the optimiser steps, in (0, 1]; the shares of all stages add up to 1."""
    learning_rate: float = 1.0
    """Factor on the learning rate."""
    mix: Mapping[str, float] = field(default_factory=dict)
    """Share of the rows of each group named; the groups not named divide the rest evenly. Empty: as in the data."""


def stage_at(stages: Sequence[Stage], step: int, total_steps: int) -> int:
    """Return which stage a step belongs to.

    >>> stages = [Stage(0.5), Stage(0.5)]
    >>> [stage_at(stages, step, 4) for step in range(5)]
    [0, 0, 1, 1, 1]

    Args:
        stages: At least one.
        step: Optimiser steps done before it, >= 0; the steps after the last belong to the last stage.
        total_steps: Optimiser steps of the training, >= 1.

    Returns:
        Index of the stage. Stage i ends before step ``ceil(total_steps * (share 0 + ... + share i))``.
    """
    ends = stage_ends(stages, total_steps)
    return next((index for index, end in enumerate(ends) if step < end), len(stages) - 1)


def stage_ends(stages: Sequence[Stage], total_steps: int) -> list[int]:
    """Return the step at which each stage is over; the last is `total_steps`."""
    sums = np.cumsum([stage.share for stage in stages])
    # Shares such as 0.35 are not exact; a stage must not end one step late for that.
    ends = [min(total_steps, math.ceil(total_steps * float(share) - 1e-6)) for share in sums]
    return [*ends[:-1], total_steps]


def staged_cosine(step: int, total_steps: int, *, warm_up_steps: int, stages: Sequence[Stage]) -> float:
    """Return the factor on the peak learning rate at a step.

    It rises linearly over the warm-up, then falls along half a cosine to 0 at the end; each stage multiplies it.

    Args:
        step: Optimiser steps done, >= 0.
        total_steps: Optimiser steps of the training.
        warm_up_steps: Steps of the rise, < `total_steps`.
        stages: The curriculum.

    Returns:
        The factor, >= 0.
    """
    if step < warm_up_steps:
        factor = step / max(1, warm_up_steps)
    else:
        done = (step - warm_up_steps) / max(1, total_steps - warm_up_steps)
        factor = (1 + math.cos(math.pi * min(1.0, done))) / 2
    return factor * stages[stage_at(stages, step, total_steps)].learning_rate
