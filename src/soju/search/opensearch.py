"""What does OpenSearch want to read? Bodies for an index, its documents, its queries and a two-phase pipeline.

Pure functions of plain objects; `soju.search.opensearch_client` sends what they return. Shape letter: T = terms.

References (OpenSearch documentation, read for 3.3 and later):
    "Neural sparse search using raw vectors" (``rank_features``, ``neural_sparse`` with ``query_tokens``), "Rank field
    types" and "Rank feature query" (``linear``), "Sparse vector" and "Neural sparse ANN search" (``sparse_vector``,
    SEISMIC, ``method_parameters``), "Neural sparse query two-phase processor".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from soju.core.config import Settings
from soju.core.errors import UserError
from soju.search.bulk_load import BulkSettings
from soju.search.passages import CorpusFacts, Passage

VECTOR = "tokens"
"""Field of the weights."""
MAX_QUERY_WEIGHT = 64.0
"""Largest weight Lucene's ``FeatureField.newLinearQuery`` takes."""
MAX_SEISMIC_TERMS = 65_536
"""OpenSearch keeps the ids of a ``sparse_vector`` modulo this number (neural-search issue 1925)."""
MAX_ID_BYTES = 512
"""Longest ``_id`` a bulk request may carry."""

Kind = Literal["rank_features", "sparse_vector"]
Query = Literal["neural_sparse", "rank_feature"]


class SeismicIndex(Settings):
    """Parameters of a ``sparse_vector`` field; what is left open is OpenSearch's default."""

    n_postings: int | None = Field(default=None, ge=1)
    """Documents kept in each posting list; 0.0005 of the segment when open."""
    cluster_ratio: float = Field(default=0.1, gt=0, lt=1)
    """Clusters of a posting list, as a share of its documents."""
    summary_prune_ratio: float = Field(default=0.4, gt=0, le=1)
    """Share of a cluster summary's weight that is kept."""
    approximate_threshold: int = Field(default=1_000_000, ge=0)
    """Documents of a segment from which SEISMIC is built; smaller segments are searched exactly."""
    ceiling_ingest: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Weight that becomes 255 of 255; the largest weight of the corpus when open. Heavier ones are cut down to it."""
    ceiling_search: float = Field(default=16.0, gt=0, allow_inf_nan=False)
    """The same for queries; every query is scaled so that its heaviest term reaches it, so nothing is ever cut."""


class SeismicQuery(Settings):
    """How far a SEISMIC search looks."""

    top_n: int = Field(default=10, ge=1)
    """Heaviest query terms whose posting lists are read; every term counts in the scores of what is found there."""
    heap_factor: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Higher finds more and takes longer."""


class TwoPhase(Settings):
    """Score with heavy terms first, rescore the best with all."""

    prune_ratio: float = Field(default=0.4, ge=0, le=1)
    """Terms below this share of the heaviest wait for the second phase."""
    expansion_rate: float = Field(default=5.0, gt=1)
    """Documents rescored, as a multiple of the hits wanted."""
    max_window_size: int = Field(default=10_000, gt=50)
    """Most documents rescored."""


class OpenSearchSettings(Settings):
    """Everything that can be set about an index in OpenSearch."""

    kind: Kind = "rank_features"
    """``rank_features``: exact, 9 significant bits a weight. ``sparse_vector``: SEISMIC, 8 bits, OpenSearch 3.3."""
    seismic: SeismicIndex = SeismicIndex()
    """For ``sparse_vector``."""
    two_phase: TwoPhase | None = None
    """A pipeline that becomes the index's default; ``rank_features`` on one shard only."""
    shards: int = Field(default=1, ge=1)
    """Primary shards."""
    replicas: int = Field(default=0, ge=0)
    """Copies of each."""
    max_clauses: int = Field(default=1024, ge=1)
    """The cluster's ``indices.query.bool.max_clause_count``: most terms of a query."""
    bulk: BulkSettings = BulkSettings()
    """How fast to send."""

    @model_validator(mode="after")
    def _fits(self) -> OpenSearchSettings:
        if self.two_phase and self.kind == "sparse_vector":
            raise ValueError("two_phase does not work on a sparse_vector field; leave one of them out")
        if self.two_phase and self.shards > 1:
            raise ValueError("two_phase ranks wrongly on several shards (neural-search issue 1654); use one shard")
        return self


class OpenSearchQuery(Settings):
    """Everything that can be set about a search in OpenSearch."""

    query: Query = "neural_sparse"
    """``rank_feature`` writes the same sum as a ``bool`` of linear queries, for clusters without the neural plugin."""
    seismic: SeismicQuery = SeismicQuery()
    """For ``sparse_vector``."""


