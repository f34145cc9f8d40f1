"""Where a recipe looks at an evaluation before the checkpoint of that step is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback


class OnEvaluation(TrainerCallback):
    """Calls ``judge(step, metrics)`` after each evaluation, on every rank with the same metrics.

    When it raises `RegressionError`, training ends and no checkpoint of that step is written, so that the newest one is
    the last that passed.
    """

    def __init__(self, judge: Callable[[int, Mapping[str, float]], None]) -> None:
        self.judge = judge

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hand on step and metrics."""
        self.judge(state.global_step, kwargs["metrics"])
