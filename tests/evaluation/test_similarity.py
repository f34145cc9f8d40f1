import numpy as np
import pytest
import torch
from scipy import stats

from soju.core.errors import UserError
from soju.data.rows import SimilarityPair
from soju.evaluation.significance import Measurement, compare
from soju.evaluation.similarity import (
    compare_similarity,
    correlation,
    cosines_of,
    evaluate_similarity,
    resampled_correlations,
)

GRADES = [0.0, 1.0, 2.0, 5.0]
PAIRS = [SimilarityPair(f"하나 {number}", f"둘 {number}", grade) for number, grade in enumerate(GRADES)]


def measured(cosines, *, subject="S1", pairs=PAIRS, samples=200, **decisive):
    return evaluate_similarity(cosines, pairs, subject=subject, test_set="tiny", samples=samples, **decisive)[0]


def many_pairs(count, seed):
    generator = np.random.default_rng(seed)
    grades = np.round(generator.uniform(0, 5, count), 1)  # one decimal, as in KorSTS: many ties
    cosines = 0.1 * grades + generator.normal(0, 0.2, count)
    return [SimilarityPair(f"a{n}", f"b{n}", grade) for n, grade in enumerate(grades)], cosines


def test_cosines_are_those_of_equal_rows():
    cosines = cosines_of([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]], [[6.0, 8.0], [0.0, 2.0], [1.0, 1.0]])
    np.testing.assert_allclose(cosines, [1.0, 0.0, 0.0])


def test_one_exchanged_neighbour_costs_six_times_two_over_sixty():
    # 1 - 6 * sum(d ** 2) / (n * (n ** 2 - 1)) with rank differences 0, 1, -1, 0
    assert correlation([0.1, 0.3, 0.2, 0.9], GRADES) == pytest.approx(1 - 6 * 2 / 60)


def test_equal_values_share_the_mean_of_their_ranks():
    # Ranks 1, 2.5, 2.5, 4 beside 1, 2, 3, 4: covariance 4.5, spreads 4.5 and 5.
    assert correlation([0.1, 0.2, 0.2, 0.9], GRADES) == pytest.approx(4.5 / np.sqrt(4.5 * 5))


@pytest.mark.parametrize("seed", range(5))
def test_both_correlations_are_those_of_scipy(seed):
    pairs, cosines = many_pairs(60, seed)
    cosines = np.round(cosines, 1)
    grades = [pair.score for pair in pairs]
    assert correlation(cosines, grades, "spearman") == pytest.approx(stats.spearmanr(cosines, grades).statistic)
    assert correlation(cosines, grades, "pearson") == pytest.approx(stats.pearsonr(cosines, grades).statistic)


@pytest.mark.parametrize("metric", ["spearman", "pearson"])
def test_a_draw_is_correlated_as_if_its_pairs_were_written_out(metric):
    pairs, cosines = many_pairs(30, 1)
    grades = np.array([pair.score for pair in pairs])
    drawn = np.random.default_rng(4).integers(0, 30, size=(50, 30))  # the generator's own order of draws
    (ours,) = resampled_correlations([cosines], grades, metric, samples=50, seed=4)
    other = stats.spearmanr if metric == "spearman" else stats.pearsonr
    np.testing.assert_allclose(ours, [other(cosines[row], grades[row]).statistic for row in drawn])


def test_the_interval_is_that_of_scipys_bootstrap():
    pairs, cosines = many_pairs(200, 2)
    grades = [pair.score for pair in pairs]
    interval = measured(cosines, pairs=pairs, samples=4_000).score.interval
    theirs = stats.bootstrap(
        (cosines, grades),
        lambda a, b: stats.spearmanr(a, b).statistic,
        paired=True,
        vectorized=False,
        n_resamples=1_000,
        method="percentile",
        rng=3,
    ).confidence_interval
    assert (interval.low, interval.high) == pytest.approx((theirs.low, theirs.high), abs=0.015)


