"""The same tests run against the server of this process and, with --url, against a live cluster."""

import json

import numpy as np
import pytest

from engines.engine_models import PIECES, QUERIES, assert_ranks_as, exact_search, ids
from soju.core.errors import UserError
from soju.search.opensearch import OpenSearchEngine
from soju.search.remote import escape_token
from soju.sparse.indexing import load_index, search_engine

NINE_BITS = 2**-8
"""Relative error of a weight that keeps 9 significant bits."""


def load(cluster, model, corpus, tmp_path, *settings):
    engine, name = cluster
    loaded = load_index(model, [corpus], name, engine, settings=settings, dead_letters=tmp_path / "dead.jsonl")
    assert loaded.report.failed == 0
    assert loaded.report.stored == loaded.facts.passages > loaded.facts.documents == 80
    assert loaded.empty == (2, ("문서 7", "문서 8"))
    return engine, name


@pytest.mark.parametrize("query", ["neural_sparse", "rank_feature"])
def test_rank_features_rank_as_the_exact_engine_within_nine_bits(cluster, model, corpus, tmp_path, query):
    engine, name = load(cluster, model, corpus, tmp_path)
    for text, exact in zip(QUERIES, exact_search(model, corpus, tmp_path / "index"), strict=True):
        found = search_engine(engine, name, text, model, k=20, settings=[f"query={query}"])
        assert len(found.hits) == len(exact.hits)
        assert_ranks_as(found, exact, relative=NINE_BITS)


def test_a_hit_names_the_terms_that_matched_in_our_units(cluster, model, corpus, tmp_path):
    engine, name = load(cluster, model, corpus, tmp_path)
    (exact,) = exact_search(model, corpus, tmp_path / "index", queries=["v1.5 소주"], k=1)
    found = search_engine(engine, name, "v1.5 소주", model, k=1)
    ours, theirs = exact.hits[0], found.hits[0]
    assert [term.term for term in theirs.matched] == [term.term for term in ours.matched]
    assert {"v1.5", "소주", "…soju…"} >= {term.term for term in theirs.matched}
    for mine, other in zip(ours.matched, theirs.matched, strict=True):
        assert other.contribution == pytest.approx(mine.contribution, rel=1e-5)
    assert sum(term.contribution for term in theirs.matched) == pytest.approx(theirs.score, rel=NINE_BITS)
    assert theirs.passage == ours.passage


def test_small_segments_of_a_sparse_vector_are_exact_within_nine_bits(cluster, model, corpus, tmp_path):
    engine, name = load(cluster, model, corpus, tmp_path, "kind=sparse_vector")
    for text, exact in zip(QUERIES, exact_search(model, corpus, tmp_path / "index"), strict=True):
        assert_ranks_as(search_engine(engine, name, text, model, k=20), exact, relative=NINE_BITS)


def test_two_phases_find_the_same_best_documents(cluster, model, corpus, tmp_path):
    engine, name = load(cluster, model, corpus, tmp_path, "two_phase={expansion_rate: 10.0}")
    for text, exact in zip(QUERIES, exact_search(model, corpus, tmp_path / "index", k=3), strict=True):
        assert_ranks_as(search_engine(engine, name, text, model, k=3), exact, relative=NINE_BITS)


def test_a_query_of_unknown_words_finds_nothing(cluster, model, corpus, tmp_path):
    engine, name = load(cluster, model, corpus, tmp_path)
    assert search_engine(engine, name, "없는 말", model).hits == ()


def test_an_index_is_replaced_only_when_told_to_and_searched_only_with_its_model(cluster, model, corpus, tmp_path):
    engine, name = load(cluster, model, corpus, tmp_path)
    with pytest.raises(UserError, match="exists already"):
        load_index(model, [corpus], name, engine)
    one = tmp_path / "one.jsonl"
    one.write_text('{"id": "1", "text": "쌀"}\n', encoding="utf-8")
    load_index(model, [str(one)], name, engine, overwrite=True)
    assert ids(search_engine(engine, name, "rice 쌀", model)) == ["1"]
    with pytest.raises(UserError, match="another model"):
        search_engine(engine, name, "쌀", "ko-en-static")
    with pytest.raises(UserError, match="no such index"):
        search_engine(engine, "soju-test-nowhere", "쌀", model)


