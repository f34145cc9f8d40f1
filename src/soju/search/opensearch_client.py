"""How are the bodies of `soju.search.opensearch` sent, and what do the answers mean? A layer over opensearch-py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Self
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from soju.core.config import Settings
from soju.core.errors import MissingExtraError, UserError
from soju.search.best_passages import Found, best_of_each
from soju.search.bulk_load import BUSY, Answer, Item, RequestRefusedError, Send
from soju.search.opensearch import (
    VECTOR,
    OpenSearchQuery,
    OpenSearchSettings,
    document_body,
    index_body,
    keys_of,
    pipeline_body,
    query_tokens,
    search_body,
)
from soju.search.passages import CorpusFacts, Passage
from soju.search.token_lint import lint_names, lint_settings

_HOPELESS = (401, 403, 404)
"""Statuses of a bulk request that no smaller request mends."""


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
        """Return an engine for ``http(s)://[USER:PASSWORD@]HOST:PORT``; nothing is sent yet.

        Args:
            url: The cluster.
            timeout: Seconds to wait for an answer.

        Returns:
            The engine.

        Raises:
            MissingExtraError: If opensearch-py is not installed.
            UserError: If the URL is none.
        """
        try:
            from opensearchpy import OpenSearch
        except ImportError:
            raise MissingExtraError("--engine opensearch", "engines") from None
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
        """Make an empty index, and its pipeline when the settings ask for one.

        Args:
            index: Its name.
            settings: Kind of field, shards, SEISMIC, two-phase.
            facts: Of the corpus; kept in the mapping.
            overwrite: Delete an index of that name.

        Raises:
            UserError: If the index exists, or the cluster refuses.
        """
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
        """Return ``_meta.soju`` of an index.

        Args:
            index: Its name.

        Returns:
            The facts of its corpus, ``kind``, ``max_clauses`` and, of a SEISMIC one, ``ceiling_search``.

        Raises:
            UserError: If there is no such index, or soju did not make it.
        """
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
        """Return the best passage of each of the k best documents.

        Args:
            index: Its name.
            terms_T: Terms of the query.
            weights_T: Their weights, > 0, without idf.
            names: The V escaped names.
            k: Most documents.
            meta: From `meta`.
            settings: Which query to write.

        Returns:
            Passages, best first, scores in our units.

        Raises:
            UserError: If the cluster refuses, or the query does not fit.
        """
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
                raise UserError(f"{path}: {_reason(error)}; mend the permission or the name") from None
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
            remedy = "look whether the cluster runs and try again" if busy else "mend the request"
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
