"""Settings of recipe `embedding`: what is refused, and that every shipped preset can be checked as it is."""

import gzip
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from embedding.pico_embedding import embedding_config, write_passages
from soju.cli import app
from soju.core.config import preset_names, preset_text, validate
from soju.core.errors import ConfigError, UserError
from soju.embedding.config import (
    EmbeddingConfig,
    EmbeddingDataSettings,
    ExpansionSettings,
    PretrainedBase,
    RetentionSettings,
    ScratchBase,
    Stage1Settings,
    Stage2Settings,
    Stage3Settings,
    SupervisedSettings,
)
from soju.embedding.data import read_embedding_data

PRESETS = [name for name in preset_names() if name.startswith("embedding-")]


@pytest.mark.parametrize(
    ("former", "name"),
    [
        ("stage1.batch_size=4", "per_device_train_batch_size"),
        ("stage1.accumulation=2", "gradient_accumulation_steps"),
        ("stage1.epochs=1", "num_train_epochs"),
        ("stage2.warm_up=0.1", "warmup_steps"),
        ("stage2.max_gradient_norm=1", "max_grad_norm"),
        ("stage2.validate_every=4", "eval_steps"),
        ("stage2.log_every=4", "logging_steps"),
        ("stage3.keep_checkpoints=4", "save_total_limit"),
        ("stage3.mini_batch=4", "mini_batch_size"),
        ("stage3.start_weight=0.1", "l2_sp_weight"),
        ("base.distillation.batch_size=4", "per_device_train_batch_size"),
        ("base.distillation.save_every=4", "save_steps"),
        ("supervised={similarity: [a.tsv], start_weight: 0.1}", "l2_sp_weight"),
        ("stage2.adapters={kind: lora, hidden: 8}", "r"),
        ("stage2.adapters={kind: lora, dropout: 0.1}", "lora_dropout"),
    ],
)
def test_a_former_name_is_refused_with_the_new_one(former, name):
    key = former.partition("=")[0]
    with pytest.raises(ConfigError, match=rf'pico: {key}\S*: the setting is called "{name}" now; rename it'):
        embedding_config(".", former)