# What only a server that can be told to misbehave, or to count all documents as a large segment, can show.


@pytest.fixture
def ours(fake):
    engine = OpenSearchEngine.connect(fake.url)
    yield engine
    engine.close()


def test_a_large_segment_ranks_as_eight_bits_allow(fake, ours, model, corpus, tmp_path):
    settings = ("kind=sparse_vector", "seismic={approximate_threshold: 0}")
    loaded = load_index(model, [corpus], "large", ours, settings=settings, dead_letters=tmp_path / "dead.jsonl")
    parameters = fake.indexes["large"].properties["tokens"]["method"]["parameters"]
    stored = [
        max(body["tokens"].values(), default=0) for body in fake.indexes["large"].documents.values() if "tokens" in body
    ]
    assert (
        parameters["quantization_ceiling_ingest"] == pytest.approx(max(stored)) == pytest.approx(loaded.facts.ceiling)
    )
    step = loaded.facts.ceiling / 255
    for text, exact in zip(QUERIES, exact_search(model, corpus, tmp_path / "index"), strict=True):
        found = search_engine(ours, "large", text, model, k=20)
        scores = {hit.document_id: hit.score for hit in exact.hits}
        for hit in found.hits:
            # Half a step of each weight, times its query weight, and half a step of each query weight, times 5.
            allowed = sum(term.query_weight * step / 2 + term.document_weight / 510 for term in hit.matched) * 1.2
            if hit.document_id in scores:
                assert abs(hit.score - scores[hit.document_id]) <= allowed, (text, hit)
        assert max(fake.searches[-1]["query"]["neural_sparse"]["tokens"]["query_tokens"].values()) == 16.0
        assert len(set(ids(found)) & set(ids(exact))) >= 0.9 * len(exact.hits)


def test_stored_names_are_escaped_and_ids_are_the_models_own(fake, ours, model, tmp_path):
    corpus = tmp_path / "c.jsonl"
    corpus.write_text('{"id": "1", "text": "v1.5 3.5%"}\n', encoding="utf-8")
    for kind, keys in (
        ("rank_features", {escape_token("v1.5"), escape_token("3.5%")}),
        ("sparse_vector", {str(PIECES.index("v1.5")), str(PIECES.index("3.5%"))}),
    ):
        load_index(model, [str(corpus)], kind, ours, settings=[f"kind={kind}"])
        assert set(fake.indexes[kind].documents["1"]["tokens"]) == keys


def test_stored_weights_are_bm25_times_idf(fake, ours, model, tmp_path):
    corpus = tmp_path / "c.jsonl"
    corpus.write_text('{"id": "1", "text": "쌀 쌀 rice"}\n{"id": "2", "text": "rice"}\n', encoding="utf-8")
    load_index(model, [str(corpus)], "hand", ours)
    share = {"쌀": 1 / 5, "rice": 1 / 6}  # of 100 training documents
    df = {"쌀": 1, "rice": 2}
    idf = {
        word: np.log1p((102 - df[word] - 100 * share[word] + 0.5) / (df[word] + 100 * share[word] + 0.5)) for word in df
    }
    norm = 1.2 * (0.25 + 0.75 * 3 / 2)  # lengths 3 and 1, average 2
    stored = fake.indexes["hand"].documents["1"]["tokens"]
    assert stored["쌀"] == pytest.approx(2 * 2.2 / (2 + norm) * idf["쌀"], rel=1e-3)  # shares are kept in float16
    assert stored["…rice…"] == pytest.approx(2.2 / (1 + norm) * idf["rice"], rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["kind=sparse_vector", "seismic={ceiling_ingest: 0.5}"], "would be cut off"),
        (["kind=sparse_vector", "two_phase={}"], "does not work on a sparse_vector"),
        (["two_phase={}", "shards=2"], "issue 1654"),
        (["kind=dense"], "kind"),
        (["seismic={n_posting: 3}"], 'did you mean "n_postings"'),
    ],
)
def test_settings_that_would_rank_wrongly_are_refused(ours, fake, model, corpus, settings, message):
    with pytest.raises(UserError, match=message):
        load_index(model, [corpus], "bad", ours, settings=settings)
    assert "bad" not in fake.indexes


