"""What changes while a student trains: the stages of a curriculum, and controllers that hold a measured quantity.

A curriculum is stages with their own learning rate and mix of rows, and the batches that follow it: a pure function of
seed, epoch and step, so a resume needs nothing from it. A controller moves the weight of a loss until a measured
quantity meets its target; its state is in the checkpoint.

Shape letters: B = texts of one side (queries or documents) in a batch, R = rows, G = groups of rows (types, or
difficulties).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from accelerate import PartialState
from numpy.typing import NDArray
from sentence_transformers.base.sampler import DefaultBatchSampler
from torch import Tensor

from soju.core.errors import RegressionError
from soju.training.ranks import from_all
from soju.training.sampling import length_batches


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
        patience: Alarms in a row that stop the training.
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

    Stage i ends before step ``ceil(total_steps * (share 0 + ... + share i))``; later steps belong to the last stage.
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
    `step` counts the optimiser steps done.
    """
    if step < warm_up_steps:
        factor = step / max(1, warm_up_steps)
    else:
        done = (step - warm_up_steps) / max(1, total_steps - warm_up_steps)
        factor = (1 + math.cos(math.pi * min(1.0, done))) / 2
    return factor * stages[stage_at(stages, step, total_steps)].learning_rate


def mixed_rows(
    groups_R: NDArray[np.int64], shares_G: NDArray[np.float64], count: int, *, seed: Sequence[int]
) -> NDArray[np.int64]:
    """Draw rows so that each group has its share.

    A group is gone through in a shuffled order and, where it has fewer rows than asked for, again in another.

    The number of rows of each group is its share of `count` to within one row; a group without rows gives its share to
    the others.
    """
    generator = np.random.default_rng(list(seed))
    members = [np.flatnonzero(groups_R == group) for group in range(len(shares_G))]
    shares = np.where([len(rows) > 0 for rows in members], shares_G, 0.0)
    ends = np.rint(np.cumsum(shares / shares.sum()) * count).astype(np.int64)
    drawn = [
        _cycled(rows, int(wanted), generator) for rows, wanted in zip(members, np.diff(ends, prepend=0), strict=True)
    ]
    return generator.permutation(np.concatenate(drawn))


def _cycled(rows: NDArray[np.int64], count: int, generator: np.random.Generator) -> NDArray[np.int64]:
    if count == 0:
        return rows[:0]
    passes = [generator.permutation(rows) for _ in range(-(-count // len(rows)))]
    return np.concatenate(passes)[:count]


def shares_of(mix: Mapping[str, float], names: Sequence[str], groups_R: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the share of each group, ``(G,)``: those named, the rest evenly among the groups that have rows."""
    present = np.bincount(groups_R, minlength=len(names)) > 0
    shares = np.array([mix.get(name, 0.0) for name in names])
    others = np.array([name not in mix for name in names]) & present
    if others.any():
        shares[others] = max(0.0, 1.0 - shares.sum()) / others.sum()
    return shares


@dataclass(frozen=True, slots=True)
class Grouping:
    """One way to divide the rows: by type, or by difficulty."""

    names: tuple[str, ...]
    groups_R: NDArray[np.int64]


class CurriculumSampler(DefaultBatchSampler):
    """Batches of similar lengths whose rows follow the mix of the stage they fall into.

    An epoch has as many batches as the data fill. The rows of an epoch, or of the part of it that lies in one stage,
    are drawn by `mixed_rows`; without a mix, each row once an epoch. All of it is a pure function of seed and epoch,
    so a resume needs nothing from it: the trainer sets the epoch and skips the batches it has had.

    Args:
        lengths: Length of each row, ``(R,)``.
        batch_size: Rows of a batch on one rank.
        seed: Of all draws.
        stages: The curriculum.
        groupings: The ways a mix may divide the rows; the names of a stage's mix belong to one of them.
        total_steps: Optimiser steps of the training.
        batches_a_step: Batches of one rank that make an optimiser step.
        ranks: Processes that share the batches.
        valid_label_columns: Handed on.

    Raises:
        ValueError: If there are fewer rows than one batch of all ranks needs.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        *,
        seed: int,
        stages: Sequence[Stage],
        groupings: Sequence[Grouping],
        total_steps: int,
        batches_a_step: int = 1,
        ranks: int = 1,
        valid_label_columns: list[str] | None = None,
    ) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.stages = tuple(stages)
        self.groupings = tuple(groupings)
        self.total_steps = total_steps
        self.batches_a_step = batches_a_step
        self.ranks = ranks
        super().__init__(
            range(len(self.lengths)),
            batch_size=batch_size,
            drop_last=True,
            valid_label_columns=valid_label_columns,
            seed=seed,
        )
        if len(self) == 0:
            raise ValueError(f"{len(self.lengths)} rows do not fill one batch of {batch_size} on {ranks} ranks")

    def __len__(self) -> int:
        return len(self.lengths) // (self.batch_size * self.ranks) * self.ranks

    def __iter__(self) -> Iterator[list[int]]:
        start = 0
        for stage, groups in self._parts():
            yield from self._batches(stage, start, groups)
            start += groups

    def _parts(self) -> list[tuple[int, int]]:
        """Return the stages of this epoch, each with its number of groups (one batch for every rank)."""
        groups = len(self) // self.ranks
        steps = -(-groups // self.batches_a_step)  # the trainer makes a step of what is left at the end of an epoch
        first = self.epoch * steps
        stages = [
            stage_at(self.stages, first + group // self.batches_a_step, self.total_steps) for group in range(groups)
        ]
        return [(stage, stages.count(stage)) for stage in dict.fromkeys(stages)]

    def _batches(self, stage: int, start: int, groups: int) -> list[list[int]]:
        rows = self._rows(stage, start, groups)
        parts = length_batches(
            self.lengths[rows],
            self.batch_size,
            seed=self.seed,
            epoch=self.epoch * len(self.stages) + stage,
            ranks=self.ranks,
        )
        return [rows[batch].tolist() for batch in parts]

    def _rows(self, stage: int, start: int, groups: int) -> NDArray[np.int64]:
        count = groups * self.batch_size * self.ranks
        mix = self.stages[stage].mix
        if not mix:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.lengths))
            first = start * self.batch_size * self.ranks
            return order[first : first + count]
        grouping = next(grouping for grouping in self.groupings if mix.keys() <= set(grouping.names))
        shares = shares_of(mix, grouping.names, grouping.groups_R)
        return mixed_rows(grouping.groups_R, shares, count, seed=(self.seed, self.epoch, stage))


@dataclass(frozen=True)
class Curriculum:
    """What to give ``SparseEncoderTrainingArguments(batch_sampler=...)``: makes a `CurriculumSampler`."""

    stages: Sequence[Stage]
    groupings: Sequence[Grouping]
    lengths: Sequence[int]
    seed: int
    total_steps: int
    batches_a_step: int

    def __call__(
        self,
        dataset: Any,
        batch_size: int,
        drop_last: bool,
        valid_label_columns: list[str] | None = None,
        generator: Any = None,
        seed: int = 0,
    ) -> CurriculumSampler:
        """Make the sampler of the data set; sentence-transformers calls this."""
        return CurriculumSampler(
            self.lengths,
            batch_size,
            seed=self.seed,
            stages=self.stages,
            groupings=self.groupings,
            total_steps=self.total_steps,
            batches_a_step=self.batches_a_step,
            ranks=PartialState().num_processes,
            valid_label_columns=valid_label_columns,
        )

    def __repr__(self) -> str:
        return f"Curriculum(stages={len(self.stages)}, seed={self.seed})"
