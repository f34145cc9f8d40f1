import re

import pytest
from report_runs import HOSTILE, expansion, score, write_run

from soju.report import write_report
from soju.report.markdown import code, code_block, escape, table


def read(run):
    write_report(run)
    return (run / "report.md").read_text(encoding="utf-8")


def test_every_picture_it_names_exists(run):
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", read(run))
    assert pictures == ["plots/quality.png", "plots/sizes.png"]
    assert all((run / name).is_file() for name in pictures)


def test_tables_show_scores_with_intervals_marks_and_signatures(run):
    text = read(run)
    assert "| student | **0.800** ▲ (0.700–0.900) |" in text
    assert "- ndcg@10: `k:10\\|metric:ndcg`" in text
    assert "against bm25" in text


def test_sections_follow_the_page(run):
    assert re.findall(r"^## (.+)$", read(run), flags=re.M) == [
        *("Scores", "Cost", "Paired tests", "Plots", "Expansions", "Searches", "How it was made"),
        *("Data", "Configuration", "Environment"),
    ]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_makes_no_markup(tmp_path, text):
    markdown = read(write_run(tmp_path, scores=[score(text)], expansions=[expansion(text, text)]))
    outside_code = re.sub(r"`[^`]*`", "", markdown)
    assert "<" not in outside_code


def test_every_row_of_a_table_has_as_many_cells(tmp_path):
    markdown = read(write_run(tmp_path, scores=[score("a|b")], expansions=[expansion("x", "a|b\nc")]))
    for rows in re.findall(r"(?:^\|.*\n?)+", markdown, flags=re.M):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows.strip().split("\n")}) == 1


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a|b", r"a\|b"),
        ("# not a heading", r"\# not a heading"),
        ("- not a list", r"\- not a list"),
        ("1. not a list", r"1\. not a list"),
        ("[text](javascript:alert(1))", r"\[text\](javascript:alert(1))"),
        ("two\nlines", "two lines"),
    ],
)
def test_text_is_escaped(text, escaped):
    assert escape(text) == escaped


def test_code_uses_a_fence_longer_than_any_inside():
    assert code("a`b") == "``a`b``"
    assert code_block("```\nx\n```", "python").startswith("````python\n")


def test_a_table_aligns_numbers_to_the_right():
    assert table(["a", "b"], [["x", "1"]], "lr") == "| a | b |\n| --- | ---: |\n| x | 1 |"
