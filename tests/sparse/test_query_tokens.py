import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array

from soju.core.errors import UserError
from soju.search.remote import escape_token, unescape_token
from soju.sparse.export.formats import query_tokens, write_token_table
from soju.sparse.export.vectors import query_body

TERMS = ["서버", "server", "v1.5", ""]
VECTORS = csr_array(np.float32([[1.0, 0.5, 0.0, 0.0], [0.0, 0.0, 2.0, 1.0]]))
IDF = np.array([4.0, 2.0, 3.0, 1.0])


@pytest.mark.parametrize(
    ("name", "token"),
    [("서버", "서버"), ("v1.5", "v1%2E5"), ("", "%"), ("%", "%25"), ("%2E", "%252E"), ("a\tb", "a%09b"), ("…s", "…s")],
)
def test_names_are_escaped_as_documented(name, token):
    assert escape_token(name) == token
    assert unescape_token(token) == name


@given(st.text())
def test_every_name_comes_back_and_none_has_a_dot(name):
    token = escape_token(name)
    assert token
    assert "." not in token
    assert unescape_token(token) == name


@pytest.mark.parametrize("token", ["a.b", "", "%%", "%2e", "%41", "a%"])
def test_what_is_no_escaped_token_is_refused(token):
    with pytest.raises(UserError, match="no escaped token"):
        unescape_token(token)


def test_a_row_has_the_tokens_times_idf_heaviest_first():
    first, second = query_tokens(["1", "2"], ["서버", "v1.5"], VECTORS, TERMS, idf_V=IDF)
    assert first == {"id": "1", "text": "서버", "query_tokens": {"서버": 4.0, "server": 1.0}, "scale": 1.0}
    assert list(second["query_tokens"].items()) == [("v1%2E5", 6.0), ("%", 1.0)]


def test_a_query_above_the_bound_is_scaled_as_a_whole():
    row = next(query_tokens(["1"], ["x"], VECTORS[[0]], TERMS, max_weight=0.25))
    assert row["query_tokens"] == {"서버": 0.25, "server": 0.125}
    assert row["scale"] == 0.25


def test_weights_that_round_to_zero_are_left_out():
    tiny = csr_array(np.array([[1e-9, 1.0, 0.0, 0.0]]))
    assert next(query_tokens(["1"], ["x"], tiny, TERMS))["query_tokens"] == {"server": 1.0}


def test_a_query_without_terms_has_no_tokens():
    assert next(query_tokens(["1"], ["x"], csr_array((1, 4)), TERMS))["query_tokens"] == {}


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_negative_and_non_finite_weights_are_refused(bad):
    with pytest.raises(UserError, match="negative or not finite"):
        list(query_tokens(["1"], ["x"], csr_array(np.array([[bad, 0, 0, 0]])), TERMS))


def test_sizes_that_differ_are_refused():
    with pytest.raises(UserError, match="one of each a query"):
        list(query_tokens(["1"], ["x"], VECTORS, TERMS))
    with pytest.raises(UserError, match="one of each a term"):
        list(query_tokens(["1", "2"], ["x", "y"], VECTORS, TERMS[:2]))


@pytest.mark.parametrize("bound", [0.0, 65.0])
def test_a_bound_the_engines_do_not_take_is_refused(bound):
    with pytest.raises(UserError, match="max_weight"):
        list(query_tokens(["1", "2"], ["x", "y"], VECTORS, TERMS, max_weight=bound))


def test_adding_up_the_token_table_gives_the_query_vector(tmp_path):
    weights = csr_array(np.float32([[1, 0.5, 0], [0, 1, 0], [0, 0, 0]]))
    pieces = ["▁a▁", "▁b▁", "<unk>"]
    path = tmp_path / "tokens.jsonl"
    assert write_token_table(path, weights, pieces, ["a", "b", "?"], idf_V=np.array([2.0, 3.0, 1.0])) == 2
    table = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        table |= json.loads(line)
    assert table == {"▁a▁": {"a": 2.0, "b": 1.5}, "▁b▁": {"b": 3.0}}


def test_a_token_table_above_the_bound_is_refused_with_the_divisor(tmp_path):
    with pytest.raises(UserError, match="divide idf_V by 2"):
        write_token_table(tmp_path / "t", csr_array(np.eye(1)), ["a"], ["a"], idf_V=np.array([128.0]))


def test_bodies_have_the_shape_the_engines_document():
    assert query_body({"서버": 4.0}, field="tokens", size=3) == {
        "size": 3,
        "query": {"neural_sparse": {"tokens": {"query_tokens": {"서버": 4.0}}}},
    }
    assert query_body({"a": 1.0}, field="tokens", engine="elasticsearch")["query"] == {
        "sparse_vector": {"field": "tokens", "query_vector": {"a": 1.0}, "prune": False}
    }


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({}, "no token"),
        ({"a": 0.0}, "weights must lie"),
        ({"a": 65.0}, "weights must lie"),
        ({"a": float("nan")}, "weights must lie"),
        ({"a.b": 1.0}, "no escaped token"),
    ],
)
def test_a_search_body_the_engines_would_refuse_is_not_rendered(tokens, message):
    with pytest.raises(UserError, match=message):
        query_body(tokens, field="tokens")
