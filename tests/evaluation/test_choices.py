import numpy as np
import pytest

from soju.core.errors import UserError
from soju.data.rows import ChoiceQuestion
from soju.evaluation.similarity import chance_level, credits_of, evaluate_choices

QUESTIONS = [
    ChoiceQuestion("비가 온다.", ("젖는다", "뜬다"), 0),
    ChoiceQuestion("던진다.", ("친다", "잔다", "운다", "난다"), 2),
]


def test_the_right_choice_must_be_the_nearest():
    np.testing.assert_array_equal(credits_of([0.9, 0.1, 0.2, 0.3, 0.4, 0.1], QUESTIONS), [1, 1])
    np.testing.assert_array_equal(credits_of([0.1, 0.9, 0.5, 0.3, 0.4, 0.1], QUESTIONS), [0, 0])


def test_choices_that_tie_share_the_point():
    np.testing.assert_allclose(credits_of([0.5, 0.5, 0.4, 0.4, 0.4, 0.1], QUESTIONS), [1 / 2, 1 / 3])


def test_a_model_that_finds_all_alike_is_at_chance():
    assert chance_level(QUESTIONS) == pytest.approx((1 / 2 + 1 / 4) / 2)
    measured, chance = evaluate_choices(
        np.ones((2, 3), np.float32), np.ones((6, 3), np.float32), QUESTIONS, subject="flat", test_set="copa"
    )
    assert measured.score.value == chance.value == pytest.approx(3 / 8)
    assert (chance.subject, chance.interval) == ("chance", None)
    assert measured.score.signature == chance.signature


def test_vectors_of_choices_follow_question_by_question():
    context = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)
    choices = np.array([[1, 0], [0, 1], [1, 0], [1, 1], [0, 5], [-1, 0]], np.float32)
    measured, _ = evaluate_choices(context, choices, QUESTIONS, subject="S1", test_set="copa", pooling="mean")
    np.testing.assert_array_equal(measured.values, [1, 1])
    assert "pooling:mean" in measured.score.signature


def test_another_answer_is_other_data():
    def signature(answer):
        questions = [QUESTIONS[0], ChoiceQuestion(QUESTIONS[1].context, QUESTIONS[1].choices, answer)]
        vectors = np.ones((2, 3), np.float32), np.ones((6, 3), np.float32)
        return evaluate_choices(*vectors, questions, subject="x", test_set="t")[0].score.signature

    assert signature(0) != signature(1)


def test_too_few_questions_or_cosines_are_refused():
    with pytest.raises(UserError, match="fewer than two questions"):
        evaluate_choices(np.ones((1, 2)), np.ones((2, 2)), QUESTIONS[:1], subject="x", test_set="t")
    with pytest.raises(ValueError, match=r"must be \(6,\)"):
        credits_of([0.1], QUESTIONS)
