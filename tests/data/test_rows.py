import sys

import pytest

from soju.core.language import is_hangul
from soju.data.log import HANGUL, Place
from soju.data.rows import (
    Document,
    PairRow,
    PassageRow,
    Term,
    TermRow,
    TripletRow,
    parse_document,
    parse_pair,
    parse_passage,
    parse_terms,
    parse_triplet,
)

TRIPLET = {
    "query": "단추",
    "positive": "button",
    "negative": "zipper",
    "pair_type": "single_term",
    "difficulty": "easy",
}
PASSAGE = {
    "id": "p1",
    "domain": "kitchen",
    "ko": "물을 끓인다.",
    "en": "Boil the water.",
    "query_ko": "물 끓이기",
    "query_en": "boiling water",
}


def parsed(parse, row):
    place = Place("data.jsonl", 3)
    return parse(row, place), [(problem.field, problem.reason) for problem in place.problems]


def test_terms_come_out_best_first_and_a_bare_string_counts_one():
    row = {
        "ko": "가사",
        "terms": [{"term": "housework", "sim": 0.8}, {"term": "우산", "sim": 0.9}, "lyrics"],
        "src": ["x"],
    }
    expected = TermRow("가사", (Term("lyrics", 1.0), Term("우산", 0.9), Term("housework", 0.8)), ("x",))
    assert parsed(parse_terms, row) == (expected, [])


def test_every_problem_of_a_row_is_reported():
    row = {"ko": "price", "terms": [3, {"term": "", "sim": 2}]}
    expected = [("terms[0]", "wrong-type"), ("terms[1].term", "empty"), ("terms[1].sim", "out-of-range")]
    assert parsed(parse_terms, row) == (None, [("ko", "no-hangul"), *expected])


@pytest.mark.parametrize("similarity", [0, -0.5, 1.0000001, 10**400])
def test_a_similarity_outside_its_range_is_refused(similarity):
    row = {"ko": "가", "terms": [{"term": "edge", "sim": similarity}]}
    assert parsed(parse_terms, row) == (None, [("terms[0].sim", "out-of-range")])


def test_a_pair_is_stripped_and_composed():
    place = Place("data.tsv", 1)
    assert parse_pair({"ko": " \u1112\u1161\u11ab ", "en": "cafe\u0301"}, place) == PairRow("한", "café")
    assert place.normalised


@pytest.mark.parametrize(
    ("ko", "en", "field", "reason"),
    [
        ("Hello", "안녕하세요", "ko", "swapped-languages"),
        ("Hello", "Good day", "ko", "no-hangul"),
        ("안녕", "안녕하세요 여러분 ok", "en", "mostly-hangul"),
        ("안녕", "안녕", "en", "identical-sides"),
        ("안녕", " \u200b ", "en", "empty"),
    ],
)
def test_a_pair_in_the_wrong_language_is_refused(ko, en, field, reason):
    assert parsed(parse_pair, {"ko": ko, "en": en}) == (None, [(field, reason)])


@pytest.mark.parametrize(
    ("ko", "en"),
    [
        ("print() 함수", "The print() function"),
        ("API 키", "API key (API 키)"),
        ("삼", "3"),
        ("첫째\n둘째", "first\nsecond"),
    ],
)
def test_mixed_texts_of_real_data_are_kept(ko, en):
    assert parsed(parse_pair, {"ko": ko, "en": en}) == (PairRow(ko, en), [])


def test_a_triplet_is_read_whole():
    assert parsed(parse_triplet, TRIPLET) == (TripletRow(**TRIPLET), [])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"negative": "button"}, ("negative", "identical-sides")),
        ({"positive": "단추"}, ("positive", "identical-sides")),
        ({"pair_type": "cross-lingual"}, ("pair_type", "unknown-value")),
        ({"difficulty": 3}, ("difficulty", "wrong-type")),
    ],
)
def test_a_triplet_that_teaches_nothing_is_refused(change, problem):
    assert parsed(parse_triplet, TRIPLET | change) == (None, [problem])


@pytest.mark.parametrize(
    ("row", "document"),
    [
        ({"id": 7, "text": "물"}, Document("7", "물")),
        ({"_id": "d7", "title": "물", "text": "끓인다"}, Document("d7", "물 끓인다")),
        ({"_id": "d7", "title": "물", "text": ""}, Document("d7", "물")),
        ({"_id": "d7", "title": "", "text": "물"}, Document("d7", "물")),
    ],
)
def test_documents_are_read_with_and_without_a_title(row, document):
    assert parsed(parse_document, row) == (document, [])


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"text": "물"}, ("id", "missing-field")),
        ({"id": True, "text": "물"}, ("id", "wrong-type")),
        ({"id": 1.5, "text": "물"}, ("id", "wrong-type")),
        ({"id": "1", "title": "물"}, ("text", "missing-field")),
        ({"id": "1", "title": 3, "text": "물"}, ("title", "wrong-type")),
        ({"id": "1", "text": {"ko": "물"}}, ("text", "wrong-type")),
    ],
)
def test_unusable_documents_are_refused(row, problem):
    result, problems = parsed(parse_document, row)
    assert result is None
    assert problems == [problem]


def test_a_korean_query_may_be_without_hangul():
    row = PASSAGE | {"query_ko": "GPU vs CPU"}
    assert parsed(parse_passage, row) == (PassageRow(**row), [])


def test_an_english_query_in_korean_is_refused():
    assert parsed(parse_passage, PASSAGE | {"query_en": "물 끓이기"}) == (None, [("query_en", "mostly-hangul")])


def test_hangul_is_what_core_calls_hangul():
    assert all(is_hangul(chr(code)) == bool(HANGUL.match(chr(code))) for code in range(min(sys.maxunicode, 0x1FFFF)))


def test_a_query_pair_may_be_latin_on_both_sides_but_not_swapped(read):
    rows, log = read('{"ko": "wwe", "en": "wwe"}\n{"ko": "first man", "en": "퍼스트맨"}', "query_pairs", "data.jsonl")
    assert rows == [PairRow("wwe", "wwe")]
    assert [problem.reason for problem in log.problems] == ["swapped-languages"]
