import itertools
import json

import numpy as np
import pytest
from scipy import stats

from soju.core.errors import UserError
from soju.core.results import Comparison, Score, signature
from soju.evaluation.significance import Measurement, compare, mean_interval, resampled_means


def measured(values, *, subject="ours", metric="recall@10"):
    values = np.asarray(values, dtype=float)
    score = Score(metric, subject, "tiny", values.mean(), "fraction", True, signature(metric=metric))
    return Measurement(score, values)


def test_p_value_and_interval_are_those_of_exact_enumeration():
    differences = np.array([0.5, -0.25, 0.75, 0.25])
    means = np.array([np.mean(draw) for draw in itertools.product(differences, repeat=4)])  # all 256 draws
    exact_p = np.mean(np.abs(means - differences.mean()) >= differences.mean() - 1e-12)
    result = compare(measured(differences), measured(np.zeros(4), subject="bm25"), samples=50_000)
    assert result.difference == pytest.approx(0.3125)
    assert result.p_value == pytest.approx(exact_p, abs=0.01)
    low, high = np.quantile(means, [0.025, 0.975])
    assert (result.interval.low, result.interval.high) == pytest.approx((low, high), abs=0.07)  # steps are 1/16


def test_interval_is_that_of_scipy():
    values = np.random.default_rng(1).beta(0.5, 0.5, size=200)
    ours = mean_interval(values, samples=20_000, seed=3)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=4).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.003)
    assert ours.level == 0.95


def test_p_value_is_near_that_of_the_paired_t_test_for_many_queries():
    generator = np.random.default_rng(5)
    ours, theirs = generator.normal(0.1, 1, 400), generator.normal(0, 1, 400)
    result = compare(measured(ours), measured(theirs), samples=20_000)
    assert result.p_value == pytest.approx(stats.ttest_rel(ours, theirs).pvalue, abs=0.02)


def test_equal_systems_differ_by_nothing():
    result = compare(measured([0.1, 0.7, 0.2]), measured([0.1, 0.7, 0.2]))
    assert (result.difference, result.p_value) == (0.0, 1.0)
    assert (result.interval.low, result.interval.high) == (0.0, 0.0)


def test_the_p_value_is_never_zero():
    values = 1 + np.random.default_rng(0).normal(0, 0.01, 50)
    assert compare(measured(values), measured(np.zeros(50)), samples=99).p_value == pytest.approx(1 / 100)


def test_swapping_the_systems_turns_the_sign_and_keeps_the_p_value():
    a, b = measured([0.2, 0.9, 0.4, 0.4]), measured([0.1, 0.5, 0.6, 0.2])
    there, back = compare(a, b), compare(b, a)
    assert there.difference == pytest.approx(-back.difference)
    assert there.p_value == back.p_value
    assert there.interval.low == pytest.approx(-back.interval.high)


def test_the_same_seed_gives_the_same_result_and_another_seed_another():
    values = np.arange(10.0)
    first = resampled_means(values, samples=100, seed=1)
    np.testing.assert_array_equal(first, resampled_means(values, samples=100, seed=1))
    assert not np.array_equal(first, resampled_means(values, samples=100, seed=2))


def test_large_samples_are_drawn_in_blocks():
    means = resampled_means(np.ones(3_000_000), samples=3, seed=0)
    np.testing.assert_array_equal(means, [1.0, 1.0, 1.0])


def test_a_comparison_survives_json():
    result = compare(measured([1, 0, 1]), measured([0, 0, 1], subject="bm25"))
    assert (result.subject, result.baseline, result.test_set, result.metric) == ("ours", "bm25", "tiny", "recall@10")
    assert Comparison.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_scores_that_were_not_measured_alike_are_refused():
    with pytest.raises(UserError, match="not measured alike"):
        compare(measured([1, 0]), measured([1, 0], metric="mrr@10"))


def test_unequal_numbers_of_queries_are_refused():
    with pytest.raises(UserError, match="3 queries"):
        compare(measured([1, 0, 1]), measured([1, 0]))


@pytest.mark.parametrize("values", [[], [1.0], [[1.0, 2.0], [3.0, 4.0]]])
def test_fewer_than_two_queries_are_refused(values):
    with pytest.raises(UserError, match="at least two queries"):
        mean_interval(values)


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="value 1 is not finite"):
        mean_interval([0.0, float("nan"), 1.0])


def test_impossible_settings_are_refused():
    with pytest.raises(UserError, match="samples: got 0"):
        mean_interval([0.0, 1.0], samples=0)
    with pytest.raises(UserError, match="level: got 95"):
        mean_interval([0.0, 1.0], level=95)
