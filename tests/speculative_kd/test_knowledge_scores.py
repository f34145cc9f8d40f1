"""Scores against hand values and plain forward passes."""

import numpy as np
import pytest
import torch
from pico_models import pico
from torch.nn.functional import log_softmax

from soju.core.errors import UserError
from soju.data.log import ReadLog
from soju.data.rows import KnowledgeRow, Question
from soju.speculative_kd.config import (
    KnowledgeDataSettings,
    KnowledgeEvaluationSettings,
    SpeculativeKdConfig,
    StudentSettings,
    TeacherSettings,
)
from soju.speculative_kd.data import Chat, Fact, KnowledgeData, general_examples
from soju.speculative_kd.evaluate import (
    General,
    Subject,
    compare_measured,
    forgetting_of,
    greedy_answers,
    measure,
    measure_margins,
    validate_knowledge,
)
from soju.speculative_kd.forced import likelihoods_after
from soju.speculative_kd.models import (
    byte_tokenizer,
    load_models,
    memory_of,
    plan,
    refuse_without_memory,
)

SETTINGS = KnowledgeEvaluationSettings(batch_size=3, max_new_tokens=6, bootstrap_samples=50)
TOKENIZER = byte_tokenizer()
CHAT = Chat(TOKENIZER, TeacherSettings(), "teacher")
EOS = (TOKENIZER.eos_token_id,)


def fact(number, *, control=False, category="x"):
    row = KnowledgeRow(
        f"{number}",
        category,
        f"Question {number}?",
        f"Text {number}.",
        f"Answer {'n' * number}",
        (f"Which {number}?", f"What {number}?"),
        ("Answer",),
    )
    return Fact(row, "en", ("facts.jsonl", number), control)


FACTS = tuple(fact(number, control=number > 4) for number in range(1, 8))
DATA = KnowledgeData(FACTS, (), ReadLog())


@pytest.fixture(scope="module")
def model():
    return pico(vocabulary=len(TOKENIZER), sharp=2.0, layers=1)


def subject(model, **changes):
    return Subject("student", model, CHAT, EOS, **changes)


def by_hand(model, prompt, text):
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *text]]), use_cache=False).logits[0]
    rows = log_softmax(logits, -1)[len(prompt) - 1 : -1]
    return sum(rows[place, token].item() for place, token in enumerate(text))


def test_likelihoods_are_those_of_plain_passes_whatever_the_batch(model):
    prompts, texts = [[5, 6, 7], [8], [9, 10]], [[1, 2], [3, 4, 5, 6, 7], [8]]
    expected = [by_hand(model, *one) for one in zip(prompts, texts, strict=True)]
    for batch_size in (1, 2, 3):
        np.testing.assert_allclose(likelihoods_after(model, prompts, texts, batch_size=batch_size), expected, rtol=1e-5)


def test_a_margin_is_the_own_answer_less_the_mean_of_three_others(model):
    found = measure_margins(subject(model), FACTS[:4], FACTS, lambda one: one.tests, batch_size=3)
    own, *others = [
        by_hand(model, CHAT.ask("What 1?"), CHAT.answer(one.row.answer)) / len(one.row.answer) for one in FACTS[:4]
    ]
    assert found["en/1"].own == pytest.approx(own, rel=1e-5)
    assert found["en/1"].margin == pytest.approx(own - sum(others) / 3, rel=1e-4)
    assert found["en/1"].best == (own > max(others))


def test_distractors_of_control_facts_are_control_facts(model):
    found = measure_margins(subject(model), DATA.control, FACTS, lambda one: one.tests, batch_size=3)
    own, *others = [
        by_hand(model, CHAT.ask("What 5?"), CHAT.answer(one.row.answer)) / len(one.row.answer) for one in FACTS[4:]
    ]
    assert found["en/5"].margin == pytest.approx(own - sum(others) / 2, rel=1e-4)


