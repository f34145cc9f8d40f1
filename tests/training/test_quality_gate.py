"""The gate: thresholds worked by hand, directions from the scores, and what it refuses to compare."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soju.core.config import validate
from soju.core.errors import ConfigError, UserError
from soju.core.results import Score
from soju.training.gate import QualityGate, Threshold

NAN, INF = float("nan"), float("inf")


def score(value, *, name="recall@10", test_set="mkqa/ko-en", higher=True, signature="k:10"):
    return Score(name, "student", test_set, value, "fraction", higher, signature)


def judge(value, baseline=None, *, higher=True, **threshold):
    gate = QualityGate([Threshold(metric="recall@10", **threshold)])
    return gate.judge([score(value, higher=higher)], [] if baseline is None else [score(baseline, higher=higher)])


@pytest.mark.parametrize(
    ("value", "baseline", "higher", "threshold", "reason"),
    [
        (0.80, None, True, {"worst": 0.8}, None),
        (0.79, None, True, {"worst": 0.8}, "recall@10 on mkqa/ko-en is 0.79, below 0.8"),
        (31.0, None, False, {"worst": 30.0}, "recall@10 on mkqa/ko-en is 31, above 30"),
        (30.0, None, False, {"worst": 30.0}, None),
        (0.80, 0.90, True, {"max_drop": 0.1}, None),
        (0.79, 0.90, True, {"max_drop": 0.1}, "went from 0.9 to 0.79, a loss of 0.11 where 0.1 is allowed"),
        (0.99, 0.90, True, {"max_drop": 0.0}, None),
        (35.0, 30.0, False, {"max_drop": 4.0}, "went from 30 to 35, a loss of 5 where 4 is allowed"),
        (25.0, 30.0, False, {"max_drop": 0.0}, None),
        (0.45, 0.50, True, {"max_relative_drop": 0.1}, None),
        (0.44, 0.50, True, {"max_relative_drop": 0.1}, "a loss of 12.00% where 10.00% is allowed"),
        (0.0, 0.0, True, {"max_relative_drop": 0.1}, None),
        (-0.1, 0.0, True, {"max_relative_drop": 0.1}, "a loss of inf%"),
        (NAN, None, True, {"worst": 0.0}, "is nan"),
        (NAN, 0.5, True, {"max_drop": 1.0}, "is nan"),
        (INF, None, True, {"worst": 0.0}, "is inf"),
        (-INF, None, False, {"worst": 0.0}, "is -inf"),
    ],
)
def test_one_threshold(value, baseline, higher, threshold, reason):
    verdict = judge(value, baseline, higher=higher, **threshold)
    assert verdict.passed == (reason is None)
    if reason:
        assert len(verdict.reasons) == 1
        assert reason in verdict.reasons[0]


def test_every_threshold_that_is_missed_is_a_reason():
    verdict = judge(0.4, 0.9, worst=0.5, max_drop=0.1, max_relative_drop=0.1)
    assert len(verdict.reasons) == 3
    assert json.loads(json.dumps(verdict.to_json())) == {"passed": False, "reasons": list(verdict.reasons)}


def test_a_threshold_without_test_set_holds_on_every_one():
    gate = QualityGate([Threshold(metric="recall@10", worst=0.5)])
    verdict = gate.judge([score(0.6), score(0.4, test_set="parallel.dev/ko-en"), score(0.1, name="mrr@10")])
    assert verdict.reasons == ("recall@10 on parallel.dev/ko-en is 0.4, below 0.5",)


def test_a_threshold_with_test_set_holds_there_only():
    gate = QualityGate([Threshold(metric="recall@10", test_set="mkqa/ko-en", worst=0.5)])
    assert gate.judge([score(0.6), score(0.4, test_set="parallel.dev/ko-en")]).passed


def test_a_gate_without_thresholds_passes():
    assert QualityGate([]).judge([score(0.0)]).passed


@pytest.mark.parametrize(
    ("scores", "baseline", "message"),
    [
        ([score(0.5)], [score(0.5, signature="k:100")], "was measured as k:10, the baseline as k:100"),
        ([score(0.5)], [score(0.5, higher=False)], "measure both in the same way"),
        (
            [score(0.5)],
            [score(0.5, test_set="dev")],
            "the baseline has no recall@10 on mkqa/ko-en, only recall@10 on dev",
        ),
        ([score(0.5)], [], "only none"),
        ([score(0.5)], [score(NAN)], "the baseline's recall@10 on mkqa/ko-en is nan"),
        ([score(0.5, name="mrr@10")], [score(0.5)], "no score recall@10 to judge, only mrr@10 on mkqa/ko-en"),
        ([], [score(0.5)], "to judge, only none"),
        ([score(0.5), score(0.6)], [score(0.5)], "the scores hold recall@10 on mkqa/ko-en twice"),
        ([score(0.5)], [score(0.5), score(0.5)], "the baseline hold"),
    ],
)
def test_what_cannot_be_compared_is_refused(scores, baseline, message):
    with pytest.raises(UserError) as caught:
        QualityGate([Threshold(metric="recall@10", max_drop=0.1)]).judge(scores, baseline)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "values", [{"metric": "a"}, {"metric": "a", "max_drop": -0.1}, {"metric": "a", "worst": 0, "wurst": 1}]
)
def test_a_threshold_that_says_nothing_or_something_else_is_refused(values):
    with pytest.raises(ConfigError):
        validate(values, Threshold, place="x.yaml")


@given(value=st.floats(-1, 1), baseline=st.floats(-1, 1), drop=st.floats(0, 1), higher=st.booleans())
def test_turning_the_direction_and_the_sign_changes_nothing(value, baseline, drop, higher):
    one = judge(value, baseline, higher=higher, max_drop=drop)
    other = judge(-value, -baseline, higher=not higher, max_drop=drop)
    assert one.passed == other.passed


@given(value=st.floats(0, 1), baseline=st.floats(0, 1), drop=st.floats(0, 1), better=st.floats(0, 1))
def test_a_better_score_never_fails_where_a_worse_one_passed(value, baseline, drop, better):
    if judge(value, baseline, max_drop=drop).passed:
        assert judge(max(value, better), baseline, max_drop=drop).passed
