"""The table of recipes: a row and a folder are all that a new one takes."""

import json

import pytest

import soju
from fixtures.terminal import soju as in_terminal
from soju.core.errors import ConfigError, UserError
from soju.core.recipe import RECIPES, recipe_named, recipe_of_model


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A folder with a configuration of a recipe that is in the table for this test alone."""
    monkeypatch.setitem(RECIPES, "toy", "fixtures.toy_recipe:RECIPE")
    (tmp_path / "words.txt").write_text("소주 distil still", encoding="utf-8")
    (tmp_path / "toy.yaml").write_text("recipe: toy\nname: mine\nwords: words.txt\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments, cwd, code=0):
    done = in_terminal(*arguments, cwd=cwd)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_every_verb_asks_the_table(toy):
    checked = run("check", "toy.yaml", cwd=toy)
    assert "table of 3" in checked
    assert "words: 3" in checked
    assert "No problem found" in checked
    trained = run("train", "toy.yaml", "seed=7", cwd=toy)
    assert "Model   runs/mine/final" in trained
    assert "length" in trained
    assert "seed: 7" in (toy / "runs/mine/resolved.yaml").read_text()
    measured = run("evaluate", "runs/mine", "toy.yaml", "--out", "scores.json", cwd=toy)
    assert "runs/mine 6" in measured
    assert "toy.yaml: done" in measured
    assert json.loads((toy / "scores.json").read_text()) == {"runs/mine": 6}
    assert "distil minus distil" in run("compare", "runs/mine", "runs/mine", cwd=toy)
    assert "runs/mine 6" in run("compare", "runs/mine", "--config", "toy.yaml", cwd=toy)
    assert "a demo in demo-toy" in run("demo", "toy", cwd=toy)
    assert "no task" in run("mteb", "runs/mine", "Ko-StrategyQA", cwd=toy, code=2)


def test_a_run_holds_model_scores_and_report(toy):
    made = soju.train("toy.yaml", out="runs/a", overrides={"words": "words.txt"})
    assert (made.recipe, made.model, made.scores[0].value) == ("toy", "distil", 6.0)
    assert "learned distil" in made.report.read_text(encoding="utf-8")
    with pytest.raises(UserError, match=r"holds a run already"):
        soju.train("toy.yaml", out="runs/a")


def test_a_failed_quality_gate_exits_with_3_and_shows_what_was_accepted(toy):
    shown = run("train", "toy.yaml", "longest=3", cwd=toy, code=3)
    assert "longer than 3" in shown
    assert "Report  runs/mine/report.html" in shown


def test_data_is_told_before_a_folder_is_made(toy):
    seen = []
    soju.train("toy.yaml", on_data=lambda report: seen.append((report.data, (toy / "runs").exists())))
    assert seen == [(["소주", "distil", "still"], False)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "a.yaml: recipe: missing; add one of splade, embedding, speculative_kd, translation"),
        ("wine", "a.yaml: recipe: 'wine' is unknown; choose one of splade, embedding, speculative_kd, translation"),
        (["splade"], r"a.yaml: recipe: \['splade'\] is unknown"),
    ],
)
def test_a_recipe_that_is_not_in_the_table_is_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        recipe_named(name, place="a.yaml")


def test_a_model_knows_its_recipe():
    assert recipe_of_model("ko-en-static") is recipe_named("splade", place="")
    with pytest.raises(
        UserError,
        match=r"nowhere: not a model folder or a run of a recipe \(splade, embedding, speculative_kd, translation\)",
    ):
        recipe_of_model("nowhere")
