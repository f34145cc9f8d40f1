"""OpenSearch: bodies of indexes, documents and queries, what would be refused, and the client that sends them.

The bodies are pure functions of plain objects. Names, ids and weights are checked before anything is sent.

Shape letter: T = terms.

References (OpenSearch documentation, read for 3.3 and later):
    "Neural sparse search using raw vectors" (``rank_features``, ``neural_sparse`` with ``query_tokens``), "Rank field
    types" and "Rank feature query" (``linear``), "Sparse vector" and "Neural sparse ANN search" (``sparse_vector``,
    SEISMIC, ``method_parameters``), "Neural sparse query two-phase processor".
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from soju.core.config import Settings
from soju.core.errors import UserError, require_extra
from soju.search.hits import Found, best_of_each
from soju.search.remote import BUSY, Answer, BulkSettings, CorpusFacts, Item, Passage, RequestRefusedError, Send

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
    """How far a SEISMIC search goes."""

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
    """Return the body of ``PUT /INDEX``."""
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
        settings: Which query to write and how far SEISMIC searches.
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


MAX_TERM_BYTES = 32_766
"""Longest term of a Lucene index (``IndexWriter.MAX_TERM_LENGTH``)."""
SMALLEST_WEIGHT = float(np.finfo(np.float32).tiny)
"""Smallest weight a Lucene ``FeatureField`` takes (``Float.MIN_NORMAL``)."""


def lint_name(name: str) -> str | None:
    """Return what is wrong with the name of a token, or none."""
    if not name:
        return "is empty"
    if "." in name:
        return "holds a dot, which rank_features refuses"
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        return "holds a control character"
    if len(name.encode("utf-8", "surrogatepass")) > MAX_TERM_BYTES:
        return f"is longer than {MAX_TERM_BYTES:,} bytes"
    return None


def lint_names(names: Sequence[str]) -> list[str]:
    """Return one sentence for every bad name and every name that is given twice."""
    faults = [f"token {at}: {name[:40]!r} {fault}" for at, name in enumerate(names) if (fault := lint_name(name))]
    counts = Counter(names)
    return faults + [f"token {name[:40]!r} is given {count} times" for name, count in counts.items() if count > 1]


def lint_settings(settings: OpenSearchSettings, facts: CorpusFacts) -> list[str]:
    """Return what of the vectors the field would fold or cut off."""
    if settings.kind != "sparse_vector":
        return []
    faults = []
    if facts.terms > MAX_SEISMIC_TERMS:
        faults.append(
            f"the vocabulary has {facts.terms:,} terms and sparse_vector folds ids above {MAX_SEISMIC_TERMS - 1:,} "
            "onto lower ones; trim the model before training (soju trim), or use rank_features"
        )
    ceiling = settings.seismic.ceiling_ingest
    if ceiling is not None and ceiling < facts.ceiling:
        faults.append(
            f"seismic.ceiling_ingest is {ceiling:g} but weights reach {facts.ceiling:.6g}, which would be cut off; "
            "leave it out to take the largest weight of the corpus"
        )
    return faults


def lint_passage(passage: Passage) -> str | None:
    """Return why the engine would refuse a passage, or none."""
    if (length := len(passage.id.encode("utf-8", "surrogatepass"))) > MAX_ID_BYTES:
        return f"the id has {length:,} bytes, more than {MAX_ID_BYTES}"
    weights = passage.weights_T
    if len(weights) and not (np.isfinite(weights) & (weights >= SMALLEST_WEIGHT)).all():
        return "a weight is not a positive normal number"
    return None


def refuse(faults: Sequence[str], *, shown: int = 10) -> None:
    """Raise one error that lists the first faults."""
    if faults:
        more = f"\n... and {len(faults) - shown:,} more" if len(faults) > shown else ""
        raise UserError("\n".join(faults[:shown]) + more)


_HOPELESS = (401, 403, 404)
"""Statuses of a bulk request that no smaller request changes."""


class OpenSearchEngine:
    """An OpenSearch cluster.

    Args:
        client: An ``opensearchpy.OpenSearch`` that does not retry; see `connect`.
    """

    name = "opensearch"
    index_settings: type[Settings] = OpenSearchSettings
    query_settings: type[Settings] = OpenSearchQuery

    def __init__(self, client: Any) -> None:
        self.client = client

    @classmethod
    def connect(cls, url: str, *, timeout: float = 60.0) -> Self:
        """Return an engine for ``http(s)://[USER:PASSWORD@]HOST:PORT``; nothing is sent yet."""
        require_extra("--engine opensearch", "engines", "opensearchpy")
        from opensearchpy import OpenSearch

        if not url.startswith(("http://", "https://")):
            raise UserError(f"--url {url}: expected http://HOST:9200 or https://USER:PASSWORD@HOST:9200")
        # Retries are the loader's business: the client's own would send a busy cluster the same large request again.
        return cls(OpenSearch(hosts=[url], timeout=timeout, max_retries=0, retry_on_status=()))

    def close(self) -> None:
        """Close the connections."""
        self.client.close()

    def exists(self, index: str) -> bool:
        """Tell whether there is an index of that name."""
        return self._call("HEAD", _path(index), allow=(404,)) is not None

    def faults(self, settings: OpenSearchSettings, facts: CorpusFacts, names: Sequence[str]) -> list[str]:
        """Return what the field would refuse, fold or cut off, one sentence each."""
        return [*(lint_names(names) if settings.kind == "rank_features" else ()), *lint_settings(settings, facts)]

    def body(self, passage: Passage, settings: OpenSearchSettings, names: Sequence[str]) -> dict[str, Any]:
        """Return what is stored of a passage."""
        return document_body(passage, keys_of(settings.kind, names))

    def create(self, index: str, settings: OpenSearchSettings, facts: CorpusFacts, *, overwrite: bool) -> None:
        """Make an empty index, and its pipeline when the settings ask for one."""
        path = _path(index)
        if self.exists(index):
            if not overwrite:
                raise UserError(f"{index}: the index exists; choose another name or --overwrite it")
            self._call("DELETE", path)
        pipeline = f"{index}-two-phase" if settings.two_phase else None
        if settings.two_phase:
            self._call("PUT", f"/_search/pipeline{_path(str(pipeline))}", pipeline_body(settings.two_phase))
        self._call("PUT", path, index_body(settings, facts, pipeline=pipeline))

    def sender(self, index: str) -> Send:
        """Return what sends one bulk request to an index."""

        def send(items: Sequence[Item]) -> list[Answer]:
            lines = [line for item in items for line in (_action(item.id), item.line)]
            answer = self._bulk(f"{_path(index)}/_bulk", b"\n".join(lines) + b"\n")
            return [_answer(entry) for entry in answer["items"]]

        return send

    def refresh(self, index: str) -> None:
        """Make everything stored so far findable."""
        self._call("POST", f"{_path(index)}/_refresh")

    def meta(self, index: str) -> dict[str, Any]:
        """Return ``_meta.soju`` of an index."""
        answer = self._call("GET", f"{_path(index)}/_mapping", allow=(404,))
        if answer is None:
            raise UserError(f"{index}: no such index; make it with soju index ... {index} --engine opensearch")
        mappings = [entry.get("mappings", {}) for entry in answer.values()]
        meta = mappings[0].get("_meta", {}).get("soju") if len(mappings) == 1 else None
        if not isinstance(meta, dict):
            raise UserError(f"{index}: not an index that soju made; index the corpus again under another name")
        return meta

    def search(
        self,
        index: str,
        terms_T: NDArray[np.int32],
        weights_T: NDArray[np.float32],
        names: Sequence[str],
        *,
        k: int,
        meta: dict[str, Any],
        settings: OpenSearchQuery,
    ) -> list[Found]:
        """Return the best passage of each of the k best documents."""
        keys = keys_of(meta["kind"], names)
        tokens, scale = query_tokens(terms_T, weights_T, keys, meta)
        if not tokens:
            return []
        terms = {keys[term]: int(term) for term in terms_T}

        def fetch(size: int) -> list[Found]:
            body = search_body(tokens, meta, settings, size=size)
            answer = self._call("POST", f"{_path(index)}/_search", body)
            return [_found(hit, scale, terms) for hit in (answer or {})["hits"]["hits"]]

        return best_of_each(fetch, k, one_each=meta["passages"] == meta["documents"])

    def _bulk(self, path: str, body: bytes) -> dict[str, Any]:
        from opensearchpy.exceptions import ConnectionError as NoConnectionError
        from opensearchpy.exceptions import TransportError

        headers = {"content-type": "application/x-ndjson"}
        try:
            answer: dict[str, Any] = self.client.transport.perform_request("POST", path, headers=headers, body=body)
        except NoConnectionError as error:
            raise RequestRefusedError(0, _reason(error)) from None
        except TransportError as error:
            status = error.status_code
            if not isinstance(status, int):
                raise RequestRefusedError(0, _reason(error)) from None
            if status in _HOPELESS:
                raise UserError(f"{path}: {_reason(error)}; fix the permission or the name") from None
            raise RequestRefusedError(status, _reason(error)) from None
        return answer

    def _call(self, method: str, path: str, body: Any = None, *, allow: tuple[int, ...] = ()) -> dict[str, Any] | None:
        """Send one request; none for a status of `allow`."""
        from opensearchpy.exceptions import TransportError

        try:
            answer = self.client.transport.perform_request(method, path, body=body)
        except TransportError as error:
            if error.status_code in allow:
                return None
            busy = error.status_code in BUSY or not isinstance(error.status_code, int)
            remedy = "look whether the cluster runs and try again" if busy else "fix the request"
            raise UserError(f"{method} {path}: {_reason(error)}; {remedy}") from None
        if answer is False:  # HEAD of what is not there
            return None
        return answer if isinstance(answer, dict) else {}


