"""Recipe ``translation``: a large Korean–English encoder–decoder becomes a small quantised one."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from soju.translation.config import DistillationConfig, ValidationConfig
    from soju.translation.degradation import QualityDegradationDetector
    from soju.translation.loss import DistillationLoss
    from soju.translation.recipe import ModelDistiller, Translator
    from soju.translation.validation import DistillationValidator, TranslationQualityEvaluator, ValidationResult

__all__ = [
    "DistillationConfig",
    "DistillationLoss",
    "DistillationValidator",
    "ModelDistiller",
    "QualityDegradationDetector",
    "TranslationQualityEvaluator",
    "Translator",
    "ValidationConfig",
    "ValidationResult",
]

_HOMES = {
    "config": ("DistillationConfig", "ValidationConfig"),
    "degradation": ("QualityDegradationDetector",),
    "loss": ("DistillationLoss",),
    "recipe": ("ModelDistiller", "Translator"),
    "validation": ("DistillationValidator", "TranslationQualityEvaluator", "ValidationResult"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(import_module(f"soju.translation.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module 'soju.translation' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return list(__all__)
