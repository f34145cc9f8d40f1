"""Controllers: weights of losses that move until a measured quantity is where the user wants it; and alarms.

Shape letter: B = texts of one side (queries or documents) in a batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from soju.core.errors import RegressionError
from soju.training.ranks import from_all


class SparsityController:
    """Finds the weight of a sparsity penalty at which texts have the active terms of the sparsity target.

    Bounded dual ascent in the logarithm, with a proportional term against oscillation: after each optimiser step,

    ``error = clip(log(active / target) / tolerance, -1, 1)``, ``multiplier *= exp(rate * error)``,
    ``weight = multiplier * exp(damping * error)``

    with ``active`` an exponential mean over steps, counted on all ranks together. The multiplier, for which orders of
    magnitude matter, moves at the full rate until texts are about as asked, and ever slower from there. It grows while
    texts are too dense and shrinks while they are too sparse, so it settles where they are as asked. A penalty can only
    thin out: it cannot give texts more terms than the other losses activate. Its state is part of the checkpoint
    (`soju.training.state.Stateful`).

    Args:
        target: Active terms a text, > 0; the weight stays as it is when ``None``, and only the mean is kept.
        weight: Weight to begin with, > 0 if it is to move.
        rate: Largest step of the multiplier's logarithm, > 0.
        tolerance: Relative error beyond which it moves at that rate, > 0.
        damping: Strength of the proportional term, >= 0.
        smoothing: Share of the old mean that stays at each step, in [0, 1).
        bounds: Lowest and highest weight.

    Raises:
        ValueError: If a number is out of its range.

    References:
        Boyd and Vandenberghe 2004, Convex Optimization, section 5.5 (dual ascent). Stooke et al. 2020, arXiv:2007.03964
        (damped multipliers).
    """

    def __init__(
        self,
        target: float | None,
        *,
        weight: float,
        rate: float = 0.05,
        tolerance: float = 0.1,
        damping: float = 0.5,
        smoothing: float = 0.95,
        bounds: tuple[float, float] = (1e-8, 100.0),
    ) -> None:
        if target is not None and not (target > 0 and weight > 0):
            raise ValueError(f"target and weight must be > 0, got {target} and {weight}")
        if not (rate > 0 and tolerance > 0 and damping >= 0 and 0 <= smoothing < 1 and 0 < bounds[0] <= bounds[1]):
            raise ValueError(
                "rate and tolerance must be > 0, damping >= 0, smoothing in [0, 1), bounds 0 < low <= high"
            )
        self.target = target
        self.weight = weight
        self.rate = rate
        self.tolerance = tolerance
        self.damping = damping
        self.smoothing = smoothing
        self.bounds = bounds
        self._multiplier = weight
        self._mean = self._mass = 0.0
        self._terms = self._texts = 0.0

    @property
    def active(self) -> float:
        """Active terms a text, the mean over recent steps; NaN before the first."""
        return self._mean / self._mass if self._mass else math.nan

    def observe(self, active_B: Tensor) -> None:
        """Note how many active terms each text of a micro-batch has, ``(B,)``."""
        self._terms += float(active_B.sum())
        self._texts += len(active_B)

    def step(self, *, move: bool = True) -> None:
        """Take in what was observed; call once an optimiser step, on every rank.

        `move` tells whether the penalty is at work, so that its weight is to be moved.
        """
        terms, texts = (sum(values) for values in zip(*from_all((self._terms, self._texts)), strict=True))
        self._terms = self._texts = 0.0
        if texts == 0:
            return
        self._mean = self.smoothing * self._mean + (1 - self.smoothing) * terms / texts
        self._mass = self.smoothing * self._mass + (1 - self.smoothing)
        if self.target is None or not move:
            return
        error = min(1.0, max(-1.0, math.log(max(self.active, 1e-3) / self.target) / self.tolerance))
        low, high = self.bounds
        self._multiplier = min(high, max(low, self._multiplier * math.exp(self.rate * error)))
        self.weight = min(high, max(low, self._multiplier * math.exp(self.damping * error)))

    def state_dict(self) -> Mapping[str, Any]:
        """Return what a checkpoint keeps."""
        return {"weight": self.weight, "multiplier": self._multiplier, "mean": self._mean, "mass": self._mass}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.weight, self._multiplier = state["weight"], state["multiplier"]
        self._mean, self._mass = state["mean"], state["mass"]


class SparsityAlarm:
    """Stops a training whose vectors have collapsed to nothing, or have nearly all terms active.

    Args:
        terms: Size of the vocabulary.
        fewest: Mean active terms of a text below which it has collapsed.
        densest: Share of the vocabulary above which it is dense, if these are at least `many` terms.
        many: See `densest`; a small vocabulary may well be half active.
        patience: Looks in a row before the alarm.
        grace: Steps at the beginning in which dense vectors are accepted; a student from scratch starts dense.
    """

    def __init__(
        self,
        terms: int,
        *,
        fewest: float = 1.0,
        densest: float = 0.5,
        many: int = 1000,
        patience: int = 3,
        grace: int = 0,
    ) -> None:
        self._terms = terms
        self._fewest = fewest
        self._most = max(densest * terms, many)
        self._patience = patience
        self._grace = grace
        self._seen = 0

    def look(self, active: float, *, step: int) -> str | None:
        """Return what is wrong with the mean active terms of the last steps, ``None`` when nothing is.

        Raise `RegressionError` if something was wrong `patience` times in a row.
        """
        wrong = None
        if active < self._fewest:
            wrong = f"collapse: {active:.2f} active terms a text; lower the sparsity penalty or the learning rate"
        elif active > self._most and step >= self._grace:
            wrong = f"all dense: {active:,.0f} of {self._terms:,} terms active; raise the sparsity penalty"
        if wrong is None:
            self._seen = 0
            return None
        self._seen += 1
        if self._seen >= self._patience:
            raise RegressionError(f"step {step:,}: {wrong}")
        return wrong

    def state_dict(self) -> Mapping[str, Any]:
        """Return what a checkpoint keeps."""
        return {"seen": self._seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._seen = state["seen"]
