"""Whether the knowledge arrived: likelihoods of reference answers, greedy answers, and what was forgotten.

Every score is a mean over facts, with a bootstrap interval over facts. Distractors come from the fact's own part,
trained or control: answers that were trained on would be likelier than control answers for their style alone.

Shape letters: N = tokens, V = tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from soju.core.results import Comparison, Score, Setting
from soju.data.rows import holds_fact
from soju.data.statistics import spread
from soju.evaluation.significance import Measurement, compare, mean_interval
from soju.speculative_kd.config import KnowledgeEvaluationSettings
from soju.speculative_kd.data import Chat, Example, Fact, KnowledgeData, distractors
from soju.speculative_kd.forced import evaluating, likelihoods_after, parts_of, read_texts

NATS_A_BYTE = "nats/byte"
KNOWLEDGE_SCORE = "knowledge"
"""Chooses the checkpoint."""
FORGETTING = "forgetting"
_AT_ONCE = 64
"""Tokens whose logits exist at a time."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A model, and how it is asked."""

    name: str
    model: Any
    chat: Chat
    eos: tuple[int, ...]
    privileged: bool = False
    """Whether it reads the knowledge before the question."""

    def ask(self, fact: Fact, question: str) -> list[int]:
        """Return the ids after which it answers."""
        if self.privileged:
            return self.chat.ask_with(question, fact.row.knowledge, fact.language)
        return self.chat.ask(question)


@dataclass(frozen=True, slots=True)
class Margins:
    """Of one fact, means over its questions; likelihoods in nats a byte of the answer."""

    own: float
    """Log-likelihood of its own answer."""
    margin: float
    """That, less the mean of the distractors."""
    best: float
    """Share of the questions after which its own answer was likelier than every distractor."""


Questions = Callable[[Fact], Sequence[str]]


def measure_margins(
    subject: Subject, facts: Sequence[Fact], everyone: Sequence[Fact], questions: Questions, *, batch_size: int
) -> dict[str, Margins]:
    """Compare each fact's answer with those of others.

    Args:
        subject: The model.
        facts: Of one part, trained or control.
        everyone: All facts, for categories with one fact of the part.
        questions: What is asked of a fact; facts without questions, answer or distractors are left out.
        batch_size: Texts at a time.

    Returns:
        Margins by key.
    """
    prompts: list[list[int]] = []
    answers: list[str] = []
    asked: list[tuple[Fact, int, int]] = []
    for fact in facts:
        others = distractors(fact, facts) or distractors(fact, everyone)
        texts = [text for one in (fact, *others) if (text := one.row.answer)]
        if fact.row.answer is None or not others:
            continue
        asked.append((fact, len(questions(fact)), len(texts)))
        for question in questions(fact):
            prompts += [subject.ask(fact, question)] * len(texts)
            answers += texts
    told = [subject.chat.answer(text) for text in answers]
    found = likelihoods_after(subject.model, prompts, told, batch_size=batch_size)
    a_byte = iter([value / len(text.encode()) for value, text in zip(found, answers, strict=True)])
    result = {}
    for fact, number, choices in asked:
        values = np.array([[next(a_byte) for _ in range(choices)] for _ in range(number)])
        if number:
            own, others_mean = values[:, 0], values[:, 1:].mean(axis=1)
            best = own > values[:, 1:].max(axis=1)
            result[fact.key] = Margins(float(own.mean()), float((own - others_mean).mean()), float(best.mean()))
    return result


def validate_knowledge(
    data: KnowledgeData, chat: Chat, eos: tuple[int, ...], settings: KnowledgeEvaluationSettings
) -> Callable[[Any], dict[str, float]] | None:
    """Return what scores a student on the first paraphrases of trained facts; ``None`` where there are none."""
    facts = [fact for fact in data.trained if fact.validation is not None and distractors(fact, data.facts)]
    if not facts:
        return None

    def validate(model: Any) -> dict[str, float]:
        subject = Subject("student", model, chat, eos)
        found = measure_margins(
            subject,
            facts,
            data.facts,
            lambda fact: [fact.validation] if fact.validation else [],
            batch_size=settings.batch_size,
        )
        return {
            KNOWLEDGE_SCORE: float(np.mean([one.margin for one in found.values()])),
            "choice": float(np.mean([one.best for one in found.values()])),
            "answer_ll": float(np.mean([one.own for one in found.values()])),
        }

    return validate