def test_it_is_the_number_of_sentence_transformers():
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

    pairs, _ = many_pairs(40, 3)
    generator = np.random.default_rng(0)
    vectors = {text: generator.normal(size=8) for pair in pairs for text in (pair.first, pair.second)}

    class Looked(SentenceTransformer):
        def __init__(self):
            super().__init__(modules=[torch.nn.Identity()], device="cpu")

        def encode(self, texts, **_):
            return np.array([vectors[text] for text in texts])

    first, second = [pair.first for pair in pairs], [pair.second for pair in pairs]
    evaluator = EmbeddingSimilarityEvaluator(
        first, second, [pair.score / 5 for pair in pairs], main_similarity="cosine", write_csv=False
    )
    theirs = evaluator(Looked())
    cosines = cosines_of([vectors[text] for text in first], [vectors[text] for text in second])
    ours = {item.metric: item.score.value for item in evaluate_similarity(cosines, pairs, subject="x", test_set="y")}
    assert ours["spearman"] == pytest.approx(theirs["spearman_cosine"])
    assert ours["pearson"] == pytest.approx(theirs["pearson_cosine"])


def test_the_signature_names_metric_data_and_setting_and_not_the_system():
    ours, other = measured(GRADES, prompt="none", pooling="mean"), measured(GRADES, subject="BASE", prompt="query: ")
    assert "metric:spearman" in ours.score.signature
    assert "pooling:mean|prompt:none" in ours.score.signature
    assert "S1" not in ours.score.signature
    with pytest.raises(UserError, match="not measured alike"):
        compare_similarity(ours, other)


def test_other_scores_of_the_same_texts_are_other_data():
    changed = [*PAIRS[:3], SimilarityPair(PAIRS[3].first, PAIRS[3].second, 4.0)]
    assert measured(GRADES).score.signature != measured(GRADES, pairs=changed).score.signature


def test_equal_systems_differ_by_nothing():
    result = compare_similarity(measured(GRADES), measured(GRADES, subject="BASE"), samples=100)
    assert (result.difference, result.p_value) == (0.0, 1.0)
    assert (result.interval.low, result.interval.high) == (0.0, 0.0)


def test_systems_are_compared_on_the_same_draws():
    pairs, cosines = many_pairs(300, 5)
    noise = np.random.default_rng(6).normal(0, 0.02, 300)
    near = compare_similarity(measured(cosines, pairs=pairs), measured(cosines + noise, pairs=pairs), samples=500)
    alone = measured(cosines, pairs=pairs).score.interval
    assert near.interval.high - near.interval.low < 0.3 * (alone.high - alone.low)


def test_a_much_better_system_is_told_from_a_worse_one_and_swapping_turns_the_sign():
    pairs, cosines = many_pairs(200, 7)
    good = measured(cosines, pairs=pairs)
    bad = measured(np.random.default_rng(8).normal(size=200), pairs=pairs, subject="BASE")
    there, back = compare_similarity(good, bad, samples=199), compare_similarity(bad, good, samples=199)
    assert there.p_value == pytest.approx(1 / 200)
    assert there.interval.low > 0
    assert there.difference == pytest.approx(-back.difference)


def test_pearson_of_standardised_values_judges_like_a_mean():
    """For fixed grades, the bootstrap of Pearson is close to that of the mean product of standardised values."""
    pairs, cosines = many_pairs(2_000, 9)
    grades = np.array([pair.score for pair in pairs])
    (draws,) = resampled_correlations([cosines], grades, "pearson", samples=500, seed=0)
    r = stats.pearsonr(cosines, grades).statistic
    assert draws.std() == pytest.approx((1 - r**2) / np.sqrt(2_000), rel=0.25)  # the delta method


@pytest.mark.parametrize(
    ("cosines", "pairs", "what"),
    [
        ([0.1, 0.2, np.nan, 0.4], PAIRS, "tiny: S1: value 2 is not finite"),
        ([0.5] * 4, PAIRS, "every value is 0.5"),
        ([0.1, 0.2], [SimilarityPair("a", "b", 3.0)] * 2, "every grade is 3"),
        ([0.1], PAIRS[:1], "two or more"),
    ],
)
def test_what_cannot_be_correlated_is_refused(cosines, pairs, what):
    with pytest.raises(UserError, match=what):
        measured(cosines, pairs=pairs)


def test_no_interval_is_drawn_when_none_is_asked_for():
    assert measured(GRADES, samples=0).score.interval is None


def test_the_shared_judgement_still_serves_means():
    ones = Measurement(measured(GRADES).score, np.array([1.0, 0.0, 1.0]))
    zeros = Measurement(measured(GRADES, subject="BASE").score, np.array([0.0, 0.0, 1.0]))
    assert compare(ones, zeros, samples=50).difference == pytest.approx(1 / 3)