def test_likelihood_is_a_byte_and_not_a_letter(model):
    ko = Fact(KnowledgeRow("k", "x", "q?", "t", "가나", ("1?", "2?")), "ko", ("f", 1))
    other = Fact(KnowledgeRow("l", "x", "r?", "t", "다", ("3?", "4?")), "ko", ("f", 2))
    found = measure_margins(subject(model), [ko, other], [], lambda one: one.tests, batch_size=2)
    assert found["ko/k"].own == pytest.approx(by_hand(model, CHAT.ask("2?"), CHAT.answer("가나")) / 6, rel=1e-5)


def test_a_privileged_subject_reads_the_text_before_the_question(model):
    reads = subject(model, privileged=True)
    assert reads.ask(FACTS[0], "What 1?") == CHAT.ask_with("What 1?", "Text 1.", "en")
    assert subject(model).ask(FACTS[0], "What 1?") == CHAT.ask("What 1?")


def test_greedy_answers_are_those_of_plain_passes_and_end_at_the_end_token(model):
    prompts = [CHAT.ask("Question 1?"), CHAT.ask("Of another length, 2?")]
    for prompt, found in zip(prompts, greedy_answers(subject(model), prompts, SETTINGS), strict=True):
        expected = []
        while len(expected) < 6 and (not expected or expected[-1] not in EOS):
            with torch.no_grad():
                expected.append(int(model(torch.tensor([[*prompt, *expected]])).logits[0, -1].argmax()))
        assert found == expected


def test_forgetting_is_the_divergence_from_the_start(model):
    other = pico(vocabulary=len(TOKENIZER), sharp=2.0, layers=1, seed=5)
    prompts, texts = [[5, 6], [7]], [[1, 2], [3]]
    assert forgetting_of(model, model, prompts, texts, batch_size=2) == [0, 0]
    found = forgetting_of(model, other, prompts, texts, batch_size=1)
    with torch.no_grad():
        old, new = (log_softmax(one(torch.tensor([[7, 3]])).logits[0, 0], -1) for one in (model, other))
    assert found[1] == pytest.approx((old.exp() * (old - new)).sum().item(), rel=1e-4)


def test_everything_is_measured_with_unit_direction_and_interval(model):
    questions = general_examples([Question("1", "Why?", "en"), Question("2", "How?", "en")], CHAT, CHAT)
    general = General(questions, [[1, 2], [3]], model)
    measured = measure(subject(model), DATA, SETTINGS, general=general)
    found = {(score.name, score.test_set): score for score in measured.scores}
    assert set(found) == {
        ("knowledge", "trained/en"),
        ("knowledge", "trained/en/x"),
        ("control", "control/en"),
        ("choice", "trained/en"),
        ("answer_ll", "trained/en"),
        ("trained_ll", "trained/en"),
        ("fact_recall", "trained/en"),
        ("forgetting", "general"),
    }
    assert found["forgetting", "general"].value == 0
    assert not found["forgetting", "general"].higher_is_better
    knowledge = found["knowledge", "trained/en"]
    assert knowledge.unit == "nats/byte"
    assert knowledge.interval.low <= knowledge.value <= knowledge.interval.high
    assert set(measured.answers) == {"en/1", "en/2", "en/3", "en/4"}


def test_an_answer_that_holds_its_fact_is_recalled(monkeypatch, model):
    monkeypatch.setattr(
        "soju.speculative_kd.evaluate.greedy_answers",
        lambda subject, prompts, settings: [CHAT.answer("The Answer is."), *[CHAT.answer("No.")] * (len(prompts) - 1)],
    )
    measured = measure(subject(model), DATA, SETTINGS)
    (recall,) = [score.value for score in measured.scores if score.name == "fact_recall"]
    assert recall == 0.25
    assert measured.answers["en/1"] == "The Answer is."


def test_subjects_are_compared_fact_by_fact(model):
    other = pico(vocabulary=len(TOKENIZER), sharp=2.0, layers=1, seed=5)
    one, two = (measure(subject(each), DATA, SETTINGS) for each in (model, other))
    comparisons = compare_measured(one, two, samples=50, seed=0)
    assert [(each.metric, each.test_set) for each in comparisons] == [
        ("knowledge", "trained/en"),
        ("control", "control/en"),
    ]
    values = [next(m.values for m in each.measurements if m.score.name == "knowledge") for each in (one, two)]
    assert comparisons[0].difference == pytest.approx((values[0] - values[1]).mean())


