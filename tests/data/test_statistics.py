import json
from io import StringIO

from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from soju.core.language import language_of
from soju.data.rows import Document, PairRow, PassageRow, Term, TermRow, TripletRow
from soju.data.statistics import UNITS, Lengths, RowStatistics, _language, counted, format_statistics

TEXT_UNITS = {name: unit for name, unit in UNITS.items() if name.startswith(("rows", "texts"))}


def statistics_of(*rows):
    statistics = RowStatistics()
    assert list(counted(rows, statistics)) == list(rows)
    return statistics.to_json()


def test_a_quantile_is_the_smallest_value_that_the_share_does_not_exceed():
    lengths = Lengths()
    for value in (1, 2, 3, 4):
        lengths.add(value)
    assert lengths.to_json() == {"min": 1, "p5": 1, "p50": 2, "p95": 4, "p99": 4, "max": 4, "mean": 2.5}


def test_lengths_are_in_characters_and_words_and_scripts_in_shares_of_letters():
    texts = statistics_of(PairRow("한글 ab 1 я", "two words"))["texts"]
    assert (texts["ko"]["characters"]["p50"], texts["ko"]["words"]["p50"]) == (9, 4)
    assert texts["ko"]["scripts"] == {"hangul": 0.4, "latin": 0.4, "other": 0.2}
    assert texts["en"]["scripts"] == {"hangul": 0.0, "latin": 1.0, "other": 0.0}


def test_similarities_fall_into_tenths_closed_above():
    terms = tuple(Term(f"t{number}", value) for number, value in enumerate((1.0, 0.95, 0.9, 0.3, 0.05)))
    result = statistics_of(TermRow("가", terms))
    filled = {interval: count for interval, count in result["similarity"].items() if count}
    assert filled == {"(0.0, 0.1]": 1, "(0.2, 0.3]": 1, "(0.8, 0.9]": 1, "(0.9, 1.0]": 2}
    assert result["terms_per_row"]["max"] == 5


def test_triplets_are_counted_by_type_and_difficulty():
    row = TripletRow("단추", "button", "zipper", "single_term", "easy")
    result = statistics_of(row, row)
    assert result["triplets"] == {"single_term": {"easy": 2}}
    assert list(result["texts"]) == ["negative.en", "positive.en", "query.ko"]


def test_documents_and_passages_are_counted():
    assert list(statistics_of(Document("1", "물"))["texts"]) == ["document.ko"]
    assert statistics_of(PassageRow("1", "kitchen", "물", "water", "물", "water"))["domains"] == {"kitchen": 1}


def test_every_number_has_a_unit_and_the_table_shows_the_rows():
    result = json.loads(json.dumps(statistics_of(TermRow("가", (Term("edge", 1.0),)))))
    assert {name.split(".")[0] for name in result["units"]} == set(result) - {"units"}
    console = Console(width=140, file=StringIO())
    console.print(format_statistics(result, title="terms.jsonl"))
    assert "terms.jsonl: 1 rows" in console.file.getvalue()
    assert "similarity (0.9, 1.0]" in console.file.getvalue()


@settings(deadline=None)
@given(st.text(max_size=20))
def test_the_fast_language_rule_is_the_one_of_core(text):
    assert _language(text) == language_of(text)


def test_no_rows_give_no_numbers():
    assert statistics_of() == {"rows": 0, "texts": {}, "units": TEXT_UNITS}