def index_body(settings: OpenSearchSettings, facts: CorpusFacts, *, pipeline: str | None = None) -> dict[str, Any]:
    """Return the body of ``PUT /INDEX``.

    Args:
        settings: Kind of field, shards, SEISMIC.
        facts: Of the corpus; kept in the mapping's ``_meta``, where a search reads them.
        pipeline: Name of a search pipeline to make the default.

    Returns:
        Settings and mapping.
    """
    index: dict[str, Any] = {"number_of_shards": settings.shards, "number_of_replicas": settings.replicas}
    field: dict[str, Any] = {"type": settings.kind}
    meta = {**facts.to_json(), "kind": settings.kind, "max_clauses": settings.max_clauses}
    if settings.kind == "sparse_vector":
        index["sparse"] = True
        seismic = settings.seismic
        ceiling = seismic.ceiling_ingest or facts.ceiling
        parameters = seismic.model_dump(exclude={"ceiling_ingest", "ceiling_search"}, exclude_none=True)
        parameters |= {"quantization_ceiling_ingest": ceiling, "quantization_ceiling_search": seismic.ceiling_search}
        field["method"] = {"name": "seismic", "parameters": parameters}
        meta["ceiling_search"] = seismic.ceiling_search
    if pipeline is not None:
        index["search.default_pipeline"] = pipeline
    properties = {
        "document_id": {"type": "keyword"},
        "number": {"type": "long"},
        "text": {"type": "text"},
        "start": {"type": "integer"},
        "end": {"type": "integer"},
        VECTOR: field,
    }
    return {"settings": {"index": index}, "mappings": {"_meta": {"soju": meta}, "properties": properties}}


def pipeline_body(settings: TwoPhase) -> dict[str, Any]:
    """Return the body of ``PUT /_search/pipeline/NAME`` for a two-phase search."""
    return {
        "request_processors": [
            {"neural_sparse_two_phase_processor": {"enabled": True, "two_phase_parameter": settings.model_dump()}}
        ]
    }


def keys_of(kind: str, names: Sequence[str]) -> Sequence[str]:
    """Return what the V terms are called in the field: their names, or for ``sparse_vector`` the model's own ids."""
    return names if kind == "rank_features" else _Ids(len(names))


class _Ids(Sequence[str]):
    """``"0", "1", ...`` without making them all."""

    def __init__(self, size: int) -> None:
        self._numbers = range(size)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, number: Any) -> Any:
        return str(self._numbers[number])


def document_body(passage: Passage, keys: Sequence[str]) -> dict[str, Any]:
    """Return what is stored of a passage. `keys` is from `keys_of`; a passage without terms has no vector."""
    body: dict[str, Any] = {
        "document_id": passage.document_id,
        "number": passage.number,
        "text": passage.text,
        "start": passage.start,
        "end": passage.end,
    }
    if len(passage.terms_T):
        pairs = zip(passage.terms_T.tolist(), passage.weights_T.tolist(), strict=True)
        body[VECTOR] = {keys[term]: float(f"{weight:.8g}") for term, weight in pairs}
    return body


def query_tokens(
    terms_T: NDArray[np.int32], weights_T: NDArray[np.float32], keys: Sequence[str], meta: Mapping[str, Any]
) -> tuple[dict[str, float], float]:
    """Return a query's weights as the index's field takes them, heaviest first, and the factor they were scaled with.

    Scaling a whole query changes no ranking; dividing a score by the factor gives it in our units.

    Args:
        terms_T: Term ids of the query.
        weights_T: Their weights, > 0.
        keys: From `keys_of`.
        meta: ``_meta.soju`` of the index.

    Returns:
        Weights by key, and the scale.

    Raises:
        UserError: If there are more terms than the cluster takes clauses.
    """
    if len(terms_T) > (most := int(meta["max_clauses"])):
        raise UserError(
            f"the query has {len(terms_T):,} terms and the index takes {most:,}; shorten it, or raise "
            "indices.query.bool.max_clause_count of the cluster and index with --set max_clauses=N"
        )
    if not len(terms_T):
        return {}, 1.0
    heaviest = float(weights_T.max())
    if meta["kind"] == "sparse_vector":
        scale = float(meta["ceiling_search"]) / heaviest
    else:
        scale = min(1.0, MAX_QUERY_WEIGHT / heaviest)
    order = np.lexsort((terms_T, -weights_T))
    return {keys[terms_T[at]]: float(f"{weights_T[at] * scale:.8g}") for at in order}, scale


def search_body(
    tokens: Mapping[str, float], meta: Mapping[str, Any], settings: OpenSearchQuery, *, size: int
) -> dict[str, Any]:
    """Return the body of ``POST /INDEX/_search``.

    Args:
        tokens: From `query_tokens`, not empty.
        meta: ``_meta.soju`` of the index.
        settings: Which query to write and how far SEISMIC looks.
        size: Passages wanted.

    Returns:
        The body.

    Raises:
        UserError: If a ``rank_feature`` query is asked of a ``sparse_vector`` field.
    """
    approximate = meta["kind"] == "sparse_vector"
    if settings.query == "rank_feature":
        if approximate:
            raise UserError('a sparse_vector field takes query "neural_sparse" only; leave out --set query=...')
        clauses = [
            {"rank_feature": {"field": f"{VECTOR}.{key}", "linear": {}, "boost": weight}}
            for key, weight in tokens.items()
        ]
        query: dict[str, Any] = {"bool": {"should": clauses}}
    else:
        vector: dict[str, Any] = {"query_tokens": dict(tokens)}
        if approximate:
            vector["method_parameters"] = {**settings.seismic.model_dump(), "k": size}
        query = {"neural_sparse": {VECTOR: vector}}
    return {"size": size, "query": query}
