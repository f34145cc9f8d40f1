import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from soju.core.errors import UserError
from soju.search.opensearch import (
    OpenSearchSettings,
    SeismicIndex,
    lint_name,
    lint_names,
    lint_passage,
    lint_settings,
    refuse,
)
from soju.search.remote import CorpusFacts, Passage, escape_token, token_names, unescape_token


def facts(terms=100, ceiling=3.0):
    return CorpusFacts("model", "as_is", documents=1, passages=1, terms=terms, ceiling=ceiling)


def passage(weights, name="1"):
    terms = np.arange(len(weights), dtype=np.int32)
    return Passage(name, name, 0, "text", 0, 4, terms, np.array(weights, np.float32))


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("서버", None),
        ("", "is empty"),
        ("v1.5", "dot"),
        ("a\x00b", "control"),
        ("a\x85b", "control"),
        ("가" * 10_922, None),
        ("가" * 10_923, "longer than 32,766 bytes"),
    ],
)
def test_names_that_the_field_refuses_are_told(name, fault):
    found = lint_name(name)
    assert (found is None) if fault is None else fault in found


@given(st.text(max_size=50))
def test_an_escaped_name_passes_and_comes_back(name):
    assert lint_name(escape_token(name)) is None
    assert unescape_token(escape_token(name)) == name
    assert len(escape_token(name).split()) == 1


@given(st.lists(st.text(max_size=3), unique=True))
def test_different_names_stay_different(names):
    assert len({escape_token(name) for name in names}) == len(names)


def test_every_bad_name_and_every_double_one_is_listed():
    faults = lint_names(["a", "b.c", "a", "", "a"])
    assert len(faults) == 3
    assert "token 1: 'b.c' holds a dot" in faults[0]
    assert faults[2] == "token 'a' is given 3 times"


def test_readable_names_are_taken_unless_two_are_alike():
    assert token_names(("a b", "c"), ("x", "y")) == ("a%20b", "c")
    assert token_names(("a", "a"), ("▁a", "a")) == ("▁a", "a")
    with pytest.raises(UserError, match="spelled alike"):
        token_names(("a", "a"), ("b", "b"))


def test_ids_that_would_be_folded_and_weights_that_would_be_cut_are_told():
    seismic = OpenSearchSettings(kind="sparse_vector")
    assert lint_settings(seismic, facts(terms=65_536)) == []
    (fault,) = lint_settings(seismic, facts(terms=65_537))
    assert "folds ids above 65,535" in fault
    assert "soju trim" in fault
    assert lint_settings(OpenSearchSettings(), facts(terms=250_002)) == []
    for ceiling, count in ((3.0, 0), (2.9, 1)):
        settings = OpenSearchSettings(kind="sparse_vector", seismic=SeismicIndex(ceiling_ingest=ceiling))
        assert len(lint_settings(settings, facts(ceiling=3.0))) == count


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf"), 1e-39])
def test_weights_that_are_not_positive_normal_numbers_are_told(weight):
    assert lint_passage(passage([1.0, weight])) == "a weight is not a positive normal number"
    assert lint_passage(passage([1.0])) is None
    assert lint_passage(passage([])) is None


def test_an_id_has_at_most_512_bytes():
    assert lint_passage(passage([1.0], name="가" * 170)) is None
    assert "513 bytes" in lint_passage(passage([1.0], name="가" * 171))


def test_the_first_faults_are_shown_and_the_rest_counted():
    refuse([])
    with pytest.raises(UserError, match=r"^a\nb\n\.\.\. and 1 more$"):
        refuse(["a", "b", "c"], shown=2)
