"""What a rollout returns: texts, how each token came about, and counts that do not depend on how it was computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class Outcome(IntEnum):
    """How a committed token came about."""

    PASSED = 0
    """The student's proposal."""
    REJECTED_BY_RANK = 1
    """The teacher's, for a proposal that was not among its `top_k`."""
    REJECTED_BY_MIN_PROB = 2
    """The teacher's, for a proposal among its `top_k` with less than `min_prob`."""


@dataclass(frozen=True, slots=True)
class Event:
    """One tested position, logged by ``debug``."""

    row: int
    """Index of the row in the call."""
    block: int
    position: int
    """Place in the text, from 0."""
    proposal: int
    student_probability: float
    """At the student's temperature."""
    teacher_probability: float
    """At the teacher's temperature."""
    rank: int
    """0 is the teacher's most probable token."""
    top_k: int
    """Allowed at this position."""
    min_prob: float
    margin: float
    """How far the proposal's logit was from the other decision."""
    outcome: Outcome
    token: int
    """What was committed."""
    untested: int
    """Proposals of the block that a rejection here left untested."""

    def __str__(self) -> str:
        head = f"block {self.block} position {self.position}: proposal {self.proposal}"
        seen = f"student {self.student_probability:.3f}, teacher {self.teacher_probability:.3f}, rank {self.rank}"
        if self.outcome is Outcome.PASSED:
            why = "passed as the teacher's first" if self.rank == 0 else f"passed in the top {self.top_k}"
            return f"{head} ({seen}) {why}"
        limit = f"top {self.top_k}" if self.outcome is Outcome.REJECTED_BY_RANK else f"min_prob {self.min_prob:g}"
        return f"{head} ({seen}) rejected by {limit}, replaced by {self.token}; {self.untested} left untested"


@dataclass
class RolloutResult:
    """Texts, in the order of the call, and how they came about."""

    tokens: list[list[int]]
    """Committed tokens of each row, the end token included."""
    outcomes: list[list[Outcome]]
    """One for each committed token."""
    outside: list[int]
    """For each row, how many replacements would not have passed themselves; 0 unless `replacement` is ``full``."""
    teacher_hidden: list[Tensor] | None
    """For each row, ``(tokens, H)`` on the teacher's device: the states behind its logits at each committed token."""
    teacher_passes: int = 0
    """Prefill included."""
    student_passes: int = 0
    """Prefill included."""
    gammas: list[int] = field(default_factory=list)
    """Proposals of each block, the most of its rows."""
    seconds: float = 0.0
    events: list[Event] = field(default_factory=list)
    """Filled by ``debug``."""

    @property
    def blocks(self) -> int:
        """Number of blocks of the batch."""
        return len(self.gammas)

    @property
    def tested(self) -> int:
        """Proposals that were tested, which is the number of committed tokens."""
        return sum(map(len, self.outcomes))

    @property
    def passed(self) -> int:
        """Proposals that passed."""
        return self._count(Outcome.PASSED)

    @property
    def rejected_by_rank(self) -> int:
        """Proposals that were not among the `top_k`."""
        return self._count(Outcome.REJECTED_BY_RANK)

    @property
    def rejected_by_min_prob(self) -> int:
        """Proposals among the `top_k` that had less than `min_prob`."""
        return self._count(Outcome.REJECTED_BY_MIN_PROB)

    @property
    def acceptance(self) -> float:
        """Share of the tested proposals that passed; those behind a rejection were not tested and do not count."""
        return self.passed / self.tested

    def acceptance_by_position(self) -> list[tuple[int, int]]:
        """Return (tested, passed) at each place of the texts."""
        longest = max(map(len, self.outcomes))
        columns = [[row[place] for row in self.outcomes if place < len(row)] for place in range(longest)]
        return [(len(column), column.count(Outcome.PASSED)) for column in columns]

    def _count(self, outcome: Outcome) -> int:
        return sum(row.count(outcome) for row in self.outcomes)
