"""What can be set about an index, and what does its ``index.json`` record?"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from soju.core.config import Settings
from soju.search.chunking import ChunkSettings
from soju.search.seismic_engine import SeismicSettings
from soju.search.weighting import WeightingSettings

Engine = Literal["auto", "exact", "block-max", "seismic"]


class IndexSettings(Settings):
    """Everything that decides what an index holds and how it is searched."""

    weighting: WeightingSettings = WeightingSettings()
    """How vectors become impacts."""
    chunking: ChunkSettings = ChunkSettings()
    """How long documents are cut."""
    engine: Engine = "auto"
    """What is built beside the posting lists: ``auto`` adds ``block-max`` from `block_max_from_chunks` on, ``exact``
    nothing, the others always what they say."""
    block_max_from_chunks: int = Field(default=20_000, ge=1)
    """Chunks from which ``auto`` builds the block-max engine; below, posting lists are as fast."""
    seismic: SeismicSettings = SeismicSettings()
    """Parameters of Seismic."""
    batch_size: int = Field(default=256, ge=1)
    """Chunks encoded at once."""
    compact_share: float = Field(default=0.25, gt=0)
    """Added chunks, as a share of the first segment's, from which all segments are merged, the fast engine too."""
    max_added_segments: int = Field(default=8, ge=1)
    """Added segments from which these are merged into one."""


class SegmentEntry(Settings):
    """What ``index.json`` says about one segment."""

    name: str
    """Folder below ``segments``."""
    documents: int
    """D."""
    chunks: int
    """C."""
    postings: int
    """P."""
    empty_documents: int
    """Documents without any term, kept in the store and never found."""
    first_empty_documents: tuple[str, ...]
    """Ids of the first of them."""
    average_length: float | None
    """Average length of its chunks that have terms, in term counts (``bm25`` only)."""
    fast: Literal["block-max", "seismic"] | None
    """The engine that was built beside the posting lists."""


class IndexDescription(Settings):
    """Content of ``index.json``."""

    format: int
    """Version of the folder's layout."""
    fingerprint: str
    """Names the model whose vectors are inside; compared when the index is opened with one."""
    terms: int
    """V."""
    average_length: float | None
    """Average chunk length of BM25, fixed at the first build."""
    settings: IndexSettings
    """As given to `SparseIndex.build`."""
    segments: tuple[SegmentEntry, ...]
    """In document order; the first is the largest and the one that may have a fast engine."""
