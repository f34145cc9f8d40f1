"""What mode ``terms`` accepts and refuses, and its presets."""

import json

import pytest
import torch

from fixtures.pico_terms import SCRATCH, config_of, run_pico
from soju.core.config import apply_overrides, parse_yaml, preset_names, preset_text
from soju.core.errors import ConfigError, UserError
from soju.sparse.config import PretrainedStudent, ScratchStudent, StaticConfig, TermsConfig
from soju.sparse.recipe import RECIPE, read_run_data
from soju.sparse.triplets.config import TripletsConfig

PRETRAINED = {
    "recipe": "splade",
    "mode": "terms",
    "name": "small",
    "data": {"terms": ["unused.jsonl"]},
    "student": {"init": "pretrained", "model": "nobody/nothing"},
    "losses": {"distillation": 0},
}


def preset(name, *overrides):
    return RECIPE.configure(apply_overrides(parse_yaml(preset_text(name), place=name), overrides), place=name)


@pytest.mark.parametrize("name", [name for name in preset_names() if name.startswith("splade")])
def test_every_preset_is_checked_against_the_settings_of_its_mode(name):
    kinds = {"static": StaticConfig, "v22": TripletsConfig, "v23": TripletsConfig}
    assert type(preset(name)) is next((kind for part, kind in kinds.items() if part in name), TermsConfig)


@pytest.mark.parametrize("mode", ["triplet", None, 3])
def test_an_unknown_mode_is_refused_with_the_ones_there_are(mode):
    with pytest.raises(ConfigError, match=r"x\.yaml: mode: .* is unknown; choose one of static, terms"):
        RECIPE.configure({**PRETRAINED, "mode": mode}, place="x.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("losses.distillation=1.5", "losses.distillation needs a teacher"),
        ("losses.translation=1", "losses.translation needs both texts of a row; set data.both_directions to true"),
        ("teacher={}", "teacher: give either model or vectors"),
        ("teacher={model: a/b, vectors: v.safetensors}", "teacher: give either model or vectors"),
        ("data.terms=[]", "terms are needed"),
        ("data.pairs_as_rows=true", "pairs_as_rows needs pairs or passages"),
        ("data.dev_terms=0", "data.dev_terms: got 0"),
        ("losses.flops_from=1", "losses.flops_from: got 1"),
        ("losses.flopps=1", 'losses.flopps: unknown setting; did you mean "flops"'),
        ("training.mixed_precision=fp8", "training.mixed_precision: got 'fp8'"),
        ("similarity=euclid", "similarity: got 'euclid'"),
        ("student.init=dense", "student"),
    ],
)
def test_wrong_settings_name_their_place(override, message):
    with pytest.raises(ConfigError) as refused:
        config_of(PRETRAINED, override)
    assert message in str(refused.value)


def test_a_student_from_scratch_needs_text_for_its_tokenizer():
    with pytest.raises(ConfigError, match=r"a student from scratch needs data\.pairs or data\.passages"):
        config_of(SCRATCH, "data.pairs=[]", "data.pairs_as_rows=false")


@pytest.mark.parametrize("heads", [3, 32])
def test_heads_that_do_not_divide_the_width_into_even_parts_are_refused(heads):
    with pytest.raises(ConfigError, match=rf"hidden_size 32 / heads {heads} must be an even number"):
        config_of(SCRATCH, f"student.heads={heads}")


def test_the_start_of_the_student_decides_which_settings_it_has():
    assert isinstance(config_of(PRETRAINED).student, PretrainedStudent)
    assert isinstance(config_of(SCRATCH, "student.init=random").student, ScratchStudent)
    with pytest.raises(ConfigError, match="layers"):
        config_of(PRETRAINED, "student.layers=2")


def test_the_published_preset_holds_the_published_numbers():
    config = preset("splade-v19")
    losses, training = config.losses, config.training
    assert (losses.self_terms, losses.korean_terms, losses.english_terms) == (3.0, 2.0, 12.0)
    assert (losses.margin, losses.distillation, losses.flops) == (2.0, 1.5, 5e-5)
    assert (losses.target_margin, losses.english_margin_factor, losses.temperature) == (2.0, 1.5, 0.05)
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps, training.num_train_epochs) == (
        64,
        2,
        15,
    )
    assert (training.learning_rate, training.weight_decay, training.warmup_steps) == (3e-6, 0.01, 0.1)
    assert (training.mixed_precision, config.student.max_length, losses.terms) == ("fp16", 64, "v19")


def test_the_published_preset_reads_a_term_file_and_asks_no_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [
        {"ko": f"{a}{b}", "terms": [{"term": f"word {a}{b}", "sim": 0.9}]}
        for a in "가나다라마바사아자차카타파하"
        for b in "각간갇갈감갑값갓강개객갠갤갬갭갯갱"
    ]
    (tmp_path / "terms.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    training = read_run_data(preset("splade-v19")).training
    parts = [{row.ko for row in part} for part in (training.terms, training.dev_terms, training.unseen_terms)]
    assert sum(map(len, parts)) == len(rows) == len(set.union(*parts))
    assert all(parts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_half_precision_without_a_gpu_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(UserError, match="fp16 needs a GPU, and none is here; set it to bf16 or off"):
        run_pico(tmp_path / "run", "training.mixed_precision=fp16")
    assert not (tmp_path / "run" / "static").exists()


def test_a_static_run_has_nothing_to_resume():
    with pytest.raises(UserError, match="has no checkpoints; train without --resume"):
        RECIPE.train(preset("splade-static-samples"), None, data=None, resume=True)
