import math

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from soju.core.errors import UserError
from soju.evaluation.retrieval import METRICS, RetrievalSet, evaluate

QUERIES = {"q1": "당뇨병", "q2": "고혈압"}
DOCUMENTS = {"d1": "diabetes", "d2": "hypertension", "d3": "insulin", "d4": "soju"}
JUDGEMENTS = {"q1": {"d1": 2, "d3": 1}, "q2": {"d2"}}


def make_set(**changes):
    return RetrievalSet.create(
        "tiny", **{"queries": QUERIES, "documents": DOCUMENTS, "judgements": JUDGEMENTS, **changes}
    )


def value_of(result, metric):
    return result.measurement(metric).score.value


def test_values_worked_by_hand():
    run = {"q1": ["d4", "d1", "d3"], "q2": ["d2", "d1"]}
    result = evaluate(run, make_set(), subject="hand", metrics=["ndcg@10", "mrr@10", "recall@1", "recall@2"])
    # q1: gains 0, 2, 1 at ranks 1, 2, 3; best possible 2, 1.
    ndcg = (2 / math.log2(3) + 1 / 2) / (2 + 1 / math.log2(3))
    np.testing.assert_allclose(result.measurement("ndcg@10").values, [ndcg, 1.0])
    np.testing.assert_allclose(result.measurement("mrr@10").values, [1 / 2, 1.0])
    np.testing.assert_allclose(result.measurement("recall@1").values, [0.0, 1.0])
    np.testing.assert_allclose(result.measurement("recall@2").values, [1 / 2, 1.0])
    assert value_of(result, "recall@2") == 0.75


def test_the_cut_off_ends_the_ranking():
    run = {"q1": ["d4", "d2", "d1"], "q2": ["d4", "d2"]}
    result = evaluate(run, make_set(), subject="hand", metrics=["mrr@2", "ndcg@1"])
    assert value_of(result, "mrr@2") == 0.25
    assert value_of(result, "ndcg@1") == 0.0


@pytest.mark.parametrize("k", [1, 3, 10])
def test_ndcg_is_that_of_scikit_learn(k):
    generator = np.random.default_rng(7)
    gains = generator.integers(0, 4, size=(20, 30))
    gains[:, 0] = 1
    scores = generator.permuted(np.tile(np.arange(30.0), (20, 1)), axis=1)
    test_set = RetrievalSet.create(
        "random",
        {str(q): "" for q in range(20)},
        {str(d): "" for d in range(30)},
        {str(q): {str(d): int(g) for d, g in enumerate(row) if g} for q, row in enumerate(gains)},
    )
    run = test_set.run_of([np.argsort(-row) for row in scores])
    ours = value_of(evaluate(run, test_set, subject="random", metrics=[f"ndcg@{k}"]), f"ndcg@{k}")
    assert ours == pytest.approx(ndcg_score(gains, scores, k=k))


def test_a_query_missing_from_the_run_scores_zero_and_is_counted():
    result = evaluate({"q2": ["d2"]}, make_set(), subject="half")
    assert result.missing == 1
    assert [score.value for score in result.scores] == [0.5] * len(METRICS)


def test_an_empty_ranking_scores_zero_but_is_not_missing():
    result = evaluate({"q1": [], "q2": ["d2"]}, make_set(), subject="half")
    assert result.missing == 0
    assert value_of(result, "recall@10") == 0.5


def test_pairs_are_answered_by_their_own_index():
    test_set = RetrievalSet.from_pairs("pairs", ["하나", "둘"], ["one", "two"])
    result = evaluate(test_set.run_of([np.array([0, 1]), np.array([0, 1])]), test_set, subject="first")
    np.testing.assert_allclose(result.measurement("mrr@10").values, [1.0, 0.5])


def test_scores_say_what_they_are():
    score = evaluate({"q1": ["d1"], "q2": ["d2"]}, make_set(), subject="bm25").scores[0]
    assert (score.name, score.subject, score.test_set, score.unit) == ("ndcg@10", "bm25", "tiny", "fraction")
    assert score.higher_is_better
    assert score.interval is not None
    assert score.interval.low <= score.value <= score.interval.high
    for part in ("metric:ndcg@10", "k:10", "queries:2", "documents:4", "ties:as-ranked", "gain:linear"):
        assert part in score.signature


def test_the_signature_depends_on_the_data_and_not_on_the_system():
    run = {"q1": ["d1"], "q2": ["d2"]}
    first = evaluate(run, make_set(), subject="a").scores[0]
    same = evaluate({}, make_set(), subject="b").scores[0]
    assert first.signature == same.signature
    others = [
        make_set(queries={**QUERIES, "q1": "당뇨"}),
        make_set(documents={**DOCUMENTS, "d4": "beer"}),
        make_set(judgements={"q1": {"d1": 1, "d3": 1}, "q2": {"d2"}}),
    ]
    signatures = {evaluate(run, other, subject="a").scores[0].signature for other in others}
    assert len(signatures | {first.signature}) == 4


def test_a_single_query_has_no_interval():
    test_set = RetrievalSet.from_pairs("one", ["q"], ["d"])
    assert evaluate({"0": ["0"]}, test_set, subject="a").scores[0].interval is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": {}, "judgements": {}}, "no query"),
        ({"judgements": {"q1": {"d1"}}}, '"q2" has no relevant document'),
        ({"judgements": {"q1": {"d1"}, "q2": {}}}, '"q2" has no relevant document'),
        ({"judgements": {**JUDGEMENTS, "q9": {"d1"}}}, '"q9" is judged but not among the queries'),
        ({"judgements": {"q1": {"d9"}, "q2": {"d2"}}}, '"d9" is judged but not among the documents'),
        ({"judgements": {"q1": {"d1": 0}, "q2": {"d2"}}}, "gain 0; give 1 or more"),
        ({"judgements": {"q1": {"d1": float("nan")}, "q2": {"d2"}}}, "gain nan"),
    ],
)
def test_an_unusable_test_set_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        make_set(**changes)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"q1": ["d1", "d2", "d1"]}, '"q1": ranks "d1" twice'),
        ({"q1": ["d9"]}, 'ranks "d9", which is no document'),
        ({"q9": ["d1"]}, '"q9": in the run but not in the test set'),
    ],
)
def test_an_impossible_run_is_refused(run, message):
    with pytest.raises(UserError, match=message):
        evaluate(run, make_set(), subject="bad")


@pytest.mark.parametrize("metric", ["ndcg", "map@10", "recall@0", "recall@-1", "mrr@x"])
def test_an_unknown_metric_is_refused(metric):
    with pytest.raises(UserError, match="ndcg@k, mrr@k, recall@k"):
        evaluate({}, make_set(), subject="bad", metrics=[metric])


def test_positions_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="1 rankings for 2 queries"):
        make_set().run_of([[0]])
    with pytest.raises(UserError, match="no document at position 4"):
        make_set().run_of([[0], [4]])
    with pytest.raises(UserError, match="2 queries and 1 documents"):
        RetrievalSet.from_pairs("bad", ["a", "b"], ["c"])
    with pytest.raises(UserError, match="was not measured"):
        evaluate({}, make_set(), subject="a").measurement("recall@7")
