"""Sparse vectors in Qdrant: a server, or a local folder that needs none.

Qdrant's search over sparse vectors is exact: float32 dot products over an inverted index.

References:
    Qdrant documentation, "Collections" (``sparse_vectors``), "Points", "Search" (``query`` with a sparse vector).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from soju.core.config import Settings
from soju.core.errors import UserError, require_extra
from soju.search.hits import Found, best_of_each
from soju.search.remote import Answer, BulkSettings, CorpusFacts, Item, Passage, RequestRefusedError, Send

VECTOR = "tokens"
"""Name of the sparse vector."""
_HOPELESS = (401, 403, 404)


class QdrantSettings(Settings):
    """Everything that can be set about a collection in Qdrant."""

    on_disk: bool = False
    """Keep the inverted index on disk instead of in memory."""
    half: bool = False
    """Store weights as float16: half the memory, 11 significant bits."""
    shards: int = Field(default=1, ge=1)
    """Shards of the collection; a local folder has one."""
    bulk: BulkSettings = BulkSettings(documents=256)
    """How fast to send."""


class QdrantQuery(Settings):
    """A search has no settings: it is exact."""


class QdrantEngine:
    """A Qdrant server or folder.

    Args:
        client: A ``qdrant_client.QdrantClient``.
        local: Whether the client keeps a folder or memory of its own instead of asking a server.
    """

    name = "qdrant"
    index_settings: type[Settings] = QdrantSettings
    query_settings: type[Settings] = QdrantQuery

    def __init__(self, client: Any, *, local: bool = False) -> None:
        self.client = client
        self._local = local

    @classmethod
    def connect(cls, url: str, *, timeout: int = 60) -> Self:
        """Return an engine for ``http(s)://HOST:6333``, the path of a local folder, or ``:memory:``.

        Args:
            url: Server, folder, or ``:memory:``, which vanishes with the process.
            timeout: Seconds to wait for a server.

        Returns:
            The engine.

        Raises:
            MissingExtraError: If qdrant-client is not installed.
            UserError: If another process has the folder open.
        """
        require_extra("--engine qdrant", "engines", "qdrant_client")
        from qdrant_client import QdrantClient

        if url.startswith(("http://", "https://")):
            return cls(QdrantClient(url=url, timeout=timeout, check_compatibility=False))
        if url == ":memory:":
            return cls(QdrantClient(":memory:"), local=True)
        if Path(url).is_file():
            raise UserError(f"--url {url}: is a file; give a server (http://HOST:6333) or a folder")
        try:
            return cls(QdrantClient(path=url), local=True)
        except RuntimeError as error:
            raise UserError(f"--url {url}: {error}; close the other program or start a Qdrant server") from None

    def close(self) -> None:
        """Close the client and free its folder."""
        self.client.close()

    def exists(self, index: str) -> bool:
        """Tell whether there is a collection of that name."""
        return bool(self._ask(lambda: self.client.collection_exists(index)))

    def faults(self, settings: QdrantSettings, facts: CorpusFacts, names: Sequence[str]) -> list[str]:
        """Return nothing: any id below 2^32 and any weight will do."""
        return []

    def body(self, passage: Passage, settings: QdrantSettings, names: Sequence[str]) -> dict[str, Any]:
        """Return what is stored of a passage."""
        return point_body(passage)

    def create(self, index: str, settings: QdrantSettings, facts: CorpusFacts, *, overwrite: bool) -> None:
        """Make an empty collection."""
        from qdrant_client import models

        if self.exists(index):
            if not overwrite:
                raise UserError(f"{index}: the collection exists; choose another name or --overwrite it")
            self._ask(lambda: self.client.delete_collection(index))

        def make() -> None:
            datatype = models.Datatype.FLOAT16 if settings.half else None
            parameters = models.SparseIndexParams(on_disk=settings.on_disk, datatype=datatype)
            self.client.create_collection(
                index,
                vectors_config={},
                sparse_vectors_config={VECTOR: models.SparseVectorParams(index=parameters)},
                shard_number=None if self._local else settings.shards,
                metadata={"soju": facts.to_json()},
            )

        self._ask(make)

    def sender(self, index: str) -> Send:
        """Return what stores one batch of points in a collection."""

        def send(items: Sequence[Item]) -> list[Answer]:
            self._upsert(index, [_point(item.body) for item in items])
            return [Answer(200)] * len(items)

        return send

    def refresh(self, index: str) -> None:
        """Do nothing: a stored point can be found at once."""

    def meta(self, index: str) -> dict[str, Any]:
        """Return the facts of a collection's corpus."""
        if not self.exists(index):
            raise UserError(f"{index}: no such collection; make it with soju index ... {index} --engine qdrant")
        meta = (self._ask(lambda: self.client.get_collection(index).config.metadata) or {}).get("soju")
        if not isinstance(meta, dict):
            raise UserError(f"{index}: not a collection that soju made; index the corpus again under another name")
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
        settings: QdrantQuery,
    ) -> list[Found]:
        """Return the best passage of each of the k best documents."""
        from qdrant_client import models

        if not len(terms_T):
            return []
        query = models.SparseVector(indices=terms_T.tolist(), values=weights_T.tolist())

        def fetch(size: int) -> list[Found]:
            answer = self._ask(
                lambda: self.client.query_points(index, query=query, using=VECTOR, limit=size, with_vectors=[VECTOR])
            )
            return [_found(point) for point in answer.points]

        return best_of_each(fetch, k, one_each=meta["passages"] == meta["documents"])

    def _upsert(self, index: str, points: list[Any]) -> None:
        from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
        from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

        try:
            self.client.upsert(index, points, wait=True)
        except ResourceExhaustedResponse as error:
            raise RequestRefusedError(429, str(error)) from None
        except ResponseHandlingException as error:
            raise RequestRefusedError(0, str(error)) from None
        except UnexpectedResponse as error:
            if error.status_code in _HOPELESS:
                raise UserError(f"{index}: {_reason(error)}; fix the permission or the name") from None
            raise RequestRefusedError(error.status_code or 0, _reason(error)) from None

    def _ask(self, call: Any) -> Any:
        from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

        try:
            return call()
        except (ResponseHandlingException, UnexpectedResponse) as error:
            raise UserError(f"Qdrant: {_reason(error)}; look whether the server runs and what it allows") from None


def point_body(passage: Passage) -> dict[str, Any]:
    """Return a point as ``PUT /collections/NAME/points`` takes it: id, sparse vector, payload."""
    vector = {"indices": passage.terms_T.tolist(), "values": [float(f"{w:.8g}") for w in passage.weights_T.tolist()]}
    payload = {
        "document_id": passage.document_id,
        "text": passage.text,
        "start": passage.start,
        "end": passage.end,
    }
    return {"id": passage.number, "vector": {VECTOR: vector} if len(passage.terms_T) else {}, "payload": payload}


def _point(body: dict[str, Any]) -> Any:
    from qdrant_client import models

    vector = {name: models.SparseVector(**values) for name, values in body["vector"].items()}
    return models.PointStruct(id=body["id"], vector=vector, payload=body["payload"])


def _found(point: Any) -> Found:
    vector = point.vector[VECTOR]
    return Found(
        document_id=point.payload["document_id"],
        number=point.id,
        score=point.score,
        text=point.payload["text"],
        start=point.payload["start"],
        end=point.payload["end"],
        weights=dict(zip(vector.indices, vector.values, strict=True)),
    )


def _reason(error: Any) -> str:
    return " ".join(str(error).split())[:300]
