import itertools

import pytest

from soju.core.errors import UserError
from soju.search.hits import reciprocal_rank_fusion


def test_values_worked_by_hand():
    fused = dict(reciprocal_rank_fusion([["a", "b"], ["b", "c"]]))
    assert fused == pytest.approx({"a": 1 / 61, "b": 1 / 62 + 1 / 61, "c": 1 / 62})


def test_what_two_systems_find_comes_first():
    assert [document for document, _ in reciprocal_rank_fusion([[1, 2, 3], [4, 3, 5]])] == [3, 1, 4, 2, 5]


def test_ties_go_to_the_earlier_system():
    assert [document for document, _ in reciprocal_rank_fusion([["a", "x"], ["b", "y"]])] == ["a", "b", "x", "y"]


def test_scores_do_not_depend_on_the_order_of_the_systems():
    rankings = [list("abcdef"), list("fbdace"), list("cfab")]
    scores = {tuple(sorted(reciprocal_rank_fusion(list(order)))) for order in itertools.permutations(rankings)}
    assert len(scores) == 1


def test_a_small_k_trusts_the_first_ranks_more():
    rankings = [["a", "b"], ["c", "b"], ["d", "x", "y"]]
    assert reciprocal_rank_fusion(rankings, k=60)[0][0] == "b"
    assert reciprocal_rank_fusion([["a", "x", "b"], ["c", "y", "b"]], k=1)[0][0] == "a"


def test_limit_cuts_and_empty_rankings_add_nothing():
    assert len(reciprocal_rank_fusion([["a", "b", "c"], []], limit=2)) == 2
    assert reciprocal_rank_fusion([[], []]) == []
    assert reciprocal_rank_fusion([]) == []


def test_unusable_input_is_refused():
    with pytest.raises(UserError, match="ranking 2 holds a document twice"):
        reciprocal_rank_fusion([["a"], ["b", "b"]])
    with pytest.raises(UserError, match="k: got 0"):
        reciprocal_rank_fusion([["a"]], k=0)
    with pytest.raises(UserError, match="limit: got 0"):
        reciprocal_rank_fusion([["a"]], limit=0)
