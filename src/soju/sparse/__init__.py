"""Cross-lingual learned sparse retrieval: Korean text activates Korean and English terms."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from soju.sparse.config import StaticSettings
    from soju.sparse.mine import mine_negatives
    from soju.sparse.negatives import Choice
    from soju.sparse.static.encoder import StaticEncoder
    from soju.sparse.static.training import train_static

__all__ = ["Choice", "StaticEncoder", "StaticSettings", "mine_negatives", "train_static"]

_HOME_OF = {
    "Choice": "soju.sparse.negatives",
    "StaticEncoder": "soju.sparse.static.encoder",
    "StaticSettings": "soju.sparse.config",
    "mine_negatives": "soju.sparse.mine",
    "train_static": "soju.sparse.static.training",
}


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module 'soju.sparse' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return list(__all__)
