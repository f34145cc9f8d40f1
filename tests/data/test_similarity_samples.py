import json
import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from soju.core.language import language_of
from soju.data.log import ReadLog
from soju.data.readers import read_rows
from soju.data.rows import SIMILARITY

SAMPLES = Path(__file__).resolve().parents[2] / "src" / "soju" / "samples"
DOMAINS = ("culture", "economy", "everyday", "it", "law", "medicine", "news", "science")
FIELDS = ("id", "domain", "language", "sentence1", "sentence2", "score")


@pytest.fixture(scope="module")
def rows():
    lines = (SAMPLES / "similarity.heldout.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_sample_is_read_without_a_problem(rows):
    log = ReadLog()
    pairs = list(read_rows(["samples:similarity.heldout"], SIMILARITY, log=log))
    assert (len(pairs), log.problems) == (len(rows), [])


def test_there_are_as_many_pairs_of_each_domain_and_language(rows):
    assert Counter((row["domain"], row["language"]) for row in rows) == {
        (domain, language): 16 for domain in DOMAINS for language in ("ko", "en")
    }


def test_file_form(rows):
    text = (SAMPLES / "similarity.heldout.jsonl").read_bytes().decode("utf-8")
    assert unicodedata.is_normalized("NFC", text)
    assert text == "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    assert [(row["domain"], row["id"]) for row in rows] == sorted((row["domain"], row["id"]) for row in rows)
    for row in rows:
        assert tuple(row) == FIELDS
        assert re.fullmatch(rf"{row['domain']}-{row['language']}-\d\d", row["id"])


def test_every_grade_is_used_in_steps_of_a_half(rows):
    for language in ("ko", "en"):
        counts = Counter(row["score"] for row in rows if row["language"] == language)
        assert set(counts) == {step / 2 for step in range(11)}
        assert min(counts.values()) >= 8


def test_sentences_are_of_their_language_and_stand_once(rows):
    texts = [row[side] for row in rows for side in ("sentence1", "sentence2")]
    assert len(set(texts)) == len(texts)
    assert {language_of(row[side]) == row["language"] for row in rows for side in ("sentence1", "sentence2")} == {True}
    assert all(text.endswith((".", "요.")) for text in texts)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_no_sentence_stands_in_a_passage(rows, split):
    lines = (SAMPLES / f"passages.{split}.jsonl").read_text(encoding="utf-8")
    assert [row["id"] for row in rows for side in ("sentence1", "sentence2") if row[side].rstrip(".") in lines] == []