def test_a_query_above_the_clause_limit_is_refused_not_cut(ours, model, corpus, tmp_path):
    load_index(model, [corpus], "few", ours, settings=["max_clauses=2"])
    with pytest.raises(UserError, match="3 terms and the index takes 2"):
        search_engine(ours, "few", "w1 w2 w3", model)
    assert search_engine(ours, "few", "w1 w2", model).hits


def test_a_busy_cluster_gets_smaller_requests_until_everything_is_stored(fake, ours, model, corpus):
    fake.busy_requests = 3
    fake.busy_documents = {"문서 3": 2, "문서 20#1": 1}
    loaded = load_index(model, [corpus], "busy", ours, settings=["bulk={first_wait: 0}"])
    assert (loaded.report.stored, loaded.report.failed) == (loaded.facts.passages, 0)
    assert len(fake.indexes["busy"].documents) == loaded.facts.passages
    assert fake.sizes[:4] == [loaded.facts.passages >> at for at in range(4)]
    assert loaded.report.waits >= 4


def test_refused_passages_are_kept_named_and_counted(fake, ours, model, tmp_path):
    rows = [{"id": "x" * 600, "text": "쌀"}, {"id": "b", "text": "rice"}, {"id": "c", "text": "soju"}]
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    fake.busy_documents = {"c": 99}
    dead = tmp_path / "dead.jsonl"
    settings = ["bulk={first_wait: 0, attempts: 3}"]
    loaded = load_index(model, [str(corpus)], "dead", ours, settings=settings, dead_letters=dead)
    assert (loaded.report.stored, loaded.report.failed) == (1, 2)
    assert loaded.report.first_failed == ["x" * 600, "c"]
    letters = [json.loads(line) for line in dead.read_text(encoding="utf-8").splitlines()]
    assert [(letter["id"], letter["status"]) for letter in letters] == [("x" * 600, 400), ("c", 429)]
    assert "600 bytes" in letters[0]["reason"]
    assert letters[1]["body"]["text"] == "soju"
    with pytest.raises(UserError, match="earlier load"):
        load_index(model, [str(corpus)], "dead", ours, overwrite=True, dead_letters=dead)


def test_a_request_that_is_too_large_is_halved(fake, ours, model, corpus):
    fake.largest = 20_000
    loaded = load_index(model, [corpus], "small", ours, settings=["bulk={first_wait: 99}"])
    assert (loaded.report.failed, loaded.report.waits) == (0, 0)
    assert len(fake.indexes["small"].documents) == loaded.facts.passages


def test_a_cluster_that_stays_busy_or_is_not_there_ends_the_load(fake, ours, model, corpus):
    fake.busy_requests = 99
    with pytest.raises(UserError, match=r"refused 2 requests in a row .*rejected_execution_exception"):
        load_index(model, [corpus], "never", ours, settings=["bulk={first_wait: 0, attempts: 2}"])
    nowhere = OpenSearchEngine.connect("http://127.0.0.1:9")
    with pytest.raises(UserError, match="look whether the cluster runs"):
        load_index(model, [corpus], "never", nowhere)
    nowhere.close()


@pytest.mark.parametrize("name", ["Upper", "a b", "_x", "a/b", ""])
def test_names_that_no_index_can_have_are_refused(ours, name):
    with pytest.raises(UserError, match="index names are lower case"):
        ours.exists(name)
