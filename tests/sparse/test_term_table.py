import numpy as np
import pytest
from scipy.sparse import csr_array

from soju.core.errors import DataError, UserError
from soju.sparse.export.formats import read_term_table, write_term_table

TERMS = ["쌀", "rice", "a\tb\\n\n"]
WEIGHTS = csr_array(np.float32([[1.0, 0.25, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 0.1]]))


def test_lines_are_sorted_by_source_then_falling_weight_then_target(tmp_path):
    path = tmp_path / "terms.tsv"
    assert write_term_table(path, WEIGHTS, TERMS) == 5
    assert path.read_text(encoding="utf-8").split("\n") == [
        "source\tsource_language\ttarget\ttarget_language\tweight",
        "a\\tb\\\\n\\n\ten\ta\\tb\\\\n\\n\ten\t0.1",
        "rice\ten\trice\ten\t0.5",
        "rice\ten\t쌀\tko\t0.5",
        "쌀\tko\t쌀\tko\t1",
        "쌀\tko\trice\ten\t0.25",
        "",
    ]


def test_a_table_read_back_is_the_same_to_the_bit(tmp_path):
    generator = np.random.default_rng(0)
    dense = generator.random((40, 40), np.float32) * (generator.random((40, 40)) < 0.1)
    names = [f"term\n{index}\\" for index in range(40)]
    write_term_table(tmp_path / "terms.tsv", csr_array(dense), names)
    np.testing.assert_array_equal(read_term_table(tmp_path / "terms.tsv", names).toarray(), dense)


def test_a_matrix_without_weights_round_trips(tmp_path):
    write_term_table(tmp_path / "terms.tsv", csr_array((2, 2), dtype=np.float32), ["a", "b"])
    assert read_term_table(tmp_path / "terms.tsv", ["a", "b"]).nnz == 0


def test_a_stored_zero_is_no_line(tmp_path):
    zero = csr_array((np.float32([0.0]), ([0], [1])), shape=(2, 2))
    assert write_term_table(tmp_path / "terms.tsv", zero, ["a", "b"]) == 0


def test_two_terms_of_one_name_are_refused_and_the_old_table_stays(tmp_path):
    path = tmp_path / "terms.tsv"
    path.write_text("old")
    with pytest.raises(UserError, match="make the names different"):
        write_term_table(path, csr_array(np.eye(2)), ["a", "a"])
    assert path.read_text() == "old"


def test_names_that_do_not_fit_the_matrix_are_refused(tmp_path):
    with pytest.raises(UserError, match="one name for each"):
        write_term_table(tmp_path / "terms.tsv", WEIGHTS, ["a"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a\ten\tb\ten", ":2: 4 cells instead of 5"),
        ("a\ten\tz\ten\t1", ":2: unknown term 'z'"),
        ("a\ten\tb\ten\tmuch", ":2: could not convert"),
        ("a\ten\t\\q\ten\t1", ":2: unknown escape"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    path = tmp_path / "terms.tsv"
    write_term_table(path, csr_array((2, 2)), ["a", "b"])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=message):
        read_term_table(path, ["a", "b"])


def test_another_header_is_refused(tmp_path):
    (tmp_path / "x.tsv").write_text("a\tb\n")
    with pytest.raises(UserError, match=r"x\.tsv:1: the header"):
        read_term_table(tmp_path / "x.tsv", ["a"])