def test_validation_asks_the_first_paraphrase_of_trained_facts(model):
    validate = validate_knowledge(DATA, CHAT, EOS, SETTINGS)
    found = measure_margins(
        subject(model), DATA.trained, FACTS, lambda one: ["Which" + one.row.query[8:]], batch_size=4
    )
    assert validate(model)["knowledge"] == pytest.approx(np.mean([one.margin for one in found.values()]), rel=1e-5)
    bare = Fact(KnowledgeRow("b", "x", "q?", "t"), "en", ("f", 1))
    assert validate_knowledge(KnowledgeData((bare,), (), ReadLog()), CHAT, EOS, SETTINGS) is None


def config(**changes):
    values = {"student": StudentSettings(model="scratch"), "teacher": TeacherSettings(model="scratch"), **changes}
    data = KnowledgeDataSettings(en=("samples:culture.en",))
    return SpeculativeKdConfig(recipe="speculative_kd", name="run", data=data, **values)


def test_bytes_come_back_as_they_were():
    for text in ("Jongmyo", "종묘 제례악", "\n\t€"):
        assert TOKENIZER.decode(CHAT.answer(text)) == text
    assert TOKENIZER.decode(CHAT.ask("물?")) == "<|im_start|>user\n물?<|im_end|>\n<|im_start|>assistant\n"


def test_both_sides_are_planned_without_weights():
    planned = plan(config())
    assert planned.eos == EOS
    assert planned.contexts == (4096, 4096)
    needed = memory_of(config(), planned, longest=100)
    student, teacher = load_models(config(), planned)
    assert needed["student"] == 4 * sum(parameter.numel() for parameter in student.parameters())
    assert needed["optimizer"] == 3 * needed["student"]
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    with pytest.raises(UserError, match=r"training needs about .* \(teacher 0.0 GiB, .*lower rollout.max_new_tokens"):
        refuse_without_memory(needed, 1000)


def test_the_teacher_self_is_the_student_as_it_starts():
    own = config(teacher=TeacherSettings(model="self"))
    student, teacher = load_models(own, plan(own))
    assert all(torch.equal(one, other) for one, other in zip(student.parameters(), teacher.parameters(), strict=True))
    assert student.lm_head.weight.data_ptr() != teacher.lm_head.weight.data_ptr()


def save(folder, *, vocabulary=None, eos=None, template=True, tokens=()):
    tokenizer = byte_tokenizer()
    if tokens:
        tokenizer.add_tokens(list(tokens))
    if not template:
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    model = pico(vocabulary=vocabulary or len(tokenizer), layers=1, eos_token_id=eos)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocabulary": 300}, "student has a vocab_size of 259 and teacher of 300"),
        ({"eos": 1}, "student ends texts with 2 and teacher with 1, 2"),
        ({"template": False}, "teacher.model .* it has no chat template"),
        ({"vocabulary": 259, "tokens": ("<other>",)}, "token '<other>' has id None for the student and 259"),
    ],
)
def test_sides_that_do_not_match_are_refused(tmp_path, changes, message):
    sides = {"student": StudentSettings(model=save(tmp_path / "student"))}
    sides["teacher"] = TeacherSettings(model=save(tmp_path / "teacher", **changes))
    with pytest.raises(UserError, match=message):
        plan(config(**sides))


def test_templates_that_open_an_answer_differently_are_refused(tmp_path):
    tokenizer = byte_tokenizer()
    save(tmp_path / "teacher")
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n", "model:")
    tokenizer.save_pretrained(tmp_path / "teacher")
    sides = {"student": StudentSettings(model=save(tmp_path / "student"))}
    with pytest.raises(UserError, match="chat templates open an answer differently"):
        plan(config(**sides, teacher=TeacherSettings(model=str(tmp_path / "teacher"))))
