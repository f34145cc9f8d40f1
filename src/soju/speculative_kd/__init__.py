"""Speculative knowledge distillation: the student proposes, a teacher with privileged knowledge replaces.

Names are imported when they are first used, so that settings can be read without loading torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from soju.speculative_kd.config import DivergenceSettings, RolloutSettings, SpeculativeKdConfig
    from soju.speculative_kd.controller import Costs, GammaController, best_gamma, expected_speed, measure_costs
    from soju.speculative_kd.divergence import Projection, token_divergence
    from soju.speculative_kd.outcome import Outcome, RolloutResult
    from soju.speculative_kd.recipe import ask
    from soju.speculative_kd.rollout import Rollout
    from soju.speculative_kd.trainer import Lesson, SkdTrainer

_MODULES = {
    "Costs": "controller",
    "DivergenceSettings": "config",
    "GammaController": "controller",
    "Lesson": "trainer",
    "Outcome": "outcome",
    "Projection": "divergence",
    "Rollout": "rollout",
    "RolloutResult": "outcome",
    "RolloutSettings": "config",
    "SkdTrainer": "trainer",
    "SpeculativeKdConfig": "config",
    "ask": "recipe",
    "best_gamma": "controller",
    "expected_speed": "controller",
    "measure_costs": "controller",
    "token_divergence": "divergence",
}

__all__ = [
    "Costs",
    "DivergenceSettings",
    "GammaController",
    "Lesson",
    "Outcome",
    "Projection",
    "Rollout",
    "RolloutResult",
    "RolloutSettings",
    "SkdTrainer",
    "SpeculativeKdConfig",
    "ask",
    "best_gamma",
    "expected_speed",
    "measure_costs",
    "token_divergence",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
