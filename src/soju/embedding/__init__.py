"""Recipe ``embedding``: a Korean vocabulary, adapters and three training stages for an embedding model."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from soju.embedding.expansion.expand import ExpandedModel, expand_vocabulary

__all__ = ["ExpandedModel", "expand_vocabulary"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("soju.embedding.expansion.expand"), name)
    raise AttributeError(f"module 'soju.embedding' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return list(__all__)
