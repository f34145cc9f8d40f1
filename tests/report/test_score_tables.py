import pytest
from report_runs import comparison, score

from soju.core.results import Score
from soju.report.contents import Comparison
from soju.report.tables import build_tables, describe_tests, direction_label, finding_of


def scores(*rows):
    return [Score.from_json(row) for row in rows]


def best(table, column=0):
    return [subject for group in table.groups for subject, cells in group.rows if cells[column] and cells[column].best]


def marks(table):
    return [mark.symbol for group in table.groups for _, cells in group.rows for c in cells if c for mark in c.marks]


def compared(**changes):
    return Comparison.from_json(comparison(**changes))


def test_each_test_set_is_one_table_with_a_group_for_each_direction():
    rows = [score(test_set=name) for name in ("parallel.dev/ko-en", "news", "parallel.dev/en-ko")]
    tables = build_tables(scores(*rows))
    assert [table.test_set for table in tables] == ["parallel.dev", "news"]
    assert [group.label for group in tables[0].groups] == ["Korean → English", "English → Korean"]
    assert [group.label for group in tables[1].groups] == [""]


def test_an_unknown_direction_is_written_as_it_is():
    assert direction_label("ko") == "Korean"
    assert direction_label("spacing-errors") == "spacing-errors"


def test_the_highest_value_is_best_when_higher_is_better():
    assert best(build_tables(scores(score("a", 0.4), score("b", 0.6)))[0]) == ["b"]


def test_the_lowest_value_is_best_when_lower_is_better():
    rows = [score(s, v, name="latency", unit="milliseconds", higher_is_better=False) for s, v in (("a", 3), ("b", 5))]
    assert best(build_tables(scores(*rows))[0]) == ["a"]


def test_values_that_read_the_same_are_best_together():
    assert best(build_tables(scores(score("a", 0.60004), score("b", 0.6), score("c", 0.1)))[0]) == ["a", "b"]


def test_a_single_value_is_not_called_best():
    assert best(build_tables(scores(score()))[0]) == []


def test_unequal_signatures_get_columns_of_their_own_and_a_flag():
    (table,) = build_tables(scores(score("a", 0.4, signature="k:10"), score("b", 0.6, signature="k:20")))
    assert [column.heading for column in table.columns] == ["ndcg@10 (a)", "ndcg@10 (b)"]
    assert [column.signatures for column in table.columns] == [(("", "k:10"),), (("", "k:20"),)]
    assert table.mixed == ("ndcg@10",)
    assert best(table, 0) == best(table, 1) == []


def test_signatures_may_differ_between_directions():
    rows = [score(s, test_set=f"t/{d}", signature=f"pairs:{d}") for d in ("ko-en", "en-ko") for s in ("a", "b")]
    (table,) = build_tables(scores(*rows))
    assert len(table.columns) == 1
    assert table.mixed == ()
    assert table.columns[0].signatures == (("Korean → English", "pairs:ko-en"), ("English → Korean", "pairs:en-ko"))


def test_a_signature_keeps_its_letter_across_directions():
    rows = [
        score("a", test_set="t/ko-en", signature="one"),
        score("b", test_set="t/ko-en", signature="two"),
        score("b", test_set="t/en-ko", signature="two"),
    ]
    (table,) = build_tables(scores(*rows))
    assert [column.signatures for column in table.columns] == [(("", "one"),), (("", "two"),)]


def test_a_missing_score_is_an_empty_cell():
    (table,) = build_tables(scores(score("a"), score("b", name="mrr")))
    assert next(cells for _, cells in table.groups[0].rows if cells[0] is None)[1].text == "0.500"


def test_a_proven_difference_is_marked_against_its_baseline():
    (table,) = build_tables(scores(score("bm25", 0.5), score("student", 0.8)), [compared()])
    assert marks(table) == ["▲"]
    assert table.baselines == ("bm25",)


def test_several_baselines_are_numbered():
    tests = [compared(), compared(baseline="teacher", difference=-0.1)]
    (table,) = build_tables(scores(score("student", 0.8)), tests)
    assert marks(table) == ["▲¹", "▼²"]


def test_no_mark_is_given_when_the_baseline_was_measured_differently():
    (table,) = build_tables(scores(score("bm25", 0.5, signature="other"), score("student", 0.8)), [compared()])
    assert marks(table) == []


@pytest.mark.parametrize(
    ("difference", "p_value", "higher", "finding"),
    [
        (0.1, 0.01, True, "better"),
        (-0.1, 0.01, True, "worse"),
        (-0.1, 0.01, False, "better"),
        (0.1, 0.05, True, "undecided"),
        (0.0, 0.0, True, "undecided"),
    ],
)
def test_a_difference_counts_when_p_is_below_one_minus_the_level(difference, p_value, higher, finding):
    assert finding_of(compared(difference=difference, p_value=p_value), higher_is_better=higher) == finding


def test_a_comparison_whose_metric_has_no_score_has_no_finding():
    known, unknown = describe_tests([compared(), compared(metric="mrr")], scores(score()))
    assert (known.finding, known.difference, known.p_value) == ("better", "+0.300", "0.010")
    assert unknown.finding is None
