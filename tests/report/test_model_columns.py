import io
import json

import pytest
from rich.console import Console

from soju.core.results import Interval, Score
from soju.report.contents import Comparison
from soju.report.tables import model_rows
from soju.report.terminal import models_table

MODELS = ("BASE", "S0", "S1")


def score(subject, value, *, test_set="korsts.dev", name="spearman", unit="correlation", up=True, signature="same"):
    return Score(name, subject, test_set, value, unit, up, signature, Interval(value - 0.02, value + 0.02))


def difference(subject, value, p_value, *, test_set="korsts.dev", metric="spearman"):
    interval = Interval(value - 0.01, value + 0.01)
    return Comparison(
        subject=subject,
        baseline="BASE",
        test_set=test_set,
        metric=metric,
        difference=value,
        interval=interval,
        p_value=p_value,
        samples=2000,
        seed=0,
    )


SCORES = [
    score("BASE", 0.71),
    score("S0", 0.70),
    score("S1", 0.80),
    score("BASE", 14.2, test_set="korsts.dev/ko", name="tokens", unit="tokens", up=False),
    score("S0", 7.0, test_set="korsts.dev/ko", name="tokens", unit="tokens", up=False),
]
COMPARISONS = [
    difference("S0", -0.01, 0.4),
    difference("S1", 0.09, 0.001),
    difference("S0", -7.2, 0.0005, test_set="korsts.dev/ko", metric="tokens"),
]


def drawn(rows):
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(models_table(MODELS, rows))
    return console.export_text()


def test_there_is_a_row_for_each_figure_and_a_cell_for_each_model():
    rows = model_rows(MODELS, SCORES, COMPARISONS)
    assert [(row.test_set, row.direction, row.metric) for row in rows] == [
        ("korsts.dev", "", "spearman"),
        ("korsts.dev", "Korean", "tokens"),
    ]
    assert [cell and cell.value for cell in rows[0].cells] == [0.71, 0.70, 0.80]
    assert [cell and cell.finding for cell in rows[0].cells] == [None, "undecided", "better"]


def test_fewer_tokens_are_better_and_a_missing_figure_is_no_cell():
    (_, tokens) = model_rows(MODELS, SCORES, COMPARISONS)
    assert tokens.cells[1].finding == "better"
    assert tokens.cells[2] is None
    assert "–" in drawn([tokens])


def test_the_difference_stands_below_the_value_with_its_interval():
    text = drawn(model_rows(MODELS, SCORES, COMPARISONS))
    assert "▲ +0.090 [+0.080, +0.100]" in text
    assert "≈ −0.010 [−0.020, 0.000]" in text
    assert "▲ −7.20" in text
    assert "against BASE" in text


def test_guessing_is_said_beside_the_metric_and_has_no_column():
    scores = [
        score("BASE", 0.6, name="accuracy", unit="fraction"),
        score("chance", 0.5, name="accuracy", unit="fraction"),
    ]
    (row,) = model_rows(("BASE",), scores)
    assert (row.chance, len(row.cells)) == (0.5, 1)
    assert "chance 0.500" in drawn([row])


def test_a_row_says_when_models_were_not_measured_alike():
    (row,) = model_rows(("BASE", "S0"), [score("BASE", 0.7), score("S0", 0.8, signature="other")])
    assert not row.alike
    assert "prompt, pooling or length differ" in drawn([row])


def test_rows_are_plain_data():
    rows = [row.to_json() for row in model_rows(MODELS, SCORES, COMPARISONS)]
    assert json.loads(json.dumps(rows))[0]["cells"][2]["difference"] == pytest.approx(0.09)
