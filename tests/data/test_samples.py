import json
import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

SAMPLES = Path(__file__).resolve().parents[2] / "src" / "soju" / "samples"
SPLITS = ("train", "heldout")
DOMAINS = ("culture", "economy", "everyday", "it", "law", "medicine", "news", "science")
PROBES = frozenset(
    [
        *("머신러닝", "딥러닝", "자연어처리", "인공지능", "검색엔진", "데이터베이스", "클라우드", "서버"),
        *("네트워크", "추천시스템", "추천", "신경망", "강화학습", "컴퓨터비전", "음성인식"),
    ]
)
PASSAGE_FIELDS = ("id", "domain", "ko", "en", "query_ko", "query_en")
HANGUL = re.compile("[가-힣]")
ANY_HANGUL = re.compile("[\u1100-\u11ff\u3130-\u318f\ua960-\ua97f\uac00-\ud7ff]")


def read_rows(kind, split):
    lines = (SAMPLES / f"{kind}.{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def without_spaces(word):
    return word.replace(" ", "")


def korean_words(row):
    words = {row["ko"]} | {term["term"] for term in row["terms"] if HANGUL.search(term["term"])}
    return {without_spaces(word) for word in words}


def sentences_of(passage):
    texts = (passage["ko"], passage["en"])
    return {part.strip() for text in texts for part in re.split(r"(?<=[.?!])\s+", text) if part.strip()}


def four_grams(text):
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[start : start + 4]) for start in range(len(words) - 3)}


@pytest.fixture(scope="module")
def terms():
    return {split: read_rows("terms", split) for split in SPLITS}


@pytest.fixture(scope="module")
def passages():
    return {split: read_rows("passages", split) for split in SPLITS}


@pytest.fixture(scope="module")
def term_rows(terms):
    return [row for split in SPLITS for row in terms[split]]


@pytest.fixture(scope="module")
def passage_rows(passages):
    return [row for split in SPLITS for row in passages[split]]


def test_counts(terms, passages):
    assert sum(map(len, terms.values())) >= 1500
    assert sum(map(len, passages.values())) >= 400
    assert 0.1 <= len(terms["heldout"]) / sum(map(len, terms.values())) <= 0.2
    assert Counter(row["domain"] for row in passages["heldout"]) == dict.fromkeys(DOMAINS, 15)
    assert {row["domain"] for row in terms["heldout"]} == set(DOMAINS)
    assert {row["domain"] for row in terms["train"]} == set(DOMAINS)
    assert {row["domain"] for row in passages["train"]} == set(DOMAINS)


@pytest.mark.parametrize("kind", ["terms", "passages"])
@pytest.mark.parametrize("split", SPLITS)
def test_file_form(kind, split):
    text = (SAMPLES / f"{kind}.{split}.jsonl").read_bytes().decode("utf-8")
    assert text.endswith("\n")
    assert "\r" not in text
    assert unicodedata.is_normalized("NFC", text)
    rows = read_rows(kind, split)
    assert text == "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    name = "ko" if kind == "terms" else "id"
    order = [(row["domain"], row[name]) for row in rows]
    assert order == sorted(order)


def test_term_rows(term_rows):
    for row in term_rows:
        assert set(row) == {"ko", "terms", "domain"}
        assert HANGUL.search(row["ko"])
        assert row["ko"] == row["ko"].strip()
        names = [term["term"] for term in row["terms"]]
        assert row["ko"] not in names
        assert len({without_spaces(name).lower() for name in names}) == len(names), row["ko"]
        for term in row["terms"]:
            assert set(term) == {"term", "sim"}
            assert 0.5 <= term["sim"] <= 1.0
            assert term["term"]
            assert term["term"] == term["term"].strip()


def test_terms_are_english_first_and_best_first(term_rows):
    for row in term_rows:
        order = [(bool(HANGUL.search(term["term"])), -term["sim"]) for term in row["terms"]]
        assert order == sorted(order), row["ko"]
        assert not order[0][0], f"{row['ko']} has no English term"


def test_head_words_are_unique(term_rows):
    counts = Counter(without_spaces(row["ko"]) for row in term_rows)
    assert [word for word, count in counts.items() if count > 1] == []


def test_probes_are_reserved(term_rows):
    used = set().union(*map(korean_words, term_rows))
    assert used & PROBES == set()


def test_heldout_words_are_not_in_training_terms(terms):
    heldout = set().union(*(korean_words(row) for row in terms["heldout"]))
    training = set().union(*(korean_words(row) for row in terms["train"]))
    assert heldout & training == set()


def test_no_training_head_contains_a_heldout_head(terms):
    heldout = [without_spaces(row["ko"]) for row in terms["heldout"]]
    leaks = [(row["ko"], word) for row in terms["train"] for word in heldout if word in without_spaces(row["ko"])]
    assert leaks == []


def test_passage_rows(passage_rows):
    for row in passage_rows:
        assert tuple(row) == PASSAGE_FIELDS
        assert re.fullmatch(rf"{row['domain']}-\d{{3}}", row["id"])
        for field in PASSAGE_FIELDS:
            assert row[field]
            assert row[field] == row[field].strip()
        for field in ("ko", "query_ko"):
            assert HANGUL.search(row[field]), row["id"]
        for field in ("en", "query_en"):
            assert not ANY_HANGUL.search(row[field]), row["id"]


@pytest.mark.parametrize("field", ["id", "ko", "en", "query_ko", "query_en"])
def test_passages_are_unique(passage_rows, field):
    assert [text for text, count in Counter(row[field] for row in passage_rows).items() if count > 1] == []


def test_heldout_passages_share_no_sentence_with_training(passages):
    heldout = set().union(*map(sentences_of, passages["heldout"]))
    training = set().union(*map(sentences_of, passages["train"]))
    assert heldout & training == set()


def test_queries_do_not_copy_their_passage(passage_rows):
    copied = [
        (row["id"], row[f"query_{side}"])
        for row in passage_rows
        for side in ("ko", "en")
        if four_grams(row[f"query_{side}"]) & four_grams(row[side])
    ]
    assert copied == []
