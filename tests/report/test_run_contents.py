import pytest
from report_runs import comparison, figure, full_run, score, write_run

from soju.core.errors import UserError
from soju.report.contents import read_run


def test_only_scores_must_be_there(tmp_path):
    contents = read_run(write_run(tmp_path / "r", scores=[score()]))
    assert contents.name == "r"
    assert contents.scores[0].value == 0.5
    assert contents.figures == ()
    assert contents.story.summary == ()


def test_a_folder_without_scores_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no scores\.json"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    "name", ["scores", "comparisons", "figures", "expansions", "searches", "data", "environment", "story"]
)
@pytest.mark.parametrize("text", ["", "{", "[1]", '"text"', "\x00"])
def test_a_malformed_file_is_refused_by_its_name(tmp_path, name, text):
    full_run(tmp_path)
    (tmp_path / f"{name}.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=rf"{name}\.json: "):
        read_run(tmp_path)


@pytest.mark.parametrize("name", ["resolved.yaml", "config.yaml"])
def test_a_text_file_that_is_not_utf8_is_refused_by_its_name(tmp_path, name):
    full_run(tmp_path)
    (tmp_path / name).write_bytes("한국어".encode("cp949"))
    with pytest.raises(UserError, match=f"{name}: not UTF-8"):
        read_run(tmp_path)


def test_an_unknown_key_is_refused_with_its_place(tmp_path):
    write_run(tmp_path, scores=[score()], comparisons=[comparison(lows=1)])
    with pytest.raises(UserError, match=r"comparisons\.json: 0\.lows: "):
        read_run(tmp_path)


def test_a_number_written_as_text_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"scores\.json: 0\.value: "):
        read_run(write_run(tmp_path, scores=[score(value="0.5")]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_is_refused(tmp_path, value):
    with pytest.raises(UserError, match=r"scores\.json: 0: ndcg@10 of student is not a finite number"):
        read_run(write_run(tmp_path, scores=[score(value=value)]))


def test_two_values_for_one_score_are_refused(tmp_path):
    with pytest.raises(UserError, match="two values"):
        read_run(write_run(tmp_path, scores=[score(value=0.5), score(value=0.6)]))


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b", "", "a.b", "a b", '"onload="'])
def test_a_figure_cannot_choose_where_it_is_written(tmp_path, name):
    with pytest.raises(UserError, match=r"figures\.json: 0\.id: "):
        read_run(write_run(tmp_path, scores=[score()], figures=[figure(id=name)]))


def test_two_figures_cannot_share_a_file(tmp_path):
    with pytest.raises(UserError, match="given twice"):
        read_run(write_run(tmp_path, scores=[score()], figures=[figure(), figure(id="QUALITY")]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"series": []}, "at least 1 item"),
        ({"series": [{"name": "a", "x": [1, 2], "y": [1]}]}, "y has 1 values, x has 2"),
        ({"series": [{"name": "a", "x": [1], "y": [1], "low": [0]}]}, "low and high come together"),
        ({"series": [{"name": "a", "x": ["one"], "y": [1]}]}, "must be numbers"),
        ({"series": [{"name": "a", "x": [0], "y": [1]}], "log_x": True}, "needs x > 0"),
        ({"series": [{"name": "a", "x": [1], "y": [-1]}], "log_y": True}, "needs y > 0"),
    ],
)
def test_a_figure_that_cannot_be_drawn_is_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=rf"figures\.json: 0.*{message}"):
        read_run(write_run(tmp_path, scores=[score()], figures=[figure(**changes)]))
