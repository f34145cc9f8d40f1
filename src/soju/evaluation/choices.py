"""Does a model put the right continuation nearest? Multiple choice by cosine, beside what guessing would give.

Shape letters: Q = questions, C = choices of all questions, one after the other, D = dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from soju.core.errors import UserError
from soju.core.score import Score
from soju.core.setting import Setting
from soju.data.records import ChoiceQuestion
from soju.evaluation.significance import Measurement, mean_interval
from soju.evaluation.similarity import cosines_of


def chance_level(questions: Sequence[ChoiceQuestion]) -> float:
    """Return the accuracy of guessing: the mean of 1 / number of choices."""
    return float(np.mean([1 / len(question.choices) for question in questions]))


def credits_of(cosines_C: ArrayLike, questions: Sequence[ChoiceQuestion]) -> NDArray[np.float64]:
    """Return what each question earns: 1 when its right choice has the highest cosine, a share when it ties for it.

    Args:
        cosines_C: Cosine of each choice with the context of its question, ``(C,)``.
        questions: Q questions, whose choices follow one another in `cosines_C`.

    Returns:
        Credits in [0, 1], ``(Q,)``. Equal cosines share one point, so that a model that finds all alike is at chance.

    Raises:
        ValueError: If there is not one cosine for each choice.
    """
    cosines = np.asarray(cosines_C, np.float64)
    counts = [len(question.choices) for question in questions]
    if cosines.shape != (sum(counts),):
        raise ValueError(f"cosines must be ({sum(counts)},), one a choice, got {cosines.shape}")
    credits = []
    for question, own in zip(questions, np.split(cosines, np.cumsum(counts)[:-1]), strict=True):
        best = own == own.max()
        credits.append(float(best[question.answer]) / float(best.sum()))
    return np.array(credits)


def evaluate_choices(
    context_QD: NDArray[np.float32],
    choices_CD: NDArray[np.float32],
    questions: Sequence[ChoiceQuestion],
    *,
    subject: str,
    test_set: str,
    samples: int = 2_000,
    seed: int = 0,
    **decisive: object,
) -> tuple[Measurement, Score]:
    """Measure how often the right choice is nearest to the context.

    Args:
        context_QD: Vectors of the contexts, ``(Q, D)``.
        choices_CD: Vectors of the choices, question by question, ``(C, D)``.
        questions: The questions, Q >= 2.
        subject: Name of the system.
        test_set: Name of the questions.
        samples: Draws for the interval; 0 for none.
        seed: Seed of the draws.
        **decisive: What else decides the value: prompt, pooling, length.

    Returns:
        The accuracy with the credit of each question, and the chance level as a score of the system ``chance``.

    Raises:
        UserError: If there are fewer than two questions.
    """
    if len(questions) < 2:
        raise UserError(f"{test_set}: fewer than two questions; give more, or leave the set out")
    repeated_CD = np.repeat(context_QD, [len(question.choices) for question in questions], axis=0)
    credits_Q = credits_of(cosines_of(repeated_CD, choices_CD), questions)
    texts = [text for question in questions for text in (question.context, *question.choices, str(question.answer))]
    same = {"questions": len(questions), "ties": "shared", **decisive}

    def score(name: str, value: float, values_Q: NDArray[np.float64] | None = None) -> Score:
        interval = mean_interval(values_Q, samples=samples, seed=seed) if samples and values_Q is not None else None
        setting = Setting.of_texts(texts, subject=name, test_set=test_set)
        return setting.score("accuracy", value, unit="fraction", higher_is_better=True, interval=interval, **same)

    measured = Measurement(score(subject, float(credits_Q.mean()), credits_Q), credits_Q)
    return measured, score("chance", chance_level(questions))
