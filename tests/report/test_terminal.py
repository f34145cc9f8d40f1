import io
import json

from report_runs import comparison, expansion, score, search
from rich.cells import cell_len
from rich.console import Console

from soju.core.results import Comparison, Score
from soju.report.contents import Expansion, Search
from soju.report.terminal import expansion_table, figures_table, hits_table, scores_table


def show(renderable, width=100):
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    console.print(renderable)
    return console.file.getvalue()


def read(model, value):
    return model.model_validate_json(json.dumps(value))


def test_scores_show_systems_metrics_and_marks():
    scores = [Score.from_json(score("bm25", 0.5)), Score.from_json(score("student", 0.8))]
    text = show(scores_table(scores, [Comparison.from_json(comparison())]))
    assert "parallel.dev" in text
    assert "Korean → English" in text
    assert "0.800 ▲" in text
    assert "against bm25" in text


def test_a_system_with_three_baselines_stays_on_one_line_of_a_common_terminal():
    baselines, metrics = ("BM25", "dictionary", "soju + BM25"), ("recall@10", "ndcg@10", "mrr@10", "recall@100")
    systems = [("soju static", 0.8), *((name, 0.5) for name in baselines)]
    scores = [Score.from_json(score(system, value, name=metric)) for system, value in systems for metric in metrics]
    compared = [
        Comparison.from_json(comparison(subject="soju static", baseline=name, metric=metric))
        for name in baselines
        for metric in metrics[:2]
    ]
    lines = show(scores_table(scores, compared), width=80).splitlines()
    (line,) = (line for line in lines if "soju static" in line)
    assert line.split()[2:] == ["0.800", "▲¹▲²▲³", "0.800", "▲¹▲²▲³", "0.800", "0.800"]


def test_different_settings_are_said():
    scores = [Score.from_json(score("a", signature="x")), Score.from_json(score("b", signature="y"))]
    assert "different settings" in show(scores_table(scores))


def test_expansions_show_a_bar_in_proportion():
    lines = show(expansion_table(read(Expansion, expansion()))).splitlines()
    bars = {word: line.count("█") for line in lines for word in ("ko", "en", "other") if f" {word} " in line}
    assert bars == {"ko": 24, "en": 12, "other": 1}


def test_hits_show_passage_and_matched_terms():
    text = show(hits_table(read(Search, search())))
    assert "Soju is distilled." in text
    assert "soju 3.00" in text


def test_wide_letters_keep_the_columns_straight():
    text = show(hits_table(read(Search, search(passage="한국의 전통 소주는 " * 30)), passage_width=40), width=80)
    assert all(cell_len(line) <= 80 for line in text.splitlines())
    assert "…" in text


def test_text_cannot_steer_the_terminal():
    hostile = "\x1b[2J[red]x[/red]\u202e"
    text = show(hits_table(read(Search, search(hostile, hostile, hostile))))
    text += show(expansion_table(read(Expansion, expansion(hostile, hostile))))
    text += show(scores_table([Score.from_json(score(hostile, name=hostile, test_set=hostile))]))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "[red]" in text


def test_figures_of_a_single_system_are_a_list_that_is_never_cut():
    figure = Score("active_terms.document.mean", "soju", "cost on parallel.dev ko-en", 13.1, "terms", False, "s")
    text = show(figures_table([figure]), width=60)
    assert "…" not in text
    assert "13.1 terms" in text
