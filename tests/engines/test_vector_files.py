import json
from collections import Counter, defaultdict

import pytest

from engines.engine_models import QUERIES, exact_search
from soju.core.errors import UserError
from soju.core.files import verify_manifest
from soju.sparse.export.vectors import Quantised, anserini_query, quantise, write_bulk, write_vectors


@pytest.fixture(scope="module")
def queries(tmp_path_factory):
    path = tmp_path_factory.mktemp("queries") / "queries.jsonl"
    rows = [{"id": f"q{number}", "text": text} for number, text in enumerate([*QUERIES, "없는 말"])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def best_of(scores, document_of):
    """Score of the best passage of each document."""
    best = defaultdict(float)
    for passage, score in scores.items():
        best[document_of(passage)] = max(best[document_of(passage)], score)
    return {document: score for document, score in best.items() if score > 0}


def test_an_anserini_collection_ranks_as_the_exact_engine_within_its_rounding(model, corpus, queries, tmp_path):
    about, _ = write_vectors(model, [corpus], tmp_path / "out", "anserini", queries=[queries], quantisation=1000)
    verify_manifest(tmp_path / "out")
    assert about["parts"] == ["vectors-00000.jsonl"]
    assert about["queries"] == {"written": 6, "without_terms": ["q6"], "dropped_weights": 0}
    rows = lines(tmp_path / "out" / "vectors-00000.jsonl")
    assert len(rows) == about["passages"]
    assert all(isinstance(weight, int) and weight > 0 for row in rows for weight in row["vector"].values())
    asked = [line.split("\t") for line in (tmp_path / "out" / "queries.tsv").read_text(encoding="utf-8").splitlines()]
    exact = exact_search(model, corpus, tmp_path / "index", k=20)
    for (name, text), reference, number in zip(asked, exact, range(6), strict=True):
        assert name == f"q{number}"
        weights = Counter(text.split())
        scores = {row["id"]: sum(weights[t] * w for t, w in row["vector"].items()) / 1e6 for row in rows}
        best = best_of(scores, lambda passage: passage.split("#")[0])
        for hit in reference.hits:  # each of two weights is off by half of 1/1000
            allowed = sum(0.0005 * (term.query_weight + term.document_weight) for term in hit.matched) * 1.01
            assert abs(best[hit.document_id] - hit.score) <= allowed


@pytest.mark.parametrize("form", ["opensearch", "elasticsearch"])
def test_bulk_files_hold_the_weights_and_queries_of_the_exact_engine(model, corpus, queries, tmp_path, form):
    about, _ = write_vectors(model, [corpus], tmp_path / "out", form, queries=[queries], name="there")
    verify_manifest(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "index.json").read_text(encoding="utf-8"))
    kind = {"opensearch": "rank_features", "elasticsearch": "sparse_vector"}[form]
    assert index["mappings"]["properties"]["tokens"] == {"type": kind}
    rows = lines(tmp_path / "out" / about["parts"][0])
    assert all(
        action["index"].keys() == {"_index", "_id"} and action["index"]["_index"] == "there" for action in rows[::2]
    )
    bodies = rows[1::2]
    assert len(bodies) == about["passages"]
    asked = lines(tmp_path / "out" / "queries.jsonl")
    assert [row["id"] for row in asked] == [f"q{number}" for number in range(6)]
    for row, reference in zip(asked, exact_search(model, corpus, tmp_path / "index", k=20), strict=True):
        if form == "opensearch":
            weights = row["body"]["query"]["neural_sparse"]["tokens"]["query_tokens"]
        else:
            weights = row["body"]["query"]["sparse_vector"]["query_vector"]
            assert row["body"]["query"]["sparse_vector"]["prune"] is False
        scores = {
            (body["document_id"], body["number"]): sum(weights.get(t, 0) * w for t, w in body.get("tokens", {}).items())
            for body in bodies
        }
        best = best_of(scores, lambda passage: passage[0])
        for hit in reference.hits:
            assert best[hit.document_id] == pytest.approx(hit.score, rel=1e-5)


def test_bulk_files_go_on_in_the_next_part_and_no_pair_is_cut(tmp_path):
    parts = write_bulk(tmp_path, "i", ((str(number), {"n": "x" * 40}) for number in range(5)), part_bytes=200)
    assert parts == ["bulk-00000.ndjson", "bulk-00001.ndjson", "bulk-00002.ndjson"]
    assert [len(lines(tmp_path / part)) for part in parts] == [4, 4, 2]
    assert all((tmp_path / part).read_bytes().endswith(b"\n") for part in parts)


def test_weights_are_rounded_and_what_is_lost_is_counted():
    counts = Quantised()
    assert quantise({"a": 0.004, "b": 0.006, "c": 2.344}, 100, counts) == {"b": 1, "c": 234}
    assert (counts.weights, counts.dropped) == (3, 1)
    assert anserini_query("q1", {"a%20b": 2, "c": 1}) == "q1\ta%20b a%20b c\n"
    with pytest.raises(UserError, match="holds a tab"):
        anserini_query("q\t1", {"a": 1})


def test_nothing_is_left_behind_when_a_document_does_not_fit(model, tmp_path):
    corpus = tmp_path / "c.jsonl"
    corpus.write_text(json.dumps({"id": "x" * 513, "text": "쌀"}) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="513 bytes"):
        write_vectors(model, [str(corpus)], tmp_path / "out", "opensearch")
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("")
    with pytest.raises(UserError, match="is not empty"):
        write_vectors(model, [str(corpus)], tmp_path / "full", "opensearch")
