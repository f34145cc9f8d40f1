"""Whether a student kept enough: retention above chance with its lower bound, by direction and domain. Fails closed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from soju.core.errors import UserError
from soju.evaluation.translation import QualityWeights, SentenceStatistics
from soju.evaluation.translation_bootstrap import Retention, difference, retention
from soju.translation.config import GateSettings

Statistics = Mapping[str, SentenceStatistics]
"""Direction -> statistics of the test sentences."""


class WeakTeacherError(UserError):
    """The teacher is too close to chance for retention to mean anything; exit code 2."""


@dataclass(frozen=True, slots=True)
class Margin:
    """How far the teacher is above chance in a direction."""

    teacher: float
    chance: float
    low: float
    """2.5 % quantile of the difference over paired draws."""


@dataclass(frozen=True, slots=True)
class DirectionVerdict:
    """What the gate found in one direction, or in one domain of it."""

    retention: Retention | None
    """``None`` when there was nothing to measure it from."""
    state: Literal["passed", "failed", "unproven"]
    """``unproven`` is for domains alone: the estimate is good enough and its lower bound is not."""
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary."""
        found = None if self.retention is None else self.retention.to_json()
        return {"state": self.state, "reason": self.reason, "retention": found}


@dataclass(frozen=True, slots=True)
class TranslationVerdict:
    """The verdict on one artefact."""

    artefact: str
    passed: bool
    meaningful: bool
    """False when the teacher is weak and the settings went on all the same."""
    directions: Mapping[str, DirectionVerdict]
    domains: Mapping[str, Mapping[str, DirectionVerdict]]
    """Direction -> domain -> verdict, for domains with enough pairs."""

    @property
    def reasons(self) -> list[str]:
        """Why it did not pass, a sentence each."""
        found = [one.reason for one in self.directions.values() if one.state == "failed"]
        for domains in self.domains.values():
            found += [one.reason for one in domains.values() if one.state == "failed"]
        return found

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary for ``verdicts.json``."""
        return {
            "artefact": self.artefact,
            "passed": self.passed,
            "meaningful": self.meaningful,
            "reasons": self.reasons,
            "directions": {name: one.to_json() for name, one in self.directions.items()},
            "domains": {
                name: {domain: one.to_json() for domain, one in found.items()} for name, found in self.domains.items()
            },
        }


@dataclass(frozen=True, slots=True)
class TranslationGate:
    """Judges students and artefacts against one teacher on the same test sentences.

    Args:
        settings: What must be kept.
        teacher: Of the teacher.
        chance: Of the teacher's output handed to the wrong sentences.
        domains: Domain of each test sentence.
        weights: Of the quality.
        draws: Paired bootstrap draws.
    """

    settings: GateSettings
    teacher: Statistics
    chance: Statistics
    domains: Sequence[str]
    weights: QualityWeights
    draws: int = 1_000

    def teacher_margins(self) -> dict[str, Margin]:
        """Return by direction how far the teacher is above chance."""
        found = {}
        for name, theirs in self.teacher.items():
            gap = difference(theirs, self.chance[name], weights=self.weights, draws=self.draws, level=0.95)
            ours, floor = (side.scores(self.weights)["quality"] for side in (theirs, self.chance[name]))
            found[name] = Margin(ours, floor, gap.low)
        return found

    def check_teacher(self) -> bool:
        """Tell whether the teacher makes retention meaningful.

        Raises `WeakTeacherError` when it does not, unless the settings allow that.
        """
        weak = {
            name: margin
            for name, margin in self.teacher_margins().items()
            if not margin.low >= self.settings.teacher_margin  # not a number is weak
        }
        if weak and not self.settings.allow_weak_teacher:
            name, margin = next(iter(weak.items()))
            raise WeakTeacherError(
                f"teacher: {name} quality {margin.teacher:.3f} is {margin.teacher - margin.chance:.3f} above chance, "
                f"at least {margin.low:.3f}, and {self.settings.teacher_margin:g} is needed for retention to mean "
                "anything; train it longer or take another, or set gate.allow_weak_teacher: true"
            )
        return not weak

    def judge(self, artefact: str, subject: Statistics) -> TranslationVerdict:
        """Judge one artefact.

        It passes only when the 2.5 % quantile of its retention reaches the threshold in each direction, and no domain
        with enough pairs lies below as a whole. Missing statistics, other signatures and bad numbers fail.

        Args:
            artefact: Its name.
            subject: Of the artefact.

        Returns:
            The verdict.

        Raises:
            WeakTeacherError: If the teacher is too weak and that is not allowed.
        """
        meaningful = self.check_teacher()
        directions, domains = {}, {}
        for name in self.teacher:
            directions[name] = self._judge(f"{artefact}, {name}", subject.get(name), name, None)
            places: dict[str, list[int]] = {}
            for place, domain in enumerate(self.domains):
                places.setdefault(domain, []).append(place)
            large = {domain: rows for domain, rows in places.items() if len(rows) >= self.settings.domain_pairs}
            domains[name] = {
                domain: self._judge(f"{artefact}, {name}, domain {domain or 'unnamed'}", subject.get(name), name, rows)
                for domain, rows in large.items()
                if len(large) > 1 or len(rows) < len(self.domains)
            }
        verdicts = [*directions.values(), *(one for found in domains.values() for one in found.values())]
        passed = bool(directions) and all(one.state != "failed" for one in verdicts)
        return TranslationVerdict(artefact, passed, meaningful, directions, domains)

    def _judge(
        self, what: str, subject: SentenceStatistics | None, direction: str, rows: list[int] | None
    ) -> DirectionVerdict:
        if subject is None:
            return DirectionVerdict(None, "failed", f"{what}: not measured")
        sides = [subject, self.teacher[direction], self.chance[direction]]
        try:
            if rows is not None:
                sides = [side.subset(np.array(rows)) for side in sides]
            found = retention(*sides, weights=self.weights, draws=self.draws)
        except UserError as error:
            return DirectionVerdict(None, "failed", f"{what}: {error}")
        needed = self.settings.retention
        if rows is None:
            if math.isfinite(found.value) and found.low >= needed:
                return DirectionVerdict(found, "passed")
            return DirectionVerdict(
                found,
                "failed",
                f"{what}: retention {found.value:.3f}, at least {found.low:.3f}, and {needed:g} is needed",
            )
        # A domain has fewer sentences: only one that lies below as a whole fails.
        if found.low >= needed:
            return DirectionVerdict(found, "passed")
        if not found.high >= needed:
            return DirectionVerdict(
                found, "failed", f"{what}: retention {found.value:.3f} is at most {found.high:.3f}, below {needed:g}"
            )
        return DirectionVerdict(found, "unproven", f"{what}: retention may be as low as {found.low:.3f}")
