"""An OpenSearch of this process: takes the published request shapes, refuses others, ranks as the field types do.

What it takes, and where that is published (OpenSearch documentation, docs.opensearch.org, read for 3.3 and later):

* ``PUT /INDEX`` and ``GET /INDEX/_mapping``, with ``_meta``: "Create index", "Get mapping", "Mappings: _meta".
* ``rank_features``: "Rank field types": a map of names to positive numbers, no dots in names; "a relative error of
  about 0.4 %" since 9 significant bits are kept: Lucene ``FeatureField`` drops the lower 15 bits of the float32 and
  refuses what is below ``Float.MIN_NORMAL``.
* ``rank_feature`` query with ``linear``: "Rank feature query". ``linear`` is the stored value, ``boost`` multiplies.
* ``neural_sparse`` with ``query_tokens``: "Neural sparse query", "Neural sparse search using raw vectors". It becomes a
  ``BooleanQuery`` of ``FeatureField.newLinearQuery``, whose weight lies in (0, 64], with at most
  ``indices.query.bool.max_clause_count`` (1,024) clauses.
* ``sparse_vector``: "Sparse vector" (``index.sparse``, method ``seismic``, ranges of its parameters) and "Neural sparse
  ANN search" (``method_parameters``: ``k``, ``top_n``, ``heap_factor``). Segments below ``approximate_threshold`` are
  searched as ``rank_features``; above, weights are bytes: ``round(min(w, ceiling) / ceiling * 255)``, and ids are taken
  modulo 65,536 (neural-search issue 1925). Which clusters are skipped is not modelled: every document is scored, with
  all terms, if it holds one of the ``top_n`` heaviest.
* ``neural_sparse_two_phase_processor``, ``index.search.default_pipeline``: "Neural sparse query two-phase processor".
* ``POST /INDEX/_bulk``: "Bulk": ``application/x-ndjson``, last line ends with a line feed, one ``index`` action a
  document, ``_id`` of at most 512 bytes, 200 with ``errors`` and one item each, 429 when a shard's queue is full.
"""

import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import numpy as np

MIN_NORMAL = float(np.finfo(np.float32).tiny)
MAX_CLAUSES = 1024


class RefusedError(Exception):
    def __init__(self, status, kind, reason):
        super().__init__(reason)
        self.status, self.kind = status, kind


def bad(reason, kind="illegal_argument_exception"):
    return RefusedError(400, kind, reason)


def only(mapping, allowed, where):
    if extra := set(mapping) - set(allowed):
        raise bad(f"unknown {sorted(extra)} in {where}", "parsing_exception")


def kept(weight):
    """9 significant bits of a float32, as Lucene's FeatureField keeps them."""
    return float((np.float32(weight).view(np.int32) >> 15 << 15).view(np.float32))


def byte(weight, ceiling):
    return int(np.floor(min(max(weight, 0.0), ceiling) / ceiling * 255 + 0.5))


@dataclass
class Index:
    body: dict
    documents: dict = field(default_factory=dict)

    @property
    def properties(self):
        return self.body["mappings"]["properties"]


@dataclass
class FakeOpenSearch:
    """Start with ``with``. Set `busy_requests`, `busy_documents` or `largest` to make bulk requests fail."""

    busy_requests: int = 0
    """How many bulk requests meet 429 before one is taken."""
    busy_documents: dict = field(default_factory=dict)
    """How often each document meets 429 inside an answered request."""
    largest: int = 1 << 30
    """Bytes of a bulk request above which the answer is 413."""
    sizes: list = field(default_factory=list)
    """Documents of each bulk request."""
    indexes: dict = field(default_factory=dict)
    pipelines: dict = field(default_factory=dict)
    searches: list = field(default_factory=list)

    def __enter__(self):
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, method, path, kind, body):
        match method, path.strip("/").split("/"):
            case "PUT", ["_search", "pipeline", name]:
                return self.make_pipeline(name, json.loads(body))
            case method, [name, *rest] if name in self.indexes or (method, rest) == ("PUT", []):
                return self.answer_index(method, name, rest, kind, body)
        raise RefusedError(404, "index_not_found_exception", f"no such index [{path}]")

    def answer_index(self, method, name, rest, kind, body):
        match method, rest:
            case "PUT", []:
                return self.make_index(name, json.loads(body))
            case "HEAD", []:
                return {}
            case "DELETE", []:
                del self.indexes[name]
                return {"acknowledged": True}
            case "GET", ["_mapping"]:
                return {name: {"mappings": self.indexes[name].body["mappings"]}}
            case "POST", ["_refresh"]:
                return {"_shards": {"total": 1, "successful": 1, "failed": 0}}
            case "POST", ["_bulk"]:
                return self.bulk(self.indexes[name], name, kind, body)
            case "POST", ["_search"]:
                return self.search(self.indexes[name], json.loads(body))
        raise RefusedError(405, "method_not_allowed", f"{method} {rest}")

    def make_pipeline(self, name, body):
        only(body, ("description", "request_processors"), "pipeline")
        ((kind, processor),) = body["request_processors"][0].items()
        if kind != "neural_sparse_two_phase_processor":
            raise bad(f"Invalid processor type {kind}")
        only(processor, ("enabled", "two_phase_parameter", "tag", "description"), kind)
        parameters = processor["two_phase_parameter"]
        only(parameters, ("prune_ratio", "expansion_rate", "max_window_size"), "two_phase_parameter")
        if not (
            0 <= parameters["prune_ratio"] <= 1 < parameters["expansion_rate"] and parameters["max_window_size"] > 50
        ):
            raise bad("two_phase_parameter out of range")
        self.pipelines[name] = parameters
        return {"acknowledged": True}

    def make_index(self, name, body):
        if name in self.indexes:
            raise bad(f"index [{name}] already exists", "resource_already_exists_exception")
        only(body, ("settings", "mappings", "aliases"), "index")
        settings = body["settings"]["index"]
        only(settings, ("number_of_shards", "number_of_replicas", "sparse", "search.default_pipeline"), "settings")
        pipeline = settings.get("search.default_pipeline")
        if pipeline is not None and pipeline not in self.pipelines:
            raise bad(f"pipeline {pipeline} is not defined")
        only(body["mappings"], ("_meta", "properties", "dynamic"), "mappings")
        for field_name, mapping in body["mappings"]["properties"].items():
            self.check_field(field_name, mapping, sparse=settings.get("sparse", False))
        self.indexes[name] = Index(body)
        return {"acknowledged": True, "shards_acknowledged": True, "index": name}

    def check_field(self, name, mapping, *, sparse):
        if mapping["type"] != "sparse_vector":
            only(mapping, ("type",), name)
            assert mapping["type"] in ("rank_features", "keyword", "text", "long", "integer"), mapping
            return
        only(mapping, ("type", "method"), name)
        only(mapping["method"], ("name", "engine", "parameters"), "method")
        if not sparse or mapping["method"]["name"] != "seismic":
            raise bad("sparse_vector needs index.sparse and method seismic", "mapper_parsing_exception")
        ranges = {
            "n_postings": lambda value: isinstance(value, int) and value > 0,
            "cluster_ratio": lambda value: 0 < value < 1,
            "summary_prune_ratio": lambda value: 0 < value <= 1,
            "approximate_threshold": lambda value: isinstance(value, int) and value >= 0,
            "quantization_ceiling_search": lambda value: value > 0,
            "quantization_ceiling_ingest": lambda value: value > 0,
        }
        only(mapping["method"]["parameters"], ranges, "parameters")
        for key, value in mapping["method"]["parameters"].items():
            if not ranges[key](value):
                raise bad(f"{key} is {value}", "mapper_parsing_exception")

    def bulk(self, index, name, kind, body):
        if kind != "application/x-ndjson" or not body.endswith(b"\n"):
            raise bad("The bulk request must be application/x-ndjson and be terminated by a newline [\\n]")
        if len(body) > self.largest:
            raise RefusedError(413, "content_too_long_exception", "request too large")
        lines = [json.loads(line) for line in body.splitlines()]
        self.sizes.append(len(lines) // 2)
        if self.busy_requests > 0:
            self.busy_requests -= 1
            raise RefusedError(429, "rejected_execution_exception", "coordinating operation rejected")
        items = [self.store(index, name, *pair) for pair in zip(lines[::2], lines[1::2], strict=True)]
        return {"took": 1, "errors": any("error" in item["index"] for item in items), "items": items}

    def store(self, index, name, action, document):
        only(action, ("index",), "action")
        only(action["index"], ("_id", "_index"), "index action")
        identifier = action["index"]["_id"]
        result = {"_index": name, "_id": identifier, "status": 201}
        try:
            if self.busy_documents.get(identifier, 0) > 0:
                self.busy_documents[identifier] -= 1
                raise RefusedError(429, "rejected_execution_exception", "rejected execution of primary operation")
            if len(identifier.encode()) > 512:
                raise bad(f"id is too long, must be no longer than 512 bytes but was: {len(identifier.encode())}")
            for field_name, value in document.items():
                self.check_value(field_name, index.properties[field_name]["type"], value)
            index.documents[identifier] = document
        except RefusedError as error:
            result |= {"status": error.status, "error": {"type": error.kind, "reason": str(error)}}
        return {"index": result}

    def check_value(self, name, kind, value):
        if kind in ("rank_features", "sparse_vector"):
            for key, weight in value.items():
                if kind == "rank_features" and (not key or "." in key):
                    raise bad(f"[rank_features] fields do not support dots in feature names but found [{key}]")
                if kind == "sparse_vector" and not key.isdigit():
                    raise bad(f"[sparse_vector] fields should be integers but found [{key}]")
                if not MIN_NORMAL <= weight < float("inf"):
                    raise bad(
                        f"featureValue must be a positive normal float, got: {weight} for feature {key} on {name}"
                    )
        elif not isinstance(value, {"keyword": str, "text": str}.get(kind, int)):
            raise bad(f"failed to parse field [{name}] of type [{kind}]", "mapper_parsing_exception")

    def search(self, index, body):
        only(body, ("size", "query", "from", "_source"), "search")
        self.searches.append(body)
        if body["size"] > 10_000:
            raise bad("Result window is too large, from + size must be less than or equal to: [10000]")
        ((kind, query),) = body["query"].items()
        scores = getattr(self, f"score_{kind}")(index, query, body["size"])
        ranked = sorted(scores.items(), key=lambda item: -item[1])[: body["size"]]
        hits = [{"_id": name, "_score": score, "_source": index.documents[name]} for name, score in ranked]
        return {"took": 1, "timed_out": False, "hits": {"max_score": ranked[0][1] if ranked else None, "hits": hits}}

    def score_bool(self, index, query, size):
        only(query, ("should",), "bool")
        tokens = {}
        for clause in query["should"]:
            (feature,) = [clause["rank_feature"]]
            only(feature, ("field", "linear", "boost"), "rank_feature")
            field_name, _, key = feature["field"].partition(".")
            assert index.properties[field_name]["type"] == "rank_features"
            assert feature["linear"] == {}
            tokens[key] = feature["boost"]
        return self.linear(index, field_name, tokens)

    def score_neural_sparse(self, index, query, size):
        ((field_name, vector),) = query.items()
        approximate = index.properties[field_name]["type"] == "sparse_vector"
        only(vector, ("query_tokens", *(["method_parameters"] if approximate else [])), "neural_sparse")
        tokens = vector["query_tokens"]
        if approximate:
            only(vector["method_parameters"], ("k", "top_n", "heap_factor", "filter"), "method_parameters")
            parameters = index.properties[field_name]["method"]["parameters"]
            if len(index.documents) >= parameters["approximate_threshold"]:
                return self.quantised(index, field_name, tokens, vector["method_parameters"]["top_n"], parameters)
        pipeline = index.body["settings"]["index"].get("search.default_pipeline")
        if pipeline:
            return self.two_phases(index, field_name, tokens, size, self.pipelines[pipeline])
        return self.linear(index, field_name, tokens)

    def linear(self, index, field_name, tokens):
        if len(tokens) > MAX_CLAUSES:
            raise bad("maxClauseCount is set to 1024", "too_many_clauses")
        if any(not 0 < weight <= 64 for weight in tokens.values()):
            raise bad("weight must be in ]0, 64]")
        scores = {}
        for name, document in index.documents.items():
            stored = document.get(field_name, {})
            products = [weight * kept(stored[key]) for key, weight in tokens.items() if key in stored]
            if products:
                scores[name] = float(np.sum(products, dtype=np.float64))
        return scores

    def two_phases(self, index, field_name, tokens, size, parameters):
        threshold = parameters["prune_ratio"] * max(tokens.values())
        heavy = {key: weight for key, weight in tokens.items() if weight >= threshold}
        first = self.linear(index, field_name, heavy)
        window = min(int(size * parameters["expansion_rate"]), parameters["max_window_size"])
        best = sorted(first, key=lambda name: -first[name])[:window]
        whole = self.linear(index, field_name, tokens)
        return {**first, **{name: whole[name] for name in best}}

    def quantised(self, index, field_name, tokens, top_n, parameters):
        search, ingest = parameters["quantization_ceiling_search"], parameters["quantization_ceiling_ingest"]
        query = {int(key) % 65_536: byte(weight, search) for key, weight in tokens.items()}
        heaviest = {int(key) % 65_536 for key in sorted(tokens, key=lambda key: -tokens[key])[:top_n]}
        scores = {}
        for name, document in index.documents.items():
            stored = {int(key) % 65_536: byte(weight, ingest) for key, weight in document.get(field_name, {}).items()}
            if heaviest & set(stored):
                dot = sum(weight * stored.get(key, 0) for key, weight in query.items())
                scores[name] = dot * search * ingest / 255**2
        return scores

    def _handler(self):
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def respond(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                kind = (self.headers.get("Content-Type") or "").split(";")[0]
                try:
                    status, answer = 200, fake.answer(self.command, unquote(self.path), kind, body)
                except RefusedError as error:
                    reason = {"type": error.kind, "reason": str(error)}
                    status, answer = error.status, {"error": {"root_cause": [reason], **reason}, "status": error.status}
                text = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json; charset=UTF-8")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(text)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = respond

            def log_message(self, *_):
                pass

        return Handler
