"""How sure a translation score is: paired bootstrap, retention above chance, and the derangement that defines chance.

Shape letters: N = sentences, A = additive columns, D = draws, S = systems.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soju.core.errors import UserError
from soju.evaluation.translation import QualityWeights, SentenceStatistics, corpus_scores

Floats = NDArray[np.float64]

DRAWS = 1_000
"""Bootstrap draws unless told otherwise."""
_CELLS = 1 << 22
"""Drawn sentences held at once, which bounds the memory to some 64 MB."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with the interval of its paired bootstrap draws, in the unit of its metric."""

    metric: str
    value: float
    low: float
    high: float
    level: float
    draws: int
    seed: int
    signature: str

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary; a value that is not finite becomes null."""
        return _finite(asdict(self))


@dataclass(frozen=True, slots=True)
class Retention:
    """How much of the teacher's quality above chance a student keeps."""

    value: float
    """``(student − chance) / (teacher − chance)``, unitless."""
    low: float
    """Its 2.5 % quantile over the draws: what the gate reads. −inf when the teacher is at chance in any draw."""
    high: float
    """Its 97.5 % quantile."""
    plain_ratio: float
    """``student / teacher``, never stricter."""
    student: float
    teacher: float
    chance: float
    """Quality of the teacher's own output handed to the wrong sentences."""
    margin_low: float
    """2.5 % quantile of ``teacher − chance``: whether the teacher is worth keeping up with."""
    draws: int
    seed: int
    signature: str

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary; a value that is not finite becomes null."""
        return _finite(asdict(self))


def estimate(
    system: SentenceStatistics,
    *,
    metric: str = "quality",
    weights: QualityWeights | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """Return a corpus score with its interval.

    Args:
        system: What was measured.
        metric: ``quality`` or one of `SentenceStatistics.scores`.
        weights: Those of ``quality``.
        draws: Number D of draws of N sentences with replacement.
        seed: Seed of the draws.
        level: Level of the interval, in (0, 1).

    Returns:
        The score and its interval.
    """
    value, draws_D = system.scores(weights)[metric], resample([system], weights, draws=draws, seed=seed)[metric][0]
    return _estimate(metric, value, draws_D, level, seed, _signed(system, weights))


def difference(
    subject: SentenceStatistics,
    baseline: SentenceStatistics,
    *,
    metric: str = "quality",
    weights: QualityWeights | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """Return subject minus baseline on the same sentences, with the interval of the paired draws; see `estimate`."""
    subject_D, baseline_D = resample([subject, baseline], weights, draws=draws, seed=seed)[metric]
    value = subject.scores(weights)[metric] - baseline.scores(weights)[metric]
    return _estimate(metric, value, subject_D - baseline_D, level, seed, _signed(subject, weights))


def retention(
    student: SentenceStatistics,
    teacher: SentenceStatistics,
    chance: SentenceStatistics,
    *,
    weights: QualityWeights | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Retention:
    """Return the share of the teacher's quality above chance that the student keeps, with its bounds.

    Args:
        student: The system in question.
        teacher: What it learnt from, on the same sentences.
        chance: The teacher's output moved by `derangement`, on the same references.
        weights: Those of the quality.
        draws: Number of paired draws.
        seed: Seed of the draws.

    Returns:
        The estimate and its bounds.
    """
    systems = [student, teacher, chance]
    ours, theirs, floor = (system.scores(weights)["quality"] for system in systems)
    ours_D, theirs_D, floor_D = resample(systems, weights, draws=draws, seed=seed)["quality"]
    margin_D = theirs_D - floor_D
    value, low, high = (-math.inf,) * 3  # nothing above chance to keep: closed, never a lucky ratio
    if theirs > floor and bool((margin_D > 0).all()):
        value = (ours - floor) / (theirs - floor)
        low, high = (float(bound) for bound in np.quantile((ours_D - floor_D) / margin_D, [0.025, 0.975]))
    return Retention(
        value=value,
        low=low,
        high=high,
        plain_ratio=ours / theirs if theirs > 0 else -math.inf,
        student=ours,
        teacher=theirs,
        chance=floor,
        margin_low=float(np.quantile(margin_D, 0.025)),
        draws=draws,
        seed=seed,
        signature=_signed(student, weights),
    )


def resample(
    systems: Sequence[SentenceStatistics],
    weights: QualityWeights | None = None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Floats]:
    """Score every system on the same draws of sentences.

    Args:
        systems: S systems that translated the same sentences.
        weights: Those of ``quality``.
        draws: Number D of draws of N sentences with replacement.
        seed: Seed of the draws.

    Returns:
        Metric -> ``(S, D)``.

    Raises:
        UserError: If the systems were not measured alike, on other numbers of sentences, or on fewer than two.
    """
    first = systems[0]
    for other in systems[1:]:
        if other.signature != first.signature or set(other.given) != set(first.given):
            raise UserError(
                f"translations were not measured alike ({first.signature} / {other.signature}); measure both again"
            )
        if len(other) != len(first):
            raise UserError(f"translations of {len(first):,} and of {len(other):,} sentences; compare the same ones")
    if len(first) < 2 or draws < 1:
        raise UserError(f"{draws} draws of {len(first)} sentences; take at least 1 draw of at least 2 sentences")
    names = tuple(first.given)
    aligned = [SentenceStatistics(s.counts_NK, {name: s.given[name] for name in names}, s.signature) for s in systems]
    all_NA = np.concatenate([system.additive_NA for system in aligned], axis=1)
    generator = np.random.default_rng(seed)
    block = max(1, _CELLS // len(first))
    sums = []
    for start in range(0, draws, block):
        drawn = generator.integers(0, len(first), size=(min(block, draws - start), len(first)))
        times_DN = np.stack([np.bincount(row, minlength=len(first)) for row in drawn]).astype(np.float64)
        sums.append(times_DN @ all_NA)
    per_system = np.split(np.concatenate(sums), len(systems), axis=1)
    scores = [corpus_scores(sums_DA, names, weights) for sums_DA in per_system]
    return {metric: np.stack([score[metric] for score in scores]) for metric in scores[0]}


def derangement(domains: Sequence[Hashable], *, seed: int = 0) -> NDArray[np.int64]:
    """Assign to each sentence another one of its domain, so that none keeps its own: what defines chance.

    Args:
        domains: Domain of each of the N sentences of one direction, N >= 2; all equal when there is only one. A domain
            with one sentence is joined with the other such ones, the last of them with the largest domain.
        seed: Seed of the permutation, which is uniform among those without a fixed place.

    Returns:
        ``(N,)`` positions: hypothesis ``result[i]`` goes to sentence i.

    Raises:
        UserError: If there are fewer than two sentences.
    """
    if len(domains) < 2:
        raise UserError(f"chance: {len(domains)} sentence cannot be handed to another; give at least two a direction")
    members: dict[Hashable, list[int]] = {}
    for index, domain in enumerate(domains):
        members.setdefault(domain, []).append(index)
    groups = [group for group in members.values() if len(group) > 1]
    single = [index for group in members.values() if len(group) == 1 for index in group]
    if len(single) == 1:
        max(groups, key=len).extend(single)
    elif single:
        groups.append(single)
    generator = np.random.default_rng(seed)
    result = np.empty(len(domains), dtype=np.int64)
    for group in groups:
        places = np.array(group)
        moved = generator.permutation(places)
        while (moved == places).any():  # succeeds with probability 1/e or more a try
            moved = generator.permutation(places)
        result[places] = moved
    return result


def _estimate(metric: str, value: float, draws_D: Floats, level: float, seed: int, signature: str) -> Estimate:
    if not 0 < level < 1:
        raise UserError(f"level: got {level}; give a share between 0 and 1, 0.95 is usual")
    low, high = (float(bound) for bound in np.quantile(draws_D, [(1 - level) / 2, (1 + level) / 2]))
    return Estimate(metric, value, low, high, level, len(draws_D), seed, signature)


def _signed(system: SentenceStatistics, weights: QualityWeights | None) -> str:
    return f"{system.signature}|weights:{(weights or QualityWeights()).signature}"


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }
