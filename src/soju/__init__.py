"""soju distils large multilingual language models into small Korean–English ones.

    >>> import soju
    >>> model = soju.load("ko-en-static")
    >>> index = soju.Index.build(["The heart pumps blood.", "물을 끓인다."], model, folder / "my-index")
    >>> [hit.passage for hit in index.search("심장")]
    ['The heart pumps blood.']

Names are imported when they are first used: ``import soju`` takes milliseconds, and torch is loaded only for what
needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from soju.core import __version__

if TYPE_CHECKING:
    from soju import embedding, sparse
    from soju.core.recipe import train
    from soju.core.results import Comparison, Hit, MatchedTerm, Score, TermWeight
    from soju.core.run import Run
    from soju.data.rows import Document, PairRow, Term, TermRow, TripletRow
    from soju.sparse.indexing import Index
    from soju.sparse.model import Model, load

__all__ = [
    "Comparison",
    "Document",
    "Hit",
    "Index",
    "MatchedTerm",
    "Model",
    "PairRow",
    "Run",
    "Score",
    "Term",
    "TermRow",
    "TermWeight",
    "TripletRow",
    "__version__",
    "embedding",
    "load",
    "sparse",
    "train",
]

_HOMES = {
    "soju.core.recipe": ("train",),
    "soju.core.run": ("Run",),
    "soju.core.results": ("Comparison", "Hit", "MatchedTerm", "Score", "TermWeight"),
    "soju.data.rows": ("Document", "PairRow", "Term", "TermRow", "TripletRow"),
    "soju.sparse.indexing": ("Index",),
    "soju.sparse.model": ("Model", "load"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(import_module(_HOME_OF[name]), name)
    if name in ("sparse", "embedding"):
        return import_module(f"soju.{name}")
    raise AttributeError(f"module 'soju' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return list(__all__)
