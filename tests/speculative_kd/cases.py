"""Random rollouts of every kind that the settings allow, small enough to run hundreds."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass

import torch
from pico_models import VOCABULARY, mix_head, pair

from soju.speculative_kd import Costs, Rollout, RolloutSettings
from soju.speculative_kd.rollout import WAYS

COSTS = Costs(rows=4, student=0.2, blocks=((1, 1.0), (4, 1.2), (32, 3.0)), teacher_seconds=0.01)


@dataclass
class Case:
    """Prompts and settings; `mix` is how much the student resembles the teacher."""

    mix: float
    queries: list[list[int]]
    privileged: list[list[int]]
    ids: list[str]
    settings: dict
    epoch: int


def draw_case(number, *, budget=None, rows=None):
    """Draw a case; long blocks and long texts only where enough passes for them to be cheap."""
    chance = random.Random(number)
    kind = chance.choices(["short", "long block", "long text"], [13, 6, 1])[0]
    gamma = chance.randint(1, 6) if kind == "short" else chance.randint(7, 32)
    most = {"short": chance.randint(1, 6), "long block": chance.randint(1, 6), "long text": chance.randint(25, 40)}
    lenient = kind == "long text"
    rows = rows or (1 if lenient else chance.choice([1, 1, 5, 6, 7, 8]))
    queries = [tokens(chance, 1, 10) for _ in range(rows)]
    privileged = [tokens(chance, 0, 12) + query for query in queries]
    if chance.random() < 0.2:  # templates that end differently
        privileged = [[*prompt, chance.randrange(VOCABULARY)] for prompt in privileged]
    return Case(
        mix=1.0 if lenient else chance.choice([0.0, 0.5, 0.8, 1.0]),
        queries=queries,
        privileged=privileged,
        ids=[f"row {number} {row}" for row in range(rows)],
        epoch=chance.randrange(3),
        settings={
            "gamma": gamma,
            "max_new_tokens": budget or most[kind],
            "eos": tuple(chance.sample(range(VOCABULARY), chance.randint(0, 1 if lenient else 3))),
            "seed": number,
            "top_k": chance.choice([20, VOCABULARY] if lenient else [1, 2, 5, 20, "auto"]),
            "min_prob": chance.choice([0.0] if lenient else [0.0, 0.05, 0.3]),
            "replacement": chance.choice(["full", "accept_set", "argmax"]),
            "teacher_temperature": chance.choice([0.0, 0.7, 1.0]),
            "student_temperature": chance.choice([0.0, 0.7, 1.0]),
        },
    )


def tokens(chance, least, most):
    """Draw token ids."""
    return [chance.randrange(VOCABULARY) for _ in range(chance.randint(least, most))]


class Kitchen:
    """One pair of models for all cases; a rollout is made once and given other settings."""

    def __init__(self, *, dtype=torch.float64, compile_backend="eager", **changes):
        self.student, self.teacher = pair(dtype=dtype, **changes)
        self.first = Rollout(
            self.student, self.teacher, RolloutSettings(implementation="compiled"), compile_backend=compile_backend
        )

    def rollout(self, case, implementation, **changes):
        """Return a rollout for a case."""
        mix_head(self.student, self.teacher, case.mix)
        rollout = copy.copy(self.first)
        rollout.settings = RolloutSettings(**(case.settings | {"implementation": implementation} | changes))
        rollout.way = WAYS[implementation]
        rollout.steps = self.first.steps if implementation == "compiled" else []
        if implementation == "adaptive":
            rollout._control(COSTS)
        return rollout

    def run(self, case, implementation, **changes):
        """Write the texts of a case."""
        rollout = self.rollout(case, implementation, **changes)
        return rollout(case.queries, case.privileged, ids=case.ids, epoch=case.epoch)
