import gzip
import json

import pytest

from soju.data.rows import ChoiceQuestion, InferencePair, SimilarityPair

BOILS = SimilarityPair("물이 끓는다.", "물이 끓고 있다.", 4.8)
COPA = {"premise": "비가 왔다.", "question": "결과", "choice1": "땅이 젖었다.", "choice2": "해가 떴다.", "label": 1}
SWAG = {"context": "공을 던진다.", "choices": ["친다.", "잔다.", "먹는다."], "label": 2}
KMMLU = {"question": "가장 가벼운 원소는?", "A": "수소", "B": "철", "C": "금", "D": "납", "answer": 1}


def problems(log):
    return [(problem.line, problem.field, problem.reason) for problem in log.problems]


@pytest.mark.parametrize(
    "content",
    [
        "idx\tpart\tscore\tsentence1\tsentence2\n0\tnews\t4.8\t물이 끓는다.\t물이 끓고 있다.\n",
        "idx\tpart\tscore\treal_score\tsentence1\tsentence2\n0\tx\t4.8\t4.75\t물이 끓는다.\t물이 끓고 있다.\n",
        "sentence1\tsentence2\tscore\r\n물이 끓는다.\t물이 끓고 있다.\t4.8\r\n",
    ],
)
def test_scored_pairs_are_read_by_the_names_of_their_columns(read, content):
    rows, log = read(content, "similarity")
    assert (rows, log.problems) == ([BOILS], [])


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
def test_scored_pairs_are_read_from_json_lines(read, name):
    content = json.dumps({"sentence1": BOILS.first, "sentence2": BOILS.second, "score": 4.8}).encode()
    assert read(gzip.compress(content) if name.endswith(".gz") else content, "similarity", name)[0] == [BOILS]


def test_a_file_without_its_header_is_refused_at_its_first_line(read):
    rows, log = read("물이 끓는다.\t물이 끓고 있다.\t4.8\n", "similarity")
    assert rows == []
    assert str(log.problems[0]) == (
        "data.tsv:1: no header that names each column once: sentence1, sentence2, score; "
        "write a header as the first line: sentence1<TAB>sentence2<TAB>score"
    )


def test_a_column_named_twice_is_no_header(read):
    assert problems(read("sentence1\tsentence2\tscore\tscore\na\tb\t1\t2\n", "similarity")[1]) == [(1, "", "no-header")]


@pytest.mark.parametrize(
    ("score", "reason"),
    [
        ("5.1", "out-of-range"),
        ("-0.1", "out-of-range"),
        ("nan", "wrong-type"),
        ("1e999", "not-finite"),
        ("alike", "wrong-type"),
    ],
)
def test_a_score_outside_the_scale_is_refused_with_its_place(read, score, reason):
    rows, log = read(f"sentence1\tsentence2\tscore\na\tb\t{score}\nc\td\t5\n", "similarity")
    assert rows == [SimilarityPair("c", "d", 5.0)]
    assert problems(log) == [(2, "score", reason)]
    assert "write a number from 0 to 5, drop the row or set data.on_error: skip" in str(log.problems[0])


@pytest.mark.parametrize(
    ("score", "reason"),
    [
        ("true", "wrong-type"),
        ("null", "wrong-type"),
        ("NaN", "not-finite"),
        ("9" * 4000, "out-of-range"),
        ("-" + "9" * 4000, "out-of-range"),
    ],
)
def test_a_json_score_must_be_a_number_on_the_scale(read, score, reason):
    content = f'{{"sentence1": "a", "sentence2": "b", "score": {score}}}'
    assert problems(read(content, "similarity", "data.jsonl")[1]) == [(1, "score", reason)]


def test_all_that_is_wrong_with_a_pair_is_told_at_once(read):
    _, log = read('{"sentence1": "", "score": 9}', "similarity", "data.jsonl")
    assert [field for _, field, _ in problems(log)] == ["sentence1", "sentence2", "score"]


def test_inference_pairs_keep_their_label(read):
    content = "idx\tpart\tlabel\tpremise\thypothesis\n0\tx\tentailment\t비가 온다.\t날씨가 흐리다.\n1\tx\tmaybe\ta\tb\n"
    rows, log = read(content, "inference")
    assert rows == [InferencePair("비가 온다.", "날씨가 흐리다.", "entailment")]
    assert problems(log) == [(3, "label", "unknown-value")]


@pytest.mark.parametrize(
    ("row", "question"),
    [
        (COPA, ChoiceQuestion("비가 왔다. 그래서", ("땅이 젖었다.", "해가 떴다."), 0)),
        (
            {**COPA, "question": "원인", "label": 2},
            ChoiceQuestion("비가 왔다. 왜냐하면", ("땅이 젖었다.", "해가 떴다."), 1),
        ),
        (SWAG, ChoiceQuestion("공을 던진다.", ("친다.", "잔다.", "먹는다."), 2)),
        (KMMLU, ChoiceQuestion("가장 가벼운 원소는?", ("수소", "철", "금", "납"), 0)),
        ({**KMMLU, "answer": "C"}, ChoiceQuestion("가장 가벼운 원소는?", ("수소", "철", "금", "납"), 2)),
    ],
)
def test_questions_are_read_in_the_forms_they_are_published_in(read, row, question):
    assert read(json.dumps(row), "choices", "data.jsonl")[0] == [question]


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({**COPA, "label": 0}, ("label", "out-of-range")),
        ({**COPA, "label": True}, ("label", "out-of-range")),
        ({**COPA, "question": "?"}, ("question", "unknown-value")),
        ({**SWAG, "label": 3}, ("label", "out-of-range")),
        ({**SWAG, "choices": ["친다."], "label": 0}, ("choices", "too-few-choices")),
        ({**SWAG, "choices": "친다."}, ("choices", "wrong-type")),
        ({**SWAG, "choices": ["친다.", "친다.", "잔다."]}, ("choices", "identical-sides")),
        ({**SWAG, "choices": ["친다.", "", "잔다."]}, ("choices[1]", "empty")),
        ({"question": "?", "answer": 1}, ("choices", "missing-field")),
        ({key: value for key, value in SWAG.items() if key != "label"}, ("label", "missing-field")),
    ],
)
def test_a_question_without_one_right_answer_is_refused(read, row, found):
    rows, log = read(json.dumps(row), "choices", "data.jsonl")
    assert rows == []
    assert found in [(problem.field, problem.reason) for problem in log.problems]
