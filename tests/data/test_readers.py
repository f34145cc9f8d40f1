import gzip
import json
import tracemalloc

import pytest

from soju.core.errors import DataError
from soju.data.log import ReadLog
from soju.data.readers import read_rows
from soju.data.rows import DOCUMENTS, PAIRS, Document, PairRow, TripletRow

PAIR = PairRow("안녕", "Hello")


def reasons(log):
    return [(problem.line, problem.reason) for problem in log.problems]


@pytest.mark.parametrize("name", ["data.jsonl", "data.json-lines", "data.ndjson", "data.jsonl.gz"])
def test_pairs_are_read_from_json_lines(read, name):
    content = '{"ko": "안녕", "en": "Hello"}\n'.encode()
    assert read(gzip.compress(content) if name.endswith(".gz") else content, name=name)[0] == [PAIR]


@pytest.mark.parametrize("header", ["", "ko\ten\n", "\ufeffko\ten\r\n"])
def test_a_tsv_header_is_recognised(read, header):
    rows, log = read(f"{header}안녕\tHello\n")
    assert (rows, log.refused) == ([PAIR], 0)


def test_a_tsv_header_may_change_the_order_of_columns(read):
    assert read("en\tko\nHello\t안녕\n")[0] == [PAIR]


def test_line_ends_of_every_kind_are_counted_alike(read):
    rows, log = read("안녕\tHello\r\n안녕\tHello\rbroken\n안녕\tHello")
    assert len(rows) == 3
    assert reasons(log) == [(3, "wrong-columns")]


def test_blank_lines_are_passed_over_and_counted(read):
    rows, log = read("안녕\tHello\n\n  \n")
    assert (len(rows), log.refused, log.sources["data.tsv"].blank) == (1, 0, 2)


def test_plain_text_is_one_document_a_line_numbered_from_one(read):
    assert read("물\n\n불\n", "documents", "data.txt")[0] == [Document("1", "물"), Document("3", "불")]


def test_documents_of_several_text_files_have_different_ids(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("물\n", encoding="utf-8")
    rows = list(read_rows(["*.txt"], DOCUMENTS, log=ReadLog(), root=tmp_path))
    assert [row.id for row in rows] == ["a.txt:1", "b.txt:1"]


def test_an_id_used_twice_is_refused_with_its_first_place(read):
    rows, log = read("1\t물\n1\t불\n", "documents")
    assert rows == [Document("1", "물")]
    assert str(log.problems[0]).startswith("data.tsv:2: id: '1' was the id of data.tsv:1 already; give every row")


def test_triplets_are_read_from_five_columns(read):
    rows, _ = read("단추\tbutton\tzipper\tsingle_term\teasy\n", "triplets")
    assert rows == [TripletRow("단추", "button", "zipper", "single_term", "easy")]


def test_passages_are_read_from_json(read):
    row = {"id": 1, "domain": "x", "ko": "물", "en": "water", "query_ko": "물", "query_en": "water"}
    rows, _ = read(json.dumps(row), "passages", "data.jsonl")
    assert (rows[0].id, rows[0].query_en) == ("1", "water")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_a_utf16_file_is_one_problem_not_one_a_line(read, encoding):
    rows, log = read("안녕\tHello there\n".encode(encoding) * 50)
    assert (rows, reasons(log)) == ([], [(0, "utf-16")])
    assert "iconv -f UTF-16 -t UTF-8 data.tsv" in str(log.problems[0])


def test_a_truncated_gzip_keeps_the_whole_lines_before_the_break(read):
    lines = [f"안녕 {number}\t{number * 7919 % 10007} Hello\n" for number in range(50_000)]
    data = gzip.compress("".join(lines).encode())
    rows, log = read(data[: len(data) // 2], name="data.tsv.gz")
    assert len(rows) > 1000
    assert rows[-1].en == lines[len(rows) - 1].split("\t")[1].strip()
    assert reasons(log) == [(len(rows) + 1, "truncated-gzip")]
    with pytest.raises(DataError, match="gzip -t"):
        log.raise_if_broken("skip")


def test_altered_gzip_data_are_refused(read):
    data = bytearray(gzip.compress("안녕\tHello\n".encode() * 50))
    data[-5] ^= 1  # in the checksum
    assert read(bytes(data), name="data.tsv.gz")[1].reasons == {"broken-gzip": 1}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("data.tsv.gz", b"plain", "not-gzip"),
        ("data.tsv.gz", b"", "not-gzip"),
        ("data.tsv", gzip.compress(b"x", mtime=0), "gzip-without-ending"),
        ("data.tsv", b"", "no-rows"),
        ("data.tsv", b"\n \n", "no-rows"),
        ("data.csv", b"x", "unknown-ending"),
        ("data", b"x", "unknown-ending"),
        ("data.json", b"[]", "unknown-ending"),
        ("data.txt", b"x", "wrong-format"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused(read, name, content, reason):
    rows, log = read(content, name=name)
    assert (rows, reasons(log)) == ([], [(0, reason)])


def test_a_long_line_is_refused_without_being_held_in_memory(tmp_path):
    with (tmp_path / "data.tsv").open("wb") as file:
        for _ in range(10):
            file.write(b"a" * 1_000_000)
        file.write("\n안녕\tHello\n".encode())
    log = ReadLog()
    tracemalloc.start()
    rows = list(read_rows(["data.tsv"], PAIRS, log=log, root=tmp_path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (rows, reasons(log)) == ([PAIR], [(1, "too-long")])
    assert peak < 5_000_000


def test_the_log_keeps_a_thousand_problems_and_counts_the_rest(read):
    _, log = read("broken\n" * 1500 + "안녕\tHello\n")
    assert (len(log.problems), log.reasons["wrong-columns"], log.refused) == (1000, 1500, 1500)
    with pytest.raises(DataError, match="1,480 more"):
        log.raise_if_broken()
    log.raise_if_broken("skip")


def test_skip_does_not_accept_a_reading_without_a_row(read):
    _, log = read("broken\n")
    with pytest.raises(DataError, match="1 column instead of 2"):
        log.raise_if_broken("skip")


def test_the_log_is_plain_json(read):
    _, log = read("안녕\tHello\nbroken\n")
    assert json.loads(json.dumps(log.to_json())) == {
        "kept": 1,
        "refused": 1,
        "normalised": 0,
        "reasons": {"wrong-columns": 1},
        "sources": {"data.tsv": {"kept": 1, "refused": 1, "normalised": 0, "blank": 0, "deselected": 0}},
    }
