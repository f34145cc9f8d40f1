"""Settings of rollout and divergence, and their schedules. Loads no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from soju.core.config import Settings

Implementation = Literal["adaptive", "sequential", "parallel", "compiled", "debug"]
Replacement = Literal["full", "accept_set", "argmax"]
DivergenceName = Literal["forward_kl", "reverse_kl", "generalized_jsd", "skew_kl", "top_k"]

MOST_AUTO_TOP_K = 25
"""`top_k: auto` allows no more tokens than this."""

TopK = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, slots=True)
class AcceptRule:
    """What the teacher lets pass and how it replaces, at one training step."""

    top_k: int | None
    """A proposal must be among this many most probable tokens; None: min(25, ceil(exp entropy)) at each position."""
    min_prob: float
    replacement: Replacement
    temperature: float
    """The teacher's."""


class RolloutSettings(Settings):
    """How student and teacher write a text together."""

    top_k: TopK | tuple[TopK, TopK] | Literal["auto"] = 5
    """A proposal must be among this many of the teacher's most probable tokens. ``[from, to]`` moves over the training
    steps; ``auto`` takes min(25, ceil(exp entropy)) of the teacher's distribution at each position."""

    min_prob: Probability | tuple[Probability, Probability] = 0.05
    """A proposal must have at least this probability under the teacher, unless it is the teacher's most probable token.
    ``[from, to]`` moves over the training steps."""

    replacement: Replacement = "full"
    """The teacher replaces a rejected proposal with a draw from all tokens, with a draw from those that would pass, or
    with its most probable token."""

    implementation: Implementation = "adaptive"
    """All write the same texts. ``adaptive`` chooses the block length from acceptance and measured costs; ``parallel``
    keeps it; ``compiled`` is ``parallel`` in `torch.compile`; ``sequential`` asks the teacher token by token;
    ``debug`` is ``parallel`` with a log of every decision."""

    gamma: int = Field(default=20, ge=1, le=1024)
    """Tokens the student proposes before the teacher reads them; the most of them under ``adaptive``."""

    teacher_temperature: float = Field(default=0.7, ge=0, le=100)
    """Of the teacher's distribution in `min_prob` and replacements; 0 is greedy."""

    student_temperature: float = Field(default=0.7, ge=0, le=100)
    """Of the student's draws; 0 is greedy."""

    max_new_tokens: int = Field(default=4096, ge=1)
    """Budget of a text, its end token included."""

    eos: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Ids of all tokens that end a text."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the draws, together with the epoch, the id of the row and the position."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.eos)) < len(self.eos):
            raise ValueError("eos lists a token twice; list each once")
        return self

    @property
    def scheduled(self) -> bool:
        """Whether a setting moves over the training steps."""
        return isinstance(self.top_k, tuple) or isinstance(self.min_prob, tuple)

    def rule(self, progress: float) -> AcceptRule:
        """Return what holds at a point of the run.

        Args:
            progress: Share of the run that is done, 0 to 1; see `progress_at`.

        Returns:
            `top_k` rounded to the nearest whole number, half upwards; `min_prob` unrounded.
        """
        top_k = None if self.top_k == "auto" else math.floor(_between(self.top_k, progress) + 0.5)
        min_prob = _between(self.min_prob, progress)
        return AcceptRule(top_k, min_prob, self.replacement, self.teacher_temperature)


class DivergenceSettings(Settings):
    """What the student's distribution is pulled towards the teacher's with."""

    divergence: DivergenceName = "forward_kl"
    """With teacher T and student S: ``forward_kl`` KL(T‖S); ``reverse_kl`` KL(S‖T); ``generalized_jsd`` between them;
    ``skew_kl`` KL(T‖αT + (1-α)S); ``top_k`` KL(T‖S) over the teacher's most probable tokens and a bucket of the
    rest."""

    beta: float = Field(default=0.5, gt=0, lt=1)
    """Of ``generalized_jsd``: weight of the teacher in the mixture."""

    alpha: float = Field(default=0.1, ge=0, lt=1)
    """Of ``skew_kl``: share of the teacher that is mixed into the student's distribution."""

    top_k: int = Field(default=50, ge=1)
    """Of ``top_k``: tokens that are compared one by one."""

    temperature: float = Field(default=1.0, gt=0, le=100)
    """Divides both sides' logits. Not squared into the loss."""


def progress_at(step: int, total_steps: int) -> float:
    """Return the share of a run that is done: 0 at its first step, 1 at its last and after."""
    return min(1.0, max(0.0, step / max(1, total_steps - 1)))


def _between(value: float | tuple[float, float], progress: float) -> float:
    if isinstance(value, tuple):
        return value[0] + (value[1] - value[0]) * progress
    return value
