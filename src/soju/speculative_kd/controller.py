"""The block length: from what passes cost and how often proposals pass.

A block of γ tokens costs γ passes of the student and one long pass of the teacher, and commits ``(1 - α^γ) / (1 - α)``
tokens when each proposal passes with probability α: the leading run, and the replacement that ends it. Long blocks
waste proposals behind the first rejection; short ones waste the teacher's width. On a CPU, or at a large batch, the
teacher's long pass is not free either, so its cost is measured and not assumed.

Costs are measured once for a run and then read from its `costs.json`: other costs would give other block lengths, and
these other last bits, so that a resumed run would not be the straight one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import Field, ValidationError, model_validator

from soju.core.config import Settings
from soju.core.errors import IntegrityError, UserError
from soju.core.files import write_json
from soju.speculative_kd.acceptance import TESTED_AT_ONCE, decide
from soju.speculative_kd.cache import Reader, RowCache, reading
from soju.speculative_kd.config import RolloutSettings
from soju.speculative_kd.noise import draw

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

HALF_LIFE = 1000
"""Tested proposals after which a test counts half as much: acceptance rises while the student learns."""


class Costs(Settings):
    """What passes cost, in single-token passes of the teacher, for one batch size."""

    rows: int = Field(ge=1)
    """Rows of the batch that was measured."""

    student: Positive
    """c: a single-token pass of the student, with its draw."""

    blocks: tuple[tuple[int, Positive], ...] = Field(min_length=1)
    """Pairs of γ and v(γ): the teacher reads and tests γ tokens a row. Linear in between."""

    teacher_seconds: Positive
    """A single-token pass of the teacher, the unit of the other costs."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        lengths = [gamma for gamma, _ in self.blocks]
        if lengths != sorted(set(lengths)) or lengths[0] != 1:
            raise ValueError(f"blocks must be in rising order of their length, from 1, got {lengths}; measure again")
        return self

    def block(self, gamma: int) -> float:
        """Return v(γ); beyond the longest measured block its last slope goes on."""
        if len(self.blocks) == 1:
            return self.blocks[0][1]
        upper = next((i for i in range(1, len(self.blocks)) if self.blocks[i][0] >= gamma), len(self.blocks) - 1)
        (low, low_cost), (high, high_cost) = self.blocks[upper - 1], self.blocks[upper]
        return low_cost + (high_cost - low_cost) * (gamma - low) / (high - low)

    def write(self, path: Path) -> None:
        """Write the file in one step."""
        write_json(path, self.model_dump(mode="json"))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the file.

        Args:
            path: Written by `write`.

        Returns:
            The costs.

        Raises:
            IntegrityError: If it is not there or not what `write` writes.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise IntegrityError(
                f"{path}: {error.strerror or error}; start the run anew to measure the costs"
            ) from None
        except (ValidationError, ValueError) as error:
            first = str(error).splitlines()[0]
            raise IntegrityError(
                f"{path}: not the costs of a rollout ({first}); restore the file from a copy"
            ) from None


def expected_tokens(alpha: float, gamma: int) -> float:
    """Return the tokens a row commits in a block.

    >>> expected_tokens(0.5, 3)
    1.75

    Args:
        alpha: Probability that a proposal passes, 0 to 1.
        gamma: Proposals of the block, >= 1.

    Returns:
        ``1 + α + ... + α^(γ-1)``: the leading run and its replacement; there is no bonus token.
    """
    return float(gamma) if alpha == 1 else (1 - alpha**gamma) / (1 - alpha)


def expected_speed(alpha: float, gamma: int, costs: Costs) -> float:
    """Return the speed relative to the teacher writing alone, token by token.

    ``(1 - α^γ) / (1 - α) / (cγ + v(γ))``, with each proposal passing independently.

    Args:
        alpha: Probability that a proposal passes, 0 to 1.
        gamma: Proposals of a block, >= 1.
        costs: c and v.

    Returns:
        Above 1 is faster.
    """
    return expected_tokens(alpha, gamma) / (costs.student * gamma + costs.block(gamma))


def best_gamma(alpha: float, costs: Costs, longest: int) -> int:
    """Return the block length of the highest `expected_speed`, 1 to `longest`; the shortest of equal ones."""
    return max(range(1, longest + 1), key=lambda gamma: expected_speed(alpha, gamma, costs))


