from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soju.core.errors import UserError
from soju.translation.degradation import (
    Adjustment,
    DegradationSettings,
    QualityDegradationDetector,
    Validation,
    best_of,
)

DETECTOR = QualityDegradationDetector()
SURE = {"ko-en": -0.01, "en-ko": -0.01}
UNSURE = {"ko-en": 0.01, "en-ko": 0.01}


def history(*values, rejected=()):
    """Validations each 1,000 steps; one number is the quality of both directions."""
    pairs = [value if isinstance(value, tuple) else (value, value) for value in values]
    return [
        Validation(1_000 * number, {"ko-en": ko, "en-ko": en}, number not in rejected)
        for number, (ko, en) in enumerate(pairs)
    ]


def test_the_first_validation_is_accepted():
    judgement = DETECTOR.judge(history(0.1))
    assert (judgement.action, judgement.best, judgement.adjustment) == ("accept", 0, Adjustment())


def test_quality_that_rises_is_the_new_best():
    assert DETECTOR.judge(history(0.1, 0.4, 0.5), SURE).best == 2_000


def test_a_regression_is_more_than_the_drop_and_more_than_chance():
    fallen = history(0.5, 0.8, 0.75)  # 6.25 % below
    assert DETECTOR.judge(fallen, SURE).action == "roll back"
    assert DETECTOR.judge(fallen, UNSURE).action == "accept"
    assert DETECTOR.judge(history(0.5, 0.8, 0.77), SURE).action == "accept"  # 3.75 % below
    assert DETECTOR.judge(history(0.5, 0.8, 0.76), SURE).action == "accept"  # exactly 5 %


def test_one_direction_is_enough_and_is_named():
    judgement = DETECTOR.judge(history(0.1, 0.5, (0.9, 0.4)), {"ko-en": 0.5, "en-ko": -0.02})
    assert judgement.action == "roll back"
    assert judgement.best == 1_000
    assert judgement.reasons == (
        "en-ko: quality 0.4000 at step 2,000 is 20.0% below 0.5000 at step 1,000, "
        "and the difference is at most -0.0200",
    )
    assert DETECTOR.judge(history(0.1, 0.5, (0.9, 0.4)), {"ko-en": -0.5, "en-ko": 0.02}).action == "accept"


def test_it_is_compared_with_the_best_accepted_validation_and_not_the_last():
    slowly = history(0.5, 0.8, 0.775, 0.75)
    judgement = DETECTOR.judge(slowly, SURE)
    assert (judgement.action, judgement.best) == ("roll back", 1_000)
    rejected = history(0.5, 0.6, 0.9, 0.59, rejected={2})
    assert DETECTOR.judge(rejected, SURE).action == "accept"
    assert best_of(rejected).clock == 1_000


def test_what_is_not_finite_always_goes_back():
    judgement = DETECTOR.judge(history(0.1, 0.5, math.nan), UNSURE)
    assert judgement.action == "roll back"
    assert "quality at step 2,000 is nan" in judgement.reasons[0]
    assert DETECTOR.judge(history(0.1, 0.5, 0.2), {"ko-en": math.nan, "en-ko": math.nan}).action == "roll back"
    assert DETECTOR.judge(history(math.nan)).action == "stop"


def test_learning_rate_and_seed_change_in_turn_and_the_fourth_regression_stops():
    fallen = history(0.5, 0.8, 0.4)
    seen = [DETECTOR.judge(fallen, SURE, rollbacks=done) for done in range(4)]
    assert [judgement.action for judgement in seen] == ["roll back"] * 3 + ["stop"]
    assert [(j.adjustment.learning_rate_factor, j.adjustment.seed_offset) for j in seen] == [
        (0.5, 0),
        (0.5, 1),
        (0.25, 1),
        (0.25, 1),
    ]
    assert DETECTOR.judge(history(0.5, 0.8), SURE, rollbacks=2).adjustment == Adjustment(0.5, 1)
    none = QualityDegradationDetector(DegradationSettings(max_rollbacks=0))
    assert none.judge(fallen, SURE).action == "stop"


def test_a_falling_trend_only_warns():
    judgement = DETECTOR.judge(history(0.1, 0.80, 0.795, 0.79, 0.785), UNSURE)
    assert judgement.action == "accept"
    assert judgement.warnings[0] == "ko-en: quality falls by 0.0050 in 1,000 steps since the best"
    assert DETECTOR.judge(history(0.1, 0.80, 0.795, 0.79), UNSURE).warnings == ()  # three points are no trend
    assert DETECTOR.judge(history(0.1, 0.80, 0.79, 0.799, 0.79, 0.798), UNSURE).warnings == ()
    assert DETECTOR.judge(history(0.1, 0.2, 0.3, 0.4, 0.5), UNSURE).warnings == ()


@given(
    st.lists(st.floats(0.01, 1), min_size=1, max_size=6),
    st.floats(0.01, 1),
    st.floats(-1, 1).filter(lambda value: abs(value) > 1e-6),
)
def test_the_rule_is_the_conjunction_of_both_conditions(earlier, now, upper):
    entries = history(*earlier, now)
    judgement = DETECTOR.judge(entries, {"ko-en": upper, "en-ko": upper})
    best = max(earlier)
    if abs(now - 0.95 * best) > 1e-9:
        assert (judgement.action == "roll back") == (now < 0.95 * best and upper < 0)
    assert judgement.action in ("accept", "roll back")
    if judgement.action == "accept":
        assert max(entries, key=lambda entry: entry.mean).mean == entries[judgement.best // 1_000].mean
    json.dumps(judgement.to_json(), allow_nan=False)


def test_other_directions_and_no_history_are_refused():
    with pytest.raises(UserError, match="validate first"):
        DETECTOR.judge([])
    with pytest.raises(UserError, match="measure the same ones"):
        DETECTOR.judge(history(0.1, 0.2))
    with pytest.raises(UserError, match="measure the same ones"):
        DETECTOR.judge([*history(0.1), Validation(1_000, {"ko-en": 0.2})], {"ko-en": 0.1})
    with pytest.raises(UserError, match="validate the untrained student"):
        best_of(history(0.1, rejected={0}))


def test_a_fall_from_less_than_the_smallest_quality_that_counts_is_no_regression():
    detector = QualityDegradationDetector()
    ends = {"ko-en": -0.01}
    falls = [Validation(0, {"ko-en": 0.0249}), Validation(1_000, {"ko-en": 0.001})]
    assert detector.judge(falls, ends).action == "accept"
    falls = [Validation(0, {"ko-en": 0.0501}), Validation(1_000, {"ko-en": 0.001})]
    assert detector.judge(falls, ends).action == "roll back"