@torch.no_grad()
def greedy_answers(
    subject: Subject, prompts: Sequence[Sequence[int]], settings: KnowledgeEvaluationSettings
) -> list[list[int]]:
    """Return what a model answers when it always takes the likeliest token, the end token included."""
    device = subject.model.get_input_embeddings().weight.device
    result: list[list[int]] = []
    with evaluating(subject.model):
        for start in range(0, len(prompts), settings.batch_size):
            part = prompts[start : start + settings.batch_size]
            longest = max(map(len, part))
            ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in part], device=device)
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in part], device=device)
            written = subject.model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                max_new_tokens=settings.max_new_tokens,
                eos_token_id=list(subject.eos) or None,
                pad_token_id=subject.eos[0] if subject.eos else 0,
            )
            result += [_until_end(row, subject.eos) for row in written[:, longest:].tolist()]
    return result


def _until_end(tokens: list[int], eos: Sequence[int]) -> list[int]:
    end = next((place for place, token in enumerate(tokens) if token in eos), len(tokens) - 1)
    return tokens[: end + 1]


@torch.no_grad()
def forgetting_of(
    start: Any, student: Any, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], *, batch_size: int
) -> list[float]:
    """Return KL(start‖student) for each text, the mean over its tokens, in nats.

    Args:
        start: The student before training.
        student: After it.
        prompts: General questions.
        texts: What `start` answers.
        batch_size: Texts at a time.

    Returns:
        One value a text.
    """
    values: list[float] = []
    heads = [parts_of(model)[1] for model in (start, student)]
    for first in range(0, len(prompts), batch_size):
        part = slice(first, first + batch_size)
        both = [read_texts(model, prompts[part], texts[part], batch_size=batch_size) for model in (start, student)]
        for hidden in zip(*both, strict=True):
            total = 0.0
            for place in range(0, len(hidden[0]), _AT_ONCE):
                old_NV, new_NV = (
                    head(states[place : place + _AT_ONCE]).float().log_softmax(-1)
                    for head, states in zip(heads, hidden, strict=True)
                )
                total += float((old_NV.exp() * (old_NV - new_NV)).sum())
            values.append(total / len(hidden[0]))
    return values


