"""The engines: which there are, and what each kind has to do. Adding one is a file with a class, and a row here.

The choices of the command line, the settings of an index and the messages come from these tables. Nothing is imported
before an engine is asked for.

Shape letters: C = chunks, T = terms of a query.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from soju.core.config import Settings
    from soju.search.hits import Found
    from soju.search.postings import Postings
    from soju.search.remote import CorpusFacts, Passage, Send


FAST = {"block-max": "soju.search.block_max:BlockMaxEngine"}
"""Engines that are built in addition to the posting lists of an index of ours."""
SERVERS = {"opensearch": "soju.search.opensearch:OpenSearchEngine", "qdrant": "soju.search.qdrant:QdrantEngine"}
"""Engines that keep indexes of their own."""
OWN = ("auto", "exact", *FAST)
"""What an index of ours can be built for and searched with; ``exact`` needs the posting lists alone."""
ENGINES = (*OWN, *SERVERS)
AUTO = "block-max"
"""What ``auto`` builds for a large index."""


class SegmentEngine(Protocol):
    """Finds the best documents of one segment."""

    def search(
        self, terms_T: NDArray[np.int32], weights_T: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return the best chunk of each of the k best documents, best first; equal scores in chunk order.

        Args:
            terms_T: Terms of the query, each once, rising.
            weights_T: Their weights >= 0, idf included.
            k: Most documents to return, >= 1.

        Returns:
            Chunk numbers and scores (sum of query weight times impact), both at most k long; documents that share no
            term with the query are left out.
        """
        ...


class FastEngine(SegmentEngine, Protocol):
    """A `SegmentEngine` with files of its own, which finds the exact engine's documents sooner."""

    auto_up_to: int
    """Most documents of a search for which ``auto`` takes it."""

    @classmethod
    def build(cls, folder: Path, postings: Postings, documents_C: NDArray[np.int32]) -> Self:
        """Write the engine's files of a segment.

        Args:
            folder: Of the segment.
            postings: Its posting lists.
            documents_C: Document number of each chunk, rising.

        Returns:
            The engine, ready to search.
        """
        ...

    @classmethod
    def open(cls, folder: Path, postings: Postings, documents_C: NDArray[np.int32]) -> Self:
        """Open what `build` wrote; a file that is missing or does not fit is an `IntegrityError`."""
        ...


class SearchServer(Protocol):
    """An engine with indexes that have names. `names` are the escaped names of the V terms, `settings` its own."""

    name: str
    """How the command line calls it."""
    index_settings: type[Settings]
    """What can be set about an index; has a field ``bulk``."""
    query_settings: type[Settings]
    """What can be set about a search."""

    @classmethod
    def connect(cls, url: str) -> Self:
        """Return the engine at an address; a missing client is a `MissingExtraError`."""
        ...

    def close(self) -> None:
        """Close the connections."""

    def exists(self, index: str) -> bool:
        """Tell whether there is an index of that name."""
        ...

    def faults(self, settings: Any, facts: CorpusFacts, names: Sequence[str]) -> list[str]:
        """Return what the engine would refuse, fold or cut off of a whole corpus, one sentence each."""
        ...

    def create(self, index: str, settings: Any, facts: CorpusFacts, *, overwrite: bool) -> None:
        """Make an empty index that knows the facts."""

    def body(self, passage: Passage, settings: Any, names: Sequence[str]) -> dict[str, Any]:
        """Return what is stored of a passage."""
        ...

    def sender(self, index: str) -> Send:
        """Return what sends one batch of bodies."""
        ...

    def refresh(self, index: str) -> None:
        """Make what is stored findable."""

    def meta(self, index: str) -> dict[str, Any]:
        """Return the facts the index was made with, and what a search must know of its settings."""
        ...

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
        ...


def fast_engine(name: str) -> type[FastEngine]:
    """Return an engine of `FAST`."""
    engine: type[FastEngine] = _load(FAST[name])
    return engine


def server(name: str) -> type[SearchServer]:
    """Return an engine of `SERVERS`."""
    engine: type[SearchServer] = _load(SERVERS[name])
    return engine


def _load(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
