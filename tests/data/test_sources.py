import json
import os

import pytest

from soju.data import sources
from soju.data.log import ReadLog
from soju.data.readers import read_rows
from soju.data.rows import KINDS, PairRow

LINE = "안녕\tHello\n"


def read_from(root, *names, kind="pairs"):
    log = ReadLog()
    return list(read_rows(names, KINDS[kind], log=log, root=root)), log


def test_a_pattern_reads_its_matches_in_the_order_of_their_names(tmp_path):
    for name, text in (("b.tsv", "둘\ttwo\n"), ("a.tsv", "하나\tone\n"), ("c.md", "x")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "folder.tsv").mkdir()
    rows, log = read_from(tmp_path, "*.tsv")
    assert [row.en for row in rows] == ["one", "two"]
    assert list(log.sources) == ["a.tsv", "b.tsv"]


def test_a_file_whose_name_looks_like_a_pattern_is_read(tmp_path):
    (tmp_path / "a[1].tsv").write_text(LINE, encoding="utf-8")
    assert read_from(tmp_path, "a[1].tsv")[0] == [PairRow("안녕", "Hello")]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("nowhere.tsv", "missing-file"),
        ("nul\0.tsv", "missing-file"),
        ("file.tsv/inside.tsv", "missing-file"),
        ("nowhere/*.tsv", "no-match"),
        (".", "folder"),
        ("samples:nothing", "unknown-sample"),
        ("samples:../data/rows", "unknown-sample"),
        ("hub:owner/name", "hub-syntax"),
        ("hub:owner/name:train:ko=", "hub-syntax"),
    ],
)
def test_a_source_that_names_nothing_readable_is_one_problem_at_line_0(tmp_path, source, reason):
    (tmp_path / "file.tsv").write_text(LINE, encoding="utf-8")
    rows, log = read_from(tmp_path, source)
    assert rows == []
    assert [(problem.line, problem.reason) for problem in log.file_problems] == [(0, reason)]


def test_a_file_that_is_not_there_is_named_as_it_was_looked_for(tmp_path):
    problem = str(read_from(tmp_path, "nowhere.tsv")[1].problems[0])
    assert problem.startswith(f"nowhere.tsv:0: no such file (looked for {tmp_path / 'nowhere.tsv'}); ")


def test_no_source_at_all_is_a_problem(tmp_path):
    assert read_from(tmp_path)[1].reasons == {"no-source": 1}


def test_a_file_without_permission_is_refused(tmp_path):
    path = tmp_path / "data.tsv"
    path.write_text(LINE, encoding="utf-8")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read every file")
    assert read_from(tmp_path, "data.tsv")[1].reasons == {"no-permission": 1}


def test_a_refused_permission_is_told_with_its_remedy(tmp_path, monkeypatch):
    (tmp_path / "data.tsv").write_text(LINE, encoding="utf-8")
    monkeypatch.setattr("pathlib.Path.open", _refuse)
    assert "chmod u+r" in str(read_from(tmp_path, "data.tsv")[1].problems[0])


def _refuse(*_):
    raise PermissionError(13, "Permission denied")


def test_a_sample_is_read_from_the_package(tmp_path, monkeypatch):
    folder = tmp_path / "samples"
    folder.mkdir()
    (folder / "pairs.jsonl").write_text('{"ko": "안녕", "en": "Hello"}\n', encoding="utf-8")
    monkeypatch.setattr(sources.importlib.resources, "files", lambda _: tmp_path)
    assert read_from(None, "samples:pairs")[0] == [PairRow("안녕", "Hello")]


def test_a_hub_data_set_is_streamed_with_its_columns_renamed(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "set"
    folder.mkdir()
    lines = [{"translation": {"korean": "안녕", "en": "Hello"}}, {"translation": {"korean": "", "en": "Bye"}}]
    (folder / "train.jsonl").write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    source = f"hub:{folder}:train:ko=translation.korean,en=translation.en"
    rows, log = read_from(None, source)
    assert rows == [PairRow("안녕", "Hello")]
    assert [(problem.file, problem.line, problem.field, problem.reason) for problem in log.problems] == [
        (source, 2, "ko", "empty")
    ]


def test_a_hub_data_set_that_is_not_there_is_a_problem(tmp_path):
    rows, log = read_from(None, f"hub:{tmp_path}/nowhere:train")
    assert (rows, log.reasons) == ([], {"hub": 1})


def test_a_hub_source_may_name_a_configuration():
    log = ReadLog()
    (found,) = sources.resolve(["hub:owner/name/ko:train"], "pairs", root=None, log=log)
    assert (found.dataset, found.configuration, found.split) == ("owner/name", "ko", "train")
