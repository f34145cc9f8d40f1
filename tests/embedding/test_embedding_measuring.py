import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from soju.core.errors import ConfigError, DataError, UserError
from soju.embedding.config import EvaluationSettings
from soju.embedding.embedder import Embedder, load_model
from soju.embedding.evaluate import (
    Subject,
    compare_measured,
    compare_models,
    evaluation_of,
    measure_models,
    read_evaluation,
    subjects_of,
)
from soju.evaluation.significance import Measurement

_FILE = Path(__file__).parent.parent / "teachers" / "pico_teacher.py"
_SPEC = importlib.util.spec_from_file_location("pico_teacher_for_measuring", _FILE)
pico_teacher = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(pico_teacher)

TEXTS = ["검색", "엔진", "검색 엔진", "물", "물 엔진", "검색들", "물 물", "엔진 물 검색"]
PAIRS = [(TEXTS[n], TEXTS[(n * 3 + 1) % 8], float(n % 6)) for n in range(8)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [pico_teacher.save_pico_teacher(folder / name, seed=seed) for name, seed in (("base", 0), ("stage1", 1))]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    lines = ["sentence1\tsentence2\tscore", *(f"{a}\t{b}\t{score}" for a, b, score in PAIRS)]
    (folder / "sts.tsv").write_text("\n".join(lines), encoding="utf-8")
    pairs = [("검색", "search"), ("엔진", "engine"), ("물", "water")]
    (folder / "bitext.tsv").write_text("".join(f"{ko}\t{en}\n" for ko, en in pairs), encoding="utf-8")
    questions = [
        {"context": "검색", "choices": ["엔진", "물"], "label": 0},
        {"context": "물", "choices": ["검색", "물들"], "label": 1},
    ]
    (folder / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions), encoding="utf-8")
    passages = [
        {"id": f"p{n}", "domain": "it", "ko": ko, "en": en, "query_ko": f"{ko} ?", "query_en": f"{en} ?"}
        for n, (ko, en) in enumerate(pairs)
    ]
    (folder / "passages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in passages), encoding="utf-8")
    return folder


@pytest.fixture
def everything(sets):
    return EvaluationSettings.model_validate(
        {
            "root": sets,
            "sts": [{"name": "sts", "file": "sts.tsv", "language": "ko"}],
            "bitext": [{"name": "bitext", "file": "bitext.tsv"}],
            "choices": [{"name": "choices", "file": "choices.jsonl"}],
            "retrieval": [{"name": "passages", "passages": ["passages.jsonl"]}],
            "resamples": 100,
            "timed_texts": 4,
        }
    )


@pytest.fixture
def similarity(everything):
    return everything.model_copy(update={"bitext": (), "choices": (), "retrieval": (), "timed_texts": None})


def test_everything_is_measured_for_every_model(models, everything):
    measured = measure_models([Subject("BASE", models[0]), Subject("S1", str(models[1]))], everything)
    for name in ("BASE", "S1"):
        found = {(score.test_set, score.name) for score in measured.scores if score.subject == name}
        assert {("sts", "spearman"), ("sts", "pearson"), ("bitext/ko-en", "accuracy"), ("choices", "accuracy")} <= found
        assert {("passages/ko-en", "ndcg@10"), ("sts/ko", "tokens"), ("bitext/en", "tokens")} <= found
        assert {("model", "parameters"), ("model", "size"), ("model", "speed")} <= found
    assert measured.score("chance", "choices", "accuracy").value == 0.5
    assert {item.subject for item in measured.comparisons} == {"S1"}
    assert measured.not_compared == []
    json.dumps(measured.to_json(), allow_nan=False)


def test_the_correlation_is_that_of_the_models_own_vectors(models, similarity):
    model = load_model(str(models[0]))
    first, second = model.encode([pair[0] for pair in PAIRS]), model.encode([pair[1] for pair in PAIRS])
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(first, second, strict=True)]
    measured = measure_models([Subject("BASE", model)], similarity)
    expected = stats.spearmanr(cosines, [pair[2] for pair in PAIRS]).statistic
    assert measured.similarity("BASE", ["sts"]) == pytest.approx(expected)


def test_a_model_does_not_differ_from_itself(models, similarity):
    measured = measure_models([Subject("BASE", models[0]), Subject("S0", models[0])], similarity)
    assert {item.difference for item in measured.comparisons} == {0.0}
    assert len(measured.comparisons) == 3  # spearman, pearson, tokens


