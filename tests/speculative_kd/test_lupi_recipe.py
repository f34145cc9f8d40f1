"""The recipe from a configuration to a report, on models made from their config."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import soju
from soju.cli import app
from soju.core.config import parse_yaml, preset_names, preset_text, validate
from soju.core.errors import RegressionError, UserError
from soju.core.files import verify_manifest
from soju.core.recipe import DataReport, recipe_named, recipe_of_model, train
from soju.core.run import Run
from soju.speculative_kd.config import SpeculativeKdConfig
from soju.speculative_kd.models import byte_tokenizer
from soju.speculative_kd.recipe import RECIPE, ask, describe_rollout, figures_of, load_chat

QUICK = {
    "data.max_facts": 10,
    "training.num_train_epochs": 1,
    "evaluation.max_answers": 1,
    "evaluation.max_new_tokens": 4,
    "rollout.max_new_tokens": 8,
}
PRESETS = [name for name in preset_names() if name.startswith("lupi-")]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train("lupi-pico", out=tmp_path_factory.mktemp("run") / "pico", overrides=QUICK)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_pass_the_check(name):
    report = RECIPE.check(validate(parse_yaml(preset_text(name), place=name), SpeculativeKdConfig, place=name))
    assert isinstance(report, DataReport)
    assert len(report.data.trained) > 0
    assert PRESETS == ["lupi-pico", "lupi-qwen3", "lupi-small"]


def test_a_run_leaves_stock_models_scores_and_a_report(run):
    for folder in (run.best, run.final):
        verify_manifest(folder)
        AutoModelForCausalLM.from_pretrained(folder)
    found = {(score.subject, score.name) for score in run.scores}
    subjects = ("start", "student", "teacher", "teacher with knowledge")
    assert {(subject, "knowledge") for subject in subjects} <= found
    assert {subject for subject, name in found if name == "forgetting"} == {"start", "student"}
    page = run.report.read_text(encoding="utf-8")
    assert "What the knowledge is worth" in page
    assert (run.folder / "costs.json").is_file()
    assert json.loads((run.folder / "data.json").read_text())["facts"]["ko"]["trained"] == 10


def test_the_student_learnt_and_the_start_is_what_it_was(run):
    values = {score.subject: score.value for score in run.scores if score.name == "forgetting"}
    assert values["start"] == 0
    assert values["student"] > 0


def test_a_run_is_told_by_its_files_and_loads(run):
    assert recipe_of_model(str(run.folder)) is RECIPE
    assert recipe_of_model(str(run.best)) is RECIPE
    assert type(Run(run.folder).model).__name__ == "Qwen3ForCausalLM"


def test_soju_ask_and_rollout_print(run):
    found = CliRunner().invoke(app, ["ask", str(run.folder), "물?", "--max-new-tokens", "4"])
    assert found.exit_code == 0
    model, chat = load_chat(run.best)
    assert found.stdout.strip() == ask(model, chat, "물?", max_new_tokens=4)
    found = CliRunner().invoke(app, ["rollout", "lupi-pico", "en/food_001", "rollout.max_new_tokens=4"])
    assert found.exit_code == 0
    assert "acceptance" in found.stdout


def test_models_are_measured_against_each_other(run):
    values = parse_yaml(preset_text("lupi-pico"), place="preset")
    values["data"]["max_facts"] = 10
    evaluation = RECIPE.evaluate([str(run.final), str(run.best)], values, place="preset", samples=20)
    assert {row["name"] for row in evaluation.record} >= {"knowledge", "choice", "trained_ll"}


@pytest.mark.parametrize("general", [["samples:general"], []])
def test_the_published_file_trains_and_its_report_says_what_could_not_be_measured(tmp_path, general):
    rows = [
        {"id": f"{n}", "category": f"c{n % 2}", "query": f"Question {n}?", "knowledge": f"Text {n}."} for n in range(8)
    ]
    (tmp_path / "culture.json").write_text(json.dumps(rows), encoding="utf-8")
    data = {"data": {"root": str(tmp_path), "en": ["culture.json"], "general": general}}
    config = {**parse_yaml(preset_text("lupi-pico"), place="preset"), **data}
    changes = {key: value for key, value in QUICK.items() if key != "data.max_facts"}
    run = train(config, out=tmp_path / "run", overrides=changes)
    AutoModelForCausalLM.from_pretrained(run.best)
    assert {score.name for score in run.scores} == ({"forgetting"} if general else set())
    assert "No row has an answer and paraphrases" in (run.folder / "report.md").read_text(encoding="utf-8")


def test_too_much_forgotten_fails_the_run_after_its_report(tmp_path):
    with pytest.raises(RegressionError, match=r"forgetting is .* above 1e-09; raise mixing.share"):
        train("lupi-pico", out=tmp_path / "run", overrides={**QUICK, "evaluation.max_forgetting": 1e-9})
    assert (tmp_path / "run" / "report.html").is_file()


def test_rollout_tells_how_each_token_came_about():
    values = parse_yaml(preset_text("lupi-pico"), place="preset")
    config = recipe_named("speculative_kd", place="test").configure(values, place="preset")
    lines = describe_rollout(config, "ko/food_001")
    assert lines[0].startswith("block 0 position 0: proposal ")
    assert any(line.startswith("acceptance ") for line in lines)
    with pytest.raises(UserError, match='no row has the id "nothing"; the first ones are '):
        describe_rollout(config, "nothing")


def test_names_of_the_environment_are_recorded_and_yield(tmp_path, monkeypatch):
    monkeypatch.setenv("STUDENT_MODEL", str(tmp_path / "nowhere"))
    told = []
    with pytest.raises(UserError, match="no such model folder"):
        train("lupi-pico", out=tmp_path / "run", overrides={**QUICK, "teacher.model": "self"})
    monkeypatch.setenv("TEACHER_MODEL", "self")
    overrides = {**QUICK, "student.model": "scratch", "training.max_steps": 1}
    run = train("lupi-pico", out=tmp_path / "run", overrides=overrides, on_data=told.append)
    assert told[-1].facts[0] == "teacher.model is self, from TEACHER_MODEL"
    assert "# environment: teacher.model is self, from TEACHER_MODEL" in (run.folder / "config.yaml").read_text()
    assert "teacher" not in {score.subject for score in run.scores}


def test_figures_leave_out_what_was_not_logged():
    figures = figures_of([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "acceptance": 0.5}])
    assert [figure["id"] for figure in figures] == ["loss", "acceptance"]
    assert figures[0]["series"] == [{"name": "loss", "x": [1, 2], "y": [2.0, 1.0]}]


def test_bytes_are_a_vocabulary():
    assert len(byte_tokenizer()) == 259
    assert soju.__version__
