"""What is trained and what is held out, what is refused, and how each side is asked."""

import json

import pytest
from pydantic import ValidationError

from soju.core.config import validate
from soju.core.errors import ConfigError, DataError, UserError
from soju.data.rows import KnowledgeRow, Question
from soju.speculative_kd.config import KnowledgeDataSettings, SpeculativeKdConfig, TeacherSettings, from_environment
from soju.speculative_kd.data import (
    Chat,
    Fact,
    KnowledgeData,
    by_category,
    control_ids,
    distractors,
    examples_of,
    read_knowledge,
    refuse_long,
    split_general,
)

CULTURE = {"ko": ("samples:culture.ko",), "en": ("samples:culture.en",)}
ROWS = [
    {"id": "a", "category": "x", "query": "First?", "knowledge": "One.", "paraphrases": ["1?", "I?"], "answer": "1"},
    {"id": "b", "category": "x", "query": "Second?", "knowledge": "Two."},
    {"id": "c", "category": "x", "query": "Third?", "knowledge": "Three."},
]


def read(folder, rows, **settings):
    (folder / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {"en": ("facts.jsonl",), "general": (), "control_share": 0, **settings}
    return read_knowledge(KnowledgeDataSettings(root=folder, **settings), seed=0)


def changed(number, **change):
    return [{**row, **(change if place == number else {})} for place, row in enumerate(ROWS)]


def fact(number, category="x", language="en", answer=None):
    row = KnowledgeRow(f"{number}", category, f"Question {number}?", f"Text {number}.", answer or f"Answer {number}.")
    return Fact(row, language, ("facts.jsonl", number))


def test_a_tenth_of_each_category_is_control_in_both_languages():
    data = read_knowledge(KnowledgeDataSettings(**CULTURE), seed=3)
    assert {group: sum(one.control for one in facts) for group, facts in by_category(data.facts).items()} == {
        (language, category): 4
        for language in ("ko", "en")
        for category in ("tradition", "history", "food", "geography", "modern")
    }
    assert not {one.row.id for one in data.trained} & {one.row.id for one in data.control}
    assert (len(data.trained), len(data.control), len(data.general)) == (360, 40, 40)


def test_control_does_not_depend_on_the_order_of_rows_and_does_on_the_seed():
    facts = [fact(number) for number in range(40)]
    assert control_ids(facts, 0.25, seed=1) == control_ids(facts[::-1], 0.25, seed=1)
    assert control_ids(facts, 0.25, seed=1) != control_ids(facts, 0.25, seed=2)
    assert len(control_ids(facts, 0.25, seed=1)) == 10


def test_the_first_paraphrase_validates_and_the_others_test(tmp_path):
    first, second, _ = read(tmp_path, ROWS).facts
    assert (first.validation, first.tests) == ("1?", ("I?",))
    assert (second.validation, second.tests) == (None, ())


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        (changed(1, query="first"), "facts.jsonl:2: query: the same question as facts.jsonl:1"),
        (changed(0, paraphrases=["second ?", "I?"]), "facts.jsonl:1: paraphrases[0]: 'second ?' is the question of"),
        (changed(2, category="y"), "facts.jsonl:3: category: 'y' has this row alone"),
        (changed(2, id="a"), "facts.jsonl:3: id: 'a' was the id of facts.jsonl:1"),
        (changed(1, knowledge=""), "facts.jsonl:2: knowledge: empty"),
    ],
)
def test_what_rows_have_only_together_is_refused_at_its_line(tmp_path, rows, problem):
    with pytest.raises(DataError) as caught:
        read(tmp_path, rows)
    assert str(caught.value).startswith(problem)
    assert caught.value.count == 1


def test_broken_rows_can_be_left_out_and_are_counted(tmp_path):
    data = read(tmp_path, [*changed(1, query="first"), {**ROWS[1], "id": "d", "category": "y"}], on_error="skip")
    assert [one.row.id for one in data.facts] == ["a", "c"]
    assert (data.log.kept, data.log.refused) == (2, 2)