def _path(name: str) -> str:
    if not name or name != name.lower() or name[0] in "-_+." or any(letter in '\\/*?"<>| ,#:' for letter in name):
        raise UserError(
            f'{name!r}: index names are lower case, without \\ / * ? " < > | , # : and blanks, and do not start '
            "with - _ + or a dot"
        )
    return "/" + quote(name)


def _action(name: str) -> bytes:
    return json.dumps({"index": {"_id": name}}, ensure_ascii=False).encode("utf-8", "replace")


def _answer(entry: dict[str, Any]) -> Answer:
    (result,) = entry.values()
    error = result.get("error") or {}
    reason = f"{error.get('type', '')}: {error.get('reason', '')}" if isinstance(error, dict) else str(error)
    cause = error.get("caused_by", {}).get("reason") if isinstance(error, dict) else None
    return Answer(int(result["status"]), f"{reason} ({cause})" if cause else reason if error else "")


def _found(hit: dict[str, Any], scale: float, terms: dict[str, int]) -> Found:
    source = hit["_source"]
    stored = source.get(VECTOR, {})
    return Found(
        document_id=source["document_id"],
        number=source["number"],
        score=hit["_score"] / scale,
        text=source["text"],
        start=source["start"],
        end=source["end"],
        weights={term: stored[key] for key, term in terms.items() if key in stored},
    )


def _reason(error: Any) -> str:
    """Return why, in one line: the cluster's own words where it gave some."""
    info = getattr(error, "info", None)
    if isinstance(info, dict) and isinstance(info.get("error"), dict):
        return f"{error.status_code} {info['error'].get('type', '')}: {info['error'].get('reason', '')}"
    return " ".join(str(error).split())[:300]
