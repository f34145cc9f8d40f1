import importlib.util
from pathlib import Path

import pytest

from soju.core.errors import DataError
from soju.data.log import ReadLog
from soju.data.readers import read_rows
from soju.data.rows import TERMS, Term, TermRow

_FILE = Path(__file__).parent.parent / "fixtures" / "broken_rows.py"
_SPEC = importlib.util.spec_from_file_location("broken_rows", _FILE)
broken_rows = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(broken_rows)

REMEDIES = {
    "not-json": "write one",
    "not-an-object": "write one object a line",
    "missing-field": "data.on_error: skip",
    "empty": "write the text, drop the row or set data.on_error: skip",
    "wrong-type": "write",
    "no-terms": 'write "terms": [{"term": "program", "sim": 0.95}]',
    "out-of-range": "write a number above 0 and at most 1",
    "not-finite": "write a number above 0 and at most 1",
    "duplicate-key": "keep one of them",
    "lone-surrogate": "write the whole character",
    "nul-byte": "remove the",
    "control-character": "remove the",
    "cp949": "iconv -f CP949 -t UTF-8 terms.jsonl > NEW_FILE",
    "invalid-utf8": "save the row as UTF-8",
    "too-long": "raise data.max_line_bytes",
    "no-hangul": "write Korean in ko",
    "identical-sides": "remove the term",
    "duplicate-term": "keep one of them",
}


@pytest.fixture
def broken(tmp_path):
    expected = broken_rows.write_broken_terms(tmp_path / "terms.jsonl")
    log = ReadLog()
    rows = list(read_rows(["terms.jsonl"], TERMS, log=log, root=tmp_path))
    return rows, log, expected


def test_one_pass_lists_every_broken_row_with_its_line_and_reason(broken):
    _, log, expected = broken
    assert {problem.line: problem.reason for problem in log.problems} == expected
    assert len(log.problems) == len(expected)
    assert len(set(expected.values())) == len(REMEDIES)


def test_every_problem_prints_its_place_and_a_concrete_remedy(broken):
    _, log, _ = broken
    for problem in log.problems:
        assert str(problem).startswith(f"terms.jsonl:{problem.line}: ")
        assert REMEDIES[problem.reason] in str(problem)
        str(problem).encode()  # printable whatever the file held


def test_good_rows_among_broken_ones_are_read_and_normalised(broken):
    rows, log, expected = broken
    assert rows == [
        TermRow("프로그램", (Term("software", 1.0), Term("program", 0.95))),
        TermRow("가", (Term("price", 1.0),)),
    ]
    assert (log.kept, log.refused, log.normalised) == (2, len(expected), 1)


def test_broken_rows_stop_the_run_or_are_skipped_when_told_to(broken):
    _, log, expected = broken
    with pytest.raises(DataError, match=f"{len(expected) - 20} more"):
        log.raise_if_broken("stop")
    log.raise_if_broken("skip")
