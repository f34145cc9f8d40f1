"""What does an engine that is not ours have to do? OpenSearch and Qdrant, seen from the recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from soju.core.config import Settings
from soju.search.best_passages import Found
from soju.search.bulk_load import Send
from soju.search.passages import CorpusFacts, Passage


class SearchServer(Protocol):
    """An engine with indexes that have names. `names` are the escaped names of the V terms, `settings` its own."""

    name: str
    """How the command line calls it."""
    index_settings: type[Settings]
    """What can be set about an index; has a field ``bulk``."""
    query_settings: type[Settings]
    """What can be set about a search."""

    def close(self) -> None:
        """Close the connections."""

    def exists(self, index: str) -> bool:
        """Tell whether there is an index of that name."""

    def faults(self, settings: Any, facts: CorpusFacts, names: Sequence[str]) -> list[str]:
        """Return what the engine would refuse, fold or cut off of a whole corpus, one sentence each."""

    def create(self, index: str, settings: Any, facts: CorpusFacts, *, overwrite: bool) -> None:
        """Make an empty index that knows the facts."""

    def body(self, passage: Passage, settings: Any, names: Sequence[str]) -> dict[str, Any]:
        """Return what is stored of a passage."""

    def sender(self, index: str) -> Send:
        """Return what sends one batch of bodies."""

    def refresh(self, index: str) -> None:
        """Make what is stored findable."""

    def meta(self, index: str) -> dict[str, Any]:
        """Return the facts the index was made with, and what a search must know of its settings."""

    def search(
        self,
        index: str,
        terms_T: NDArray[np.int32],
        weights_T: NDArray[np.float32],
        names: Sequence[str],
        *,
        k: int,
        meta: dict[str, Any],
        settings: Any,
    ) -> list[Found]:
        """Return the best passage of each of the k best documents, best first."""