def test_each_text_is_embedded_once(models, similarity, monkeypatch):
    seen = []
    embedder = Embedder(Subject("BASE", models[0]), similarity)
    encode = embedder.encode
    monkeypatch.setattr(embedder, "encode", lambda texts, prompt: seen.extend(texts) or encode(texts, prompt))
    once = embedder.embed(["물", "불", "물"])
    again = embedder.embed(["불", "물"])
    assert seen == ["물", "불"]
    np.testing.assert_array_equal(once[[1, 0]], again)


def test_a_model_in_training_is_left_as_it_was(models, similarity):
    model = load_model(str(models[0]))
    model.train()
    model[1].eval()
    limited = similarity.model_copy(update={"max_length": 4})
    before = [module.training for module in model.modules()], model.max_seq_length
    measured = measure_models([Subject("now", model)], limited)
    assert ([module.training for module in model.modules()], model.max_seq_length) == before
    assert "length:4" in measured.scores[0].signature


def test_a_models_own_prompts_are_used_and_a_setting_takes_their_place(models, similarity):
    model = load_model(str(models[0]))
    model.prompts.update({"query": "query : ", "document": "engine "})
    own = Embedder(Subject("BASE", model), similarity)
    assert [own.prompt(role) for role in ("text", "query", "document")] == ["", "query : ", "engine "]
    told = Embedder(Subject("BASE", model), similarity.model_copy(update={"prompt": "search "}))
    assert [told.prompt(role) for role in ("text", "query", "document")] == ["search ", "search ", "engine "]
    assert not np.allclose(own.embed(["물"]), told.embed(["물"]))
    np.testing.assert_allclose(own.embed(["물"], "query"), model.encode_query(["물"]), atol=1e-6)
    np.testing.assert_allclose(own.embed(["물"], "document"), model.encode_document(["물"]), atol=1e-6)


def test_models_with_other_prompts_are_measured_but_not_compared(models, similarity):
    prompted = load_model(str(models[1]))
    prompted.prompts["own"] = "query : "
    prompted.default_prompt_name = "own"
    measured = measure_models([Subject("BASE", models[0]), Subject("S1", prompted)], similarity)
    assert [item.metric for item in measured.comparisons] == ["tokens"]
    assert len(measured.not_compared) == 2
    assert "not measured alike" in measured.not_compared[0]


def test_no_draws_are_made_when_none_are_wanted(models, similarity):
    quick = similarity.model_copy(update={"resamples": None})
    measured = measure_models([Subject("BASE", models[0]), Subject("S1", models[1])], quick)
    assert measured.comparisons == []
    assert all(score.interval is None for score in measured.scores)


def test_a_later_measurement_is_compared_with_one_that_was_kept(models, similarity):
    data = read_evaluation(similarity)
    before = measure_models([Subject("BASE", models[0])], similarity, data=data)
    after = measure_models([Subject("now", models[1])], similarity, data=data)
    found, why = compare_measured(after.items, before.items, samples=100)
    assert ([item.metric for item in found], why) == (["spearman", "pearson", "tokens"], [])
    expected = after.similarity("now", ["sts"]) - before.similarity("BASE", ["sts"])
    assert found[0].difference == pytest.approx(expected)


def test_tokens_are_those_of_whole_texts_without_special_ones(models, similarity):
    measured = measure_models([Subject("BASE", models[0])], similarity)
    tokens = next(item for item in measured.items if item.score.name == "tokens")
    assert isinstance(tokens, Measurement)
    first = [len(pair[0].replace("들", " 들").split()) for pair in PAIRS]
    np.testing.assert_array_equal(tokens.values[::2], first)


def test_the_first_rows_are_taken_for_a_quick_look_and_the_rest_is_still_checked(sets, similarity):
    short = similarity.model_copy(update={"limit": 4})
    assert len(read_evaluation(short).sts["sts"]) == 4
    (sets / "bad.tsv").write_text((sets / "sts.tsv").read_text(encoding="utf-8") + "\n물\t불\t9\n", encoding="utf-8")
    broken = short.model_copy(update={"sts": (similarity.sts[0].model_copy(update={"file": "bad.tsv"}),)})
    with pytest.raises(DataError, match=r"bad.tsv:10: score: .* outside \[0, 5\]"):
        read_evaluation(broken)