@dataclass(frozen=True, slots=True)
class General:
    """General questions with what the start answers to them."""

    examples: Sequence[Example]
    texts: Sequence[list[int]]
    start: Any


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured of one subject."""

    measurements: Sequence[Measurement]
    answers: Mapping[str, str]
    """Greedy answers to test questions, by the key of the fact."""

    @property
    def scores(self) -> list[Score]:
        """The scores alone."""
        return [one.score for one in self.measurements]


def measure(
    subject: Subject,
    data: KnowledgeData,
    settings: KnowledgeEvaluationSettings,
    *,
    general: General | None = None,
    seed: int = 0,
) -> Measured:
    """Measure a subject on the questions that test, by language, and its margin by category.

    Args:
        subject: The model.
        data: Facts.
        settings: Batch, budget of answers, resamples.
        general: To measure what was forgotten; only for subjects that were the start once.
        seed: Of the resampling.

    Returns:
        Measurements, one value a fact each, and greedy answers.
    """
    rows: list[Measurement] = []
    answers: dict[str, str] = {}
    for language in sorted({fact.language for fact in data.facts}):
        for part, facts in (("trained", data.trained), ("control", data.control)):
            chosen = [fact for fact in facts if fact.language == language]
            tested = measure_margins(
                subject, chosen, data.facts, lambda fact: fact.tests, batch_size=settings.batch_size
            )
            by_key = {fact.key: fact for fact in chosen}
            make = _Maker(subject.name, f"{part}/{language}", settings, seed)
            name = KNOWLEDGE_SCORE if part == "trained" else "control"
            rows += make(name, {key: one.margin for key, one in tested.items()}, by_key)
            if part == "control":
                continue
            rows += make("choice", {key: one.best for key, one in tested.items()}, by_key, unit="fraction")
            rows += make("answer_ll", {key: one.own for key, one in tested.items()}, by_key)
            asked = measure_margins(
                subject, chosen, data.facts, lambda fact: [fact.row.query], batch_size=settings.batch_size
            )
            rows += make("trained_ll", {key: one.own for key, one in asked.items()}, by_key)
            for category in sorted({fact.row.category for fact in chosen}):
                of_category = {key: one.margin for key, one in tested.items() if by_key[key].row.category == category}
                rows += _Maker(subject.name, f"{part}/{language}/{category}", settings, seed)(name, of_category, by_key)
            written = answer_tests(subject, chosen, settings)
            answers |= written
            recalled = {
                key: float(np.mean([holds_fact(text, spelling) for spelling in by_key[key].row.facts]))
                for key, text in written.items()
                if by_key[key].row.facts
            }
            budget = {"max_new_tokens": settings.max_new_tokens}
            rows += make("fact_recall", recalled, by_key, unit="fraction", **budget)
    if general is not None and general.examples:
        rows += _forgetting(subject, general, settings, seed)
    return Measured(rows, answers)


def answer_tests(subject: Subject, facts: Sequence[Fact], settings: KnowledgeEvaluationSettings) -> dict[str, str]:
    """Return greedy answers to the last paraphrase of facts, by key; evenly spread ones where they are limited."""
    chosen = [fact for fact in facts if fact.tests]
    if settings.max_answers is not None:
        chosen = spread(chosen, settings.max_answers) if settings.max_answers else []
    if not chosen:
        return {}
    tokens = greedy_answers(subject, [subject.ask(fact, fact.tests[-1]) for fact in chosen], settings)
    texts = [subject.chat.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in tokens]
    return {fact.key: text for fact, text in zip(chosen, texts, strict=True)}


def _forgetting(
    subject: Subject, general: General, settings: KnowledgeEvaluationSettings, seed: int
) -> list[Measurement]:
    prompts = [one.query for one in general.examples]
    values = forgetting_of(general.start, subject.model, prompts, general.texts, batch_size=settings.batch_size)
    setting = Setting.of_texts([one.id for one in general.examples], subject=subject.name, test_set="general")
    return [
        _measurement(setting, FORGETTING, values, "nats/token", settings, seed, max_new_tokens=settings.max_new_tokens)
    ]


@dataclass(frozen=True, slots=True)
class _Maker:
    """Makes measurements of one subject on one test set."""

    subject: str
    test_set: str
    settings: KnowledgeEvaluationSettings
    seed: int

    def __call__(
        self,
        name: str,
        values: Mapping[str, float],
        facts: Mapping[str, Fact],
        *,
        unit: str = NATS_A_BYTE,
        **decisive: object,
    ) -> list[Measurement]:
        """Return the measurement, or none where no fact could be measured."""
        if not values:
            return []
        texts = [text for key in values for row in [facts[key].row] for text in (row.query, *row.paraphrases)]
        setting = Setting.of_texts(texts, subject=self.subject, test_set=self.test_set)
        return [_measurement(setting, name, list(values.values()), unit, self.settings, self.seed, **decisive)]


def _measurement(
    setting: Setting,
    name: str,
    values: Sequence[float],
    unit: str,
    settings: KnowledgeEvaluationSettings,
    seed: int,
    **decisive: object,
) -> Measurement:
    array = np.asarray(values, dtype=np.float64)
    interval = mean_interval(array, samples=settings.bootstrap_samples, seed=seed) if len(array) > 1 else None
    score = setting.score(
        name, float(array.mean()), unit=unit, higher_is_better=name != FORGETTING, interval=interval, **decisive
    )
    return Measurement(score, array)


def compare_measured(subject: Measured, baseline: Measured, *, samples: int, seed: int) -> list[Comparison]:
    """Compare two subjects fact by fact, where both were measured alike on two facts or more."""
    others = {(one.score.name, one.score.test_set): one for one in baseline.measurements}
    return [
        compare(one, other, samples=samples, seed=seed)
        for one in subject.measurements
        if one.score.name in (KNOWLEDGE_SCORE, "control")
        and one.score.test_set.count("/") == 1
        and len(one.values) > 1
        and (other := others.get((one.score.name, one.score.test_set)))
    ]
