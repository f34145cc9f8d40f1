"""Kind ``knowledge``, from JSON lines and from the published JSON array."""

import json

import pytest

from soju.data.log import ReadLog
from soju.data.readers import read_rows
from soju.data.rows import KINDS, KnowledgeRow, Question, holds_fact

PLAIN = {"id": "food_1", "category": "food", "query": "At what heat?", "knowledge": "Water boils at 100."}
WHOLE = {**PLAIN, "answer": "At 100.", "paraphrases": ["How hot?", "Which degree?"], "facts": ["100|hundred"]}


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_four_fields_are_enough(read):
    assert read(lines(PLAIN), "knowledge", "data.jsonl")[0] == [KnowledgeRow(*PLAIN.values())]


def test_the_fields_to_measure_with_are_kept(read):
    (row,), _ = read(lines(WHOLE), "knowledge", "data.jsonl")
    assert (row.answer, row.paraphrases, row.facts) == ("At 100.", ("How hot?", "Which degree?"), ("100|hundred",))


def test_null_is_as_good_as_absent(read):
    rows, _ = read(lines({**PLAIN, "answer": None, "paraphrases": None, "facts": None}), "knowledge", "data.jsonl")
    assert rows == [KnowledgeRow(*PLAIN.values())]


@pytest.mark.parametrize(
    ("change", "field", "reason"),
    [
        ({"knowledge": ""}, "knowledge", "empty"),
        ({"query": 3}, "query", "wrong-type"),
        ({"answer": "It boils."}, "answer", "answer-without-fact"),
        ({"paraphrases": ["How hot?"]}, "paraphrases", "paraphrase-count"),
        ({"paraphrases": "How hot?"}, "paraphrases", "wrong-type"),
        ({"facts": ["100|"]}, "facts[0]", "empty-spelling"),
    ],
)
def test_a_broken_field_is_refused_at_its_line(read, change, field, reason):
    rows, log = read(lines({**WHOLE, "id": "food_0"}, {**WHOLE, **change}), "knowledge", "data.jsonl")
    assert len(rows) == 1
    assert [(one.line, one.field, one.reason) for one in log.problems] == [(2, field, reason)]


@pytest.mark.parametrize("field", ["id", "category", "query", "knowledge"])
def test_a_missing_field_is_refused(read, field):
    row = {name: value for name, value in PLAIN.items() if name != field}
    assert [(one.field, one.reason) for one in read(lines(row), "knowledge", "data.jsonl")[1].problems] == [
        (field, "missing-field")
    ]


def test_an_id_used_twice_is_refused_with_its_first_place(read):
    _, log = read(lines(PLAIN, PLAIN), "knowledge", "data.jsonl")
    assert str(log.problems[0]).startswith("data.jsonl:2: id: 'food_1' was the id of data.jsonl:1 already")


@pytest.mark.parametrize("indent", [None, 2])
def test_the_published_array_is_read(read, indent):
    second = {**PLAIN, "id": "food_2", "query": "Why?"}
    rows, log = read("\ufeff" + json.dumps([PLAIN, second], indent=indent), "knowledge", "data.json")
    assert [row.id for row in rows] == ["food_1", "food_2"]
    assert log.problems == []


def test_a_problem_of_an_array_names_the_line_where_its_object_begins(read):
    text = json.dumps([PLAIN, {**PLAIN, "id": "food_2", "knowledge": ""}], indent=1)
    _, log = read(text, "knowledge", "data.json")
    assert [(one.line, one.field, one.reason) for one in log.problems] == [(8, "knowledge", "empty")]
    assert text.splitlines()[7].strip() == "{"


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("{}", 1, "not-an-array"),
        ("[", 1, "not-json"),
        ("[\n{]", 2, "not-json"),
        ('[\n{"id": 1, "id": 2}]', 2, "duplicate-key"),
        ("[\n3]", 2, "not-an-object"),
        ("[]\nx", 1, "not-an-array"),
        ("[" * 100_000, 1, "not-json"),
    ],
)
def test_what_is_no_array_is_refused(read, text, line, reason):
    rows, log = read(text, "knowledge", "data.json")
    assert rows == []
    assert [(one.line, one.reason) for one in log.problems] == [(line, reason)]


@pytest.mark.parametrize("text", ["", "[]"])
def test_an_array_without_rows_is_a_problem(read, text):
    assert read(text, "knowledge", "data.json")[1].reasons == {"no-rows": 1}


def test_other_kinds_are_not_read_from_arrays(read):
    assert read("[]", "pairs", "data.json")[1].reasons == {"unknown-ending": 1}


@pytest.mark.parametrize(("sample", "kind", "rows"), [("culture.ko", "knowledge", 200), ("general", "questions", 40)])
def test_the_samples_are_read(sample, kind, rows):
    log = ReadLog()
    assert len(list(read_rows([f"samples:{sample}"], KINDS[kind], log=log))) == rows
    assert log.problems == []


def test_a_general_question_has_a_language(read):
    rows, _ = read(lines({"id": 1, "query": "Why?", "language": "en"}), "questions", "data.jsonl")
    assert rows == [Question("1", "Why?", "en")]


@pytest.mark.parametrize(("text", "holds"), [("in 1434년", True), ("in 1443", False), ("hundred", False)])
def test_a_fact_is_held_in_any_of_its_spellings(text, holds):
    assert holds_fact(text, "1434|1434년") is holds