def test_every_text_of_the_sets_is_listed_once(everything):
    texts = read_evaluation(everything).all_texts()
    assert len(texts) == len(set(texts))
    assert {"검색 엔진", "water", "물들", "engine ?"} <= set(texts)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"sts": [{"name": "a", "file": "x", "language": "ja"}]}, "language"),
        ({"bitext": [{"name": "a", "file": "x"}], "choices": [{"name": "a", "file": "y"}]}, 'two sets are called "a"'),
        ({"retrieval": [{"name": "a"}]}, "give either beir or passages"),
        ({"timings": 2}, "greater than or equal to 3"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, what):
    with pytest.raises(ConfigError, match=what):
        evaluation_of({"evaluation": change}, place="my.yaml")


def test_a_configuration_without_sets_is_refused():
    with pytest.raises(UserError, match=r"my.yaml: evaluation: names no set"):
        evaluation_of({"recipe": "embedding"}, place="my.yaml")


def test_relative_files_start_at_the_root_of_the_data(sets):
    sts = [{"name": "sts", "file": "sts.tsv", "language": "ko"}]
    found = evaluation_of({"data": {"root": str(sets)}, "evaluation": {"sts": sts}}, place="my.yaml")
    assert len(read_evaluation(found).sts["sts"]) == 8


def test_models_are_named_as_briefly_as_tells_them_apart():
    assert [one.name for one in subjects_of(["runs/a/stage0", "runs/a/stage1"])] == ["stage0", "stage1"]
    assert [one.name for one in subjects_of(["runs/a/best", "runs/b/best"])] == ["a/best", "b/best"]
    assert [one.name for one in subjects_of([".", "stage1"])] == [".", "stage1"]
    with pytest.raises(UserError, match="given twice"):
        subjects_of(["a", "a"])


def test_a_run_folder_stands_for_its_best_model(models, tmp_path, similarity):
    run = tmp_path / "run"
    run.mkdir()
    (run / "best").symlink_to(models[1])
    values = {"evaluation": similarity.model_dump(mode="json")}
    measured = compare_models([str(models[0]), str(run)], values, place="my.yaml")
    assert measured.subjects == ("base", "run")
    assert measured.comparisons


def test_two_models_under_one_name_are_refused(models, similarity):
    with pytest.raises(UserError, match="under a name of its own"):
        measure_models([Subject("BASE", models[0]), Subject("BASE", models[1])], similarity)


def test_a_folder_that_does_not_say_how_it_pools_is_refused(models):
    plain = models[0].parent / "base-plain"
    with pytest.raises(UserError, match=r"no modules.json, so nothing says how it pools"):
        load_model(str(plain))


def test_compare_and_evaluate_print_a_column_for_each_model(models, similarity, tmp_path, monkeypatch, capsys):
    from typer.testing import CliRunner

    from soju.cli import app

    config = tmp_path / "my.yaml"
    config.write_text(json.dumps({"recipe": "embedding", "evaluation": similarity.model_dump(mode="json")}))
    out = tmp_path / "all.json"
    arguments = ["compare", *map(str, models), "--config", str(config), "--samples", "100", "--out", str(out)]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert "stage1" in result.stdout
    assert "against base" in result.stdout
    written = json.loads(out.read_text(encoding="utf-8"))
    assert written["comparisons"][0]["samples"] == 100
    assert [row["metric"] for row in written["rows"]] == ["spearman", "pearson", "tokens", "parameters", "size"]
    alone = CliRunner().invoke(app, ["evaluate", str(models[0]), str(config)], env={"COLUMNS": "160"})
    assert alone.exit_code == 0, alone.output
    assert "spearman" in alone.stdout


def test_compare_says_what_it_needs(models, tmp_path):
    from typer.testing import CliRunner

    from soju.cli import app

    config = tmp_path / "splade.yaml"
    config.write_text("recipe: splade\n", encoding="utf-8")
    cases = [
        (["compare", "a", "b", "c"], "3 runs; give two, or more models with --config"),
        (["compare", "a", "b", "--out", "x.json"], "--out: goes with --config"),
        (["compare", "a", "b", "--config", str(config)], "mode: None is unknown"),
        (["compare", *map(str, models), "--config", "splade-static-samples"], "a dense embedding model; load it with"),
        (["compare", *map(str, models)], "its recipe records nothing to compare; measure both with --config"),
    ]
    for arguments, message in cases:
        result = CliRunner().invoke(app, arguments)
        assert isinstance(result.exception, UserError)
        assert message in str(result.exception)
