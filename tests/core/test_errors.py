import pytest

from soju.core.errors import ConfigError, DataError, IntegrityError, MissingExtraError, Problem, UserError


def problem(line, field="ko"):
    return Problem("a.jsonl", line, field, "is empty", "drop the row", "empty")


def test_a_problem_reads_as_place_fault_and_remedy():
    assert str(problem(18)) == "a.jsonl:18: ko: is empty; drop the row"


def test_a_problem_of_the_whole_row_names_no_field():
    assert str(problem(18, field="")) == "a.jsonl:18: is empty; drop the row"


def test_a_data_error_shows_the_first_twenty_problems_and_how_many_follow():
    lines = str(DataError([problem(line) for line in range(1, 1301)])).splitlines()
    assert len(lines) == 21
    assert lines[19].startswith("a.jsonl:20:")
    assert lines[20] == "... and 1,280 more"


def test_a_data_error_shows_twenty_problems_without_a_last_line():
    assert str(DataError([problem(line) for line in range(20)])).count("\n") == 19


def test_a_data_error_counts_problems_it_does_not_hold():
    error = DataError([problem(1)], count=5)
    assert error.count == 5
    assert str(error).endswith("\n... and 4 more")


def test_a_missing_extra_gives_the_line_to_run():
    assert str(MissingExtraError("the ONNX export", "export")) == (
        "the ONNX export needs an optional package; run: pip install 'soju[export]'"
    )


@pytest.mark.parametrize("kind", [ConfigError, DataError, IntegrityError, MissingExtraError])
def test_every_error_for_users_is_a_value_error(kind):
    assert issubclass(kind, UserError)
    assert issubclass(kind, ValueError)