def test_languages_of_different_ids_are_refused(tmp_path):
    (tmp_path / "ko.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:2]), encoding="utf-8")
    with pytest.raises(DataError, match=r"facts.jsonl:3: id: 'c' is not among the ids of data.ko"):
        read(tmp_path, ROWS, ko=("ko.jsonl",))


def test_the_published_array_trains_as_it_is(tmp_path):
    plain = [{key: row[key] for key in ("id", "category", "query", "knowledge")} for row in ROWS]
    (tmp_path / "facts.json").write_text(json.dumps(plain, indent=2), encoding="utf-8")
    data = read_knowledge(KnowledgeDataSettings(root=tmp_path, en=("facts.json",), general=()), seed=0)
    assert [one.row.knowledge for one in data.facts] == ["One.", "Two.", "Three."]


def test_fewer_facts_are_spread_over_all_and_keep_the_languages_together():
    data = read_knowledge(KnowledgeDataSettings(**CULTURE, max_facts=10), seed=0)
    assert {len(facts) for facts in by_category(data.facts).values()} == {2}
    assert {one.row.id for one in data.facts if one.language == "ko"} == {
        one.row.id for one in data.facts if one.language == "en"
    }


def test_distractors_are_answers_of_the_category_and_always_the_same():
    facts = [*(fact(number) for number in range(6)), fact(6, "y"), fact(7, language="ko"), fact(8, answer="Answer 0.")]
    chosen = distractors(facts[0], facts)
    assert len(chosen) == 3
    assert {one.row.id for one in chosen} <= {"1", "2", "3", "4", "5"}
    assert chosen == distractors(facts[0], facts[::-1])


def test_general_questions_that_are_mixed_in_are_not_measured():
    questions = tuple(Question(f"{number}", f"Question {number}?", "en") for number in range(20))
    data = KnowledgeData((), questions, None)
    assert split_general(data, mixed=False, seed=0) == ([], list(questions))
    trained, measured = split_general(data, mixed=True, seed=0)
    assert trained
    assert measured
    assert sorted([*trained, *measured], key=questions.index) == list(questions)


class Letters:
    """A tokenizer of one id a letter, whose template shows its parts."""

    chat_template = "there"

    def apply_chat_template(self, messages, *, add_generation_prompt, tokenize, return_dict, enable_thinking):
        return [ord(letter) for letter in "".join(f"{one['role']}:{one['content']}|" for one in messages)]

    def __call__(self, text, *, add_special_tokens):
        return {"input_ids": [ord(letter) for letter in text]}


def text_of(ids):
    return "".join(map(chr, ids))


def test_only_the_teacher_reads_the_knowledge():
    sides = Chat(Letters(), TeacherSettings(), "student"), Chat(Letters(), TeacherSettings(), "teacher")
    one, other = examples_of([fact(1), fact(2)], *sides)
    assert text_of(one.query) == text_of(one.plain) == "user:Question 1?|"
    assert "Text: Text 1.\n\nQuestion: Question 1?" in text_of(one.privileged)
    assert "Text: Text 2.\n\nQuestion: Question 1?" in text_of(one.misled)
    assert (one.id, other.id) == ("en/1", "en/2")


def test_knowledge_that_looks_like_a_template_stays_as_it_is():
    chat = Chat(Letters(), TeacherSettings(system="Be brief.", template={"en": "{knowledge} # {query}"}), "teacher")
    asked = text_of(chat.ask_with("q {knowledge}", "a {query} b", "en"))
    assert asked == "system:Be brief.|user:a {query} b # q {knowledge}|"


def test_prompts_beyond_the_context_are_refused_with_their_line():
    facts = [fact(1), fact(2)]
    chat = Chat(Letters(), TeacherSettings(), "teacher")
    examples = examples_of(facts, chat, chat)
    refuse_long(facts, examples, budget=10, contexts=(30, 200))
    with pytest.raises(DataError, match=r"facts.jsonl:1: knowledge: prompt of \d+ tokens and 10 max_new"):
        refuse_long(facts, examples, budget=10, contexts=(30, 60))


def test_a_model_without_a_chat_template_is_refused():
    tokenizer = Letters()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"student.model x: it has no chat template"):
        Chat(tokenizer, TeacherSettings(model="x"), "student")


def config(**changes):
    values = {"recipe": "speculative_kd", "name": "run", "data": {"en": ["samples:culture.en"]}, **changes}
    return validate(values, SpeculativeKdConfig, place="file")


def test_published_values_are_the_defaults():
    plain = config()
    assert (plain.method, plain.teacher.model, plain.student.model) == ("lupi_skd", "Qwen/Qwen3-32B", "Qwen/Qwen3-4B")
    assert (plain.rollout.top_k, plain.rollout.min_prob, plain.rollout.gamma) == (5, 0.05, 20)
    assert (plain.training.learning_rate, plain.training.num_train_epochs) == (1e-5, 5)
    assert (plain.rollout.max_new_tokens, plain.loss.divergence) == (4096, "forward_kl")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {}}, "no knowledge; give ko or en"),
        ({"teacher": {"thinking": True}}, "texts begin differently; set both alike"),
        ({"mixing": {"share": 0.5}, "data": {"en": ["x"], "general": []}}, "mixing.share needs data.general"),
        ({"rollout": {"eos": [2]}}, "rollout.eos is read from the models"),
        ({"student": {"model": "self"}}, '"self" is for the teacher'),
        ({"teacher": {"model": "scratch"}}, "needs student.model scratch"),
        ({"teacher": {"template": {"en": "{query}"}}}, "needs {knowledge} and {query}, each once"),
    ],
)
def test_settings_that_cannot_go_together_are_refused(changes, message):
    with pytest.raises(ConfigError) as caught:
        config(**changes)
    assert message in str(caught.value)


def test_settings_are_frozen():
    plain = config()
    with pytest.raises(ValidationError):
        plain.name = "other"


def test_environment_names_override_the_file_and_yield_to_the_command_line():
    values = {"teacher": {"model": "big", "thinking": False}, "student": {"model": "small"}}
    environment = {"TEACHER_MODEL": "bigger", "STUDENT_MODEL": "smaller"}
    result, said = from_environment(values, environment, keep=frozenset({"student.model"}))
    assert result == {"teacher": {"model": "bigger", "thinking": False}, "student": {"model": "small"}}
    assert said == ["teacher.model is bigger, from TEACHER_MODEL"]