class GammaController:
    """Chooses the block length from the acceptance seen so far.

    Counts only proposals that were tested. Those behind a rejection say nothing, and accepted/γ, which counts them as
    rejected, is too low: at α = 0.8 and γ = 20 it reads 0.2.
    """

    def __init__(self, costs: Costs, longest: int) -> None:
        self.costs = costs
        self.longest = longest
        self.tested = 0.0
        self.passed = 0.0

    @property
    def alpha(self) -> float:
        """Acceptance, starting from one pass and one rejection that were not seen."""
        return (self.passed + 1) / (self.tested + 2)

    def gamma(self) -> int:
        """Return the length of the next block."""
        return best_gamma(self.alpha, self.costs, self.longest)

    def observe(self, tested: int, passed: int) -> None:
        """Count a block; what came before fades by half in `HALF_LIFE` tests."""
        fade = 0.5 ** (tested / HALF_LIFE)
        self.tested = self.tested * fade + tested
        self.passed = self.passed * fade + passed

    def state(self) -> dict[str, float]:
        """Return what a checkpoint must hold, as plain JSON."""
        return {"tested": self.tested, "passed": self.passed}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over `state`.

        Args:
            state: From `state`, also after a round trip through JSON.

        Raises:
            UserError: If it is not such a state.
        """
        try:
            tested, passed = float(state["tested"]), float(state["passed"])
        except (KeyError, TypeError, ValueError):
            raise UserError("controller state: tested and passed must be numbers; take another checkpoint") from None
        if not 0 <= passed <= tested < float("inf"):
            raise UserError(
                f"controller state: 0 <= passed <= tested must hold, got {passed} and {tested}; take another checkpoint"
            )
        self.tested, self.passed = tested, passed


def measure_costs(
    student: Reader, teacher: Reader, settings: RolloutSettings, *, rows: int, context: int, repetitions: int = 5
) -> Costs:
    """Time passes of both sides, alternating, as a rollout makes them: with heads, draws and tests.

    Args:
        student: Proposes.
        teacher: Reads blocks; 1, 2, 4, ... `gamma` tokens are measured.
        settings: Of the rollout.
        rows: Of the batch.
        context: Tokens the caches hold before each pass.
        repetitions: Passes of each kind; the fastest counts, because other work on the machine only adds.

    Returns:
        The costs.
    """
    lengths = sorted({1, settings.gamma, *(2**power for power in range(settings.gamma.bit_length()))})
    with reading(student, teacher):
        passes = {0: _student_pass(student, settings, rows, context)}
        passes |= {length: _teacher_pass(teacher, settings, rows, context, length) for length in lengths}
        seconds = _alternate(passes, repetitions)
    unit = seconds[1]
    # No block costs less than a shorter one, whatever the clock says.
    costs = accumulate((seconds[length] / unit for length in lengths), max)
    blocks = tuple(zip(lengths, costs, strict=True))
    return Costs(rows=rows, student=seconds[0] / unit, blocks=blocks, teacher_seconds=unit)


def _student_pass(student: Reader, settings: RolloutSettings, rows: int, context: int) -> Callable[[], None]:
    cache, ids_B1 = _filled(student, rows, context, 1), torch.zeros(rows, 1, dtype=torch.long, device=student.device)

    def run() -> None:
        logits_BV = student.logits(student.read(ids_B1, cache)[:, -1])
        uniform_B = torch.full((rows,), 0.5, dtype=torch.float64, device=logits_BV.device)
        draw(logits_BV, settings.student_temperature, uniform_B).tolist()  # waits for the device
        cache.lengths = [context] * rows

    return run


def _teacher_pass(
    teacher: Reader, settings: RolloutSettings, rows: int, context: int, length: int
) -> Callable[[], None]:
    cache = _filled(teacher, rows, context, length)
    ids_BQ = torch.zeros(rows, length, dtype=torch.long, device=teacher.device)
    rule = settings.rule(0)

    def run() -> None:
        hidden_NH = teacher.read(ids_BQ, cache).flatten(0, 1)
        for start in range(0, len(hidden_NH), TESTED_AT_ONCE):
            part_NH = hidden_NH[start : start + TESTED_AT_ONCE]
            logits_NV = teacher.logits(part_NH)
            decide(
                logits_NV, torch.zeros(len(part_NH), dtype=torch.long, device=logits_NV.device), rule
            ).passed_N.tolist()
        cache.lengths = [context] * rows

    return run


def _filled(reader: Reader, rows: int, context: int, length: int) -> RowCache:
    cache = reader.cache(rows, slots=context + length)
    reader.prefill(cache, [[0] * (context + 1)] * rows)
    return cache


def _alternate(passes: Mapping[int, Callable[[], None]], repetitions: int) -> dict[int, float]:
    """Return the least seconds of each pass; they take turns, so that a slow moment falls on all of them."""
    seconds: dict[int, list[float]] = {name: [] for name in passes}
    for repetition in range(repetitions + 1):
        for name, run in passes.items():
            start = time.perf_counter()
            run()
            if repetition:  # the first run allocates
                seconds[name].append(time.perf_counter() - start)
    return {name: min(taken) for name, taken in seconds.items()}
