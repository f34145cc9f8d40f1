import pytest

from soju.core.errors import UserError
from soju.data.statistics import find_overlap, normalise_for_overlap, refuse_overlap


def test_case_marks_and_composition_do_not_hide_an_overlap():
    assert normalise_for_overlap(" Café, \u1112\u1161\u11ab_2! ") == normalise_for_overlap("CAFE\u0301한2") == "café한2"


def test_overlap_is_in_evaluation_order_and_repeats_repeated_texts():
    assert find_overlap(["b!", "A", "a"], ["a.", "x", "B", "a"]) == ["a.", "B", "a"]


def test_texts_without_a_letter_or_digit_do_not_overlap():
    assert find_overlap(["...", ""], ["!?"]) == []


def test_training_is_streamed_no_further_than_needed():
    texts = iter(["a", "b", "c"])
    find_overlap(texts, ["a"])
    assert list(texts) == ["c"]


def test_an_overlap_is_refused_with_count_examples_and_remedy():
    with pytest.raises(
        UserError, match=r"4 texts of dev\.tsv .*'a', 'b', 'c' and 1 more; remove them from the training"
    ):
        refuse_overlap(["a", "b", "c", "d"], ["a", "b", "c", "d", "e"], evaluation="dev.tsv")


def test_disjoint_texts_pass():
    refuse_overlap(["a"], ["b"])
