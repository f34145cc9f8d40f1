"""Valid files are damaged at random: reading must never raise and never hand out a row that breaks a promise."""

import gzip
import json
import tempfile
import unicodedata
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from soju.core.errors import DataError
from soju.core.language import is_hangul
from soju.data.log import ReadLog
from soju.data.readers import read_rows
from soju.data.rows import DIFFICULTIES, KINDS, PAIR_TYPES, PairRow, TermRow, TripletRow

TERMS = [
    {"ko": "프로그램", "terms": [{"term": "program", "sim": 0.95}, "software"], "src": ["a"]},
    {"ko": "가", "terms": [{"term": "edge", "sim": 1}, {"term": "가장자리", "sim": 0.9}]},
]
PAIRS = [{"ko": "안녕하세요, 여러분.", "en": "Hello, everyone."}, {"ko": "값 “3”을 넣는다", "en": "Put in “3” 값"}]
TRIPLETS = [
    {"query": "단추", "positive": "button", "negative": "zipper", "pair_type": "single_term", "difficulty": "easy"},
    {"query": "물", "positive": "water", "negative": "불", "pair_type": "cross_lingual", "difficulty": "hard"},
]
DOCUMENTS = [{"id": 1, "text": "물을 끓인다."}, {"_id": "b", "title": "Tea", "text": "차 한 잔"}]
PASSAGES = [{"id": "p", "domain": "x", "ko": "물", "en": "water", "query_ko": "물?", "query_en": "water?"}]


def as_jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_tsv(rows):
    return "".join("\t".join(map(str, row.values())) + "\n" for row in rows).encode()


SEEDS = [
    ("terms", "jsonl", as_jsonl(TERMS)),
    ("pairs", "jsonl", as_jsonl(PAIRS)),
    ("pairs", "tsv", as_tsv(PAIRS)),
    ("pairs", "tsv", b"ko\ten\n" + as_tsv(PAIRS)),
    ("triplets", "jsonl", as_jsonl(TRIPLETS)),
    ("triplets", "tsv", as_tsv(TRIPLETS)),
    ("documents", "jsonl", as_jsonl(DOCUMENTS)),
    ("documents", "tsv", "1\t물\nb\t차 한 잔\n".encode()),
    ("documents", "txt", "물을 끓인다.\n차 한 잔\n".encode()),
    ("passages", "jsonl", as_jsonl(PASSAGES)),
    ("passages", "tsv", as_tsv(PASSAGES)),
]
PIECES = [
    *(
        b"\0",
        b"\xff",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b"\r",
        b"\n",
        b"\r\n",
        b"\t",
        b"\x07",
        b" ",
        b'"',
        b"\\",
        b"{",
        b"[[",
    ),
    *(
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"9" * 5000,
        b"null",
        b"true",
        b"\\ud800",
        b"\\u0000",
        b"\\u0085",
        b'"ko":',
        b",",
    ),
    *(
        "한국어".encode("cp949"),
        "한".encode("utf-16"),
        "\u1112\u1161".encode(),
        "\u200b".encode(),
        b"[" * 3000,
        b"a" * 300,
    ),
]

edits = st.lists(
    st.tuples(
        st.sampled_from(["insert", "delete", "replace", "repeat", "cut"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(1, 12),
        st.one_of(st.sampled_from(PIECES), st.binary(min_size=1, max_size=4)),
    ),
    min_size=1,
    max_size=6,
)


def damaged(data, changes):
    for action, where, length, piece in changes:
        start = int(where * (len(data) + 1))
        end = start + length
        data = {
            "insert": data[:start] + piece + data[start:],
            "delete": data[:start] + data[end:],
            "replace": data[:start] + piece + data[end:],
            "repeat": data[:end] + data[start:],
            "cut": data[:start] if where > 0.5 else data[start:],
        }[action]
    return data


def texts_of(row):
    values = [getattr(row, field.name) for field in fields(row)]
    return [value for value in values if isinstance(value, str)] + [term.text for term in getattr(row, "terms", ())]


def check_promises(row):
    for text in texts_of(row):
        assert text == text.strip() != ""
        assert unicodedata.is_normalized("NFC", text)
        text.encode("utf-8")
        assert all(unicodedata.category(character) != "Cc" or character in "\t\n\r" for character in text)
    if isinstance(row, TermRow | PairRow):
        assert any(map(is_hangul, row.ko))
    if isinstance(row, TermRow):
        similarities = [term.similarity for term in row.terms]
        assert similarities == sorted(similarities, reverse=True)
        assert all(type(value) is float and 0 < value <= 1 for value in similarities)
        assert len({row.ko, *(term.text for term in row.terms)}) == len(row.terms) + 1 > 1
    if isinstance(row, PairRow):
        assert row.ko != row.en
        assert 2 * sum(map(is_hangul, row.en)) <= sum(map(str.isalpha, row.en)) or not any(map(is_hangul, row.en))
    if isinstance(row, TripletRow):
        assert len({row.query, row.positive, row.negative}) == 3
        assert row.pair_type in PAIR_TYPES
        assert row.difficulty in DIFFICULTIES


def read_damaged(seed, changes, compressed, damage_before):
    kind, ending, data = seed
    if compressed:
        data = (
            gzip.compress(damaged(data, changes)) if damage_before else damaged(gzip.compress(data, mtime=0), changes)
        )
    else:
        data = damaged(data, changes)
    with tempfile.TemporaryDirectory() as folder:
        name = f"data.{ending}{'.gz' if compressed else ''}"
        (Path(folder) / name).write_bytes(data)
        log = ReadLog()
        rows = list(read_rows([name], KINDS[kind], log=log, root=Path(folder), max_line_bytes=2000))
    for row in rows:
        check_promises(row)
    assert log.kept == len(rows)
    assert len(log.problems) == log.reasons.total() >= log.refused
    for problem in log.problems:
        assert problem.reason
        assert problem.remedy
        str(problem).encode("utf-8")
    if log.problems:
        with pytest.raises(DataError):
            log.raise_if_broken()
    else:
        assert rows
        log.raise_if_broken()


damages = given(st.sampled_from(SEEDS), edits, st.sampled_from([False, False, False, True]), st.booleans())


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@damages
def test_300_damaged_files_never_crash_and_never_yield_a_wrong_row(seed, changes, compressed, damage_before):
    read_damaged(seed, changes, compressed, damage_before)


@pytest.mark.slow
@settings(max_examples=12_000, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@damages
def test_12000_damaged_files_never_crash_and_never_yield_a_wrong_row(seed, changes, compressed, damage_before):
    read_damaged(seed, changes, compressed, damage_before)
