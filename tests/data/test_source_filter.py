import gzip

import pytest

from soju.data.log import ReadLog
from soju.data.readers import SourceFilter, read_rows
from soju.data.rows import PAIRS

DATA = "하나\tone\nbroken\n둘\ttwo\n"


def read_selected(folder, data, companion, keep, source="data.tsv"):
    (folder / "data.tsv").write_text(data, encoding="utf-8")
    (folder / "data.src.gz").write_bytes(gzip.compress(companion.encode()))
    log = ReadLog()
    select = SourceFilter("data.src.gz", keep)
    rows = list(read_rows([source], PAIRS, log=log, root=folder, select=select))
    return [row.en for row in rows], log


@pytest.mark.parametrize("header", ["", "ko\ten\n"])
def test_only_lines_of_wanted_sources_are_read(tmp_path, header):
    texts, log = read_selected(tmp_path, header + DATA, "a\tx/1\nb\nc\n", ("a", "c"))
    assert (texts, log.refused, log.sources["data.tsv"].deselected) == (["one", "two"], 0, 1)


@pytest.mark.parametrize("companion", ["a\nb\n", "a\nb\na\na\n"])
def test_files_of_different_length_are_refused(tmp_path, companion):
    _, log = read_selected(tmp_path, DATA, companion, ("a",))
    assert [(problem.file, problem.reason) for problem in log.file_problems] == [("data.src.gz", "misaligned")]


def test_a_source_that_never_occurs_is_refused_with_the_known_ones(tmp_path):
    _, log = read_selected(tmp_path, DATA, "a\nb\na\n", ("A",))
    assert str(log.problems[0]) == "data.src.gz:0: no line has the source A; write some of a, b"


def test_a_filter_serves_one_file_only(tmp_path):
    (tmp_path / "more.tsv").write_text(DATA, encoding="utf-8")
    texts, log = read_selected(tmp_path, DATA, "a\nb\na\n", ("a",), source="*.tsv")
    assert (texts, log.reasons) == ([], {"select-several": 1})


def test_a_missing_companion_is_refused(tmp_path):
    (tmp_path / "data.tsv").write_text(DATA, encoding="utf-8")
    log = ReadLog()
    select = SourceFilter("nowhere.src.gz", ("a",))
    assert list(read_rows(["data.tsv"], PAIRS, log=log, root=tmp_path, select=select)) == []
    assert log.reasons == {"missing-file": 1}
