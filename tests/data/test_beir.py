"""Folders in the layout of BEIR."""

import gzip

import pytest

from beir_folders import CORPUS, QRELS, QUERIES, write_beir
from soju.core.errors import DataError
from soju.data.log import ReadLog
from soju.data.readers import read_beir


def read(tmp_path, split="test", **files):
    write_beir(tmp_path / "set", split=split, **files)
    log = ReadLog()
    return read_beir("set", log=log, split=split, root=tmp_path), log


def problems(tmp_path, **files):
    return [(str(problem), problem.reason) for problem in read(tmp_path, **files)[1].problems]


def test_titles_stand_before_texts_and_only_answered_queries_are_asked(tmp_path):
    found, log = read(tmp_path)
    log.raise_if_broken()
    assert found.documents["d1"] == "vaccine vaccines protect people"
    assert list(found.documents) == ["d1", "d2", "d3", "d4", "d5"]
    assert found.queries == {"q1": "백신", "q2": "학교"}  # q3 has no answer, the last no judgement
    assert found.judgements == {"q1": {"d1": 2.0, "d5": 1.0}, "q2": {"d3": 1.0}}
    assert log.sources["set/qrels/test.tsv"].kept == 5


def test_another_split_and_compressed_files_are_read(tmp_path):
    folder = write_beir(tmp_path / "set", split="dev")
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/dev.tsv"):
        (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
        (folder / name).unlink()
    assert read_beir(str(folder), log=(log := ReadLog()), split="dev").judgements["q2"] == {"d3": 1.0}
    assert log.problems == []


@pytest.mark.parametrize(
    ("row", "reason", "words"),
    [
        ("q9\td1\t1", "unknown-id", "set/qrels/test.tsv:7: query-id: 'q9' is no id of queries.jsonl; add it there"),
        ("q1\td9\t1", "unknown-id", "set/qrels/test.tsv:7: corpus-id: 'd9' is no id of corpus.jsonl; add it there"),
        ("q1\td1\t1", "duplicate-judgement", "set/qrels/test.tsv:7: 'd1' was judged for 'q1' in line 2 already"),
        ("q1\td2\t0.5", "not-a-whole-number", "set/qrels/test.tsv:7: score: '0.5' is no whole number"),
        ("q1\td2\tyes", "not-a-whole-number", "set/qrels/test.tsv:7: score: 'yes' is no whole number"),
        ("q1\td2", "wrong-columns", "set/qrels/test.tsv:7: 2 columns instead of 3"),
        ("q1\t\t1", "empty", "set/qrels/test.tsv:7: corpus-id: empty"),
    ],
)
def test_broken_judgements_are_refused_at_their_line(tmp_path, row, reason, words):
    ((text, found),) = problems(tmp_path, qrels=(*QRELS, row))
    assert found == reason
    assert text.startswith(words)


def test_broken_documents_and_queries_are_refused_at_their_line(tmp_path):
    found = problems(tmp_path, corpus=(*CORPUS, '{"_id": "d1", "text": "again"}'), queries=(*QUERIES, '{"_id": "q5"}'))
    assert [reason for _, reason in found] == ["duplicate-id", "missing-field"]
    assert found[0][0].startswith("set/corpus.jsonl:6: id: 'd1' was the id of set/corpus.jsonl:1")
    assert found[1][0].startswith("set/queries.jsonl:5: text: missing")


def test_a_broken_document_takes_its_judgements_along(tmp_path):
    found = problems(tmp_path, corpus=(*CORPUS[:4], '{"_id": "d5"}'))
    assert [reason for _, reason in found] == ["missing-field", "unknown-id"]


def test_a_missing_file_is_one_problem_and_not_one_a_judgement(tmp_path):
    folder = write_beir(tmp_path / "set")
    (folder / "corpus.jsonl").unlink()
    log = ReadLog()
    read_beir("set", log=log, root=tmp_path)
    assert [problem.reason for problem in log.problems] == ["missing-file"]
    with pytest.raises(DataError, match=r"set/corpus\.jsonl:0: no such file"):
        log.raise_if_broken("skip")


def test_a_missing_split_names_its_file(tmp_path):
    write_beir(tmp_path / "set")
    log = ReadLog()
    assert read_beir("set", log=log, split="train", root=tmp_path).queries == {}
    assert [problem.file for problem in log.problems] == ["set/qrels/train.tsv"]
