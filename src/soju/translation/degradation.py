"""When a validation counts as a regression, and what a run changes before it goes on. Pure decisions from numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import Field
from scipy.stats import theilslopes

from soju.core.config import Settings
from soju.core.errors import UserError

TREND_POINTS = 4
"""Fewest validations that show a trend."""
_TREND_LEVEL = 0.9
_TOLERANCE = 1e-12
"""A drop of exactly the allowed size passes, although 0.95 is no binary fraction."""


class DegradationSettings(Settings):
    """How far quality may fall, and what is changed when it falls further."""

    max_drop: float = Field(0.05, gt=0, lt=1)
    """Largest loss of quality in a direction against the best accepted validation, as a fraction of it."""
    min_quality: float = Field(0.05, ge=0, lt=1)
    """Quality from which a fall counts. Below it a model writes hardly a right word, and what it scores is chance: an
    untrained student babbles at 0.025 and falls to 0 before it learns."""
    max_rollbacks: int = Field(3, ge=0)
    """Rollbacks before the run stops early."""
    learning_rate_factor: float = Field(0.5, gt=0, lt=1)
    """What the learning rate is multiplied with after the first, third, … rollback; else the seed changes."""


@dataclass(frozen=True, slots=True)
class Validation:
    """What one validation measured."""

    clock: int
    """Optimiser steps executed by then."""
    quality: Mapping[str, float]
    """Direction -> quality, a fraction."""
    accepted: bool = True
    """False for one that `QualityDegradationDetector.judge` rejected."""

    @property
    def mean(self) -> float:
        """Mean quality of the directions, which decides what is best."""
        return sum(self.quality.values()) / len(self.quality)


@dataclass(frozen=True, slots=True)
class Adjustment:
    """What is different from the run as configured."""

    learning_rate_factor: float = 1.0
    """Multiplied with the schedule's learning rate."""
    seed_offset: int = 0
    """Added to the seed of the data order."""

    @classmethod
    def after(cls, rollbacks: int, settings: DegradationSettings) -> Adjustment:
        """Return the adjustment after so many rollbacks: learning rate and seed change in turn."""
        return cls(settings.learning_rate_factor ** ((rollbacks + 1) // 2), rollbacks // 2)


@dataclass(frozen=True, slots=True)
class Judgement:
    """What follows from a validation."""

    action: Literal["accept", "roll back", "stop"]
    best: int
    """Clock of the best accepted validation, this one included: where to go back to."""
    reasons: tuple[str, ...] = ()
    """One sentence for each direction that regressed."""
    warnings: tuple[str, ...] = ()
    """One sentence for each direction whose trend falls; a trend alone changes nothing."""
    adjustment: Adjustment = Adjustment()
    """What the run goes on with."""

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary for ``verdicts.jsonl``."""
        return {**asdict(self), "reasons": list(self.reasons), "warnings": list(self.warnings)}


def best_of(history: Sequence[Validation]) -> Validation:
    """Return the accepted validation of the highest mean quality, the earliest of equals (`UserError` without one)."""
    accepted = [entry for entry in history if entry.accepted and math.isfinite(entry.mean)]
    if not accepted:
        raise UserError("degradation: no accepted validation to compare with; validate the untrained student first")
    return max(accepted, key=lambda entry: (entry.mean, -entry.clock))


class QualityDegradationDetector:
    """Decides whether training goes on, goes back or stops."""

    def __init__(self, settings: DegradationSettings | None = None) -> None:
        self.settings = settings or DegradationSettings()

    def judge(
        self, history: Sequence[Validation], upper_ends: Mapping[str, float] | None = None, *, rollbacks: int = 0
    ) -> Judgement:
        """Judge the last validation of a history.

        It regressed in a direction when its quality is further below the best accepted validation than `max_drop`
        allows **and** chance does not explain that: the paired interval of the difference ends below 0. A quality that
        is not finite always is a regression.

        Args:
            history: All validations in order; the last one is judged.
            upper_ends: Direction -> upper end of the 95 % interval of its quality minus that of `best_of` the others,
                from the same draws of sentences. Needed as soon as there is something to compare with.
            rollbacks: How many there were before.

        Returns:
            The judgement.

        Raises:
            UserError: If there is no validation, or directions differ between validations or from `upper_ends`.
        """
        if not history:
            raise UserError("degradation: no validation to judge; validate first")
        current, earlier = history[-1], history[:-1]
        if not earlier:
            reasons = tuple(self._not_finite(current))
            return Judgement("stop" if reasons else "accept", current.clock, reasons)
        best = best_of(earlier)
        if set(best.quality) != set(current.quality) or set(upper_ends or {}) != set(current.quality):
            names = ", ".join(sorted(current.quality))
            raise UserError(
                f"degradation: step {current.clock:,} measured {names}, and the best validation or the intervals other "
                "directions; measure the same ones"
            )
        reasons = tuple(self._regressions(current, best, upper_ends or {}))
        warnings = tuple(self._falling(history))
        if not reasons:
            return Judgement("accept", best_of(history).clock, (), warnings, Adjustment.after(rollbacks, self.settings))
        stop = rollbacks >= self.settings.max_rollbacks
        after = Adjustment.after(rollbacks + (not stop), self.settings)
        return Judgement("stop" if stop else "roll back", best.clock, reasons, warnings, after)

    def _regressions(self, current: Validation, best: Validation, upper_ends: Mapping[str, float]) -> list[str]:
        reasons = self._not_finite(current)
        for direction, before in best.quality.items():
            now, upper = current.quality[direction], upper_ends[direction]
            fell = before >= self.settings.min_quality and now < (1 - self.settings.max_drop) * before - _TOLERANCE
            # An interval that is not a number shows nothing; then the drop alone decides.
            if fell and not upper >= 0:
                reasons.append(
                    f"{direction}: quality {now:.4f} at step {current.clock:,} is {1 - now / before:.1%} below "
                    f"{before:.4f} at step {best.clock:,}, and the difference is at most {upper:.4f}"
                )
        return reasons

    @staticmethod
    def _not_finite(current: Validation) -> list[str]:
        return [
            f"{direction}: quality at step {current.clock:,} is {value}"
            for direction, value in current.quality.items()
            if not math.isfinite(value)
        ]

    @staticmethod
    def _falling(history: Sequence[Validation]) -> list[str]:
        """Warn where the interval of the Theil–Sen slope since the best validation lies below 0."""
        since = [entry for entry in history if entry.accepted and entry.clock >= best_of(history).clock]
        warnings = []
        for direction in history[-1].quality if len(since) >= TREND_POINTS else ():
            values = [entry.quality[direction] for entry in since]
            if not all(math.isfinite(value) for value in values):
                continue
            slope, _, _, upper = theilslopes(values, [entry.clock for entry in since], _TREND_LEVEL)
            if upper < 0:
                warnings.append(f"{direction}: quality falls by {-1_000 * slope:.4f} in 1,000 steps since the best")
        return warnings
