from __future__ import annotations

import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU, CHRF, TER

from soju.core.errors import UserError
from soju.evaluation.translation import QualityWeights, Tokens, measure
from soju.evaluation.translation_bootstrap import derangement, difference, estimate, resample, retention

WORDS = Tokens("words", str.split)
REFERENCES = [" ".join(random.Random(seed).choices("가나다라마바사아자", k=8)) for seed in range(60)]


def system(rate, *, seed):
    generator = random.Random(seed)
    texts = [" ".join("?" if generator.random() < rate else word for word in text.split()) for text in REFERENCES]
    return texts, measure(texts, REFERENCES, WORDS)


TEACHER_TEXTS, TEACHER = system(0.2, seed=1)
STUDENT_TEXTS, STUDENT = system(0.3, seed=2)
CHANCE = measure([TEACHER_TEXTS[place] for place in derangement([0] * 60)], REFERENCES, WORDS)


def by_sacrebleu(hypotheses, references):
    """Return the default quality without ROUGE, from corpus scores of the drawn texts themselves."""
    bleu = BLEU(tokenize="none", force=True).corpus_score(hypotheses, [references]).score / 100
    chrf = CHRF(word_order=2).corpus_score(hypotheses, [references]).score / 100
    return 0.5 * chrf + 0.3 * bleu + 0.2 * max(0, 1 - TER().corpus_score(hypotheses, [references]).score / 100)


NO_ROUGE = QualityWeights(chrf=0.5, rouge_l=0)


def test_draws_equal_a_naive_loop_over_drawn_texts():
    draws = resample([TEACHER, STUDENT], NO_ROUGE, draws=15, seed=3)["quality"]
    generator = np.random.default_rng(3)
    for number in range(15):
        drawn = generator.integers(0, 60, size=60)
        references = [REFERENCES[i] for i in drawn]
        for row, texts in enumerate((TEACHER_TEXTS, STUDENT_TEXTS)):
            naive = by_sacrebleu([texts[i] for i in drawn], references)
            assert draws[row, number] == pytest.approx(naive, abs=1e-12)


def test_draws_equal_a_naive_loop_over_statistics_for_every_metric():
    draws = resample([STUDENT], draws=20, seed=4)
    generator = np.random.default_rng(4)
    for number in range(20):
        naive = STUDENT.subset(generator.integers(0, 60, size=60)).scores()
        assert {metric: values[0, number] for metric, values in draws.items()} == pytest.approx(naive)


def test_draws_made_in_blocks_are_the_same(monkeypatch):
    whole = resample([TEACHER], draws=50, seed=1)["quality"]
    monkeypatch.setattr("soju.evaluation.translation_bootstrap._CELLS", 60 * 7)
    np.testing.assert_array_equal(resample([TEACHER], draws=50, seed=1)["quality"], whole)


def test_estimate_and_difference_are_quantiles_of_the_draws():
    teacher_D, student_D = resample([TEACHER, STUDENT])["quality"]
    one = estimate(TEACHER)
    assert one.value == TEACHER.scores()["quality"]
    assert (one.low, one.high) == pytest.approx(tuple(np.quantile(teacher_D, [0.025, 0.975])))
    two = difference(STUDENT, TEACHER)
    assert two.value == pytest.approx(STUDENT.scores()["quality"] - TEACHER.scores()["quality"])
    assert (two.low, two.high) == pytest.approx(tuple(np.quantile(student_D - teacher_D, [0.025, 0.975])))
    assert two.high < 0
    assert (two.draws, two.seed, two.level) == (1_000, 0, 0.95)
    assert two.signature.endswith("|weights:1-ter=0.2,bleu=0.3,chrf++=0.4,rouge-l=0.1")


def test_a_system_differs_from_itself_by_nothing():
    same = difference(TEACHER, TEACHER, metric="bleu", level=0.5)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_retention_is_the_share_above_chance_with_its_bounds():
    result = retention(STUDENT, TEACHER, CHANCE)
    student, teacher, chance = (s.scores()["quality"] for s in (STUDENT, TEACHER, CHANCE))
    assert result.value == pytest.approx((student - chance) / (teacher - chance))
    student_D, teacher_D, chance_D = resample([STUDENT, TEACHER, CHANCE])["quality"]
    draws_D = (student_D - chance_D) / (teacher_D - chance_D)
    assert (result.low, result.high) == pytest.approx(tuple(np.quantile(draws_D, [0.025, 0.975])))
    assert result.margin_low == pytest.approx(np.quantile(teacher_D - chance_D, 0.025))
    assert result.low < result.value < result.plain_ratio
    assert (result.student, result.teacher, result.chance) == pytest.approx((student, teacher, chance))


def test_a_teacher_retains_all_of_itself():
    result = retention(TEACHER, TEACHER, CHANCE)
    assert (result.value, result.low, result.high) == pytest.approx((1, 1, 1))


def test_a_teacher_at_chance_closes_the_gate():
    result = retention(STUDENT, CHANCE, CHANCE)
    assert (result.value, result.low, result.margin_low) == (-np.inf, -np.inf, 0)
    assert result.to_json()["low"] is None
    json.dumps(result.to_json(), allow_nan=False)


def test_systems_that_were_not_measured_alike_are_refused():
    other = measure(TEACHER_TEXTS, REFERENCES, Tokens("others", str.split))
    with pytest.raises(UserError, match="not measured alike"):
        difference(TEACHER, other)
    with pytest.raises(UserError, match="of 60 and of 3 sentences"):
        difference(TEACHER, STUDENT.subset([0, 1, 2]))
    with pytest.raises(UserError, match="at least 2 sentences"):
        estimate(TEACHER.subset([0]))
    with pytest.raises(UserError, match="level"):
        estimate(TEACHER, level=1.0)


@given(st.lists(st.sampled_from("abcd"), min_size=2, max_size=40), st.integers(0, 5))
def test_a_derangement_keeps_the_domain_and_no_place(domains, seed):
    moved = derangement(domains, seed=seed)
    assert sorted(moved) == list(range(len(domains)))
    assert (moved != np.arange(len(domains))).all()
    counts = {domain: domains.count(domain) for domain in domains}
    if min(counts.values()) > 1:
        assert [domains[place] for place in moved] == domains


def test_lone_sentences_are_joined_among_themselves_or_with_the_largest_domain():
    pooled = derangement(["a", "b", "c", "c", "c"], seed=0)
    assert list(pooled[:2]) == [1, 0]
    joined = derangement(["a", "b", "b", "c", "c", "c"], seed=0)
    assert list(joined[1:3]) == [2, 1]
    assert set(joined[[0, 3, 4, 5]]) == {0, 3, 4, 5}


def test_the_derangement_follows_its_seed():
    first = derangement(["x"] * 30, seed=1)
    np.testing.assert_array_equal(first, derangement(["x"] * 30, seed=1))
    assert not np.array_equal(first, derangement(["x"] * 30, seed=2))


def test_derangements_of_three_are_equally_likely():
    seen = [tuple(derangement(["x"] * 3, seed=seed)) for seed in range(400)]
    assert set(seen) == {(1, 2, 0), (2, 0, 1)}
    assert abs(seen.count((1, 2, 0)) - 200) < 40


def test_one_sentence_cannot_be_handed_to_another():
    with pytest.raises(UserError, match="at least two a direction"):
        derangement(["x"])