def test_adapters_are_a_bottleneck_unless_a_kind_is_named():
    assert embedding_config(".", "stage2.adapters={hidden: 8}").stage2.adapters.kind == "bottleneck"
    assert embedding_config(".", "stage2.adapters={kind: lora}").stage2.adapters.r == 256
    with pytest.raises(ConfigError, match=r"pico: stage2.adapters.hidden: got 0"):
        embedding_config(".", "stage2.adapters={kind: gated, hidden: 0}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage1.dropout=0", "simcse needs dropout"),
        ("stage1.objectiv=simcse", 'did you mean "objective"'),
        ("stages=[1, 0]", "rising order"),
        ("stages=[4]", "got 4"),
        ("retention.held_out=0", "training needs retention.english"),
        ("base.heads=3", "is not a multiple of key_value_heads|must be an even number"),
        ("expansion.initialiser=best", "got 'best'"),
        ("stage2.matryoshka=[0]", "1 or more"),
        ("expansion={init_probe: [mean], order: donor}", None),
        ("supervised={similarity: [a.tsv], inference: [b.tsv]}", "either similarity or inference"),
        ("data.passages=[]", "no Korean text"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(override, message):
    if message is None:
        assert embedding_config(".", override).expansion.init_probe == ("mean",)
        with pytest.raises(ConfigError, match="needs stages 0 and 1"):
            embedding_config(".", override, "stages=[0]")
        return
    with pytest.raises(ConfigError, match=message):
        embedding_config(".", override)


def test_the_initialiser_that_reads_pairs_is_refused_without_them():
    data = "data={korean: [a.txt], english: [b.txt]}"
    for override in ("expansion.initialiser=aligned", "expansion.init_probe=[mean, aligned]"):
        with pytest.raises(ConfigError, match=r"aligned learns from sentence pairs; give data\.pairs"):
            embedding_config(".", override, data)


def test_defaults_are_the_published_settings():
    first, second = Stage1Settings(), Stage2Settings()
    assert (first.per_device_train_batch_size, first.num_train_epochs, first.learning_rate) == (48, 2, 5e-5)
    assert (second.per_device_train_batch_size, second.num_train_epochs, second.learning_rate) == (48, 1, 3e-5)
    assert (first.temperature, second.adapters.hidden) == (0.05, 256)


def test_the_published_preset_says_what_was_published():
    values = yaml.safe_load(preset_text("embedding-qwen3-ko"))
    assert values["base"] == {
        "kind": "pretrained", "model": "Qwen/Qwen3-Embedding-0.6B", "donor": "KORMo-Team/KORMo-10B",
    }  # fmt: skip
    assert (values["stage1"]["max_texts"], values["stage2"]["max_texts"]) == (1_000_000, 500_000)
    assert (values["stage1"]["per_device_train_batch_size"], values["stage1"]["num_train_epochs"]) == (48, 2)


def write_named(folder, settings):
    """Write a small file for every source that a preset names."""

    def put(name, lines):
        path = folder / name
        text = "\n".join(lines) + "\n"
        if name.endswith(".gz"):
            path.write_bytes(gzip.compress(text.encode()))
        else:
            path.write_text(text, encoding="utf-8")

    texts = [f"한국어 글 {number}" for number in range(4)]
    for name in {*settings.data.korean, *settings.stage2.texts, *settings.stage3.texts}:
        is_rows = name.endswith(".jsonl")
        put(name, [f'{{"id": {place}, "text": "{text}"}}' if is_rows else text for place, text in enumerate(texts)])
    for name in settings.data.pairs:
        put(name, [f"한국어 문장 {number}\tan English sentence {number}" for number in range(4)])
    scored = [*settings.retention.korean, *settings.retention.english, *(one.file for one in settings.evaluation.sts)]
    for place, name in enumerate(scored):
        put(name, ["sentence1\tsentence2\tscore", *(f"{place} a {n}\t{place} b {n}\t{n % 6}" for n in range(6))])
    for one in settings.evaluation.bitext:
        put(one.file, [f"평가 문장 {number}\ta test sentence {number}" for number in range(4)])
        put(one.select.file, ["tatoeba"] * 4)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_checked_as_shipped(name, tmp_path, monkeypatch):
    settings = validate(yaml.safe_load(preset_text(name)), EmbeddingConfig, place=name)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    root = work / (settings.data.root or ".")
    root.mkdir(parents=True, exist_ok=True)
    if name != "embedding-pico":
        write_named(root, settings)
    result = CliRunner().invoke(app, ["check", name])
    assert result.exit_code == 0, (result.output, result.exception)
    assert "No problem found" in result.output


def test_watched_and_measured_texts_are_not_trained_on(tmp_path):
    write_passages(tmp_path)
    config = embedding_config(tmp_path)
    data = read_embedding_data(config)
    watched = {text for pair in data.watched_korean for text in (pair.first, pair.second)}
    assert watched
    assert watched.isdisjoint(data.korean)
    assert {pair.score for pair in data.watched_korean} == {0.0, 5.0}
    with pytest.raises(UserError, match="2 texts of evaluation also stand in the training data"):
        read_embedding_data(config, measured=[data.korean[0], data.english[0]])
    dropped = read_embedding_data(
        embedding_config(tmp_path, "data.drop_overlap=true"), measured=[data.korean[0], data.english[0]]
    )
    assert data.korean[0] not in dropped.korean
    assert dropped.statistics["left_out_for_overlap"]["korean"] == 1


def test_texts_of_a_stage_are_spread_over_all(tmp_path):
    write_passages(tmp_path)
    data = read_embedding_data(embedding_config(tmp_path, "stage1.max_texts=5"))
    assert len(data.stage_texts[1]) == 5
    assert data.stage_texts[1][0] == data.korean[0]
    assert data.stage_texts[1][-1] == data.korean[-1]
    assert len(data.stage_texts[2]) == len(data.korean)


PAGE = (Path(__file__).resolve().parents[2] / "docs" / "embedding.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("text", re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
def test_every_yaml_block_of_the_page_is_a_valid_configuration(text):
    overrides = [
        f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in yaml.safe_load(text).items()
    ]
    embedding_config(".", *overrides)


def test_every_setting_that_the_page_names_exists():
    groups = ("data", "base", "expansion", "stage1", "stage2", "stage3", "supervised", "retention")
    fields = {
        "data": EmbeddingDataSettings, "base": PretrainedBase, "expansion": ExpansionSettings, "stage1": Stage1Settings,
        "stage2": Stage2Settings, "stage3": Stage3Settings, "supervised": SupervisedSettings,
        "retention": RetentionSettings,
    }  # fmt: skip
    named = set(re.findall(rf"`({'|'.join(groups)})\.(\w+)", PAGE))
    scratch = {*ScratchBase.model_fields, *PretrainedBase.model_fields}
    assert len(named) > 12
    assert {
        f"{group}.{name}"
        for group, name in named
        if name not in (scratch if group == "base" else fields[group].model_fields)
    } == set()
    alone = (
        "dropout",
        "temperature",
        "anchor_weight",
        "matryoshka",
        "mini_batch_size",
        "hidden_weight",
        "pooled_weight",
    )
    assert all(name in Stage2Settings.model_fields and f"`{name}`" in PAGE for name in alone)
